"""Owns the kvstore's state: one pool and, where there is a disk, its tiers."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from headrace.clock import Clock
from headrace.core.block import BlockHash, KvLayout, root_hash
from headrace.core.holder import Holder
from headrace.core.lease_terms import checked_hashes, lease_end_s
from headrace.core.ledger import LedgerCounts
from headrace.core.placement import Tier
from headrace.errors import ConfigError, Draining, HeadraceError, NotReady
from headrace.index.events import Change, ChangeKind
from headrace.index.prefix_index import PrefixMatch
from headrace.kvstore.config import KvStoreConfig
from headrace.kvstore.disk import DiskCounts, DiskTier, DiskTotals
from headrace.kvstore.disk_file import DiskSpace
from headrace.kvstore.errands import Errands
from headrace.kvstore.messages import (
    AcquireGet,
    BlockMessage,
    CloseDoor,
    CommitPut,
    DiskMessage,
    DiskOpened,
    DiskRead,
    DiskWrote,
    DropQuarantined,
    Forget,
    Granted,
    HandedOver,
    HandoverMessage,
    ListForHandover,
    ListHolders,
    Match,
    Meet,
    Message,
    Prepare,
    Quarantine,
    ReleaseGet,
    Reply,
    ReplyT,
    ReservePut,
    TakeForHandover,
    Taken,
    Tick,
)
from headrace.kvstore.opening import NUM_KEPT_BLOCKS, Opening
from headrace.kvstore.policy import check_layout, offered_blocks, own_match
from headrace.kvstore.pool import BlockPool, is_canary
from headrace.kvstore.store import StoreTotals, Terms
from headrace.kvstore.store_index import StoreIndex
from headrace.kvstore.stored_block import StoredBlock
from headrace.kvstore.tiers import Tiers
from headrace.runtime.actor import Actor, ActorStats
from headrace.transfer.connector import Connector

logger = logging.getLogger(__name__)

TICK_S = 1.0
LOOK_S = 0.02
STOP_GRACE_S = 1.0

TRIAL_LAYOUT = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=1, head_dim=64, dtype="fp32")
"""Layout of the pool that the canary uses before a worker has told its own: 8 KiB a block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edges:
    """What the actor needs of the outside.

    Attributes:
        clock: Ends leases.
        connect: Makes the connector of a pool `[block, byte]`, on another thread; called for the canary at first,
            and again when a worker tells the size of its blocks.
        new_id: Makes unguessable lease ids.
        open_disk: Makes a disk tier.
    """

    clock: Clock
    connect: Callable[[NDArray[np.uint8]], Connector]
    new_id: Callable[[], str]
    open_disk: Callable[[DiskSpace], DiskTier]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvStoreView:
    """A snapshot for reports.

    Attributes:
        counts: Of the workers' blocks; None before a worker has told its layout.
        totals: Counters since the start.
        canary: Counters of the canary's block, which are in none of the others.
        num_named: Workers' blocks in memory that can be found.
        disk: State of the disk tier; None without one.
        num_own_messages: Messages handled for the canary and the timer: work for nobody else.
        mailbox: Of the actor.
    """

    counts: LedgerCounts | None
    totals: StoreTotals = field(default_factory=StoreTotals)
    canary: StoreTotals = field(default_factory=StoreTotals)
    num_named: int = 0
    disk: "DiskView | None" = None
    num_own_messages: int = 0
    mailbox: ActorStats


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskView:
    """A snapshot of the disk tier.

    Attributes:
        num_evicted: Blocks forgotten for want of room.
        num_forged: Blocks asked for by another tenant than theirs.
    """

    counts: DiskCounts
    totals: DiskTotals
    num_evicted: int
    num_forged: int


