"""A process's copy of the index: follows the shared log, and serves what it last knew when that is away."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from redis.exceptions import RedisError

from headrace.clock import Clock
from headrace.core.block import BlockHash
from headrace.errors import InvalidRequest, Saturated
from headrace.index.connection import heed_cancellation
from headrace.index.events import Applied, ChangeKind, Event, Snapshot, event_from_bytes
from headrace.index.log import READ_ENTRIES, Entry, EntryId, IndexLog, LogState, Registered

WAIT_S = 2.0
"""How long a read waits for news; all that an idle replica does is to ask again so often."""
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 5.0
MOST_REFUSED = 1024
"""Locations without room that are told of by name."""
QUARANTINED_AT_ONCE = 4096
GRACE_S = 30.0
"""How long locations are kept that a log which has lost its memory does not name."""

_log = logging.getLogger(__name__)


class Index(Protocol):
    """What is made of the log."""

    def apply(self, event: Event) -> Applied:
        """Apply an event if it is the location's next. An event 0 begins a lifetime and drops the one before.

        An event of an unknown lifetime that is not its first is a gap.
        """
        ...

    def restore(self, snapshot: Snapshot) -> None:
        """Replace all that is known of a location."""
        ...

    def forget(self, location: str) -> None:
        """Drop a location and all it holds."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowedLocation:
    """One location as a replica sees it.

    Attributes:
        is_resyncing: Whether an event was missed and its blocks could not be read anew yet.
        age_s: Seconds since its last event or snapshot arrived.
    """

    name: str
    epoch: str
    next_sequence: int
    is_resyncing: bool
    age_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaState:
    """How current a replica is.

    Attributes:
        is_connected: Whether the log can be read now.
        is_synced: Whether the replica has caught up since its start.
        problem: Why the log cannot be read; empty if it can.
        lag_s: From the last entry's place in the log to its arrival here, by the clocks of two machines.
        age_s: Seconds since the log was last read; none if it never was.
    """

    is_connected: bool
    is_synced: bool
    problem: str
    lag_s: float
    age_s: float | None
    num_events: int
    num_gaps: int
    num_fenced: int
    num_reloads: int
    locations: tuple[FollowedLocation, ...]


@dataclass(slots=True, kw_only=True)
class _Location:
    """What was taken in of a location.

    Attributes:
        position: Entries up to here are in the index; none in a new incarnation.
        gap: Entry that could not be applied even with the newest snapshot.
        drop_s: When it is dropped for the log does not name it; none if it does.
    """

    epoch: str
    next_sequence: int
    heard_s: float
    position: EntryId = field(default_factory=EntryId)
    gap: EntryId | None = None
    drop_s: float | None = None


