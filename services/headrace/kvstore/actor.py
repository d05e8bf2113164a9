"""Owns the kvstore's state: one pool, one store, one index."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import assert_never

from headrace.clock import Clock
from headrace.core.block import BlockHash, KvLayout, root_hash
from headrace.core.lease_terms import checked_hashes, lease_end_s
from headrace.core.ledger import LedgerCounts
from headrace.errors import Draining, HeadraceError, NotReady
from headrace.kvstore.config import KvStoreConfig
from headrace.kvstore.index import PrefixIndex, Report
from headrace.kvstore.messages import (
    AcquireGet,
    Announce,
    BlockMessage,
    CloseDoor,
    CommitPut,
    Forget,
    Granted,
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
    Tick,
)
from headrace.kvstore.policy import check_layout
from headrace.kvstore.pool import NUM_CANARY_BLOCKS, BlockPool, is_canary
from headrace.kvstore.store import StoreTotals, Terms
from headrace.runtime.actor import Actor, ActorStats
from headrace.transfer.connector import Connector
from headrace.transfer.measure import NUM_SCRATCH_BLOCKS

logger = logging.getLogger(__name__)

TICK_S = 1.0
LOOK_S = 0.02
STOP_GRACE_S = 1.0
NUM_KEPT_BLOCKS = NUM_SCRATCH_BLOCKS + NUM_CANARY_BLOCKS
"""Blocks at the end of the arena that no worker's block lies in: the canary's, then those of measurements."""

TRIAL_LAYOUT = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=1, head_dim=64, dtype="fp32")
"""Layout of the pool that the canary uses before a worker has told its own: 8 KiB a block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvStoreView:
    """A snapshot for reports.

    Attributes:
        counts: Of the workers' blocks; None before a worker has told its layout.
        totals: Counters since the start.
        canary: Counters of the canary's block, which are in none of the others.
        num_own_messages: Messages handled for the canary and the timer: work for nobody else.
        num_indexed: Different blocks in the workers' caches.
        mailbox: Of the actor.
    """

    counts: LedgerCounts | None
    totals: StoreTotals = field(default_factory=StoreTotals)
    canary: StoreTotals = field(default_factory=StoreTotals)
    num_own_messages: int = 0
    num_indexed: int
    mailbox: ActorStats


