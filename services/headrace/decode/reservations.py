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
from headrace.worker.lifetimes import Lifetimes

logger = logging.getLogger(__name__)

EXPIRE_INTERVAL_S = 1.0
LANDING_S = 1.0
"""How long after its end the last data of a process may still arrive: what its kernel had taken over to send."""

WRITER_GRACE_S = 60.0
"""How long after its deadline a writer of which nothing is known is still believed to write.

It begins no write after the deadline, so what is left by then are its last chunks: longer than any transfer
deadline, a skewed clock or a pause of its process.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reused:
    """Prompt tokens that a prefill worker did not compute, and those that it need not have but did for speed."""

    cached_tokens: int = 0
    declined_tokens: int = 0


@dataclass(slots=True, kw_only=True)
class Reservation:
    """Blocks that prefill workers may write into while the sequence waits for its KV.

    Attributes:
        lease_id: Unguessable; holding it is the capability to write and to commit.
        block_ids: The blocks.
        deadline_unix_ms: When the promise ends by itself.
        version: Of a prompt that still arrives: the one whose tokens all have blocks.
        first: The first token, once the KV has landed.
        reused: What the prefill worker found, once the KV has landed.
        writer: The attempt that has begun and not reported its end.
        ended_writers: Attempts that are over; a begin of theirs that comes late is refused.
    """

    lease_id: str
    block_ids: tuple[BlockId, ...]
    deadline_unix_ms: int
    version: int = 0
    first: Token | None = None
    reused: Reused = Reused()
    writer: str | None = None
    ended_writers: set[str] = field(default_factory=set)
    landed: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The process that a writer is part of: its own address, and its lifetime."""

    address: str
    epoch: str


@dataclass(slots=True, kw_only=True)
class _Writer:
    """Whose blocks an attempt writes into, where it comes from, when its time is over, how often it was held."""

    lease_id: str
    origin: Origin
    end_unix_ms: int
    num_holds: int = 1


