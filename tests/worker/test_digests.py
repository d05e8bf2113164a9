"""Digests of a worker's own blocks."""

import numpy as np
import pytest

from headrace.core.block import BlockHash, KvLayout
from headrace.core.digest import block_digest
from headrace.worker.digests import BlockDigests

LAYOUT = KvLayout(num_layers=2, block_tokens=4, num_kv_heads=2, head_dim=8, dtype="fp32")
NAMES = tuple(BlockHash(bytes([number * 60]) * 16) for number in range(4))


@pytest.fixture
def blocks():
    made = np.random.default_rng(1).bytes(4 * LAYOUT.block_bytes)
    return np.frombuffer(made, dtype=np.uint8).reshape(4, -1).copy()


@pytest.fixture
def digests(blocks):
    return BlockDigests(LAYOUT, 1.0, blocks.__getitem__)


async def test_the_digest_of_a_block_is_kept_so_that_a_later_flip_shows(digests, blocks):
    [first] = await digests.take(NAMES[:1], [2])
    assert first == block_digest(blocks[2], LAYOUT)
    blocks[2, 5] ^= 1
    assert await digests.take(NAMES[:1], [2]) == [first]
    assert await digests.num_good([1, 2], [0, first]) == 1
    assert digests.num_corrupt == 1


async def test_a_block_that_came_anew_gets_a_new_digest(digests, blocks):
    [first] = await digests.take(NAMES[:1], [2])
    blocks[2, 5] ^= 1
    digests.forget(NAMES[:1])
    assert await digests.take(NAMES[:1], [2]) == [block_digest(blocks[2], LAYOUT)] != [first]


async def test_only_the_share_is_taken_and_blocks_without_a_digest_are_good(blocks):
    digests = BlockDigests(LAYOUT, 0.3, blocks.__getitem__)
    taken = await digests.take(NAMES, [0, 1, 2, 3])
    assert [bool(digest) for digest in taken] == [True, True, False, False]
    assert await digests.num_good([0, 1, 2, 3], taken) == 4
    assert await digests.num_good([0, 1, 2, 3], []) == 4
