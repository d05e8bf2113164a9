"""What the machine could do at best: measured in the run that is compared with it."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

READ_BYTES = 1 << 29
MATRIX = 2048
REPEATS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What plain torch calls reach while nothing else runs.

    Attributes:
        read_bytes_s: Bytes per second read from memory.
        flop_s: fp32 operations per second in a large matrix product; a multiply-add is two.
    """

    read_bytes_s: float
    flop_s: float

    def __str__(self) -> str:
        return f"memory read {self.read_bytes_s / 1e9:.1f} GB/s, fp32 products {self.flop_s / 1e9:.0f} GFLOP/s"

    def floor_s(self, read_bytes: float, flop: float) -> float:
        """Return the seconds of the slower of reading and computing."""
        return max(read_bytes / self.read_bytes_s, flop / self.flop_s)


def measure() -> Rates:
    """Return the best rates of a few tries: reads by a matrix-vector product and by a sum, whichever is faster."""
    data = torch.ones(READ_BYTES // 4 // MATRIX, MATRIX)
    vector, square = torch.ones(MATRIX), torch.randn(MATRIX, MATRIX)
    read_s = min(_least_s(lambda: torch.mv(data, vector)), _least_s(lambda: data.sum()))
    return Rates(read_bytes_s=READ_BYTES / read_s, flop_s=2 * MATRIX**3 / _least_s(lambda: square @ square))


def _least_s(call: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        begun_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun_s)
    return min(times)
