"""The kvstore's actor, on a virtual clock and without NIXL."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from headrace.clock import VirtualClock
from headrace.core.block import KvLayout
from headrace.core.put_facts import PutFacts
from headrace.errors import BlockLost, DeadlineExceeded, Draining, InvalidRequest, NotReady, PeerMismatch
from headrace.kvstore.actor import Edges, KvStoreActor
from headrace.kvstore.config import KvStoreConfig
from headrace.kvstore.disk import DiskTier
from headrace.kvstore.messages import (
    AcquireGet,
    CommitPut,
    Forget,
    Match,
    Meet,
    ReleaseGet,
    ReservePut,
    Tick,
)
from headrace.kvstore.opening import NUM_KEPT_BLOCKS
from headrace.kvstore.store import Claim
from headrace.testing.connector import Fabric, FakeConnector

LAYOUT = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=1, head_dim=8, dtype="fp32")
NUM_BLOCKS = 6
EPOCH = "now"


class Store:
    """An actor and its verbs as coroutines."""

    def __init__(self, **settings: object) -> None:
        self.clock = VirtualClock(1000.0)
        memory_bytes = (NUM_BLOCKS + NUM_KEPT_BLOCKS) * LAYOUT.block_bytes + 7
        config = KvStoreConfig(memory_bytes=memory_bytes, max_hashes=16, **settings)
        ids = itertools.count()
        edges = Edges(
            clock=self.clock,
            connect=lambda blocks: FakeConnector(Fabric(), "store", blocks, EPOCH, self.clock),
            new_id=lambda: f"lease-{next(ids)}",
            open_disk=lambda space: DiskTier(space, self.clock),
        )
        self.actor = KvStoreActor(config, EPOCH, edges)

    def _ask(self, make):
        return asyncio.wait_for(self.actor.mailbox.ask(make), 5.0)

    def deadline_ms(self, seconds: float) -> int:
        return self.clock.unix_ms() + int(seconds * 1000)

    async def meet(self, worker="w", epoch="a", layout=LAYOUT):
        await self._ask(lambda reply: Meet(worker=worker, epoch=epoch, layout=layout, reply=reply))

    async def reserve(self, hashes, seconds=10.0, writer="w", layout=LAYOUT, **facts):
        end_ms = self.deadline_ms(seconds)
        put = {"hashes": hashes, "layout": layout, "writer": writer, "facts": PutFacts(**facts)}
        return await self._ask(lambda reply: ReservePut(**put, deadline_unix_ms=end_ms, reply=reply))

    async def commit(self, lease_id, epoch=EPOCH, is_complete=True, tenant="", digests=()):
        claim = Claim(lease_id=lease_id, epoch=epoch, tenant=tenant)
        return await self._ask(
            lambda reply: CommitPut(claim=claim, is_complete=is_complete, digests=digests, reply=reply)
        )

    async def acquire(self, hashes, seconds=10.0, tenant=""):
        end_ms = self.deadline_ms(seconds)
        get = {"hashes": hashes, "reader": "r", "tenant": tenant}
        return await self._ask(lambda reply: AcquireGet(**get, deadline_unix_ms=end_ms, reply=reply))

    async def release(self, lease_id, tenant=""):
        claim = Claim(lease_id=lease_id, epoch=EPOCH, tenant=tenant)
        await self._ask(lambda reply: ReleaseGet(claim=claim, reply=reply))

    async def match(self, hashes):
        found = await self._ask(lambda reply: Match(hashes=hashes, reply=reply))
        return {match.location: match.num_blocks for match in found}

    async def forget(self, worker):
        await self._ask(lambda reply: Forget(worker=worker, reply=reply))

    async def wait(self, seconds):
        self.clock.advance(seconds)
        self.actor.mailbox.tell(Tick())
        await self.match([])

    def ledger(self) -> tuple[int, int, int]:
        counts = self.actor.view().counts
        return counts.free, counts.cached, counts.leased


def names(*numbers: int) -> list[bytes]:
    return [number.to_bytes(16, "little") for number in numbers]


@asynccontextmanager
async def running(made: Store) -> AsyncIterator[Store]:
    async with asyncio.TaskGroup() as tasks:
        made.actor.start(tasks)
        yield made
        await made.actor.close()


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    async with running(Store()) as made:
        yield made


async def test_the_first_layout_opens_the_pool_and_another_size_is_refused(store):
    assert store.actor.view().counts is None
    await store.meet("router", layout=None)
    with pytest.raises(NotReady):
        await store.reserve(names(1))
    assert (await store.acquire(names(1))).blocks == ()
    await store.meet()
    assert store.ledger() == (NUM_BLOCKS, 0, 0)
    assert store.actor.connector.pool.num_blocks == NUM_BLOCKS + NUM_KEPT_BLOCKS
    other = KvLayout(num_layers=2, block_tokens=16, num_kv_heads=1, head_dim=8, dtype="fp32")
    with pytest.raises(PeerMismatch):
        await store.meet("x", layout=other)
    with pytest.raises(PeerMismatch):
        await store.reserve(names(1), layout=other)


async def test_a_put_becomes_a_get_and_shows_in_matches(store):
    await store.meet()
    put = await store.reserve(names(1, 2))
    assert (put.indices, len(put.blocks)) == ((0, 1), 2)
    assert await store.match(names(1, 2)) == {}
    assert await store.commit(put.lease_id) == 2
    assert await store.match(names(1, 2, 3)) == {"kvstore": 2}
    got = await store.acquire(names(1, 2, 3))
    assert got.blocks == put.blocks
    await store.release(got.lease_id)
    with pytest.raises(BlockLost):
        await store.release(got.lease_id)
    assert store.ledger() == (NUM_BLOCKS - 2, 2, 0)


async def test_leases_end_by_the_clock_and_never_last_longer_than_allowed(store):
    await store.meet()
    put = await store.reserve(names(1), seconds=1e6)
    assert put.deadline_unix_ms == store.deadline_ms(60.0)
    await store.wait(60.0)
    assert store.ledger() == (NUM_BLOCKS - 1, 0, 1)
    await store.wait(5.0)
    assert store.ledger() == (NUM_BLOCKS, 0, 0)
    with pytest.raises(BlockLost):
        await store.commit(put.lease_id)
    with pytest.raises(DeadlineExceeded):
        await store.reserve(names(1), seconds=-1.0)


async def test_calls_are_checked(store):
    await store.meet()
    for verb in (store.match, store.reserve, store.acquire):
        with pytest.raises(InvalidRequest):
            await verb([b"short"])
        with pytest.raises(InvalidRequest):
            await verb(names(*range(17)))
    with pytest.raises(InvalidRequest):
        await store.reserve(names(1), tenant="t" * 385)
    with pytest.raises(BlockLost):
        await store.commit("made up")
    with pytest.raises(BlockLost):
        await store.commit("made up", epoch="before")


async def test_a_worker_that_comes_back_under_its_name_loses_what_it_had(store):
    await store.meet(epoch="a")
    await store.reserve(names(1))
    await store.meet(epoch="a")
    assert store.ledger() == (NUM_BLOCKS - 1, 0, 1)
    await store.meet(epoch="b")
    assert store.ledger() == (NUM_BLOCKS, 0, 0)


async def test_the_puts_of_a_forgotten_worker_end(store):
    await store.meet()
    await store.reserve(names(1))
    await store.forget("w")
    assert store.ledger() == (NUM_BLOCKS, 0, 0)


async def test_a_store_that_leaves_grants_nothing_and_waits_for_the_leases_it_gave(store):
    await store.meet()
    put = await store.reserve(names(1))
    draining = asyncio.create_task(store.actor.drain(1.0))
    assert await store.match([]) == {}
    for verb in (store.reserve, store.acquire):
        with pytest.raises(Draining):
            await verb(names(2))
    assert not draining.done()
    assert await store.commit(put.lease_id) == 1
    assert await draining == 0


async def test_a_store_that_leaves_waits_no_longer_than_its_grace(store):
    await store.meet()
    await store.reserve(names(1))
    draining = asyncio.create_task(store.actor.drain(1.0))
    await store.match([])
    assert not draining.done()
    store.clock.advance(1.0)
    assert await draining == 2  # the lease and its writer


async def test_a_caller_that_left_gets_no_lease(store):
    await store.meet()
    asking = asyncio.create_task(store.reserve(names(1)))
    # One step of the loop puts the question into the mailbox; it is not handled before the next.
    await asyncio.sleep(0)
    asking.cancel()
    assert await store.match(names(1)) == {}
    assert store.actor.view().mailbox.num_failed == 0
    assert store.ledger() == (NUM_BLOCKS, 0, 0)


async def test_a_disk_smaller_than_one_block_leaves_a_store_of_memory_alone(tmp_path):
    async with running(Store(disk_dir=tmp_path, disk_bytes=LAYOUT.block_bytes - 1)) as store:
        await store.meet()
        assert store.actor.view().disk is None
        granted = await store.reserve(names(1, 2))
        assert await store.commit(granted.lease_id) == 2
        got = await store.acquire(names(1, 2))
        assert len(got.blocks) == 2
        await store.release(got.lease_id)
        assert store.ledger() == (NUM_BLOCKS - 2, 2, 0)
