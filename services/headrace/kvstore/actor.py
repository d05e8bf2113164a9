"""Owns the kvstore's state: one pool, one store, one index."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar, assert_never

from headrace.clock import Clock
from headrace.core.block import BlockId, KvLayout
from headrace.core.ledger import LedgerCounts
from headrace.errors import HeadraceError, NotReady
from headrace.kvstore.config import KvStoreConfig
from headrace.kvstore.index import PrefixIndex, Report
from headrace.kvstore.policy import check_layout, checked_hashes, lease_end_s
from headrace.kvstore.store import BlockStore, StoreTotals, Terms
from headrace.runtime.actor import Actor, ActorStats
from headrace.transfer.connector import Connector
from headrace.transfer.measure import NUM_SCRATCH_BLOCKS

logger = logging.getLogger(__name__)

TICK_S = 0.25
STOP_GRACE_S = 1.0

ReplyT = TypeVar("ReplyT")
Reply: TypeAlias = "asyncio.Future[ReplyT]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """A lease on blocks; without blocks there is none and `lease_id` is empty.

    Attributes:
        indices: Which of the offered blocks to write; empty for reads.
    """

    lease_id: str = ""
    blocks: tuple[BlockId, ...] = ()
    deadline_unix_ms: int = 0
    indices: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Meet:
    """A process introduced itself; the first layout fixes the size of the blocks."""

    worker: str
    epoch: str
    layout: KvLayout | None
    reply: "Reply[None]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Who holds how much of a prefix?"""

    hashes: Sequence[bytes]
    reply: "Reply[dict[str, int]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservePut:
    """Room for blocks, please."""

    hashes: Sequence[bytes]
    layout: KvLayout
    writer: str
    deadline_unix_ms: int
    reply: "Reply[Granted]"


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitPut:
    """The writer has written, or gives up."""

    lease_id: str
    epoch: str
    is_complete: bool
    reply: "Reply[int]"


@dataclass(frozen=True, slots=True, kw_only=True)
class AcquireGet:
    """Stored blocks to read, please."""

    hashes: Sequence[bytes]
    reader: str
    deadline_unix_ms: int
    reply: "Reply[Granted]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseGet:
    """The reader has read."""

    lease_id: str
    epoch: str
    reply: "Reply[None]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Announce:
    """A worker's own cache changed."""

    report: Report
    reply: "Reply[bool]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Forget:
    """A worker's process is gone."""

    worker: str
    reply: "Reply[None]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time went by."""


Message: TypeAlias = Meet | Match | ReservePut | CommitPut | AcquireGet | ReleaseGet | Announce | Forget | Tick


@dataclass(frozen=True, slots=True, kw_only=True)
class KvStoreView:
    """A snapshot for reports.

    Attributes:
        counts: Of the pool; None before a pool exists.
        totals: Counters since the start.
        num_indexed: Different blocks in the workers' caches.
        mailbox: Of the actor.
    """

    counts: LedgerCounts | None
    totals: StoreTotals = field(default_factory=StoreTotals)
    num_indexed: int
    mailbox: ActorStats


