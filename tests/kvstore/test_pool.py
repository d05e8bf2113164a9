"""The workers' blocks and the canary's share an arena and nothing else."""

import pytest

from headrace.core.block import BlockHash
from headrace.errors import BlockLost
from headrace.kvstore.pool import NUM_CANARY_BLOCKS, BlockPool
from headrace.kvstore.store import BlockStore, Claim, StoreTotals, Terms
from headrace.kvstore.stored_block import StoredBlock

NUM_BLOCKS = 2
EPOCH = "now"


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "little"))


CANARY = name(99)


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(BlockStore(NUM_BLOCKS, EPOCH, 5.0), BlockStore(NUM_CANARY_BLOCKS, EPOCH, 5.0), CANARY)


def terms(pool: BlockPool, *hashes: BlockHash, new_id: str = "id") -> Terms:
    return Terms(lease_id=pool.lease_name(hashes, new_id), holder="w", deadline_s=10.0)


def offered(*hashes: BlockHash) -> tuple[StoredBlock, ...]:
    return tuple(StoredBlock(block_hash=name, tenant="") for name in hashes)


def claim(lease_id: str) -> Claim:
    return Claim(lease_id=lease_id, epoch=EPOCH)


def put(pool: BlockPool, *hashes: BlockHash, new_id: str = "id"):
    granted = terms(pool, *hashes, new_id=new_id)
    blocks = pool.reserve(offered(*hashes), granted).blocks
    assert len(pool.commit(claim(granted.lease_id), 0.0, is_complete=True)) == len(blocks)
    return blocks


def test_the_canarys_block_follows_the_workers_blocks(pool):
    assert sorted(put(pool, name(1), name(2))) == [0, 1]
    assert put(pool, CANARY) == (NUM_BLOCKS,)


def test_a_canary_through_a_full_pool_leaves_every_block_and_counter_as_it_was(pool):
    put(pool, name(1), name(2))
    before = (pool.counts(), repr(pool.totals))
    assert put(pool, CANARY, new_id="put") == (NUM_BLOCKS,)
    reading = terms(pool, CANARY, new_id="get")
    assert pool.acquire((CANARY,), reading) == (NUM_BLOCKS,)
    pool.release(claim(reading.lease_id), 0.0)
    assert (pool.counts(), repr(pool.totals)) == before
    assert pool.workers.match((name(1), name(2))) == 2
    assert pool.canary_totals == StoreTotals(
        num_puts=1, num_committed_blocks=1, num_gets=1, num_asked_blocks=1, num_hit_blocks=1
    )
    assert (pool.canary_counts().free, pool.canary_counts().num_leases) == (1, 0)
    assert pool.acquire((CANARY,), terms(pool, CANARY)) == ()


def test_what_a_canary_left_behind_does_not_stop_the_next(pool):
    assert put(pool, CANARY, new_id="one") == put(pool, CANARY, new_id="two") == (NUM_BLOCKS,)


def test_a_canary_that_fell_silent_keeps_its_block_until_it_can_write_no_more(pool):
    pool.reserve(offered(CANARY), terms(pool, CANARY))
    pool.expire(10.0)
    assert pool.reserve(offered(CANARY), terms(pool, CANARY, new_id="next")).blocks == ()
    pool.expire(15.0)
    assert pool.reserve(offered(CANARY), terms(pool, CANARY, new_id="next")).blocks == (NUM_BLOCKS,)


def test_the_canarys_name_among_others_is_a_name_like_any(pool):
    assert sorted(put(pool, name(1), CANARY)) == [0, 1]


def test_a_lease_of_one_side_is_unknown_on_the_other(pool):
    reading = terms(pool, name(1))
    assert put(pool, name(1)) == (0,)
    assert pool.acquire((name(1),), reading) == (0,)
    with pytest.raises(BlockLost):
        pool.release(claim("canary " + reading.lease_id), 0.0)
    pool.release(claim(reading.lease_id), 0.0)
