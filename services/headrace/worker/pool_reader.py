"""Reads named blocks out of somebody else's pool: a kvstore's or another worker's, which is the same."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from headrace.core.block import BlockHash, BlockId, Span
from headrace.errors import HeadraceError
from headrace.runtime.channels import translate_errors
from headrace.v1 import block_pb2, pool_pb2
from headrace.worker.digests import BlockDigests
from headrace.worker.pool_link import CONTROL_TIMEOUT_S, PoolLink

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Blocks to read.

    Attributes:
        hashes: Their names, in order.
        local_ids: As many own blocks to fill.
        tenant: Whose they are; empty for public ones.
    """

    hashes: tuple[BlockHash, ...]
    local_ids: tuple[BlockId, ...]
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadTerms:
    """For how long to read.

    Attributes:
        lease_end_s: Until when the blocks are wanted, on the own clock.
        answer_by_s: Until when the owner may take to lend them; what it lends later is not read.
        group_blocks: Most blocks of one READ.
        num_whole: Leading blocks that are read whole; all others are read span by span. None reads all whole.
        spans: Parts of a block, together all of it.
        may_go_on: Whether to post another READ.
        deadline_s: When a READ that is posted now is given up; asked with whether it is the first of the spans.
        on_late: Hears of a READ that was given up and has landed: bytes and seconds since the first call.
        on_landed: Hears how many of the blocks, from the first on, have landed and are what their digests say.
        on_span: Hears how many spans of the layered blocks have landed, and how many blocks were there at all.
    """

    lease_end_s: float
    answer_by_s: float
    group_blocks: int
    num_whole: int | None = None
    spans: tuple[Span, ...] = ()
    may_go_on: Callable[[], bool] = lambda: True
    deadline_s: Callable[[bool], float]
    on_late: Callable[[int, float], None] = lambda _, __: None
    on_landed: Callable[[int], None] = lambda _: None
    on_span: Callable[[int, int], None] = lambda _, __: None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadResult:
    """What came of it.

    Attributes:
        num_landed: Leading blocks that are good; 0 is a miss, whatever its cause.
        num_leased: Leading blocks that were there.
        num_from_disk: Of them, read from disk for this.
        is_measured: Whether it says how fast the lane is: not if the owner had none of the blocks or was not asked.
        epoch: Lifetime of the owner; empty if it lent nothing.
        seconds: From the first call to the last, without connecting.
        corrupt: A block whose bytes differed from its digest.
    """

    num_landed: int = 0
    num_leased: int = 0
    num_from_disk: int = 0
    is_measured: bool = False
    epoch: str = ""
    seconds: float = 0.0
    corrupt: BlockHash | None = None


class PoolReader:
    """Reads from one address.

    Args:
        link: The way there.
        digests: Checks what has landed.
    """

    def __init__(self, link: PoolLink, digests: BlockDigests) -> None:
        self.link = link
        self._digests = digests

    async def read(self, wanted: Wanted, terms: ReadTerms) -> ReadResult:
        """Read the longest prefix of the wanted blocks that is there, as far as the terms let it.

        At most one READ is in flight, or those of the layered blocks, so that is all that can be lost. Cancelling it
        leaves what was posted to its end. After a miss own blocks may still be written to; see `PoolLink.is_settled`.
        """
        reading = _Reading(self.link, self._digests, wanted, terms)
        await self.link.attempt("read", reading.run, None)
        return reading.result()

    async def report_corrupt(self, block_hash: BlockHash, tenant: str) -> None:
        """Tell the owner that a block's bytes are wrong."""
        request = pool_pb2.ReportCorruptRequest(
            block_hash=block_hash, reader=self.link.parts.caller.name, tenant=tenant
        )

        async def send() -> None:
            await self.link.pool_stub().ReportCorrupt(request, timeout=CONTROL_TIMEOUT_S)

        await self.link.attempt("report", send, None)


