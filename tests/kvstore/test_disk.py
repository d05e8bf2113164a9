"""The disk tier: what it keeps, what it says of a disk that fails, and what a cancelled call leaves."""

import asyncio
import errno
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.clock import VirtualClock, WallClock
from headrace.core.block import BlockHash
from headrace.core.placement import Origin, Provenance
from headrace.errors import ConfigError
from headrace.kvstore.disk import DiskTier, Written
from headrace.kvstore.disk_file import DiskSpace
from headrace.kvstore.disk_header import SECTOR_BYTES
from headrace.kvstore.disk_slots import RETRY_S
from headrace.kvstore.stored_block import StoredBlock
from headrace.transfer.arena import map_blocks

SIZE = 4096
NUM_SLOTS = 4


class Disk:
    """A disk that fails when told, and waits while its gate is shut."""

    def __init__(self):
        self.write_error = self.read_error = None
        self.gate = threading.Event()
        self.gate.set()
        self.arrived = threading.Event()

    def _answer(self, error):
        self.arrived.set()
        self.gate.wait()
        if error is not None:
            raise OSError(error, os.strerror(error))

    def pwrite(self, fd, data, offset):
        self._answer(self.write_error)
        return os.pwrite(fd, data, offset)

    def preadv(self, fd, buffers, offset):
        self._answer(self.read_error)
        return os.preadv(fd, buffers, offset)


def space(folder, num_slots=NUM_SLOTS):
    return DiskSpace(
        folder=folder,
        block_bytes=SIZE,
        capacity_bytes=SECTOR_BYTES + num_slots * (SIZE + SECTOR_BYTES),
        format_id=b"model and layout",
    )


def name(number):
    return BlockHash(number.to_bytes(16, "little"))


def content(number):
    memory = map_blocks(1, SIZE)[0]
    memory[:] = np.random.default_rng(number).integers(0, 256, SIZE, dtype=np.uint8)
    return memory


def entry(number, **facts):
    return StoredBlock(**{"block_hash": name(number), "tenant": "t", "stored_unix_ms": number, **facts}), content(
        number
    )


async def put(tier, *numbers):
    return await tier.write([entry(number) for number in numbers])


async def has(tier, number):
    """Return whether a block can be read, and insist that its bytes are right."""
    into = content(999)
    is_hit = await tier.read(name(number), into)
    assert not is_hit or np.array_equal(into, content(number))
    return is_hit


@pytest.fixture
def disk():
    return Disk()


@pytest.fixture
def clock():
    return VirtualClock()


@pytest.fixture
async def tier(tmp_path, disk, clock):
    tier = DiskTier(space(tmp_path), clock, 2, disk)
    await tier.open()
    yield tier
    disk.gate.set()
    await tier.close()


async def reopened(tier, tmp_path):
    await tier.close()
    again = DiskTier(space(tmp_path), VirtualClock(), 2)
    return again, await again.open()


async def flip(tmp_path, offset):
    with (tmp_path / "payloads").open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


async def test_a_written_block_is_read_back_and_another_is_a_miss(tier):
    assert await put(tier, 1, 2) == (Written.STORED, Written.STORED)
    assert tier.contains(name(1))
    assert await has(tier, 1)
    assert not await has(tier, 3)
    counts = tier.counts()
    assert (counts.num_slots, counts.num_blocks, counts.num_bytes, counts.free_slots) == (4, 2, 2 * SIZE, 2)
    assert (tier.totals.num_written_blocks, tier.totals.num_read_blocks, tier.totals.num_missed_blocks) == (2, 1, 1)


async def test_a_restart_finds_the_blocks_and_what_is_known_of_them_oldest_first(tier, tmp_path):
    facts = {
        "tenant": "ümlaut",
        "digest": 2**64 - 1,
        "num_blocks_before": 7,
        "origin": Origin(provenance=Provenance.DERIVED, policy_id="p"),
    }
    entries = [entry(5, **facts), entry(3)]
    await tier.write(entries)
    again, found = await reopened(tier, tmp_path)
    assert found == (entries[1][0], entries[0][0])
    assert await has(again, 5)
    assert await has(again, 3)
    assert again.free_slots == 2
    await again.close()