class KvStoreActor:
    """The kvstore's only writer.

    Args:
        config: Sizes and bounds.
        epoch: Lifetime of this process.
        edges: The outside.

    Attributes:
        layout: Of the workers' blocks; None before a worker has told it.
        connector: Of the pool; the canary's own while `layout` is None.
        canary_hash: Name of the canary's block. No other process can know it.
        reopened: Set whenever a pool was opened.
        index: Told of all changes; None where the store knows its own blocks only. Set before `start`.
    """

    def __init__(self, config: KvStoreConfig, epoch: str, edges: Edges) -> None:
        self._config = config
        self._edges = edges
        self._epochs: dict[str, str] = {}
        self._pool: BlockPool | None = None
        self._tiers: Tiers | None = None
        self._num_own_messages = 0
        self._is_leaving = False
        self.index: StoreIndex | None = None
        self.layout: KvLayout | None = None
        self.connector: Connector | None = None
        self.canary_hash: BlockHash = root_hash("canary", edges.new_id().encode())
        self.reopened = asyncio.Event()
        self.mailbox: Actor[Message] = Actor(config.name, self._handle, config.mailbox)
        self._errands = Errands(self.mailbox)
        self._opening = Opening(
            config=config, epoch=epoch, clock=edges.clock, canary_hash=self.canary_hash, open_disk=edges.open_disk
        )

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Begin to handle messages."""
        self._errands.start(tasks)
        self.mailbox.start(tasks)

    def view(self) -> KvStoreView:
        """Return a snapshot."""
        pool, tiers = self._pool, self._tiers
        return KvStoreView(
            counts=None if pool is None or self.layout is None else pool.counts(),
            totals=StoreTotals() if pool is None else pool.totals,
            canary=StoreTotals() if pool is None else pool.canary_totals,
            num_named=0 if pool is None else pool.workers.num_named,
            disk=None if tiers is None else _view_of(tiers),
            num_own_messages=self._num_own_messages,
            mailbox=self.mailbox.stats(),
        )

    def verify(self) -> None:
        """Recount the workers' blocks: slow, for tests."""
        if self._pool is not None:
            self._pool.workers.verify()

    def drop_quarantined(self, hashes: tuple[BlockHash, ...]) -> None:
        """Let go of blocks that somebody else found to be wrong."""

        async def said() -> Message:
            return DropQuarantined(hashes=hashes)

        self._errands.begin(said())

    async def run_timer(self) -> None:
        """Let leases end by the clock until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self.mailbox.tell(Tick())

    async def close_door(self) -> int:
        """Grant no lease any more; returns how many leases and writers are left."""
        num_leases: int = await self.mailbox.ask(lambda reply: CloseDoor(reply=reply))
        return num_leases

    async def drain(self, grace_s: float) -> int:
        """Grant no lease any more and wait until none is left, at most `grace_s`; returns how many are."""
        num_leases = await self.close_door()
        end_s = self._edges.clock.now() + grace_s
        while num_leases and self._edges.clock.now() < end_s:
            await asyncio.sleep(LOOK_S)
            num_leases = self._num_leases()
        if num_leases:
            logger.warning("drain ran out of time", extra={"num_leases": num_leases})
        return num_leases

    async def close(self) -> None:
        """Stop handling messages and free the pool and the disk."""
        await self.mailbox.stop(STOP_GRACE_S)
        await self._errands.settled()
        if self._tiers is not None:
            await self._tiers.close()
        if self.connector is not None:
            await self.connector.close()

    async def _handle(self, message: Message) -> None:
        match message:
            case Tick():
                self._tick()
            case Meet():
                await _answer_later(message.reply, self._meet(message))
            case Prepare():
                await _answer_later(message.reply, self._prepare())
            case Forget():
                _answer(message.reply, lambda: self._forget(message.worker))
            case DropQuarantined():
                for block_hash in message.hashes:
                    self._drop(block_hash)
            case CloseDoor():
                self._is_leaving = True
                _answer(message.reply, self._num_leases)
            case DiskOpened() | DiskWrote() | DiskRead():
                self._handle_disk(message)
            case ListForHandover() | TakeForHandover() | HandedOver():
                self._handle_handover(message)
            case _:
                self._handle_blocks(message)
        self._publish()

    def _handle_disk(self, message: DiskMessage) -> None:
        assert self._tiers is not None, "only tiers send these"
        match message:
            case DiskOpened():
                self._tiers.opened(message)
                if self.index is not None:
                    # Blocks that were on disk all along may have been found wrong while nobody was here.
                    self.index.copy.replica.repeat_quarantined()
            case DiskWrote():
                self._tiers.wrote(message)
            case DiskRead():
                self._tiers.read(message)
            case _:
                assert_never(message)

    def _handle_handover(self, message: HandoverMessage) -> None:
        match message:
            case ListForHandover():
                _answer(message.reply, self._all_blocks)
            case TakeForHandover():
                _answer(message.reply, lambda: self._take(message))
            case HandedOver():
                self._handed_over(message)
            case _:
                assert_never(message)

    def _handle_blocks(self, message: BlockMessage) -> None:
        if isinstance(message, ReservePut | AcquireGet) and message.reply.done():
            return  # The caller left while it waited: a lease would only end by the clock.
        self._num_own_messages += self._is_of_canary(message)
        match message:
            case Match():
                _answer(message.reply, lambda: self._match(message.hashes))
            case ReservePut():
                _answer(message.reply, lambda: self._reserve(message))
            case CommitPut():
                _answer(message.reply, lambda: self._commit(message))
            case AcquireGet():
                _answer(message.reply, lambda: self._acquire(message))
            case ReleaseGet():
                _answer(message.reply, lambda: self._release(message))
            case Quarantine():
                _answer(message.reply, lambda: self._quarantine(message))
            case ListHolders():
                _answer(message.reply, self._holders)
            case _:
                assert_never(message)

    def _tick(self) -> None:
        self._num_own_messages += 1
        if self._pool is not None:
            self._pool.expire(self._edges.clock.now())
        if self._tiers is not None:
            self._tiers.pump()

    async def _meet(self, message: Meet) -> None:
        if self._epochs.get(message.worker, message.epoch) != message.epoch:
            self._forget(message.worker)
        if message.layout is None:
            return
        if self.layout is None:
            await self._open_pool(message.layout)
        else:
            check_layout(message.layout, self.layout)
        if len(self._epochs) < self._config.max_workers:
            self._epochs[message.worker] = message.epoch

    async def _prepare(self) -> KvLayout:
        if self.connector is None:
            await self._open_arena(NUM_KEPT_BLOCKS, TRIAL_LAYOUT)
        # Not before: a message counts as handled at its end, and a report made meanwhile takes one from the other.
        self._num_own_messages += 1
        return self.layout or TRIAL_LAYOUT

    async def _open_pool(self, layout: KvLayout) -> None:
        num_blocks = self._opening.num_blocks(layout)
        await self._close_trial()
        pool, memory = await self._open_arena(num_blocks, layout)
        if self._config.disk_dir is not None:
            self._open_tiers(self._config.disk_dir / self._config.name, layout, pool, memory)
        self.layout = layout
        logger.info("block pool opened", extra={"num_blocks": num_blocks, "block_bytes": layout.block_bytes})

    def _open_tiers(self, folder: Path, layout: KvLayout, pool: BlockPool, memory: NDArray[np.uint8]) -> None:
        try:
            self._tiers = self._opening.tiers(folder, layout, pool, memory, self._errands)
        except ConfigError as error:
            logger.error("no disk tier: the store keeps blocks in memory only", extra={"error": str(error)})
        else:
            self._tiers.open()

    async def _open_arena(self, num_blocks: int, layout: KvLayout) -> tuple[BlockPool, NDArray[np.uint8]]:
        memory = self._opening.memory(num_blocks, layout)
        self.connector = await asyncio.to_thread(self._edges.connect, memory)
        self._pool = pool = self._opening.pool(num_blocks, layout)
        self.reopened.set()
        return pool, memory

    async def _close_trial(self) -> None:
        self._publish()
        connector, self.connector, self._pool = self.connector, None, None
        if connector is not None:
            await connector.close()
        if self.index is not None:
            # Its canary's block, if there was one, went with the pool.
            gone = Change(kind=ChangeKind.REMOVED, tier=Tier.DRAM, hashes=(self.canary_hash,))
            self.index.note((gone,))

    def _publish(self) -> None:
        """Tell the index what has changed; without one, forget it."""
        changes = () if self._pool is None else self._pool.take_changes()
        changes += () if self._tiers is None else self._tiers.take_changes()
        if changes and self.index is not None:
            self.index.note(changes)

    def _match(self, hashes: Sequence[bytes]) -> tuple[PrefixMatch, ...]:
        checked = checked_hashes(hashes, self._config.max_hashes)
        known = [] if self.index is None else self.index.match(checked)
        if tuple(checked) == (self.canary_hash,):
            return tuple(known)
        # The own blocks as they are, not as the log had them a moment ago.
        others = [match for match in known if match.location != self._config.name]
        own = None if self._pool is None else own_match(self._config.name, checked, self._find)
        found = others if own is None else [own, *others]
        return tuple(sorted(found, key=lambda match: (-match.num_blocks, match.location)))

    def _find(self, block_hash: BlockHash) -> tuple[Tier, StoredBlock] | None:
        in_memory = None if self._pool is None else self._pool.workers.find(block_hash)
        if in_memory is not None:
            return Tier.DRAM, in_memory
        on_disk = None if self._tiers is None else self._tiers.shelf.find(block_hash)
        return None if on_disk is None else (Tier.DISK, on_disk)

    def _reserve(self, message: ReservePut) -> Granted:
        checked = checked_hashes(message.hashes, self._config.max_hashes)
        offered = offered_blocks(checked, message.facts, self._edges.clock.unix_ms())
        terms, end_ms = self._terms(checked, message)
        pool = self._open(terms.lease_id)
        if self.layout is not None:
            check_layout(message.layout, self.layout)
        put = pool.reserve(offered, terms)
        if not put.blocks:
            return Granted(num_refused=put.num_refused)
        return Granted(
            lease_id=terms.lease_id,
            blocks=put.blocks,
            deadline_unix_ms=end_ms,
            indices=put.indices,
            num_refused=put.num_refused,
        )

    def _commit(self, message: CommitPut) -> int:
        claim = message.claim
        named = self._open(claim.lease_id).commit(
            claim, self._edges.clock.now(), is_complete=message.is_complete, digests=message.digests
        )
        if self._tiers is not None and not is_canary(claim.lease_id):
            self._tiers.note_committed(named)
        return len(named)

    def _acquire(self, message: AcquireGet) -> Granted:
        checked = checked_hashes(message.hashes, self._config.max_hashes)
        terms, end_ms = self._terms(checked, message)
        if self._pool is None:
            return Granted()
        if self._tiers is not None and message.may_promote:
            coming = self._tiers.promote(checked, message.tenant)
            if coming is not None:
                return Granted(coming=coming)
        blocks = self._pool.acquire(checked, terms)
        if not blocks:
            return Granted()
        found = map(self._pool.workers.find, checked[: len(blocks)])
        digests = tuple(0 if block is None else block.digest for block in found)
        return Granted(lease_id=terms.lease_id, blocks=blocks, deadline_unix_ms=end_ms, digests=digests)

    def _release(self, message: ReleaseGet) -> None:
        self._open(message.claim.lease_id).release(message.claim, self._edges.clock.now())

    def _quarantine(self, message: Quarantine) -> bool:
        (block_hash,) = checked_hashes((message.block_hash,), 1)
        found = self._find(block_hash)
        if found is None or found[1].tenant not in ("", message.tenant):
            return False
        if self.index is not None:
            bad = Change(kind=ChangeKind.QUARANTINED, tier=found[0], hashes=(block_hash,))
            self.index.note((bad,))
        self._drop(block_hash)
        return True

    def _drop(self, block_hash: BlockHash) -> None:
        """Let a block go whose bytes are wrong somewhere."""
        was_in_memory = self._pool is not None and self._pool.workers.quarantine(block_hash)
        was_on_disk = self._tiers is not None and self._tiers.forget(block_hash)
        if was_on_disk and not was_in_memory and self._pool is not None:
            self._pool.totals.num_quarantined_blocks += 1

    def _holders(self) -> tuple[Holder, ...]:
        return () if self._pool is None else self._pool.workers.holders()

    def _all_blocks(self) -> tuple[StoredBlock, ...]:
        in_memory = () if self._pool is None else self._pool.workers.names()
        on_disk = () if self._tiers is None else self._tiers.shelf.names()
        found = map(self._find, dict.fromkeys((*in_memory, *on_disk)))
        return tuple(block for _, block in filter(None, found))

    def _take(self, message: TakeForHandover) -> Taken:
        if self._pool is None:
            return Taken()
        if self._tiers is not None and message.may_promote:
            owner = self._find(message.hashes[0])
            coming = None if owner is None else self._tiers.promote(message.hashes, owner[1].tenant)
            if coming is not None:
                return Taken(coming=coming)
        return Taken(held=self._pool.workers.hold(message.hold_id, message.hashes))

    def _handed_over(self, message: HandedOver) -> None:
        if self._pool is not None:
            self._pool.workers.let_go(message.hold_id)
            for block_hash in message.hashes:
                # Makes room for what is still on disk; there it stays, for this store may come back.
                self._pool.workers.drop_unused(block_hash)

    def _forget(self, worker: str) -> None:
        self._epochs.pop(worker, None)
        if self._pool is not None:
            self._pool.workers.drop_writer(worker)

    def _open(self, lease_id: str) -> BlockPool:
        if self._pool is None or (self.layout is None and not is_canary(lease_id)):
            raise NotReady("the kvstore has no pool yet: a worker must shake hands first")
        return self._pool

    def _is_of_canary(self, message: BlockMessage) -> bool:
        match message:
            case ReservePut(hashes=hashes) | AcquireGet(hashes=hashes) | Match(hashes=hashes):
                return tuple(hashes) == (self.canary_hash,)
            case CommitPut(claim=claim) | ReleaseGet(claim=claim):
                return is_canary(claim.lease_id)
            case _:
                return False

    def _num_leases(self) -> int:
        return 0 if self._pool is None else self._pool.counts().num_leases

    def _terms(self, hashes: Sequence[BlockHash], message: ReservePut | AcquireGet) -> tuple[Terms, int]:
        if self._is_leaving:
            raise Draining("the kvstore is leaving: take this as a miss")
        now_ms = self._edges.clock.unix_ms()
        granted_s = lease_end_s((message.deadline_unix_ms - now_ms) / 1000, self._config.max_lease_s)
        new_id = self._edges.new_id()
        lease_id = new_id if self._pool is None else self._pool.lease_name(hashes, new_id)
        deadline_s = self._edges.clock.now() + granted_s
        match message:
            case ReservePut():
                holder, epoch, tenant = message.writer, message.writer_epoch, message.facts.tenant
            case AcquireGet():
                holder, epoch, tenant = message.reader, message.reader_epoch, message.tenant
        terms = Terms(lease_id=lease_id, holder=holder, holder_epoch=epoch, tenant=tenant, deadline_s=deadline_s)
        return terms, now_ms + int(granted_s * 1000)


def _view_of(tiers: Tiers) -> DiskView:
    return DiskView(
        counts=tiers.disk.counts(),
        totals=tiers.disk.totals,
        num_evicted=tiers.shelf.num_evicted,
        num_forged=tiers.shelf.num_forged,
    )


async def _answer_later(reply: "Reply[ReplyT]", work: Awaitable[ReplyT]) -> None:
    """Answer as `_answer` what takes a while."""
    try:
        result = await work
    except HeadraceError as error:
        if not reply.done():
            reply.set_exception(error)
        return
    if not reply.done():
        reply.set_result(result)


def _answer(reply: "Reply[ReplyT]", work: Callable[[], ReplyT]) -> None:
    """Answer with the result or a HeadraceError; a caller that left gets nothing."""
    try:
        result = work()
    except HeadraceError as error:
        if not reply.done():
            reply.set_exception(error)
        return
    if not reply.done():
        reply.set_result(result)
