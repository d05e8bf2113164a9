"""Blocks promised to prefill workers, and who still writes into them."""

import asyncio
import logging
import secrets
from dataclasses import dataclass, field

from headrace.clock import Clock
from headrace.core.block import BlockId
from headrace.core.request import Token
from headrace.errors import DeadlineExceeded
from headrace.worker.engine import AsyncEngine

logger = logging.getLogger(__name__)

EXPIRE_INTERVAL_S = 1.0
WRITER_GRACE_S = 5.0
"""How long after its deadline a writer that never reported is still believed to write."""


@dataclass(slots=True, kw_only=True)
class Reservation:
    """Blocks that prefill workers may write into while the sequence waits for its KV.

    Attributes:
        lease_id: Unguessable; holding it is the capability to write and to commit.
        block_ids: The blocks.
        deadline_unix_ms: When the promise ends by itself.
        first: The first token, once the KV has landed.
        cached_tokens: Prompt tokens that the prefill worker did not compute.
        writer: The attempt that has begun and not reported its end.
        ended_writers: Attempts that are over; a begin of theirs that comes late is refused.
    """

    lease_id: str
    block_ids: tuple[BlockId, ...]
    deadline_unix_ms: int
    first: Token | None = None
    cached_tokens: int = 0
    writer: str | None = None
    ended_writers: set[str] = field(default_factory=set)
    landed: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Writer:
    """Whose blocks an attempt writes into, and when its time is over."""

    lease_id: str
    end_unix_ms: int


class Reservations:
    """Owner of all reservations of a worker.

    The engine's ledger counts each writer apart from the sequence: a sequence may be cancelled
    while a peer still writes, but its blocks are not reused before that peer has reported its
    end, or the clock says that it cannot write any more. A reservation has one writer at a time: late
    data of a first one would overwrite what a second one has delivered.

    Args:
        engine: Owner of the blocks.
        clock: Ends writers that never report.
        epoch: Lifetime of this process; reports for another are fenced.
    """

    def __init__(self, engine: AsyncEngine, clock: Clock, epoch: str) -> None:
        self._engine = engine
        self._clock = clock
        self._epoch = epoch
        self._live: dict[str, Reservation] = {}
        self._writers: dict[str, _Writer] = {}

    def num_writers(self) -> int:
        """Return how many writers have begun and not ended."""
        return len(self._writers)

    def grant(self, block_ids: tuple[BlockId, ...], deadline_unix_ms: int) -> Reservation:
        """Promise blocks to prefill workers."""
        reservation = Reservation(
            lease_id=secrets.token_hex(16), block_ids=block_ids, deadline_unix_ms=deadline_unix_ms
        )
        self._live[reservation.lease_id] = reservation
        return reservation

    def revoke(self, reservation: Reservation) -> None:
        """The sequence left; writers that have begun are still counted until they report."""
        self._live.pop(reservation.lease_id, None)

    def begin_write(self, lease_id: str, epoch: str, writer_id: str) -> bool:
        """Count a writer.

        Returns:
            False when the sequence is gone, its KV has landed, the lease is of another epoch, another writer
            has not ended, or this one has.

        Raises:
            Saturated: the engine's mailbox is full; nothing is held.
        """
        reservation = self._live.get(lease_id) if epoch == self._epoch else None
        if reservation is None or reservation.first is not None or writer_id in reservation.ended_writers:
            return False
        if reservation.writer is not None or writer_id in self._writers:
            return reservation.writer == writer_id
        self._engine.hold_writer(writer_id, reservation.block_ids)
        end_unix_ms = reservation.deadline_unix_ms + int(WRITER_GRACE_S * 1000)
        self._writers[writer_id] = _Writer(lease_id=lease_id, end_unix_ms=end_unix_ms)
        reservation.writer = writer_id
        return True

    def commit(self, lease_id: str, writer_id: str, first: Token, cached_tokens: int) -> bool:
        """Take note that a writer delivered all KV; False when the sequence does not wait for it."""
        reservation = self._live.get(lease_id)
        is_expected = reservation is not None and reservation.writer == writer_id and reservation.first is None
        self.end_write(writer_id, lease_id)
        if reservation is None or not is_expected:
            return False
        reservation.first, reservation.cached_tokens = first, cached_tokens
        reservation.landed.set()
        return True

    def end_write(self, writer_id: str, lease_id: str = "") -> None:
        """Take note that a writer writes no more.

        Args:
            writer_id: The writer; one that never began cannot begin any more.
            lease_id: What it was to fill.
        """
        writer = self._writers.pop(writer_id, None)
        if writer is not None:
            self._engine.release_writer(writer_id)
        reservation = self._live.get(writer.lease_id if writer is not None else lease_id)
        if reservation is not None:
            reservation.ended_writers.add(writer_id)
            if reservation.writer == writer_id:
                reservation.writer = None

    def expire_writers(self) -> int:
        """End writers whose time is over; returns how many."""
        now_ms = self._clock.unix_ms()
        expired = [writer_id for writer_id, writer in self._writers.items() if writer.end_unix_ms <= now_ms]
        for writer_id in expired:
            self.end_write(writer_id)
        return len(expired)

    async def run_expiry(self) -> None:
        """End writers by the clock until cancelled."""
        while True:
            await asyncio.sleep(EXPIRE_INTERVAL_S)
            if num_expired := self.expire_writers():
                logger.warning("writers never reported", extra={"num_writers": num_expired})

    async def wait(self, reservation: Reservation) -> Token:
        """Wait for the first token.

        Raises:
            DeadlineExceeded: the promise ended by the clock.
        """
        remaining_s = (reservation.deadline_unix_ms - self._clock.unix_ms()) / 1000
        try:
            # Not wait_for: in Python 3.11 it swallows a cancellation that meets the result.
            async with asyncio.timeout(max(0.0, remaining_s)):
                await reservation.landed.wait()
        except TimeoutError:
            raise DeadlineExceeded("the prompt's KV did not arrive before the request's deadline") from None
        if reservation.first is None:
            raise AssertionError("landed without a first token")
        return reservation.first
