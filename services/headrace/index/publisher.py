"""What a location says of its own blocks, and how it gets into the shared log."""

import asyncio
import contextlib
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass

from redis.exceptions import RedisError

from headrace.clock import Clock
from headrace.core.block import HASH_BYTES, BlockHash
from headrace.core.placement import Origin, Tier
from headrace.index.connection import heed_cancellation
from headrace.index.events import Change, ChangeKind, Event, Snapshot, event_to_bytes, snapshot_to_bytes
from headrace.index.log import IndexLog, Lifetime, Written

INTERVAL_S = 0.25
"""Changes of this long are one event."""
HEARTBEAT_S = 2.0
"""How often a location without changes writes; so soon it notices that Redis has forgotten it."""
LONGEST_PAUSE_S = 5.0
EVENT_BLOCKS = 8192
"""Most blocks of an event, 128 KiB."""
PART_BLOCKS = 65_536
"""Most blocks of a part of a snapshot, 1 MiB."""
MAX_PENDING = 262_144
"""Most unpublished changes that are kept one by one; beyond, a snapshot is cheaper."""
MAX_QUARANTINED = 65_536
LEAST_SNAPSHOT_BYTES = 65_536
SNAPSHOT_AGE_S = 60.0
SNAPSHOT_BYTES_PER_S = 100_000.0
"""A delta pins the stream for others too, so it is folded in after a while, at no more than this rate."""

_log = logging.getLogger(__name__)