class _Reading:
    """One read, from its lease to the lease's end."""

    def __init__(self, link: PoolLink, digests: BlockDigests, wanted: Wanted, terms: ReadTerms) -> None:
        self._link = link
        self._digests = digests
        self._wanted = wanted
        self._terms = terms
        self._lease = block_pb2.BlockLease()
        self._begun_s = link.parts.clock.now()
        self._num_from_disk = 0
        self._num_read = 0
        self._corrupt: BlockHash | None = None
        self._is_measured = False
        self._is_believed = False

    def result(self) -> ReadResult:
        return ReadResult(
            num_landed=self._num_read if self._is_believed else 0,
            num_leased=len(self._lease.block_ids),
            num_from_disk=self._num_from_disk,
            is_measured=self._is_measured,
            epoch=self._lease.epoch,
            seconds=self._link.parts.clock.now() - self._begun_s,
            corrupt=self._corrupt,
        )

    async def run(self) -> None:
        await self._link.meet()
        self._begun_s = self._link.parts.clock.now()
        if self._begun_s >= self._terms.answer_by_s:
            return  # Connecting took all the patience there was; it tells nothing of the lane.
        self._is_measured = True
        digests = await self._acquire()
        if not self._lease.block_ids:
            self._is_measured = False
            return
        try:
            await self._read_groups(digests)
        finally:
            await self._release()

    async def _acquire(self) -> tuple[int, ...]:
        caller = self._link.parts.caller
        request = pool_pb2.AcquireGetRequest(
            block_hashes=self._wanted.hashes,
            model_fingerprint=caller.fingerprint,
            reader=caller.name,
            reader_epoch=caller.epoch,
            deadline_unix_ms=self._link.unix_ms(self._terms.lease_end_s),
            tenant=self._wanted.tenant,
        )
        timeout_s = min(CONTROL_TIMEOUT_S, max(0.0, self._terms.answer_by_s - self._link.parts.clock.now()))
        answer = await self._link.pool_stub().AcquireGet(request, timeout=timeout_s)
        self._lease, self._num_from_disk = answer.lease, answer.num_from_disk
        return tuple(answer.digests)

    async def _read_groups(self, digests: tuple[int, ...]) -> None:
        terms, num_blocks = self._terms, len(self._lease.block_ids)
        whole_end = num_blocks if terms.num_whole is None else min(terms.num_whole, num_blocks)
        starts = range(0, whole_end, terms.group_blocks)
        groups = [(start, min(start + terms.group_blocks, whole_end), False) for start in starts]
        if whole_end < num_blocks:
            groups.append((whole_end, num_blocks, True))
        agent = await self._agent()
        for start, end, is_layered in groups:
            if not await self._read_group(agent, start, end, is_layered=is_layered):
                return
            num_good = await self._digests.num_good(self._wanted.local_ids[start:end], digests[start:end])
            self._num_read += num_good
            terms.on_landed(self._num_read)
            if num_good < end - start:
                self._corrupt = self._wanted.hashes[self._num_read]
                return

    async def _agent(self) -> str:
        """Connect to who granted the lease, if that is another lifetime than the one met; not measured either."""
        clock, was_in_time = self._link.parts.clock, self._terms.may_go_on()
        begun_s, self._is_measured = clock.now(), False
        agent = await self._link.agent(self._lease.epoch)
        self._begun_s += clock.now() - begun_s
        self._is_measured = self._terms.may_go_on() or not was_in_time
        return agent

    def _note_late(self, num_bytes: int) -> None:
        self._terms.on_late(num_bytes, self._link.parts.clock.now() - self._begun_s)

    async def _read_group(self, agent: str, start: int, end: int, *, is_layered: bool) -> bool:
        """Read blocks whole or span by span; return whether that was begun, for then it is brought to its end."""
        terms = self._terms
        if not terms.may_go_on():
            return False
        deadline_s = terms.deadline_s(is_layered)
        local_ids, remote_ids = self._wanted.local_ids[start:end], tuple(self._lease.block_ids[start:end])
        block_bytes = self._link.parts.caller.layout.block_bytes
        for number, span in enumerate(terms.spans if is_layered else (None,), start=1):
            num_bytes = start * block_bytes + (end - start) * (span.end if span else block_bytes)
            on_late = partial(self._note_late, num_bytes)
            await self._link.parts.connector.read(agent, local_ids, remote_ids, deadline_s, span, on_late)
            if is_layered:
                terms.on_span(number, len(self._lease.block_ids))
        return True

    async def _release(self) -> None:
        """End the lease. Its success proves that the blocks were still the named ones when the data had landed."""
        request = pool_pb2.ReleaseGetRequest(
            lease_id=self._lease.lease_id, epoch=self._lease.epoch, tenant=self._wanted.tenant
        )
        try:
            async with translate_errors(self._link.address):
                await self._link.pool_stub().ReleaseGet(request, timeout=CONTROL_TIMEOUT_S)
        except HeadraceError as error:
            logger.info("blocks read not believed", extra={"address": self._link.address, "error": error.code})
        else:
            self._is_believed = True