class KvStoreActor:
    """The kvstore's only writer.

    Args:
        config: Sizes and bounds.
        epoch: Lifetime of this process.
        clock: Ends leases.
        connect: Makes the pool and its connector from (number of blocks, bytes of a block); called once,
            on another thread.
        new_id: Makes unguessable lease ids.
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
        self._store: BlockStore | None = None
        self.layout: KvLayout | None = None
        self.connector: Connector | None = None
        self.mailbox: Actor[Message] = Actor(config.name, self._handle, config.mailbox)

    def view(self) -> KvStoreView:
        """Return a snapshot."""
        store = self._store
        return KvStoreView(
            counts=None if store is None else store.counts(),
            totals=StoreTotals() if store is None else store.totals,
            num_indexed=self._index.num_hashes,
            mailbox=self.mailbox.stats(),
        )

    async def run_timer(self) -> None:
        """Let leases end by the clock until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self.mailbox.tell(Tick())

    async def close(self) -> None:
        """Stop handling messages and free the pool."""
        await self.mailbox.stop(STOP_GRACE_S)
        if self.connector is not None:
            await self.connector.close()

    async def _handle(self, message: Message) -> None:
        match message:
            case Tick():
                if self._store is not None:
                    self._store.expire(self._clock.now())
            case Meet():
                await self._answer_meet(message)
            case Announce():
                _answer(message.reply, lambda: self._announce(message.report))
            case Forget():
                _answer(message.reply, lambda: self._forget(message.worker))
            case _:
                self._handle_blocks(message)

    def _handle_blocks(self, message: Match | ReservePut | CommitPut | AcquireGet | ReleaseGet) -> None:
        if isinstance(message, ReservePut | AcquireGet) and message.reply.done():
            return  # The caller left while it waited: a lease would only end by the clock.
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
            case _:
                assert_never(message)

    async def _answer_meet(self, message: Meet) -> None:
        try:
            await self._meet(message)
        except HeadraceError as error:
            if not message.reply.done():
                message.reply.set_exception(error)
        else:
            _answer(message.reply, lambda: None)

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

    async def _open_pool(self, layout: KvLayout) -> None:
        num_blocks = self._config.memory_bytes // layout.block_bytes
        if num_blocks <= NUM_SCRATCH_BLOCKS:
            raise NotReady(
                f"memory_bytes of {self._config.memory_bytes} holds {num_blocks} blocks of {layout.block_bytes} bytes; "
                f"{NUM_SCRATCH_BLOCKS} are kept for measurements",
                field="memory_bytes",
            )
        self.connector = await asyncio.to_thread(self._connect, num_blocks, layout.block_bytes)
        self._store = BlockStore(num_blocks - NUM_SCRATCH_BLOCKS, self._epoch, self._config.settle_s)
        self.layout = layout
        logger.info("block pool opened", extra={"num_blocks": num_blocks, "block_bytes": layout.block_bytes})

    def _match(self, hashes: Sequence[bytes]) -> dict[str, int]:
        checked = checked_hashes(hashes, self._config.max_hashes)
        matches = self._index.match(checked)
        num_stored = 0 if self._store is None else self._store.match(checked)
        if num_stored:
            matches[self._config.name] = num_stored
        return matches

    def _reserve(self, message: ReservePut) -> Granted:
        store = self._open_store()
        if self.layout is not None:
            check_layout(message.layout, self.layout.block_bytes)
        checked = checked_hashes(message.hashes, self._config.max_hashes)
        terms, end_ms = self._terms(message.writer, message.deadline_unix_ms)
        put = store.reserve(checked, terms)
        if not put.blocks:
            return Granted()
        return Granted(lease_id=terms.lease_id, blocks=put.blocks, deadline_unix_ms=end_ms, indices=put.indices)

    def _commit(self, message: CommitPut) -> int:
        store = self._open_store()
        return store.commit(message.lease_id, message.epoch, self._clock.now(), is_complete=message.is_complete)

    def _acquire(self, message: AcquireGet) -> Granted:
        checked = checked_hashes(message.hashes, self._config.max_hashes)
        terms, end_ms = self._terms(message.reader, message.deadline_unix_ms)
        blocks = () if self._store is None else self._store.acquire(checked, terms)
        return Granted(lease_id=terms.lease_id, blocks=blocks, deadline_unix_ms=end_ms) if blocks else Granted()

    def _release(self, message: ReleaseGet) -> None:
        self._open_store().release(message.lease_id, message.epoch, self._clock.now())

    def _announce(self, report: Report) -> bool:
        checked_hashes(report.stored, self._config.max_hashes)
        checked_hashes(report.removed, self._config.max_hashes)
        return self._index.apply(report)

    def _forget(self, worker: str) -> None:
        self._index.forget(worker)
        self._epochs.pop(worker, None)
        if self._store is not None:
            self._store.drop_writer(worker)

    def _open_store(self) -> BlockStore:
        if self._store is None:
            raise NotReady("the kvstore has no pool yet: a worker must shake hands first")
        return self._store

    def _terms(self, holder: str, deadline_unix_ms: int) -> tuple[Terms, int]:
        now_ms = self._clock.unix_ms()
        granted_s = lease_end_s((deadline_unix_ms - now_ms) / 1000, self._config.max_lease_s)
        terms = Terms(lease_id=self._new_id(), holder=holder, deadline_s=self._clock.now() + granted_s)
        return terms, now_ms + int(granted_s * 1000)


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
