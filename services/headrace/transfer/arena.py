"""Memory that is registered once and cut into blocks."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.runtime.host_memory import map_host_memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Arena:
    """One contiguous piece of host memory.

    Attributes:
        base_address: Address of block 0.
        block_bytes: Distance between blocks.
        num_blocks: Number of blocks.
        owner: Whatever keeps the memory alive, for example a tensor or an array.
    """

    base_address: int
    block_bytes: int
    num_blocks: int
    owner: object

    @property
    def num_bytes(self) -> int:
        """Size of the whole arena."""
        return self.block_bytes * self.num_blocks


def arena_of(blocks: NDArray[np.uint8]) -> Arena:
    """Describe an array `[block, byte]` that lies contiguously in memory.

    Raises:
        ValueError: it has another shape or gaps.
    """
    if blocks.ndim != 2 or not blocks.flags.c_contiguous:
        raise ValueError(f"an arena is one contiguous array [block, byte], found shape {blocks.shape}")
    num_blocks, block_bytes = blocks.shape
    return Arena(base_address=blocks.ctypes.data, block_bytes=block_bytes, num_blocks=num_blocks, owner=blocks)


def map_blocks(num_blocks: int, block_bytes: int) -> NDArray[np.uint8]:
    """Map anonymous memory for blocks `[block, byte]`; the system gives pages at first touch.

    Raises:
        OSError: the system refuses that much memory.
    """
    # A mapping of its own rather than np.zeros: page aligned, so that a transport pins no page of somebody else.
    memory = map_host_memory(num_blocks * block_bytes)
    return np.frombuffer(memory, dtype=np.uint8).reshape(num_blocks, block_bytes)
