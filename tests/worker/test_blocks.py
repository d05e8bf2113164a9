"""Blocks from and to the kvstore: its failures cost a cache hit, never the worker."""

import asyncio

import pytest

from headrace.clock import VirtualClock
from headrace.core.block import BlockHash, block_hashes, root_hash
from headrace.core.request import SamplingParams, SequenceId, SequenceSpec
from headrace.engine.messages import Admitted, CacheChange, EngineStats, HoldWriter, Pin, ReleaseWriter, Unpin
from headrace.errors import BlockLost, PeerFailed, Saturated
from headrace.transfer.quarantine import Quarantine
from headrace.worker.blocks import MAX_QUEUED_STORES, BlockExchange, ExchangeParts
from headrace.worker.engine import AsyncEngine, EventStream, OpenSequence

HASHES = tuple(BlockHash(bytes([index])) for index in range(4))


class Port:
    """Keeps what it is told; answers pins with blocks 10, 11, …"""

    def __init__(self):
        self.commands = []
        self.refused = ()

    def send(self, command):
        if isinstance(command, self.refused):
            raise Saturated("full")
        self.commands.append(command)
        if isinstance(command, Pin):
            command.reply(tuple(range(10, 10 + len(command.block_hashes))))

    def stats(self):
        return EngineStats()

    def kinds(self):
        return [type(command) for command in self.commands]


class Store:
    """A kvstore client that does what the test says."""

    def __init__(self):
        self.answer = 0
        self.reached = asyncio.Event()
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.stored = []
        self.told = []
        self.owes_snapshot = False

    async def fetch(self, hashes, local_ids, deadline_s):
        self.reached.set()
        self.fetched = (hashes, local_ids)
        await self.may_end.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def store(self, hashes, local_ids, deadline_s):
        self.stored.append((hashes, local_ids))
        self.reached.set()
        if isinstance(self.answer, Exception):
            raise self.answer
        return len(hashes)

    async def announce(self, stored, removed):
        self.told.append((set(stored), set(removed)))
        self.reached.set()


