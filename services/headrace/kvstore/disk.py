"""The disk tier: blocks by hash in the slots of one folder, read and written on threads.

Plain threads with O_DIRECT took, for cold reads of 64 blocks, 11.4 (360 KiB) and 12.7 (2 MiB) times a copy in
memory; NIXL's POSIX backend 11.9 and 12.2 with io_uring, 12.0 and 13.2 with aio (2-core EPYC, 2026-11-22): no gain.
"""

import asyncio
import errno
import logging
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from headrace.clock import Clock
from headrace.core.block import BlockHash
from headrace.kvstore.disk_file import DiskFile, DiskSpace, Scan, SystemCalls
from headrace.kvstore.disk_slots import FreeSlots
from headrace.kvstore.stored_block import StoredBlock

logger = logging.getLogger(__name__)

Memory: TypeAlias = memoryview | NDArray[np.uint8]
"""Bytes of one block, contiguous. The page cache is bypassed where their address is a multiple of 4096."""


T = TypeVar("T")


class Written(Enum):
    """What became of a block that was to be written."""

    STORED = "stored"
    KNOWN = "known"
    """It is on disk, or being written, already."""
    NO_SLOT = "no_slot"
    """More blocks were given than there were free slots."""
    FORGOTTEN = "forgotten"
    """It was forgotten while it was written."""
    DISK_FULL = "disk_full"
    FAILED = "failed"
    """The disk could not write it."""


class _Found(Enum):
    WHOLE = "whole"
    CORRUPT = "corrupt"
    UNREADABLE = "unreadable"


@dataclass(slots=True, kw_only=True)
class DiskTotals:
    """Counters since the start.

    Attributes:
        num_torn: Headers found at the start that were not whole.
        num_corrupt: Blocks that did not have their checksum when they were read.
        num_io_errors: Reads and writes that the disk refused for another reason than being full.
        num_full: Writes refused because the disk was full.
        read_s: Seconds during which blocks were being read: with `num_read_blocks`, how fast the disk is.
        write_s: Seconds during which blocks were being written.
    """

    num_written_blocks: int = 0
    num_read_blocks: int = 0
    num_missed_blocks: int = 0
    num_torn: int = 0
    num_corrupt: int = 0
    num_io_errors: int = 0
    num_full: int = 0
    read_s: float = 0.0
    write_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskCounts:
    """How the slots are used; those that are neither free nor a block's are being written or read, or refused.

    Attributes:
        num_slots: All of them.
        num_blocks: Blocks that can be read.
        num_bytes: Of their payloads.
        free_slots: How many blocks can be written now.
    """

    num_slots: int
    num_blocks: int
    num_bytes: int
    free_slots: int


@dataclass(slots=True, kw_only=True)
class _Kept:
    slot: int
    checksum: bytes
    num_readers: int = 0
    is_forgotten: bool = False
    is_doubtful: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    slot: int
    block: StoredBlock
    payload: memoryview


