"""Between memory and disk: what is written, what is read back, and what leaves for it."""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.clock import Clock
from headrace.core.block import BlockHash, BlockId
from headrace.core.step_back import StepBack
from headrace.errors import ConfigError
from headrace.index.events import Change
from headrace.kvstore.config import DiskWrite
from headrace.kvstore.disk import DiskTier, Written
from headrace.kvstore.errands import Errands
from headrace.kvstore.messages import Coming, DiskOpened, DiskRead, DiskWrote
from headrace.kvstore.shelf import Shelf
from headrace.kvstore.store import BlockStore, Put
from headrace.kvstore.stored_block import StoredBlock, is_visible

logger = logging.getLogger(__name__)

WRITE_BATCH = 32
"""Blocks given to the disk at a time; one batch is under way, for one thread writes."""
MAX_WAITING_WRITES = 8192
"""Committed blocks whose names wait for the disk; they are not kept in memory for it."""
MAX_READING = 512
"""Blocks on their way from disk."""
LEAST_FREE_SHARE = 0.1
"""Of the memory, at which writing back begins."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""For how long a disk that failed is left alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    holds: tuple[str, ...]
    held: tuple[tuple[StoredBlock, BlockId], ...]


class Tiers:
    """Moves blocks between memory and disk. Belongs to the actor: every method is called by it alone.

    The disk is never waited for here; errands do that, on blocks that are held meanwhile. A disk that fails is left
    alone for a while, in which the store is one of memory only.

    Args:
        store: Blocks in memory.
        memory: Where they lie, `[block, byte]`.
        disk: Opened by `open`, closed by `close`.
        shelf: What is on it.
        write: When blocks are written.
        clock: Ends pauses.
    """

    def __init__(  # noqa: PLR0913 both tiers, and what is between them
        self,
        store: BlockStore,
        memory: NDArray[np.uint8],
        disk: DiskTier,
        shelf: Shelf,
        *,
        write: DiskWrite,
        errands: Errands,
        clock: Clock,
    ) -> None:
        self._store = store
        self._memory = memory
        self.disk = disk
        self.shelf = shelf
        self._write = write
        self._errands = errands
        self._step_back = StepBack(clock, FIRST_PAUSE_S, LONGEST_PAUSE_S)
        self._is_open = False
        self._is_writing = False
        self._waiting: deque[BlockHash] = deque(maxlen=MAX_WAITING_WRITES)
        self._reading: dict[BlockHash, asyncio.Future[None]] = {}
        self._num_holds = 0

    def open(self) -> None:
        """Begin to look at what the disk still holds."""
        self._errands.begin(self._open())

    def opened(self, message: DiskOpened) -> None:
        """Take in what the disk holds from before."""
        if message.survivors is None:
            return
        self._is_open = True
        for block in message.survivors:
            self.shelf.put((block,))

    def take_changes(self) -> tuple[Change, ...]:
        """Return what came to and left the disk since the last call."""
        return self.shelf.take_changes()

    def note_committed(self, blocks: Sequence[StoredBlock]) -> None:
        """Blocks of a put have come: write them, or make sure that there is memory left for the next."""
        if self._write is DiskWrite.THROUGH:
            self._waiting.extend(block.block_hash for block in blocks)
        self.pump()

    def pump(self) -> None:
        """Begin to write if there is something to write and nothing is being written."""
        if not self._is_open or self._is_writing:
            return
        batch = self._next_batch()
        if batch is not None:
            self._is_writing = True
            self._errands.begin(self._write_all(batch))

    def wrote(self, message: DiskWrote) -> None:
        """Take note of what became of a batch."""
        self._is_writing = False
        for hold_id in message.holds:
            self._store.let_go(hold_id)
        outcomes = tuple(zip(message.blocks, message.outcomes, strict=True))
        has_failed = any(outcome in (Written.FAILED, Written.DISK_FULL) for _, outcome in outcomes)
        self._note_disk(is_well=not has_failed)
        stored = [block for block, outcome in outcomes if outcome is Written.STORED]
        self.shelf.put([block for block in stored if self.disk.contains(block.block_hash)])
        if self._write is DiskWrite.BACK:
            for block, outcome in outcomes:
                if outcome in (Written.STORED, Written.KNOWN):
                    self._store.drop_unused(block.block_hash)
        self.pump()

    def promote(self, hashes: Sequence[BlockHash], tenant: str) -> Coming | None:
        """Begin to bring into memory what of a prefix lies on disk only; return what comes, if anything does."""
        missing, coming = self._missing(hashes, tenant)
        if missing and self._step_back.may_ask():
            self._num_holds += 1
            lease_id = f"promotion {self._num_holds}"
            put = self._store.reserve_own(missing, lease_id, beside=hashes)
            if put.blocks:
                end = asyncio.get_running_loop().create_future()
                coming.update((block.block_hash, end) for block in put.facts)
                self._reading.update((block.block_hash, end) for block in put.facts)
                self.shelf.use([block.block_hash for block in put.facts])
                self._errands.begin(self._read_all(lease_id, put))
        return Coming(ends=tuple(dict.fromkeys(coming.values())), hashes=frozenset(coming)) if coming else None

    def read(self, message: DiskRead) -> None:
        """Make visible what landed; who waits for it may look now."""
        names = [block.block_hash for block in message.blocks]
        landed = {name for name in message.landed if self.shelf.find(name) is not None}
        self._store.commit_own(message.lease_id, landed)
        for name in names:
            if not self.disk.contains(name):
                self.shelf.drop(name)
        self._note_disk(is_well=not message.has_failed)
        for end in {self._reading.pop(name) for name in names}:
            if not end.done():
                end.set_result(None)

    def forget(self, block_hash: BlockHash) -> bool:
        """Drop a block from disk, also one on its way there or back; return whether it was there."""
        was_here = self.shelf.drop(block_hash)
        return self.disk.forget(block_hash) or was_here

    async def close(self) -> None:
        """Let the disk go; no errand may be under way."""
        if self._is_open:
            await self.disk.close()

    def _missing(
        self, hashes: Sequence[BlockHash], tenant: str
    ) -> tuple[list[StoredBlock], dict[BlockHash, "asyncio.Future[None]"]]:
        """Return which blocks of the reachable prefix must be read, and which are being read already."""
        missing: list[StoredBlock] = []
        coming: dict[BlockHash, asyncio.Future[None]] = {}
        for name in hashes:
            known = self._store.find(name)
            if known is not None and is_visible(known.tenant, tenant):
                continue
            block = self.shelf.find(name)
            if known is not None or block is None or not self.shelf.has_for(name, tenant):
                break
            if name in self._reading:
                coming[name] = self._reading[name]
            elif len(missing) + len(self._reading) < MAX_READING:
                missing.append(block)
        return missing, coming

    def _next_batch(self) -> _Batch | None:
        has_work = bool(self._waiting) if self._write is DiskWrite.THROUGH else self._num_short() > 0
        if not has_work or not self._step_back.may_ask():
            return None
        batch = self._fresh() if self._write is DiskWrite.THROUGH else self._least_worth()
        kept = self._with_room(batch.held)
        if kept:
            return _Batch(holds=batch.holds, held=kept)
        for hold_id in batch.holds:
            self._store.let_go(hold_id)
        return None

    def _fresh(self) -> _Batch:
        names: dict[BlockHash, None] = {}
        while self._waiting and len(names) < WRITE_BATCH:
            name = self._waiting.popleft()
            if not self.disk.contains(name):
                names[name] = None
        self._num_holds += 1
        hold_id = f"disk {self._num_holds}"
        return _Batch(holds=(hold_id,), held=self._store.hold(hold_id, tuple(names)))

    def _least_worth(self) -> _Batch:
        holds: list[str] = []
        held: list[tuple[StoredBlock, BlockId]] = []
        for _ in range(min(WRITE_BATCH, self._num_short())):
            self._num_holds += 1
            found = self._store.hold_next(f"disk {self._num_holds}")
            if found is None:
                break
            if self.disk.contains(found[0].block_hash):
                self._store.let_go(f"disk {self._num_holds}")
                self._store.drop_unused(found[0].block_hash)
                continue
            holds.append(f"disk {self._num_holds}")
            held.append(found)
        return _Batch(holds=tuple(holds), held=tuple(held))

    def _num_short(self) -> int:
        counts = self._store.counts()
        return int(LEAST_FREE_SHARE * counts.total) - counts.free

    def _with_room(self, held: Sequence[tuple[StoredBlock, BlockId]]) -> tuple[tuple[StoredBlock, BlockId], ...]:
        """Return the blocks for which the disk has room, after others were forgotten there."""
        kept: list[tuple[StoredBlock, BlockId]] = []
        num_coming: Counter[str] = Counter()
        for block, place in held:
            tenant = block.tenant
            if self.shelf.is_full_for(tenant, num_coming[tenant]) or self.disk.free_slots <= len(kept):
                victim = self.shelf.victim(tenant, num_coming[tenant])
                if victim is not None:
                    self.disk.forget(victim)
            if not self.shelf.is_full_for(tenant, num_coming[tenant]) and self.disk.free_slots > len(kept):
                kept.append((block, place))
                num_coming[tenant] += 1
        return tuple(kept)

    def _note_disk(self, *, is_well: bool) -> None:
        if is_well:
            self._step_back.note_answer()
        else:
            self._step_back.note_failure()

    async def _open(self) -> DiskOpened:
        try:
            return DiskOpened(survivors=await self.disk.open())
        except ConfigError as error:
            logger.error("disk tier not opened: the store keeps blocks in memory only", extra={"error": str(error)})
            return DiskOpened(survivors=None)

    async def _write_all(self, batch: _Batch) -> DiskWrote:
        outcomes = await self.disk.write([(block, self._memory[place]) for block, place in batch.held])
        return DiskWrote(holds=batch.holds, blocks=tuple(block for block, _ in batch.held), outcomes=outcomes)

    async def _read_all(self, lease_id: str, put: Put) -> DiskRead:
        num_errors = self.disk.totals.num_io_errors
        reads = [
            self.disk.read(block.block_hash, self._memory[place])
            for block, place in zip(put.facts, put.blocks, strict=True)
        ]
        results = await asyncio.gather(*reads)
        landed = frozenset(block.block_hash for block, is_read in zip(put.facts, results, strict=True) if is_read)
        has_failed = self.disk.totals.num_io_errors > num_errors
        return DiskRead(lease_id=lease_id, blocks=put.facts, landed=landed, has_failed=has_failed)
