"""Leases on a worker's cached blocks, on a virtual clock: bounded, ended by the clock, bound to who got them."""

import asyncio
import itertools

import pytest

from headrace.clock import VirtualClock
from headrace.engine.messages import EngineStats, Pin, Unpin
from headrace.errors import BlockLost, DeadlineExceeded, InvalidRequest, Saturated
from headrace.worker.engine import AsyncEngine
from headrace.worker.reads import ReadBounds, Reader, Reads

HASHES = [bytes([number]) * 16 for number in range(4)]
READER = Reader(name="p1", epoch="e1", tenant="acme")


class Port:
    """An engine whose cache holds the first `num_cached` blocks asked for, once it is not busy."""

    def __init__(self):
        self.commands = []
        self.num_cached = 3
        self.is_busy = False

    def send(self, command):
        self.commands.append(command)
        if isinstance(command, Pin) and not self.is_busy:
            command.reply(tuple(range(10, 10 + len(command.block_hashes[: self.num_cached]))))

    def stats(self):
        return EngineStats()

    def sent(self, kind):
        return [command for command in self.commands if isinstance(command, kind)]


class Desk:
    def __init__(self):
        self.clock, self.port = VirtualClock(1000.0), Port()
        engine = AsyncEngine(self.port, asyncio.get_running_loop())
        ids = map("lease-{}".format, itertools.count())
        bounds = ReadBounds(max_open=2, max_hashes=4, max_lease_s=20.0, max_name_chars=8)
        self.reads = Reads(engine, self.clock, "now", lambda: next(ids), bounds)

    async def acquire(self, hashes=HASHES, seconds=10.0, reader=READER):
        return await self.reads.acquire(hashes, reader, self.clock.unix_ms() + int(seconds * 1000))

    def release(self, read, epoch="now", tenant="acme"):
        self.reads.release(read.lease_id, epoch, tenant)


@pytest.fixture
async def desk():
    return Desk()


async def test_a_read_pins_the_cached_prefix_for_its_reader_until_the_same_moment(desk):
    read = await desk.acquire()
    assert read.blocks == (10, 11, 12)
    assert read.deadline_unix_ms == desk.clock.unix_ms() + 10_000
    [pin] = desk.port.sent(Pin)
    assert (pin.lease_id, pin.owner, pin.reader, pin.epoch) == (read.lease_id, "read", "p1", "e1")
    assert pin.block_hashes == tuple(HASHES)
    assert pin.deadline_s == desk.clock.now() + 10.0


async def test_a_release_ends_the_pin_once(desk):
    read = await desk.acquire()
    desk.release(read)
    assert desk.port.sent(Unpin) == [Unpin(lease_id=read.lease_id)]
    with pytest.raises(BlockLost):
        desk.release(read)
    assert len(desk.port.sent(Unpin)) == 1


async def test_a_release_does_not_wait_for_the_step_that_the_engine_is_in(desk):
    read = await desk.acquire()
    desk.port.is_busy = True
    desk.release(read)
    assert desk.reads.num_open() == 0


async def test_a_release_after_the_end_says_that_the_blocks_are_lost(desk):
    read = await desk.acquire(seconds=10.0)
    desk.clock.advance(9.99)
    assert desk.reads.num_open() == 1
    desk.clock.advance(0.01)
    with pytest.raises(BlockLost, match="ended by the clock"):
        desk.release(read)
    assert desk.reads.num_open() == 0


@pytest.mark.parametrize(
    "forged",
    [{"tenant": "other"}, {"tenant": ""}, {"epoch": "before"}, {"lease_id": "lease-00"}],
    ids=["another tenant", "no tenant", "an earlier process", "a guessed lease"],
)
async def test_a_lease_ends_only_by_the_word_of_its_holder(desk, forged):
    read = await desk.acquire()
    terms = {"lease_id": read.lease_id, "epoch": "now", "tenant": "acme"}
    with pytest.raises(BlockLost):
        desk.reads.release(**{**terms, **forged})
    assert desk.port.sent(Unpin) == []
    desk.reads.release(**terms)


async def test_what_is_not_cached_is_no_lease(desk):
    desk.port.num_cached = 0
    read = await desk.acquire()
    assert (read.lease_id, read.blocks, read.deadline_unix_ms) == ("", (), 0)
    assert desk.reads.num_open() == 0
    with pytest.raises(BlockLost):
        desk.release(read)


async def test_there_are_only_so_many_reads_until_one_ends_or_is_over(desk):
    first, _ = await desk.acquire(seconds=10.0), await desk.acquire(seconds=5.0)
    with pytest.raises(Saturated, match="2 reads"):
        await desk.acquire()
    desk.release(first)
    await desk.acquire(seconds=10.0)
    with pytest.raises(Saturated):
        await desk.acquire()
    desk.clock.advance(5.0)
    await desk.acquire()
    assert len(desk.port.sent(Pin)) == 4


async def test_reads_that_wait_for_the_engine_count_too(desk):
    desk.port.is_busy = True
    waiting = [asyncio.ensure_future(desk.acquire()) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Saturated):
        await desk.acquire()
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert desk.reads.num_open() == 0
    assert {command.lease_id for command in desk.port.sent(Unpin)} == {
        command.lease_id for command in desk.port.sent(Pin)
    }


async def test_a_lease_is_no_longer_than_the_longest_and_none_begins_after_its_end(desk):
    read = await desk.acquire(seconds=3600.0)
    assert read.deadline_unix_ms == desk.clock.unix_ms() + 20_000
    assert desk.port.sent(Pin)[0].deadline_s == desk.clock.now() + 20.0
    with pytest.raises(DeadlineExceeded):
        await desk.acquire(seconds=0.0)
    assert desk.reads.num_open() == 1


async def test_bad_hashes_and_too_many_are_refused_before_the_engine_hears_of_them(desk):
    with pytest.raises(InvalidRequest, match="at most 4"):
        await desk.acquire(hashes=[*HASHES, HASHES[0]])
    with pytest.raises(InvalidRequest, match="16 bytes"):
        await desk.acquire(hashes=[b"short"])
    assert desk.port.commands == []


async def test_long_names_are_cut(desk):
    await desk.acquire(reader=Reader(name="r" * 100, epoch="e" * 100, tenant="acme"))
    [pin] = desk.port.sent(Pin)
    assert (pin.reader, pin.epoch) == ("r" * 8, "e" * 8)