async def test_a_forgotten_block_is_a_miss_also_after_a_restart(tier, tmp_path):
    await put(tier, 1, 2)
    assert tier.forget(name(1))
    assert not tier.forget(name(1))
    assert not await has(tier, 1)
    assert tier.free_slots == 3
    again, found = await reopened(tier, tmp_path)
    assert [block.block_hash for block in found] == [name(2)]
    await again.close()


async def test_blocks_that_are_there_are_not_written_again_and_more_than_fit_are_refused(tier):
    await put(tier, 1, 2, 3)
    assert await put(tier, 3, 4, 4, 5) == (Written.KNOWN, Written.STORED, Written.KNOWN, Written.NO_SLOT)
    tier.forget(name(1))
    assert await put(tier, 5) == (Written.STORED,)
    assert [await has(tier, number) for number in range(1, 6)] == [False, True, True, True, True]


async def test_of_two_slots_with_one_block_a_restart_keeps_the_newer(tier, tmp_path, disk, clock):
    await tier.write([entry(1, digest=1, stored_unix_ms=10)])
    disk.write_error = errno.EIO  # The clearing does not reach the disk.
    tier.forget(name(1))
    await put(tier, 2)
    disk.write_error = None
    clock.advance(RETRY_S)
    assert await tier.write([entry(1, digest=2, stored_unix_ms=20)]) == (Written.STORED,)
    again, found = await reopened(tier, tmp_path)
    assert [(block.block_hash, block.digest) for block in found] == [(name(1), 2)]
    assert again.free_slots == 3
    await again.close()


async def test_a_block_with_a_wrong_byte_is_a_miss_and_forgotten(tier, tmp_path):
    await put(tier, 1, 2)
    await flip(tmp_path, 100)
    assert [await has(tier, number) for number in (1, 2, 1)] == [False, True, False]
    assert not tier.contains(name(1))
    assert (tier.totals.num_corrupt, tier.free_slots) == (1, 3)
    again, found = await reopened(tier, tmp_path)
    assert [block.block_hash for block in found] == [name(2)]
    await again.close()


async def test_a_block_that_cannot_be_read_is_a_miss_and_forgotten(tier, disk):
    await put(tier, 1, 2)
    disk.read_error = errno.EIO
    assert not await has(tier, 1)
    disk.read_error = None
    assert await has(tier, 2)
    assert not tier.contains(name(1))
    assert (tier.totals.num_io_errors, tier.totals.num_corrupt) == (1, 0)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
async def test_a_full_disk_takes_blocks_only_where_it_took_some_before_until_it_is_asked_again(
    tier, disk, clock, error
):
    await put(tier, 1, 2)
    disk.write_error = error
    assert await put(tier, 3) == (Written.DISK_FULL,)
    disk.write_error = None
    assert (tier.totals.num_full, tier.totals.num_io_errors, tier.free_slots) == (1, 0, 0)
    assert await put(tier, 3) == (Written.NO_SLOT,)
    tier.forget(name(1))
    assert await put(tier, 3) == (Written.STORED,)
    clock.advance(RETRY_S)
    assert tier.free_slots == 2
    assert [await has(tier, number) for number in (1, 2, 3)] == [False, True, True]


async def test_a_disk_that_cannot_write_says_so_and_keeps_its_blocks(tier, disk):
    await put(tier, 1)
    disk.write_error = errno.EIO
    assert await put(tier, 2, 3) == (Written.FAILED, Written.FAILED)
    disk.write_error = None
    assert tier.totals.num_io_errors == 2
    assert [await has(tier, number) for number in (1, 2, 3)] == [True, False, False]