class IndexReplica:
    """Keeps an index up to date with the log; owns the place up to which it was read.

    An entry is applied once per location, whatever is read again, so reading may always go back: that is how a
    snapshot that is older than the last entry read is brought up to date.

    Args:
        log: What to follow.
        index: What to keep; nobody else may change it.
        clock: Measures ages.
        on_quarantine: Called with blocks that every holder has to let go of; again with all that the log remembers
            whenever an entry may have been missed.
        grace_s: How long locations are kept that a log which has lost its memory does not name.
        wait_s: How long a read waits for news; less than the connection waits for an answer.
    """

    def __init__(
        self,
        log: IndexLog,
        index: Index,
        clock: Clock,
        *,
        on_quarantine: Callable[[tuple[BlockHash, ...]], None] | None = None,
        grace_s: float = GRACE_S,
        wait_s: float = WAIT_S,
    ) -> None:
        self._log = log
        self._index = index
        self._clock = clock
        self._on_quarantine = on_quarantine
        self._grace_s = grace_s
        self._wait_s = wait_s
        self._locations: dict[str, _Location] = {}
        self._position = EntryId()
        self._incarnation: str | None = None
        self._is_connected = False
        self._is_synced = False
        self._problem = "not connected yet"
        self._lag_s = 0.0
        self._read_s: float | None = None
        self._refused: set[str] = set()
        self._may_lack_quarantined = True
        self._num_events = self._num_gaps = self._num_fenced = self._num_reloads = 0

    def state(self) -> ReplicaState:
        """Return how current the index is."""
        now_s = self._clock.now()
        return ReplicaState(
            is_connected=self._is_connected,
            is_synced=self._is_synced,
            problem=self._problem,
            lag_s=self._lag_s,
            age_s=None if self._read_s is None else now_s - self._read_s,
            num_events=self._num_events,
            num_gaps=self._num_gaps,
            num_fenced=self._num_fenced,
            num_reloads=self._num_reloads,
            locations=tuple(
                FollowedLocation(
                    name=name,
                    epoch=location.epoch,
                    next_sequence=location.next_sequence,
                    is_resyncing=location.gap is not None,
                    age_s=now_s - location.heard_s,
                )
                for name, location in sorted(self._locations.items())
            ),
        )

    def knows(self, location: str) -> bool:
        """Return whether a location is in the index."""
        return location in self._locations

    def repeat_quarantined(self) -> None:
        """Tell soon of all quarantined blocks that the log remembers: blocks have come that were not here before."""
        self._may_lack_quarantined = True

    async def run(self) -> None:
        """Follow the log until cancelled; without it the index stays as it is."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                # Until it has caught up it waits for nothing, so that it soon tells whether the log is there.
                await self.step(self._wait_s if self._is_connected and self._is_synced else 0.0)
                heed_cancellation()
                pause_s = FIRST_PAUSE_S
            except (RedisError, OSError, InvalidRequest) as error:
                self._note_problem(f"{type(error).__name__}: {error}")
                heed_cancellation()
                await asyncio.sleep(pause_s)
                pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)

    async def step(self, wait_s: float) -> None:
        """Read once, and take in what is found.

        Args:
            wait_s: How long to wait for news.

        Raises:
            RedisError: Redis does not answer, or OSError; the index stays as it is.
        """
        entries, state = await self._log.read(self._position, wait_s)
        self._is_connected, self._problem, self._read_s = True, "", self._clock.now()
        if self._is_lost(state):
            await self._reload(state)
            return
        await self._repeat_quarantined()
        for entry in entries:
            self._position = await self._take(entry)
            if self._position < entry.id:
                return  # a snapshot is older than this entry: read on from there
            await asyncio.sleep(0)
        if len(entries) < READ_ENTRIES:
            self._is_synced = True
            await self._retry_gaps()
        self._drop_unnamed()

    def _note_problem(self, problem: str) -> None:
        if self._is_connected or not self._problem:
            _log.warning("index_log_not_read", extra={"problem": problem})
        self._is_connected, self._problem = False, problem

    def _is_lost(self, state: LogState) -> bool:
        """Return whether entries after the place may be gone, or the place itself."""
        is_other = self._num_reloads == 0 or state.incarnation != self._incarnation
        return is_other or state.last < self._position or self._position < state.trimmed

    async def _reload(self, state: LogState) -> None:
        """Take in all locations anew, one by one; each serves its last known state until then."""
        self._may_lack_quarantined = True
        has_lost_memory = state.incarnation != self._incarnation or state.last < self._position
        if has_lost_memory:
            for location in self._locations.values():
                location.position = EntryId()
                location.gap = None
        lives = await self._log.registered()
        for name, life in lives.items():
            if self._lacks(name, life):
                await self._restore(name)
        for name, location in self._locations.items():
            if name in lives:
                location.drop_s = None
            elif location.drop_s is None:
                location.drop_s = self._clock.now() + self._grace_s
        self._incarnation = state.incarnation
        self._position = min((state.last, *(life.before for life in lives.values() if life.before)))
        self._num_reloads += 1

    def _lacks(self, name: str, life: Registered) -> bool:
        """Return whether a location's snapshot says more than is known here."""
        location = self._locations.get(name)
        if location is None or location.epoch != life.epoch:
            return True
        return location.next_sequence < life.snapshot_sequence

    async def _restore(self, name: str) -> Registered | None:
        """Take in a location's snapshot; return where it belongs, none if there is none."""
        try:
            found = await self._log.read_snapshot(name)
        except InvalidRequest as error:
            _log.warning("index_snapshot_unreadable", extra={"location": name, "problem": str(error)})
            return None
        if found is None:
            return None
        life, snapshot = found
        # It stands for entries that are not read one by one, and names only what is held.
        self._may_lack_quarantined = True
        try:
            self._index.restore(snapshot)
        except Saturated as error:
            self._refuse(name, error)
            return None
        self._note(name, snapshot.epoch, snapshot.next_sequence, life.since)
        return life

    def _note(self, name: str, epoch: str, next_sequence: int, position: EntryId) -> None:
        self._locations[name] = _Location(
            epoch=epoch, next_sequence=next_sequence, heard_s=self._clock.now(), position=position
        )

    async def _take(self, entry: Entry) -> EntryId:
        """Apply an entry; return from where to read on, which is before it if a snapshot was needed."""
        location = self._locations.get(entry.location)
        if location is not None and entry.id <= location.position:
            return entry.id
        self._lag_s = max(0.0, (self._clock.unix_ms() - entry.id.unix_ms) / 1000)
        if entry.event is None:
            self._index.forget(entry.location)
            self._locations.pop(entry.location, None)
            return entry.id
        try:
            return await self._apply(event_from_bytes(entry.event), entry)
        except Saturated as error:
            self._refuse(entry.location, error)
            return entry.id
        except InvalidRequest as error:
            _log.warning("index_event_unreadable", extra={"location": entry.location, "problem": str(error)})
            return entry.id

    def _refuse(self, name: str, error: Saturated) -> None:
        """Go on without a location that the index has no room for."""
        if name not in self._refused and len(self._refused) < MOST_REFUSED:
            self._refused.add(name)
            _log.error("index_location_refused", extra={"location": name, "problem": str(error)})

    async def _apply(self, event: Event, entry: Entry) -> EntryId:
        match self._index.apply(event):
            case Applied.DONE:
                self._num_events += 1
                self._note(entry.location, event.epoch, event.sequence + 1, entry.id)
                self._tell_quarantined(event)
            case Applied.REPEATED:
                self._note_repeated(entry)
            case Applied.FENCED:
                self._num_fenced += 1
            case Applied.GAP:
                self._tell_quarantined(event)
                return await self._close_gap(entry)
        return entry.id

    def _note_repeated(self, entry: Entry) -> None:
        location = self._locations.get(entry.location)
        if location is not None:
            location.position = entry.id
            location.heard_s = self._clock.now()
            location.drop_s = None

    async def _close_gap(self, entry: Entry) -> EntryId:
        """Read the location's snapshot; return the place from where on its events are to be read again."""
        location = self._locations.get(entry.location)
        if location is not None and location.gap is not None and entry.id <= location.gap:
            return entry.id  # the newest snapshot did not help; the next one will
        self._num_gaps += 1
        life = await self._restore(entry.location)
        if life is None or entry.id <= life.since:
            return entry.id
        self._locations[entry.location].gap = entry.id
        return min(entry.id, life.before or life.since)

    async def _retry_gaps(self) -> None:
        """Read snapshots that have come meanwhile and say what was missing."""
        gaps = {name: location.gap for name, location in self._locations.items() if location.gap is not None}
        if gaps:
            lives = await self._log.registered()
            for name, gap in gaps.items():
                if name in lives and gap <= lives[name].since:
                    await self._restore(name)

    def _tell_quarantined(self, event: Event) -> None:
        for change in event.changes:
            if change.kind is ChangeKind.QUARANTINED and self._on_quarantine is not None:
                self._on_quarantine(change.hashes)

    async def _repeat_quarantined(self) -> None:
        if not self._may_lack_quarantined or self._on_quarantine is None:
            return
        # Before the question: what is missed while it is answered makes for another.
        self._may_lack_quarantined = False
        try:
            hashes = await self._log.quarantined()
        except BaseException:
            self._may_lack_quarantined = True
            raise
        for start in range(0, len(hashes), QUARANTINED_AT_ONCE):
            self._on_quarantine(hashes[start : start + QUARANTINED_AT_ONCE])
            await asyncio.sleep(0)

    def _drop_unnamed(self) -> None:
        """Drop locations that were not announced again; only called while the log is there."""
        now_s = self._clock.now()
        for name in [
            name for name, item in self._locations.items() if item.drop_s is not None and item.drop_s <= now_s
        ]:
            self._index.forget(name)
            del self._locations[name]