class Reservations:
    """Owner of all reservations of a worker.

    The engine's ledger counts each writer apart from the sequence: a sequence may be cancelled
    while a peer still writes, but its blocks are not reused before that writer has provably ended. Proofs
    are its own report, and the end of its process (see `Lifetimes`); that somebody cannot reach it is none.
    A reservation has one writer at a time: late data of a first one would overwrite what a second one has
    delivered.

    What this can cost is bounded twice. In blocks: a process out of reach holds what it had begun to fill,
    and begins no more. In time: `WRITER_GRACE_S` after the deadline of its reservation a writer is given up.

    Args:
        engine: Owner of the blocks.
        clock: Ends writers of which nothing is heard.
        epoch: Lifetime of this process; reports for another are fenced.
        lifetimes: Tells whether a writer's process is gone.
    """

    def __init__(self, engine: AsyncEngine, clock: Clock, epoch: str, lifetimes: Lifetimes) -> None:
        self._engine = engine
        self._clock = clock
        self._epoch = epoch
        self._lifetimes = lifetimes
        self._live: dict[str, Reservation] = {}
        self._writers: dict[str, _Writer] = {}

    def num_writers(self) -> int:
        """Return how many writers have begun and not ended."""
        return len(self._writers)

    def grant(self, block_ids: tuple[BlockId, ...], deadline_unix_ms: int, version: int = 0) -> Reservation:
        """Promise blocks to prefill workers."""
        reservation = Reservation(
            lease_id=secrets.token_hex(16), block_ids=block_ids, deadline_unix_ms=deadline_unix_ms, version=version
        )
        self._live[reservation.lease_id] = reservation
        return reservation

    def extend(self, reservation: Reservation, block_ids: tuple[BlockId, ...], version: int) -> None:
        """Promise more blocks; the first ones are those that were promised before.

        Raises:
            Saturated: the engine's mailbox is full; nothing is promised.
        """
        added, writer = block_ids[len(reservation.block_ids) :], self._writers.get(reservation.writer or "")
        if writer is not None and added:
            self._engine.hold_writer(_hold_id(reservation.writer, writer.num_holds), added)
            writer.num_holds += 1
        reservation.block_ids, reservation.version = block_ids, version

    def revoke(self, reservation: Reservation) -> None:
        """The sequence left; writers that have begun are still counted until they have provably ended."""
        self._live.pop(reservation.lease_id, None)

    def begin_write(self, lease_id: str, epoch: str, writer_id: str, origin: Origin) -> bool:
        """Count a writer.

        Args:
            lease_id: What it is to fill.
            epoch: Lifetime of this process that the lease is of.
            writer_id: The writer.
            origin: Whose end is the writer's end.

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
        self._engine.hold_writer(_hold_id(writer_id, 0), reservation.block_ids)
        end_unix_ms = reservation.deadline_unix_ms + int(WRITER_GRACE_S * 1000)
        self._writers[writer_id] = _Writer(lease_id=lease_id, origin=origin, end_unix_ms=end_unix_ms)
        reservation.writer = writer_id
        return True

    async def meet(self, origin: Origin) -> bool:
        """Return whether the end of a writer's process can be proven later; costs a call per lifetime."""
        return await self._lifetimes.meet(origin.address, origin.epoch)

    def commit(self, lease_id: str, writer_id: str, first: Token, reused: Reused) -> bool:
        """Take note that a writer delivered all KV; False when the sequence does not wait for it."""
        reservation = self._live.get(lease_id)
        is_expected = reservation is not None and reservation.writer == writer_id and reservation.first is None
        self.end_write(writer_id, lease_id)
        if reservation is None or not is_expected:
            return False
        reservation.first, reservation.reused = first, reused
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
            for number in range(writer.num_holds):
                self._engine.release_writer(_hold_id(writer_id, number))
        reservation = self._live.get(writer.lease_id if writer is not None else lease_id)
        if reservation is not None:
            reservation.ended_writers.add(writer_id)
            if reservation.writer == writer_id:
                reservation.writer = None

    def lose(self, lease_id: str, writer_id: str) -> bool:
        """Take note that a writer cannot be reached: one that has not begun may not begin any more.

        Returns:
            Whether another may fill the lease. While the lost one may still write, nobody may.
        """
        if writer_id not in self._writers:
            self.end_write(writer_id, lease_id)
        reservation = self._live.get(lease_id)
        return reservation is not None and reservation.writer is None

    async def review_writers(self) -> int:
        """Ask after the processes of writers whose sequence has left; returns how many of them are gone.

        A writer whose sequence waits is left alone: the router watches the process that it has sent there.
        """
        doubted = {writer.origin for writer in self._writers.values() if writer.lease_id not in self._live}
        origins = [origin for origin in doubted if origin.address]
        ends = await asyncio.gather(*(self._lifetimes.is_over(each.address, each.epoch) for each in origins))
        gone = {origin for origin, is_over in zip(origins, ends, strict=True) if is_over}
        landed_unix_ms = self._clock.unix_ms() + int(LANDING_S * 1000)
        for writer in self._writers.values():
            if writer.origin in gone:
                writer.end_unix_ms = min(writer.end_unix_ms, landed_unix_ms)
        return len(gone)

    def expire_writers(self) -> int:
        """End writers whose time is over; returns how many."""
        now_ms = self._clock.unix_ms()
        expired = [writer_id for writer_id, writer in self._writers.items() if writer.end_unix_ms <= now_ms]
        for writer_id in expired:
            self.end_write(writer_id)
        return len(expired)

    async def run_expiry(self) -> None:
        """End writers that never report until cancelled: when their process is gone, or else by the clock."""
        while True:
            await asyncio.sleep(EXPIRE_INTERVAL_S)
            await self.review_writers()
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


def _hold_id(writer_id: str | None, number: int) -> str:
    """Return the ledger's name of a writer's hold on the blocks of a reservation, or on some that came later."""
    return f"{writer_id}+{number}" if number else f"{writer_id}"
