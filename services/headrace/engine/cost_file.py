"""The measured cost of steps, kept from one start of an instance to the next."""

import hashlib
import json
import logging
import math
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from headrace.core.cost import CostModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """All that the cost of a step depends on, as far as it can be told without measuring.

    Attributes:
        fingerprint: Weights, form of KV and version of the kernels.
        device: Torch device.
        threads: Most threads.
        pack: How prompt chunks lie in memory.
        processor: Model of the processor and number of cores.
        kernels: Digest of the C++ kernels; empty without them.
    """

    fingerprint: str
    device: str
    threads: int
    pack: str
    processor: str
    kernels: str


class CostFile:
    """The cost model of one instance in a small JSON file.

    Only sound fits are kept. A machine may be busier or idler than when they were measured, so a reader compares
    them with a few steps before it believes them; see `calibrate.agrees`.
    """

    def __init__(self, folder: Path, instance: Instance) -> None:
        self._instance = asdict(instance)
        digest = hashlib.sha256(json.dumps(self._instance).encode()).hexdigest()
        self.path = folder / f"cost-{digest[:24]}.json"

    def read(self) -> CostModel | None:
        """Return what was kept; None if there is nothing, or nothing that can be believed."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("kept cost unreadable", extra={"path": str(self.path), "error": str(error)})
            return None
        if not isinstance(found, dict) or found.get("instance") != self._instance:
            return None
        return _cost(found.get("cost"))

    def write(self, cost: CostModel) -> None:
        """Keep a sound model and no other; a folder that cannot be written costs the next start its time alone."""
        if not cost.is_sound:
            return
        content = json.dumps({"instance": self._instance, "cost": asdict(cost)}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
                made = Path(folder) / "cost.json"
                made.write_text(content, encoding="utf-8")
                made.replace(self.path)
        except OSError as error:
            logger.warning("cost not kept", extra={"path": str(self.path), "error": str(error)})


def processor() -> str:
    """Return the model of the processor and the number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{model}, {os.cpu_count()} cores"


def _cost(found: object) -> CostModel | None:
    names = [field.name for field in fields(CostModel)]
    if not isinstance(found, dict) or sorted(found) != sorted(names):
        return None
    if not all(isinstance(value, int | float) and math.isfinite(value) and value >= 0 for value in found.values()):
        return None
    cost = CostModel(**{name: float(found[name]) for name in names})
    return cost if cost.is_sound else None
