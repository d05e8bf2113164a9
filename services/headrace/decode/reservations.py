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
        writers: Attempts that have begun and not reported their end.
    """

    lease_id: str
    block_ids: tuple[BlockId, ...]
    deadline_unix_ms: int
    first: Token | None = None
    cached_tokens: int = 0
    writers: set[str] = field(default_factory=set)
    landed: asyncio.Event = field(default_factory=asyncio.Event)


class Reservations:
    """Owner of all reservations of a worker.

    The engine's ledger counts each writer apart from the sequence: a sequence may be cancelled
    while a peer still writes, but its blocks are not reused before that peer has reported its
    end, or the clock says that it cannot write any more.

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
        self._writer_ends_ms: dict[str, int] = {}

    def num_writers(self) -> int:
        """Return how many writers have begun and not ended."""
        return len(self._writer_ends_ms)

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
        """Count a writer; False when the sequence is gone, its KV has landed, or the lease is of another epoch."""
        reservation = self._live.get(lease_id) if epoch == self._epoch else None
        if reservation is None or reservation.first is not None:
            return False
        if writer_id not in self._writer_ends_ms:
            self._engine.hold_writer(writer_id, reservation.block_ids)
            self._writer_ends_ms[writer_id] = reservation.deadline_unix_ms + int(WRITER_GRACE_S * 1000)
        return True

    def commit(self, lease_id: str, writer_id: str, first: Token, cached_tokens: int) -> bool:
        """Take note that a writer delivered all KV; False when the sequence no longer waits for it."""
        is_known = writer_id in self._writer_ends_ms
        self.end_write(writer_id)
        reservation = self._live.get(lease_id)
        if not is_known or reservation is None or reservation.first is not None:
            return False
        reservation.first, reservation.cached_tokens = first, cached_tokens
        reservation.landed.set()
        return True

    def end_write(self, writer_id: str) -> None:
        """Take note that a writer writes no more; unknown ones are ignored."""
        if self._writer_ends_ms.pop(writer_id, None) is not None:
            self._engine.release_writer(writer_id)

    def expire_writers(self) -> int:
        """End writers whose time is over; returns how many."""
        now_ms = self._clock.unix_ms()
        expired = [writer for writer, end_ms in self._writer_ends_ms.items() if end_ms <= now_ms]
        for writer in expired:
            self.end_write(writer)
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
            await asyncio.wait_for(reservation.landed.wait(), max(0.0, remaining_s))
        except TimeoutError:
            raise DeadlineExceeded("the prompt's KV did not arrive before the request's deadline") from None
        if reservation.first is None:
            raise AssertionError("landed without a first token")
        return reservation.first
