"""The index of all blocks of the cluster in memory: fed by the log, asked for the longest known prefix."""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from headrace.core.block import BlockHash
from headrace.core.placement import Origin, Tier
from headrace.errors import Saturated
from headrace.index.events import Applied, Change, ChangeKind, Event, Snapshot
from headrace.index.pages import Page, Pages
from headrace.index.slots import Holders, HolderSets, Seat, SlotTable

REMEMBERED_EPOCHS = 16
"""Ended lifetimes of a location whose events are still told apart from those of a new one."""
LOCATION_BYTES = 3000
"""Of a location beside its blocks, with a few slots."""
_EVERYONE = -1
"""The set of all slots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocationState:
    """What the index knows of a location.

    Attributes:
        next_sequence: The event that it waits for.
        num_blocks: Known blocks by tier; tiers without blocks are left out.
        is_resyncing: Whether events are missing and no snapshot came since.
    """

    name: str
    epoch: str
    next_sequence: int
    num_blocks: Mapping[Tier, int]
    is_resyncing: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixMatch:
    """How much of a prompt lies at a location.

    Attributes:
        num_blocks: Leading blocks that it holds, in any of its tiers.
        counts: How many of them are best read from which tier, and how they came to be, fastest tier first; the
            numbers add up to `num_blocks`.
    """

    location: str
    num_blocks: int
    counts: tuple[tuple[Tier, Origin, int], ...]


@dataclass(slots=True, kw_only=True, eq=False)
class _Location:
    name: str
    seat: Seat
    epoch: str
    next_sequence: int = 0
    is_resyncing: bool = False
    ended: deque[str] = field(default_factory=lambda: deque(maxlen=REMEMBERED_EPOCHS))
    open_page: Page | None = None


class PrefixIndex:
    """Knows which locations hold which blocks, as far as a budget of memory goes.

    It may know less than there is, never more: what was evicted is as if it had never been announced.

    Args:
        budget_bytes: Memory that it may take; blocks of little value leave for others.
        max_locations: Most locations.
    """

    def __init__(self, budget_bytes: int, max_locations: int) -> None:
        self._max_locations = max_locations
        self._slots = SlotTable(max_locations)
        self._sets = HolderSets()
        self._pages = Pages(budget_bytes, self._sets)
        self._locations: dict[str, _Location] = {}
        self._by_place: dict[int, _Location] = {}

    @property
    def num_evicted(self) -> int:
        """Blocks that were dropped, or not taken in, for want of room."""
        return self._pages.num_evicted

    @property
    def num_blocks(self) -> int:
        """Different blocks known."""
        return self._pages.num_blocks

    @property
    def memory_bytes(self) -> int:
        """Bytes that the index takes."""
        return self._pages.memory_bytes

    @property
    def budget_bytes(self) -> int:
        """Bytes that it may take."""
        return self._pages.budget_bytes

    def locations(self) -> tuple[LocationState, ...]:
        """Return what is known of each location, by name."""
        counts = self._count_slots()
        return tuple(_state(location, counts) for _, location in sorted(self._locations.items()))

    def apply(self, event: Event) -> Applied:
        """Take an event in.

        Sequence 0 of an epoch that is not known begins a new lifetime and drops all blocks of the one before.

        Raises:
            Saturated: it is of one location too many; nothing is applied.
        """
        applied = self._admit(event)
        if applied is Applied.DONE:
            location = self._locations[event.location]
            location.next_sequence = event.sequence + 1
            for change in event.changes:
                self._change(location, change)
            self._pages.sweep()
        return applied

    def restore(self, snapshot: Snapshot) -> None:
        """Replace all that is known of a location; the snapshot's epoch becomes its current one.

        Raises:
            Saturated: it is of one location too many; nothing is changed.
        """
        location = self._begin(snapshot.location, snapshot.epoch)
        location.next_sequence = snapshot.next_sequence
        for change in snapshot.stored:
            self._change(location, change)

    def forget(self, location: str) -> None:
        """Drop a location, all it holds and its ended lifetimes; unknown ones are ignored."""
        known = self._locations.pop(location, None)
        if known is None:
            return
        self._clear(known)
        del self._by_place[known.seat.place]
        self._slots.leave(known.seat)
        self._pages.reserved_bytes -= LOCATION_BYTES

    def match(self, hashes: Sequence[BlockHash], policy_id: str = "") -> list[PrefixMatch]:
        """Return how many leading blocks each location holds, where it is at least one, longest first.

        Args:
            hashes: Chain of a prompt.
            policy_id: The lossy settings that the request accepts; empty is none.
        """
        served = self._slots.served(policy_id)
        matches: list[PrefixMatch] = []
        seen: dict[Holders, int] = {}
        reached: dict[Page, None] = {}
        places, length = _EVERYONE, 0
        for page, holders, count in self._pages.runs(tuple(hashes)):
            remaining = places & self._slots.places(holders.mask & served)
            if remaining != places and length:
                matches += self._matches(places & ~remaining, length, seen, served)
            places = remaining
            if not places:
                break
            reached[page] = None
            seen[holders] = seen.get(holders, 0) + count
            length += count
        if length:
            matches += self._matches(places, length, seen, served)
        self._pages.touch(tuple(reached))
        matches.sort(key=lambda match: (-match.num_blocks, match.location))
        return matches

    def pooled(self, hashes: Sequence[BlockHash], locations: Collection[str], policy_id: str = "") -> int:
        """Return how many leading blocks some of these locations have between them."""
        known = self._locations.keys() & set(locations)
        mask = self._slots.served(policy_id) & sum(self._locations[name].seat.mask for name in known)
        reached: dict[Page, None] = {}
        length = 0
        for page, holders, count in self._pages.runs(tuple(hashes)):
            if not holders.mask & mask:
                break
            reached[page] = None
            length += count
        self._pages.touch(tuple(reached))
        return length

    def verify(self) -> None:
        """Count everything anew; slow, for tests.

        Raises:
            AssertionError: something does not add up.
        """
        self._pages.verify()
        slots = [slot.bit for location in self._locations.values() for slot in location.seat.ranked]
        assert len(slots) == len(set(slots))
        assert not self._sets.used() & ~sum(slots)

    def _admit(self, event: Event) -> Applied:
        location = self._locations.get(event.location)
        if location is not None and event.epoch == location.epoch:
            if event.sequence < location.next_sequence:
                return Applied.REPEATED
            if event.sequence == location.next_sequence:
                return Applied.DONE
        elif location is not None and event.epoch in location.ended:
            return Applied.FENCED
        elif event.sequence == 0:
            self._begin(event.location, event.epoch)
            return Applied.DONE
        if location is not None:
            location.is_resyncing = True
        return Applied.GAP

    def _begin(self, name: str, epoch: str) -> _Location:
        """Begin a lifetime, or one that is known over again."""
        location = self._locations.get(name)
        if location is None:
            return self._enter(name, epoch)
        self._clear(location)
        if location.epoch != epoch:
            location.ended.append(location.epoch)
        if epoch in location.ended:
            location.ended.remove(epoch)
        location.epoch, location.next_sequence, location.is_resyncing = epoch, 0, False
        return location

    def _enter(self, name: str, epoch: str) -> _Location:
        if len(self._locations) >= self._max_locations:
            raise Saturated(f"the index holds {self._max_locations} locations", limit=str(self._max_locations))
        location = _Location(name=name, seat=self._slots.seat(), epoch=epoch)
        self._locations[name] = self._by_place[location.seat.place] = location
        self._pages.reserved_bytes += LOCATION_BYTES
        self._pages.shed()
        return location

    def _clear(self, location: _Location) -> None:
        location.open_page = None
        if location.seat.mask:
            self._pages.retire(location.seat.mask)
            self._slots.clear(location.seat)

    def _change(self, location: _Location, change: Change) -> None:
        if change.kind is ChangeKind.QUARANTINED:
            self._pages.rewrite(change.hashes, 0, _EVERYONE)
            return
        slot = None
        if change.kind is ChangeKind.STORED:
            slot = self._slots.slot(location.seat, change.tier, change.origin)
            if slot is None:
                self._slots.prune(self._sets.used())
                slot = self._slots.slot(location.seat, change.tier, change.origin)
        # A tier has one copy of a block, so a new one takes the place of another origin's.
        tier_mask = location.seat.tier_masks[change.tier]
        if slot is not None:
            location.open_page = self._pages.store(change.hashes, slot.bit, tier_mask, location.open_page)
            return
        self._pages.rewrite(change.hashes, 0, tier_mask)
        if change.kind is ChangeKind.STORED:
            self._pages.num_evicted += len(change.hashes)

    def _matches(self, places: int, length: int, seen: Mapping[Holders, int], served: int) -> Iterator[PrefixMatch]:
        while places:
            place = places & -places
            places ^= place
            location = self._by_place[place]
            counts = _counts(location.seat, seen, served)
            yield PrefixMatch(location=location.name, num_blocks=length, counts=counts)

    def _count_slots(self) -> dict[int, int]:
        """Return the number of blocks of each slot's bit."""
        counts: dict[int, int] = {}
        for holders in self._sets:
            mask = holders.mask
            while mask:
                bit = mask & -mask
                mask ^= bit
                counts[bit] = counts.get(bit, 0) + holders.num_blocks
        return counts


def _counts(seat: Seat, seen: Mapping[Holders, int], served: int) -> tuple[tuple[Tier, Origin, int], ...]:
    """Return where the blocks with these holders are best read at one location."""
    usable = [slot for slot in seat.ranked if slot.bit & served]
    counts = dict.fromkeys(usable, 0)
    for holders, count in seen.items():
        slot = next(slot for slot in usable if slot.bit & holders.mask)
        counts[slot] += count
    return tuple((slot.tier, slot.origin, count) for slot, count in counts.items() if count)


def _state(location: _Location, counts: Mapping[int, int]) -> LocationState:
    num_blocks: dict[Tier, int] = {}
    for slot in location.seat.ranked:
        if count := counts.get(slot.bit, 0):
            num_blocks[slot.tier] = num_blocks.get(slot.tier, 0) + count
    return LocationState(
        name=location.name,
        epoch=location.epoch,
        next_sequence=location.next_sequence,
        num_blocks=num_blocks,
        is_resyncing=location.is_resyncing,
    )
