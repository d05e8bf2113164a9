"""The kvstore's actor, on a virtual clock and without NIXL."""

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest

from headrace.clock import VirtualClock
from headrace.core.block import KvLayout
from headrace.errors import BlockLost, DeadlineExceeded, Draining, InvalidRequest, NotReady, PeerMismatch
from headrace.kvstore.actor import NUM_KEPT_BLOCKS, KvStoreActor
from headrace.kvstore.config import KvStoreConfig
from headrace.kvstore.index import Report
from headrace.kvstore.messages import (
    AcquireGet,
    Announce,
    CommitPut,
    Forget,
    Match,
    Meet,
    ReleaseGet,
    ReservePut,
    Tick,
)
from headrace.testing.connector import Fabric, FakeConnector
from headrace.transfer.arena import map_blocks

LAYOUT = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=1, head_dim=8, dtype="fp32")
NUM_BLOCKS = 6
EPOCH = "now"


class Store:
    """An actor and its verbs as coroutines."""

    def __init__(self) -> None:
        self.clock = VirtualClock(1000.0)
        config = KvStoreConfig(memory_bytes=(NUM_BLOCKS + NUM_KEPT_BLOCKS) * LAYOUT.block_bytes + 7, max_hashes=16)
        ids = itertools.count()
        self.actor = KvStoreActor(config, EPOCH, self.clock, self._connect, lambda: f"lease-{next(ids)}")

    def _connect(self, num_blocks: int, block_bytes: int) -> FakeConnector:
        return FakeConnector(Fabric(), "store", map_blocks(num_blocks, block_bytes), EPOCH, self.clock)

    def _ask(self, make):
        return asyncio.wait_for(self.actor.mailbox.ask(make), 5.0)

    def deadline_ms(self, seconds: float) -> int:
        return self.clock.unix_ms() + int(seconds * 1000)

    async def meet(self, worker="w", epoch="a", layout=LAYOUT):
        await self._ask(lambda reply: Meet(worker=worker, epoch=epoch, layout=layout, reply=reply))

    async def reserve(self, hashes, seconds=10.0, writer="w", layout=LAYOUT):
        end_ms = self.deadline_ms(seconds)
        return await self._ask(
            lambda reply: ReservePut(hashes=hashes, layout=layout, writer=writer, deadline_unix_ms=end_ms, reply=reply)
        )

    async def commit(self, lease_id, epoch=EPOCH, is_complete=True):
        return await self._ask(
            lambda reply: CommitPut(lease_id=lease_id, epoch=epoch, is_complete=is_complete, reply=reply)
        )

    async def acquire(self, hashes, seconds=10.0):
        end_ms = self.deadline_ms(seconds)
        return await self._ask(
            lambda reply: AcquireGet(hashes=hashes, reader="r", deadline_unix_ms=end_ms, reply=reply)
        )

    async def release(self, lease_id):
        await self._ask(lambda reply: ReleaseGet(lease_id=lease_id, epoch=EPOCH, reply=reply))

    async def match(self, hashes):
        return await self._ask(lambda reply: Match(hashes=hashes, reply=reply))

    async def announce(self, **report):
        return await self._ask(lambda reply: Announce(report=Report(**report), reply=reply))

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


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    made = Store()
    async with asyncio.TaskGroup() as tasks:
        made.actor.mailbox.start(tasks)
        yield made
        await made.actor.close()


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
    await store.announce(worker="w", epoch="a", sequence=0, stored=tuple(names(1)))
    assert await store.match(names(1, 2, 3)) == {"kvstore": 2, "w": 1}
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
        await store.announce(worker="w", epoch="a", sequence=0, stored=(b"short",))
    with pytest.raises(BlockLost):
        await store.commit("made up")
    with pytest.raises(BlockLost):
        await store.commit("made up", epoch="before")


async def test_a_worker_that_comes_back_under_its_name_loses_what_it_had(store):
    await store.meet(epoch="a")
    await store.reserve(names(1))
    await store.announce(worker="w", epoch="a", sequence=0, stored=tuple(names(7)))
    await store.meet(epoch="a")
    assert store.ledger() == (NUM_BLOCKS - 1, 0, 1)
    await store.meet(epoch="b")
    assert store.ledger() == (NUM_BLOCKS, 0, 0)
    assert await store.match(names(7)) == {}


async def test_a_forgotten_worker_is_out_of_the_index(store):
    await store.announce(worker="w", epoch="a", sequence=0, stored=tuple(names(7)))
    assert store.actor.view().num_indexed == 1
    await store.forget("w")
    assert await store.match(names(7)) == {}


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
