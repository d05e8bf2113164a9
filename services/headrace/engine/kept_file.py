"""What was measured on a machine, kept from one start of an instance to the next."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

logger = logging.getLogger(__name__)


class KeptFile:
    """One kind of measurement of one instance in a small JSON file; whole or absent, whenever the machine stops."""

    def __init__(self, folder: Path, kind: str, instance: Mapping[str, str | int]) -> None:
        """Name the file; nothing is read or written yet.

        Args:
            folder: Where measurements are kept.
            kind: What was measured; begins the name of the file.
            instance: All that the measurement depends on, as far as it can be told without measuring.
        """
        self._kind = kind
        self._instance = dict(instance)
        digest = hashlib.sha256(json.dumps(self._instance).encode()).hexdigest()
        self.path = folder / f"{kind}-{digest[:24]}.json"

    def read(self) -> object:
        """Return what was kept, as JSON has it; None if there is nothing of this instance."""
        if not self.path.is_file():
            return None
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("kept measurement unreadable", extra={"path": str(self.path), "error": str(error)})
            return None
        if not isinstance(found, dict) or found.get("instance") != self._instance:
            return None
        return found.get(self._kind)

    def write(self, measured: Mapping[str, object]) -> None:
        """Keep a measurement; a folder that cannot be written costs the next start its time alone."""
        content = json.dumps({"instance": self._instance, self._kind: measured}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
                made = Path(folder) / "measured.json"
                made.write_text(content, encoding="utf-8")
                made.replace(self.path)
        except OSError as error:
            logger.warning("measurement not kept", extra={"path": str(self.path), "error": str(error)})


def processor() -> str:
    """Return the model of the processor and the number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{model}, {os.cpu_count()} cores"