class KvStoreActor:
    """The kvstore's only writer.

    Args:
        config: Sizes and bounds.
        epoch: Lifetime of this process.
        clock: Ends leases.
        connect: Makes a pool and its connector from (number of blocks, bytes of a block), on another thread;
            called for the canary at first, and again when a worker tells the size of its blocks.
        new_id: Makes unguessable lease ids.

    Attributes:
        layout: Of the workers' blocks; None before a worker has told it.
        connector: Of the pool; the canary's own while `layout` is None.
        canary_hash: Name of the canary's block. No other process can know it.
        reopened: Set whenever a pool was opened.
    """

    def __init__(
        self,
        config: KvStoreConfig,
        epoch: str,
        clock: Clock,
        connect: Callable[[int, int], Connector],
        new_id: Callable[[], str],
    ) -> None:
        self._config = config
        self._epoch = epoch
        self._clock = clock
        self._connect = connect
        self._new_id = new_id
        self._index = PrefixIndex(config.max_workers)
        self._epochs: dict[str, str] = {}
        self._pool: BlockPool | None = None
        self._num_own_messages = 0
        self._is_leaving = False
        self.layout: KvLayout | None = None
        self.connector: Connector | None = None
        self.canary_hash: BlockHash = root_hash("canary", new_id().encode())
        self.reopened = asyncio.Event()
        self.mailbox: Actor[Message] = Actor(config.name, self._handle, config.mailbox)

    def view(self) -> KvStoreView:
        """Return a snapshot."""
        pool = self._pool
        return KvStoreView(
            counts=None if pool is None or self.layout is None else pool.counts(),
            totals=StoreTotals() if pool is None else pool.totals,
            canary=StoreTotals() if pool is None else pool.canary_totals,
            num_own_messages=self._num_own_messages,
            num_indexed=self._index.num_hashes,
            mailbox=self.mailbox.stats(),
        )

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
        end_s = self._clock.now() + grace_s
        while num_leases and self._clock.now() < end_s:
            await asyncio.sleep(LOOK_S)
            num_leases = self._num_leases()
        if num_leases:
            logger.warning("drain ran out of time", extra={"num_leases": num_leases})
        return num_leases

    async def close(self) -> None:
        """Stop handling messages and free the pool."""
        await self.mailbox.stop(STOP_GRACE_S)
        if self.connector is not None:
            await self.connector.close()

    async def _handle(self, message: Message) -> None:
        match message:
            case Tick():
                self._num_own_messages += 1
                if self._pool is not None:
                    self._pool.expire(self._clock.now())
            case Meet():
                await _answer_later(message.reply, self._meet(message))
            case Prepare():
                await _answer_later(message.reply, self._prepare())
            case Announce():
                _answer(message.reply, lambda: self._announce(message.report))
            case Forget():
                _answer(message.reply, lambda: self._forget(message.worker))
            case CloseDoor():
                self._is_leaving = True
                _answer(message.reply, self._num_leases)
            case _:
                self._handle_blocks(message)

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
                _answer(message.reply, lambda: self._pool is not None and self._pool.quarantine(message.block_hash))
            case ListHolders():
                _answer(message.reply, lambda: () if self._pool is None else self._pool.holders())
            case _:
                assert_never(message)

    async def _meet(self, message: Meet) -> None:
        if self._epochs.get(message.worker, message.epoch) != message.epoch:
            self._forget(message.worker)
        if message.layout is None:
            return
        if self.layout is None:
            await self._open_pool(message.layout)
        else:
            check_layout(message.layout, self.layout.block_bytes)
        if len(self._epochs) < self._config.max_workers:
            self._epochs[message.worker] = message.epoch

    async def _prepare(self) -> KvLayout:
        self._num_own_messages += 1
        if self.connector is None:
            await self._open_arena(NUM_KEPT_BLOCKS, TRIAL_LAYOUT)
        return self.layout or TRIAL_LAYOUT

    async def _open_pool(self, layout: KvLayout) -> None:
        num_blocks = self._config.memory_bytes // layout.block_bytes
        if num_blocks <= NUM_KEPT_BLOCKS:
            raise NotReady(
                f"memory_bytes of {self._config.memory_bytes} holds {num_blocks} blocks of {layout.block_bytes} bytes; "
                f"{NUM_KEPT_BLOCKS} are kept for measurements and the canary",
                field="memory_bytes",
            )
        await self._close_trial()
        await self._open_arena(num_blocks, layout)
        self.layout = layout
        logger.info("block pool opened", extra={"num_blocks": num_blocks, "block_bytes": layout.block_bytes})

    async def _open_arena(self, num_blocks: int, layout: KvLayout) -> None:
        self.connector = await asyncio.to_thread(self._connect, num_blocks, layout.block_bytes)
        self._pool = BlockPool(num_blocks - NUM_KEPT_BLOCKS, self._epoch, self._config.settle_s, self.canary_hash)
        self.reopened.set()

    async def _close_trial(self) -> None:
        connector, self.connector, self._pool = self.connector, None, None
        if connector is not None:
            await connector.close()

    def _match(self, hashes: Sequence[bytes]) -> dict[str, int]:
        checked = checked_hashes(hashes, self._config.max_hashes)
        matches = self._index.match(checked)
        num_stored = 0 if self._pool is None else self._pool.match(checked)
        if num_stored:
            matches[self._config.name] = num_stored
        return matches

    def _reserve(self, message: ReservePut) -> Granted:
        checked = checked_hashes(message.hashes, self._config.max_hashes)
        terms, end_ms = self._terms(checked, message.writer, message.deadline_unix_ms)
        pool = self._open(terms.lease_id)
        if self.layout is not None:
            check_layout(message.layout, self.layout.block_bytes)
        put = pool.reserve(checked, terms)
        if not put.blocks:
            return Granted()
        return Granted(lease_id=terms.lease_id, blocks=put.blocks, deadline_unix_ms=end_ms, indices=put.indices)

    def _commit(self, message: CommitPut) -> int:
        pool = self._open(message.lease_id)
        return pool.commit(message.lease_id, message.epoch, self._clock.now(), is_complete=message.is_complete)

    def _acquire(self, message: AcquireGet) -> Granted:
        checked = checked_hashes(message.hashes, self._config.max_hashes)
        terms, end_ms = self._terms(checked, message.reader, message.deadline_unix_ms)
        blocks = () if self._pool is None else self._pool.acquire(checked, terms)
        return Granted(lease_id=terms.lease_id, blocks=blocks, deadline_unix_ms=end_ms) if blocks else Granted()

    def _release(self, message: ReleaseGet) -> None:
        self._open(message.lease_id).release(message.lease_id, message.epoch, self._clock.now())

    def _announce(self, report: Report) -> bool:
        checked_hashes(report.stored, self._config.max_hashes)
        checked_hashes(report.removed, self._config.max_hashes)
        return self._index.apply(report)

    def _forget(self, worker: str) -> None:
        self._index.forget(worker)
        self._epochs.pop(worker, None)
        if self._pool is not None:
            self._pool.drop_writer(worker)

    def _open(self, lease_id: str) -> BlockPool:
        if self._pool is None or (self.layout is None and not is_canary(lease_id)):
            raise NotReady("the kvstore has no pool yet: a worker must shake hands first")
        return self._pool

    def _is_of_canary(self, message: BlockMessage) -> bool:
        match message:
            case ReservePut(hashes=hashes) | AcquireGet(hashes=hashes):
                return tuple(hashes) == (self.canary_hash,)
            case CommitPut(lease_id=lease_id) | ReleaseGet(lease_id=lease_id):
                return is_canary(lease_id)
            case _:
                return False

    def _num_leases(self) -> int:
        return 0 if self._pool is None else self._pool.counts().num_leases

    def _terms(self, hashes: Sequence[BlockHash], holder: str, deadline_unix_ms: int) -> tuple[Terms, int]:
        if self._is_leaving:
            raise Draining("the kvstore is leaving: take this as a miss")
        now_ms = self._clock.unix_ms()
        granted_s = lease_end_s((deadline_unix_ms - now_ms) / 1000, self._config.max_lease_s)
        new_id = self._new_id()
        lease_id = new_id if self._pool is None else self._pool.lease_name(hashes, new_id)
        terms = Terms(lease_id=lease_id, holder=holder, deadline_s=self._clock.now() + granted_s)
        return terms, now_ms + int(granted_s * 1000)


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