async def test_a_slot_is_not_written_while_it_is_read(tier, disk):
    await put(tier, 1, 2, 3, 4)
    disk.gate.clear()
    disk.arrived.clear()
    into = content(999)
    reading = asyncio.create_task(tier.read(name(1), into))
    await asyncio.to_thread(disk.arrived.wait)
    tier.forget(name(1))
    assert tier.free_slots == 0
    disk.gate.set()
    assert not await reading  # Forgotten meanwhile: whoever asked for that had a reason.
    assert tier.free_slots == 1


async def test_a_block_forgotten_while_it_is_written_is_not_there(tier, disk, tmp_path):
    disk.gate.clear()
    writing = asyncio.create_task(put(tier, 1, 2))
    await asyncio.to_thread(disk.arrived.wait)
    assert not await has(tier, 1)
    assert tier.forget(name(1))
    again = asyncio.create_task(put(tier, 1))
    disk.gate.set()
    assert await writing == (Written.FORGOTTEN, Written.STORED)
    assert await again == (Written.STORED,)
    assert await has(tier, 1)
    assert tier.free_slots == 2


@pytest.mark.parametrize("verb", ["read", "write"])
async def test_a_cancelled_call_ends_when_the_disk_no_longer_uses_its_memory(tier, disk, verb):
    await put(tier, 1)
    disk.gate.clear()
    disk.arrived.clear()
    into = content(999)
    call = asyncio.create_task(tier.read(name(1), into) if verb == "read" else put(tier, 2))
    await asyncio.to_thread(disk.arrived.wait)
    call.cancel()
    call.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not call.done()
    disk.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert tier.contains(name(2)) == (verb == "write")
    tier.forget(name(1))
    assert tier.free_slots == (4 if verb == "read" else 3)


async def test_memory_of_another_size_is_refused_before_anything_happens(tier):
    short = np.zeros(SIZE - 1, dtype=np.uint8)
    with pytest.raises(ValueError, match="4096 bytes, found 4095"):
        await tier.write([entry(1), (entry(2)[0], short)])
    with pytest.raises(ValueError, match="4096 bytes, found 4095"):
        await tier.read(name(1), short)
    assert tier.free_slots == 4


async def test_after_the_end_everything_is_a_miss(tier, disk):
    await put(tier, 1)
    disk.gate.clear()
    disk.arrived.clear()
    writing = asyncio.create_task(put(tier, 2))
    await asyncio.to_thread(disk.arrived.wait)
    closing = asyncio.create_task(tier.close())
    await asyncio.sleep(0)
    disk.gate.set()
    await closing
    assert await writing == (Written.FORGOTTEN,)
    assert not await has(tier, 1)
    assert await put(tier, 3) == (Written.NO_SLOT,)
    assert tier.free_slots == 0


async def test_a_folder_belongs_to_one_tier(tier, tmp_path):
    other = DiskTier(space(tmp_path), VirtualClock())
    with pytest.raises(ConfigError, match="another process"):
        await other.open()
    await other.close()
    assert await put(tier, 1) == (Written.STORED,)


async def test_seconds_of_reading_are_counted_once_however_many_read(tier, disk, clock):
    await put(tier, 1, 2)
    disk.gate.clear()
    disk.arrived.clear()
    readings = [asyncio.create_task(has(tier, number)) for number in (1, 2)]
    await asyncio.to_thread(disk.arrived.wait)
    clock.advance(3.0)
    disk.gate.set()
    await asyncio.gather(*readings)
    assert tier.totals.read_s == 3.0


WRITER = """
import asyncio, pathlib, sys
sys.path.insert(0, sys.argv[2])
from headrace.clock import WallClock
from headrace.kvstore.disk import DiskTier
import test_disk

async def main():
    tier = DiskTier(test_disk.space(pathlib.Path(sys.argv[1])), WallClock())
    await tier.open()
    number = 0
    while True:
        number += 1
        tier.forget(test_disk.name(number - test_disk.NUM_SLOTS if number > test_disk.NUM_SLOTS else 0))
        await test_disk.put(tier, number)
        print(number, flush=True)

asyncio.run(main())
"""


