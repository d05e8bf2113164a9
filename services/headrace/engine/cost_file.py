"""The measured cost of steps, kept from one start of an instance to the next."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from headrace.core.cost import CostModel
from headrace.engine.kept_file import KeptFile

MOST_S = 1e9
"""No cost is greater; JSON can hold numbers that no float can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """All that the cost of a step depends on, as far as it can be told without measuring.

    Attributes:
        fingerprint: Weights, form of KV and version of the kernels.
        device: Torch device.
        threads: Most threads.
        pack: How prompt chunks lie in memory.
        processor: Model of the processor and number of cores.
        kernels: Digest of the C++ kernels, and from how many rows on torch computes; empty without them.
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
        self._file = KeptFile(folder, "cost", asdict(instance))
        self.path = self._file.path

    def read(self) -> CostModel | None:
        """Return what was kept; None if there is nothing, or nothing that can be believed."""
        return _cost(self._file.read())

    def write(self, cost: CostModel) -> None:
        """Keep a sound model and no other; see `KeptFile.write`."""
        if cost.is_sound:
            self._file.write(asdict(cost))


def _cost(found: object) -> CostModel | None:
    names = [field.name for field in fields(CostModel)]
    if not isinstance(found, dict) or sorted(found) != sorted(names):
        return None
    if not all(isinstance(value, int | float) and 0 <= value < MOST_S for value in found.values()):
        return None
    seconds = {name: float(found[name]) for name in names if name != "wide_from"}
    cost = CostModel(**seconds, wide_from=int(found["wide_from"]))
    return cost if cost.is_sound else None