class Desk:
    def __init__(self, tasks, has_store=True):
        self.port, self.store, self.connector = Port(), Store(), Quarantine()
        self.engine = AsyncEngine(self.port, asyncio.get_running_loop())
        parts = ExchangeParts(
            engine=self.engine, connector=self.connector, tasks=tasks, clock=VirtualClock(), block_tokens=4
        )
        self.blocks = BlockExchange(parts, self.store if has_store else None, "model", 1.0)

    def sequence(self, num_tokens=17, cached=0):
        """A sequence admitted to blocks 0 to 4 with five hashes for 17 tokens."""
        spec = SequenceSpec(
            sequence_id=SequenceId("s"),
            model="m",
            prompt=tuple(range(num_tokens)),
            sampling=SamplingParams(),
            deadline_unix_ms=1 << 60,
        )
        sequence = OpenSequence(spec, self.engine, EventStream())
        table = tuple(range(-(-num_tokens // 4)))
        sequence.admitted = Admitted(
            sequence_id=spec.sequence_id,
            block_ids=table,
            num_cached_tokens=cached,
            block_hashes=HASHES[: num_tokens // 4],
        )
        return sequence


@pytest.fixture
async def desk():
    async with asyncio.TaskGroup() as tasks:
        yield Desk(tasks)


async def test_what_the_store_has_after_the_local_hit_is_fetched_into_the_following_blocks(desk):
    desk.store.answer = 2
    assert await desk.blocks.fetch(desk.sequence(cached=4)) == 12
    assert desk.store.fetched == (HASHES[1:4], (1, 2, 3))


async def test_the_last_token_is_never_fetched(desk):
    desk.store.answer = 3
    assert await desk.blocks.fetch(desk.sequence(num_tokens=16)) == 12
    assert desk.store.fetched == (HASHES[:3], (0, 1, 2))


async def test_a_miss_leaves_the_local_hit(desk):
    assert await desk.blocks.fetch(desk.sequence(cached=8)) == 8


async def test_without_a_store_the_local_hit_is_all():
    async with asyncio.TaskGroup() as tasks:
        desk = Desk(tasks, has_store=False)
        assert await desk.blocks.fetch(desk.sequence(cached=8)) == 8
        desk.blocks.store_later(HASHES)
    assert desk.port.commands == []


async def test_blocks_are_held_while_they_are_fetched(desk):
    await desk.blocks.fetch(desk.sequence())
    assert desk.port.kinds() == [HoldWriter, ReleaseWriter]
    assert desk.port.commands[0].block_ids == (0, 1, 2, 3)


async def test_blocks_stay_held_when_the_request_leaves_during_a_fetch(desk):
    desk.store.may_end.clear()
    fetching = asyncio.ensure_future(desk.blocks.fetch(desk.sequence()))
    await desk.store.reached.wait()
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert desk.port.kinds() == [HoldWriter]
    desk.store.may_end.set()
    for _ in range(3):
        await asyncio.sleep(0)
    assert desk.port.kinds() == [HoldWriter, ReleaseWriter]


async def test_blocks_stay_held_until_late_data_has_settled(desk):
    token = desk.connector.enter([2])
    desk.store.answer = BlockLost("may still write")
    with pytest.raises(BlockLost):
        await desk.blocks.fetch(desk.sequence())
    assert desk.port.kinds() == [HoldWriter]
    desk.connector.leave(token)
    assert desk.port.kinds() == [HoldWriter, ReleaseWriter]


async def test_a_fetch_that_fails_fails_its_sequence_and_not_the_worker():
    """An exception of a task ends its group, and with it every other request of the process."""
    async with asyncio.TaskGroup() as tasks:
        desk = Desk(tasks)
        desk.store.answer = BlockLost("may still write")
        with pytest.raises(BlockLost):
            await desk.blocks.fetch(desk.sequence())
        desk.port.refused = HoldWriter
        with pytest.raises(Saturated):
            await desk.blocks.fetch(desk.sequence())
        desk.port.refused, desk.store.answer = (), 1
        assert await desk.blocks.fetch(desk.sequence()) == 4
    assert not asyncio.current_task().cancelling()


async def drive(coroutine, desk):
    """Run a loop of the worker until the store was reached, then end it."""
    running = asyncio.ensure_future(coroutine)
    async with asyncio.timeout(5):
        await desk.store.reached.wait()
    for _ in range(3):
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_full_blocks_are_stored_from_under_a_pin(desk):
    desk.blocks.store_later(HASHES[:2])
    await drive(desk.blocks.run_stores(), desk)
    assert desk.store.stored == [(HASHES[:2], (10, 11))]
    assert desk.port.kinds() == [Pin, Unpin]


async def test_a_store_that_fails_is_forgotten_and_the_next_one_goes_on(desk):
    desk.store.answer = PeerFailed("gone")
    desk.blocks.store_later(HASHES[:1])
    await drive(desk.blocks.run_stores(), desk)
    desk.store.reached.clear()
    desk.port.refused = Pin
    desk.blocks.store_later(HASHES[:1])
    desk.blocks.store_later(HASHES[1:2])
    running = asyncio.ensure_future(desk.blocks.run_stores())
    for _ in range(4):
        await asyncio.sleep(0)
    assert not running.done()
    running.cancel()
    assert desk.port.kinds() == [Pin, Unpin]


async def test_stores_beyond_the_bound_are_dropped_and_counted(desk):
    for _ in range(MAX_QUEUED_STORES + 3):
        desk.blocks.store_later(HASHES)
    assert desk.blocks.num_dropped_stores == 3


async def test_only_the_last_change_of_a_block_is_announced(desk, monkeypatch):
    monkeypatch.setattr("headrace.worker.blocks.ANNOUNCE_INTERVAL_S", 0.001)
    desk.blocks.note_change(CacheChange(stored=HASHES[:2]))
    desk.blocks.note_change(CacheChange(stored=HASHES[2:3], removed=HASHES[:1]))
    await drive(desk.blocks.run_announcements(), desk)
    assert desk.store.told == [({HASHES[1], HASHES[2]}, {HASHES[0]})]


async def test_the_first_change_is_announced_at_once_and_those_after_it_together(desk, monkeypatch):
    monkeypatch.setattr("headrace.worker.blocks.ANNOUNCE_INTERVAL_S", 0.2)
    announcing = asyncio.ensure_future(desk.blocks.run_announcements())
    for block_hash in HASHES:
        desk.blocks.note_change(CacheChange(stored=(block_hash,)))
        for _ in range(3):
            await asyncio.sleep(0)
    assert desk.store.told == [({HASHES[0]}, set())]
    desk.store.reached.clear()
    async with asyncio.timeout(5):
        await desk.store.reached.wait()
    announcing.cancel()
    assert desk.store.told[1:] == [(set(HASHES[1:]), set())]


async def test_an_index_that_must_be_told_everything_is_told_though_nothing_changes(desk, monkeypatch):
    monkeypatch.setattr("headrace.worker.blocks.SNAPSHOT_LOOK_S", 0.001)
    desk.store.owes_snapshot = True
    await drive(desk.blocks.run_announcements(), desk)
    assert desk.store.told[0] == (set(), set())


async def test_hashes_are_those_that_every_other_process_computes(desk):
    tokens = tuple(range(9))
    assert desk.blocks.hashes(tokens, b"tenant") == block_hashes(root_hash("model", b"tenant"), tokens, 4)