def test_a_process_killed_while_it_writes_leaves_whole_blocks_or_none(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "disk"), os.path.dirname(__file__)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert select.select([writer.stdout], [], [], 60.0)[0]
        lines = [writer.stdout.readline() for _ in range(20)]
        writer.send_signal(signal.SIGKILL)
        lines += writer.stdout.readlines()
    last = int(lines[-1])

    async def readable():
        tier = DiskTier(space(tmp_path / "disk"), WallClock())
        found = [int.from_bytes(block.block_hash, "little") for block in await tier.open()]
        assert all([await has(tier, number) for number in found])
        await tier.close()
        return set(found)

    found = asyncio.run(readable())
    assert {last - 1, last} <= found <= set(range(last - NUM_SLOTS, last + 2))


class TierMachine(RuleBasedStateMachine):
    """Puts, reads, forgets, restarts, failures and damage in any order: a read gives the right bytes or none."""

    def __init__(self):
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = TemporaryDirectory()
        self.disk, self.clock = Disk(), VirtualClock()
        self.is_damaged = False
        self.believed = set()
        self.tier = None
        self.restart()

    def teardown(self):
        self.runner.run(self.tier.close())
        self.runner.close()
        self.folder.cleanup()

    @rule()
    def restart(self):
        if self.tier is not None:
            self.runner.run(self.tier.close())
        self.tier = DiskTier(space(Path(self.folder.name)), self.clock, 2, self.disk)
        found = {int.from_bytes(block.block_hash, "little") for block in self.runner.run(self.tier.open())}
        assert self.is_damaged or found == self.believed
        self.believed = found

    @rule(numbers=st.lists(st.integers(1, 8), max_size=3))
    def write(self, numbers):
        outcomes = self.runner.run(put(self.tier, *numbers))
        self.believed |= {
            number for number, outcome in zip(numbers, outcomes, strict=True) if outcome is Written.STORED
        }

    @rule(numbers=st.lists(st.integers(1, 8), min_size=1, max_size=3))
    def read(self, numbers):
        async def read_all():
            return await asyncio.gather(*(has(self.tier, number) for number in numbers))

        for number, is_hit in zip(numbers, self.runner.run(read_all()), strict=True):
            assert is_hit == (number in self.believed) or self.is_damaged
            if not is_hit:
                self.believed.discard(number)

    @rule(number=st.integers(1, 8))
    def forget(self, number):
        assert self.tier.forget(name(number)) == (number in self.believed)
        self.believed.discard(number)

    @rule()
    def wait(self):
        self.clock.advance(RETRY_S)

    @rule(numbers=st.lists(st.integers(1, 8), min_size=1, max_size=3), error=st.sampled_from((errno.ENOSPC, errno.EIO)))
    def write_to_a_disk_that_fails(self, numbers, error):
        # What was forgotten before is cleared by the thread that writes: this failure is not to meet it.
        self.tier._writer.submit(lambda: None).result()
        self.disk.write_error = error
        outcomes = self.runner.run(put(self.tier, *numbers))
        self.disk.write_error = None
        assert Written.STORED not in outcomes

    @precondition(lambda self: not self.is_damaged)
    @rule(offset=st.integers(0, NUM_SLOTS * SIZE - 1))
    def damage(self, offset):
        self.is_damaged = True
        self.runner.run(flip(Path(self.folder.name), offset))

    @invariant()
    def slots_and_blocks_add_up(self):
        counts = self.tier.counts()
        assert counts.num_blocks == len(self.believed)
        assert all(self.tier.contains(name(number)) for number in self.believed)
        assert counts.num_blocks + counts.free_slots <= NUM_SLOTS
        self.clock.advance(RETRY_S)
        assert counts.num_blocks + self.tier.free_slots == NUM_SLOTS


TestTier = TierMachine.TestCase
TestTier.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