class DiskTier:
    """Owns a folder's slots. Belongs to one event loop; every wrong byte and every error of the disk is a miss.

    Which block has to go for another one is decided elsewhere: a write takes free slots only. A slot is not
    given to somebody else while it is read, so a block forgotten meanwhile frees its slot later.

    Args:
        space: The folder and its size.
        clock: Times transfers, and when a disk that failed is tried again.
        num_threads: Blocks read at a time. One more thread writes, so that no read waits behind writes, and
            that a slot is cleared before it is written again.
        calls: Of the system; tests pass a disk that fails.

    Attributes:
        totals: Counters since the start.
    """

    def __init__(self, space: DiskSpace, clock: Clock, num_threads: int = 4, calls: SystemCalls = os) -> None:
        self._space = space
        self._clock = clock
        self._readers = ThreadPoolExecutor(num_threads, thread_name_prefix="disk-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="disk-write")
        self._file = DiskFile(space, calls)
        self._kept: dict[BlockHash, _Kept] = {}
        self._writing: dict[BlockHash, int] = {}
        self._slots = FreeSlots()
        self._to_clear: deque[int] = deque()
        self._is_clearing = False
        self._is_open = False
        self._reading = _Busy(clock)
        self._storing = _Busy(clock)
        self.totals = DiskTotals()

    @property
    def free_slots(self) -> int:
        """How many blocks can be written now."""
        return self._slots.num_free(self._clock.now()) if self._is_open else 0

    def contains(self, block_hash: BlockHash) -> bool:
        """Return whether a block can be read."""
        return block_hash in self._kept

    def counts(self) -> DiskCounts:
        """Return how the slots are used."""
        return DiskCounts(
            num_slots=self._space.num_slots,
            num_blocks=len(self._kept),
            num_bytes=len(self._kept) * self._space.block_bytes,
            free_slots=self.free_slots,
        )

    async def open(self) -> tuple[StoredBlock, ...]:
        """Take the folder and return the blocks that it holds from before, the oldest first.

        Only their headers have been looked at. Cancelled, it ends when the disk has answered.

        Raises:
            ConfigError: another process uses the folder, or it cannot be used at all.
        """
        scan = await _end_of(asyncio.get_running_loop().run_in_executor(self._readers, self._open_file))
        self.totals.num_torn = scan.num_torn
        self.totals.num_io_errors += scan.num_io_errors
        self._is_open = True
        self._slots.give_unproven(slot for slot in range(self._space.num_slots) if slot not in scan.headers)
        newest_first = sorted(scan.headers.items(), key=lambda item: item[1].block.stored_unix_ms, reverse=True)
        survivors = []
        for slot, header in newest_first:
            if header.block.block_hash in self._kept:
                self._vacate(_Kept(slot=slot, checksum=header.checksum))
                continue
            self._kept[header.block.block_hash] = _Kept(slot=slot, checksum=header.checksum)
            survivors.append(header.block)
        logger.info(
            "disk tier opened",
            extra={
                "num_slots": self._space.num_slots,
                "num_blocks": len(survivors),
                "num_torn": scan.num_torn,
                "is_direct": self._file.is_direct,
            },
        )
        return tuple(reversed(survivors))

    async def write(self, entries: Sequence[tuple[StoredBlock, Memory]]) -> tuple[Written, ...]:
        """Write blocks and say of each what became of it; those stored can be read from then on.

        The memory must not change until this ends. Cancelled, it ends when the disk has answered.

        Raises:
            ValueError: a block has another size, before anything is written.
        """
        payloads = [self._bytes_of(memory) for _, memory in entries]
        outcomes: dict[int, Written] = {}
        jobs: dict[int, _Job] = {}
        for index, ((block, _), payload) in enumerate(zip(entries, payloads, strict=True)):
            match self._take_slot(block.block_hash):
                case Written() as refusal:
                    outcomes[index] = refusal
                case slot:
                    jobs[index] = _Job(slot=slot, block=block, payload=payload)
        if jobs:
            loop = asyncio.get_running_loop()
            writing = loop.run_in_executor(self._writer, self._write_all, tuple(jobs.values()))
            self._storing.begin()
            try:
                await _end_of(writing)
            finally:
                self.totals.write_s += self._storing.end()
                for (index, job), landed in zip(jobs.items(), writing.result(), strict=True):
                    outcomes[index] = self._land(job, landed)
        return tuple(outcome for _, outcome in sorted(outcomes.items()))

    async def read(self, block_hash: BlockHash, into: Memory) -> bool:
        """Read a block and return whether its bytes are in `into`; if not, `into` is garbage.

        A block that cannot be read, or whose bytes are not those written, is forgotten. Cancelled, it ends
        when the disk has answered: until then a thread writes into the memory.

        Raises:
            ValueError: the memory has another size.
        """
        memory = self._bytes_of(into)
        kept = self._kept.get(block_hash)
        if kept is None:
            self.totals.num_missed_blocks += 1
            return False
        kept.num_readers += 1
        reading = asyncio.get_running_loop().run_in_executor(self._readers, self._read_one, kept, memory)
        self._reading.begin()
        try:
            await _end_of(reading)
        finally:
            self.totals.read_s += self._reading.end()
            is_hit = self._end_read(block_hash, kept, reading.result())
        return is_hit

    def forget(self, block_hash: BlockHash) -> bool:
        """Let a block go, also one being written; return whether it was here.

        A restart does not find it again once a thread has cleared its header, or `close` has ended.
        """
        if self._writing.pop(block_hash, None) is not None:
            return True
        kept = self._kept.pop(block_hash, None)
        if kept is None:
            return False
        kept.is_forgotten = True
        if not kept.num_readers:
            self._vacate(kept)
        return True

    async def close(self) -> None:
        """Finish what is under way and let the folder go; from then on everything is a miss."""
        self._kept.clear()
        self._writing.clear()
        self._slots.clear()
        self._is_open = False
        await _end_of(asyncio.get_running_loop().run_in_executor(None, self._shut))

    def _shut(self) -> None:
        self._readers.shutdown()
        self._writer.shutdown()
        self._file.close()

    def _open_file(self) -> Scan:
        self._file.open()
        return self._file.scan()

    def _bytes_of(self, memory: Memory) -> memoryview:
        view = (memory if isinstance(memory, memoryview) else memory.data).cast("B")
        if len(view) != self._space.block_bytes:
            raise ValueError(f"a block on this disk has {self._space.block_bytes} bytes, found {len(view)}")
        return view

    def _take_slot(self, block_hash: BlockHash) -> int | Written:
        if block_hash in self._kept or block_hash in self._writing:
            return Written.KNOWN
        slot = self._slots.take(self._clock.now()) if self._is_open else None
        if slot is None:
            return Written.NO_SLOT
        self._writing[block_hash] = slot
        return slot

    def _write_all(self, jobs: Sequence[_Job]) -> list[bytes | OSError]:
        return [self._write_one(job) for job in jobs]

    def _write_one(self, job: _Job) -> bytes | OSError:
        try:
            return self._file.write(job.slot, job.block, job.payload)
        except OSError as error:
            logger.warning("block not written to disk", extra={"slot": job.slot, "error": str(error)})
            return error

    def _land(self, job: _Job, landed: bytes | OSError) -> Written:
        name = job.block.block_hash
        is_wanted = self._writing.get(name) == job.slot
        if is_wanted:
            del self._writing[name]
        if isinstance(landed, OSError):
            self._slots.refuse(job.slot, self._clock.now())
            is_full = landed.errno in (errno.ENOSPC, errno.EDQUOT)
            self.totals.num_full += is_full
            self.totals.num_io_errors += not is_full
            return Written.DISK_FULL if is_full else Written.FAILED
        kept = _Kept(slot=job.slot, checksum=landed)
        if not is_wanted:
            self._vacate(kept)
            return Written.FORGOTTEN
        self._kept[name] = kept
        self.totals.num_written_blocks += 1
        return Written.STORED

    def _read_one(self, kept: _Kept, into: memoryview) -> _Found:
        try:
            return _Found.WHOLE if self._file.read(kept.slot, kept.checksum, into) else _Found.CORRUPT
        except OSError as error:
            logger.warning("block not read from disk", extra={"slot": kept.slot, "error": str(error)})
            return _Found.UNREADABLE

    def _end_read(self, block_hash: BlockHash, kept: _Kept, found: _Found) -> bool:
        kept.num_readers -= 1
        is_hit = found is _Found.WHOLE and not kept.is_forgotten
        self.totals.num_read_blocks += is_hit
        self.totals.num_missed_blocks += not is_hit
        if found is not _Found.WHOLE and not kept.is_doubtful:
            kept.is_doubtful = True
            self.totals.num_corrupt += found is _Found.CORRUPT
            self.totals.num_io_errors += found is _Found.UNREADABLE
            if self._kept.get(block_hash) is kept:
                del self._kept[block_hash]
                kept.is_forgotten = True
        if kept.is_forgotten and not kept.num_readers:
            self._vacate(kept)
        return is_hit

    def _vacate(self, kept: _Kept) -> None:
        if not self._is_open:
            return
        self._to_clear.append(kept.slot)
        if not self._is_clearing:
            self._is_clearing = True
            self._writer.submit(self._clear_all)
        if kept.is_doubtful:
            self._slots.give_unproven((kept.slot,))
        else:
            self._slots.give(kept.slot)

    def _clear_all(self) -> None:
        self._is_clearing = False  # First: what is forgotten from here on is for the next run, if this one misses it.
        while self._to_clear:
            slot = self._to_clear.popleft()
            try:
                self._file.clear(slot)
            except OSError as error:
                logger.warning("forgotten block not cleared on disk", extra={"slot": slot, "error": str(error)})


class _Busy:
    """Adds up the seconds during which at least one of several things went on."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._num_running = 0
        self._since_s = 0.0

    def begin(self) -> None:
        """One thing more."""
        if not self._num_running:
            self._since_s = self._clock.now()
        self._num_running += 1

    def end(self) -> float:
        """One thing less; returns the seconds since the last end, or since the first begin."""
        now_s = self._clock.now()
        taken_s, self._since_s = now_s - self._since_s, now_s
        self._num_running -= 1
        return taken_s


async def _end_of(job: "asyncio.Future[T]") -> T:
    """Return a job's result; cancelled, wait for its end first: its thread uses the caller's memory until then."""
    cancelled: asyncio.CancelledError | None = None
    while not job.done():
        try:
            await asyncio.wait([job])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return job.result()
