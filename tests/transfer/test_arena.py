"""Memory cut into blocks."""

import numpy as np
import pytest

from headrace.transfer.arena import arena_of, map_blocks


def test_mapped_blocks_are_writable_zeros_on_a_page():
    blocks = map_blocks(3, 4096)
    arena = arena_of(blocks)
    assert (arena.num_blocks, arena.block_bytes, arena.num_bytes) == (3, 4096, 12288)
    assert arena.base_address == blocks.ctypes.data
    assert arena.base_address % 4096 == 0
    assert not blocks.any()
    blocks[1] = 7
    assert (blocks[1] == 7).all()


def test_memory_with_gaps_is_no_arena():
    with pytest.raises(ValueError, match="contiguous"):
        arena_of(np.zeros((4, 8), dtype=np.uint8)[:, ::2])
    with pytest.raises(ValueError, match="contiguous"):
        arena_of(np.zeros(8, dtype=np.uint8))