class _Holdings:
    """All blocks of a location, by tier and origin. The hashes are those of the owner: a set slot each."""

    def __init__(self) -> None:
        self._sets: dict[tuple[Tier, Origin], set[BlockHash]] = {}

    def store(self, tier: Tier, origin: Origin, hashes: Iterable[BlockHash]) -> None:
        self.remove(tier, hashes)
        self._sets.setdefault((tier, origin), set()).update(hashes)

    def remove(self, tier: Tier, hashes: Iterable[BlockHash]) -> None:
        for (held_tier, _), held in self._sets.items():
            if held_tier is tier:
                held.difference_update(hashes)

    def num_blocks(self) -> int:
        return sum(map(len, self._sets.values()))

    def changes(self) -> list[Change]:
        """Return all of it as it is now, cut into parts."""
        return [
            Change(kind=ChangeKind.STORED, tier=tier, origin=origin, hashes=hashes[start : start + PART_BLOCKS])
            for (tier, origin), held in self._sets.items()
            for hashes in (tuple(held),)
            for start in range(0, len(hashes), PART_BLOCKS)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sending:
    """An event whose answer is not known yet, and the snapshot that is right after it."""

    sequence: int
    event: bytes
    quarantined: tuple[BlockHash, ...]
    snapshot: list[Change] | None


class IndexPublisher:
    """Publishes what one location holds; owns the full set of it.

    Every change is noted at once and published soon. It never blocks nor fails its owner: without Redis it keeps
    the last state of each changed block, and beyond a bound only the fact that there is more to say.

    Args:
        log: Where to.
        life: Who publishes.
        clock: Paces it.
        least_snapshot_bytes: A snapshot is not replaced before as many bytes of events follow it.

    Attributes:
        is_connected: Whether the last write was answered.
        is_fenced: Whether a later lifetime of the location is registered; then nothing is published any more.
        num_published: Events written.
        num_resyncs: Times the location had to register again.
        problem: Why it does not publish; empty if it does.
    """

    def __init__(
        self, log: IndexLog, life: Lifetime, clock: Clock, *, least_snapshot_bytes: int = LEAST_SNAPSHOT_BYTES
    ) -> None:
        self._log = log
        self._life = life
        self._clock = clock
        self._least_snapshot_bytes = least_snapshot_bytes
        self._held = _Holdings()
        self._pending: dict[tuple[Tier, BlockHash], Origin | None] = {}
        self._quarantined: dict[BlockHash, None] = {}
        self._told: dict[BlockHash, None] = {}
        self._sending: _Sending | None = None
        self._next = 0
        self._must_resync = False
        self._wake = asyncio.Event()
        self._delta_bytes = 0
        self._snapshot_s = clock.now()
        self._published_s = -math.inf
        self.is_connected = False
        self.is_fenced = False
        self.num_published = 0
        self.num_resyncs = 0
        self.problem = "not connected yet"

    @property
    def num_blocks(self) -> int:
        """Blocks held, one per tier."""
        return self._held.num_blocks()

    @property
    def is_current(self) -> bool:
        """Whether all that was noted is in the log, as far as is known."""
        return bool(self.is_connected and self._next and not self._has_work())

    def note(self, changes: Iterable[Change]) -> None:
        """Take changes in; they are published soon, the last state of each block only."""
        for change in changes:
            if change.kind is ChangeKind.QUARANTINED:
                self._note_quarantined(change.hashes)
                continue
            is_stored = change.kind is ChangeKind.STORED
            if is_stored:
                self._held.store(change.tier, change.origin, change.hashes)
            else:
                self._held.remove(change.tier, change.hashes)
            origin = change.origin if is_stored else None
            self._pending.update(((change.tier, block_hash), origin) for block_hash in change.hashes)
        if len(self._pending) > MAX_PENDING:
            self._pending.clear()
            self._must_resync = True
        self._wake.set()

    async def run(self) -> None:
        """Publish until cancelled, or until a later lifetime of the location takes over."""
        pause_s = INTERVAL_S
        while not self.is_fenced:
            try:
                await self.step()
                heed_cancellation()
            except (RedisError, OSError) as error:
                self._note_problem(f"{type(error).__name__}: {error}")
                heed_cancellation()
                await asyncio.sleep(pause_s)
                pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
                continue
            self.is_connected, self.problem = True, ""
            pause_s = INTERVAL_S
            await self._rest()
        self._note_problem("a later lifetime of this location is registered")

    async def step(self) -> None:
        """Make one write; without anything to say, a sign of life.

        Raises:
            RedisError: Redis does not answer, or OSError; the next step makes up for it.
        """
        if self._next == 0:
            answer = await self._log.begin(self._life, 0)
            self._next = 1 if answer is Written.DONE else 0
        elif self._must_resync:
            answer = await self._resync()
        elif self._has_work():
            answer = await self._publish()
        elif self._is_snapshot_due():
            answer = await self._fold(self._held.changes())
        else:
            answer = await self._log.touch(self._life, self._next)
        self.is_fenced = answer is Written.FENCED
        if answer is Written.RESYNC:
            self._must_resync = True

    async def leave(self) -> None:
        """Take the location out of the index at once; for the end, after `run` was cancelled.

        Without Redis nothing happens: the location is forgotten when its silence is noticed.
        """
        try:
            await self._log.leave(self._life)
        except (RedisError, OSError) as error:
            self._note_problem(f"{type(error).__name__}: {error}")

    def _note_quarantined(self, hashes: Iterable[BlockHash]) -> None:
        for tier in Tier:
            self._held.remove(tier, hashes)
            for block_hash in hashes:
                self._pending.pop((tier, block_hash), None)
        self._quarantined.update(dict.fromkeys(hashes))
        _bound(self._quarantined)

    def _note_problem(self, problem: str) -> None:
        if self.is_connected or not self.problem:
            _log.warning("index_not_published", extra={"location": self._life.location, "problem": problem})
        self.is_connected, self.problem = False, problem

    def _has_work(self) -> bool:
        return bool(self._must_resync or self._sending or self._pending or self._quarantined)

    async def _rest(self) -> None:
        """Wait for a change, and until it is its time."""
        self._wake.clear()
        if not self._has_work():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._wake.wait()
        if self._sending is None and len(self._pending) < EVENT_BLOCKS:
            await asyncio.sleep(max(0.0, self._published_s + INTERVAL_S - self._clock.now()))

    async def _resync(self) -> Written:
        """Register again with all there is, whatever readers and log have seen.

        The event's number skips that of an event whose answer was lost and one more, and no number is tried twice:
        so no reader can expect it as its next, and every reader notices that it lacks something.
        """
        # The log may have lost its memory before all have read what was told.
        sending = () if self._sending is None else self._sending.quarantined
        self._quarantined = dict.fromkeys((*self._told, *sending, *self._quarantined))
        self._told.clear()
        self._sending = None
        self._pending.clear()
        sequence = self._next + 2
        self._next = sequence + 1
        # Changes during the writes below are pending again and follow as ordinary events.
        self._must_resync = False
        try:
            parts = await self._encoded(self._held.changes(), self._next)
            answer = await self._log.begin(self._life, sequence, parts)
        except BaseException:
            self._must_resync = True
            raise
        self.num_resyncs += 1
        self._published_s = self._clock.now()
        if answer is Written.DONE:
            self._note_folded()
        return answer

    async def _publish(self) -> Written:
        """Append the next event, or the last one again if its answer was lost."""
        self._sending = sending = self._sending or self._next_event()
        answer = await self._log.append(self._life, sending.sequence, sending.event, sending.quarantined)
        if answer is not Written.DONE:
            return answer
        self._sending = None
        self._told |= dict.fromkeys(sending.quarantined)
        _bound(self._told)
        self._next = sending.sequence + 1
        self._published_s = self._clock.now()
        self._delta_bytes += len(sending.event)
        self.num_published += 1
        return answer if sending.snapshot is None else await self._fold(sending.snapshot)

    def _next_event(self) -> _Sending:
        hashes: dict[tuple[ChangeKind, Tier, Origin | None], list[BlockHash]] = {}
        for tier, block_hash in list(self._pending)[:EVENT_BLOCKS]:
            origin = self._pending.pop((tier, block_hash))
            kind = ChangeKind.REMOVED if origin is None else ChangeKind.STORED
            hashes.setdefault((kind, tier, origin), []).append(block_hash)
        quarantined = tuple(self._quarantined)[:EVENT_BLOCKS]
        for block_hash in quarantined:
            del self._quarantined[block_hash]
        changes = [Change(kind=ChangeKind.QUARANTINED, tier=Tier.DEVICE, hashes=quarantined)] if quarantined else []
        changes += [
            Change(kind=kind, tier=tier, origin=origin or Origin(), hashes=tuple(group))
            for (kind, tier, origin), group in hashes.items()
        ]
        event = Event(location=self._life.location, epoch=self._life.epoch, sequence=self._next, changes=tuple(changes))
        # What is held now is what the log says after this event, but only if nothing else is pending.
        is_due = not self._pending and self._is_snapshot_due()
        return _Sending(
            sequence=self._next,
            event=event_to_bytes(event),
            quarantined=quarantined,
            snapshot=self._held.changes() if is_due else None,
        )

    def _is_snapshot_due(self) -> bool:
        """Return whether the delta costs readers more than a snapshot, or has pinned the stream for long."""
        size = max(self._least_snapshot_bytes, HASH_BYTES * self.num_blocks)
        age_s = self._clock.now() - self._snapshot_s
        is_old = age_s > max(SNAPSHOT_AGE_S, size / SNAPSHOT_BYTES_PER_S)
        return self._delta_bytes > size or (is_old and self._delta_bytes > 0)

    async def _fold(self, stored: list[Change]) -> Written:
        """Replace the snapshot and let the stream be trimmed."""
        answer = await self._log.snapshot(self._life, self._next, await self._encoded(stored, self._next))
        if answer is Written.DONE:
            self._note_folded()
        return answer

    def _note_folded(self) -> None:
        self._delta_bytes = 0
        self._snapshot_s = self._clock.now()

    async def _encoded(self, stored: list[Change], next_sequence: int) -> list[bytes]:
        """Return messages that joined are the snapshot."""
        parts = []
        for change in stored:
            part = Snapshot(
                location=self._life.location, epoch=self._life.epoch, next_sequence=next_sequence, stored=(change,)
            )
            parts.append(snapshot_to_bytes(part))
            await asyncio.sleep(0)  # the owner's loop goes on between two parts
        return parts


def _bound(hashes: dict[BlockHash, None]) -> None:
    """Drop the oldest beyond `MAX_QUARANTINED`."""
    while len(hashes) > MAX_QUARANTINED:
        del hashes[next(iter(hashes))]
