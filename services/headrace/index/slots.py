"""Who holds a block, as bits: one bit says which tier of which location, and how the block came to be."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from headrace.core.placement import Origin, Tier

MAX_SLOTS = 1024
"""Bits of a set of holders at most: a set takes 160 bytes then."""
MAX_SLOTS_PER_LOCATION = 64
"""So that one location with ever new policies leaves bits for the others."""
_MAX_REMEMBERED = 4096
"""Sets of slots whose locations are kept at hand."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slot:
    """One tier of one location with one origin."""

    bit: int
    tier: Tier
    origin: Origin


@dataclass(slots=True, kw_only=True, eq=False)
class Seat:
    """The bits of one location.

    Attributes:
        place: The location's own bit, in sets of locations.
        mask: All of its slots.
        tier_masks: Its slots, by the number of their tier.
        ranked: Its slots, fastest tier first.
    """

    place: int
    mask: int = 0
    tier_masks: list[int] = field(default_factory=lambda: [0] * (max(Tier) + 1))
    ranked: tuple[Slot, ...] = ()
    by_kind: dict[tuple[int, str], Slot] = field(default_factory=dict)


class SlotTable:
    """Gives out bits and takes them back; a bit means one thing from `slot` until `clear` or `prune`.

    Args:
        max_locations: Most seats; the caller keeps to it.
    """

    def __init__(self, max_locations: int) -> None:
        self._free_places = [1 << number for number in reversed(range(max_locations))]
        self._free_bits = [1 << number for number in reversed(range(MAX_SLOTS))]
        self._seats: dict[int, Seat] = {}
        self._policies: set[str] = set()
        self._served: dict[str, int] = {}
        self._places: dict[int, int] = {}

    def seat(self) -> Seat:
        """Give a location its own bit."""
        seat = Seat(place=self._free_places.pop())
        self._seats[seat.place] = seat
        return seat

    def leave(self, seat: Seat) -> None:
        """Take back a cleared seat."""
        del self._seats[seat.place]
        self._free_places.append(seat.place)

    def slot(self, seat: Seat, tier: Tier, origin: Origin) -> Slot | None:
        """Return the slot of that kind, a new one if needed; None when no bit is left."""
        kind = _kind(tier, origin)
        slot = seat.by_kind.get(kind)
        if slot is None and self._free_bits and len(seat.by_kind) < MAX_SLOTS_PER_LOCATION:
            slot = Slot(bit=self._free_bits.pop(), tier=tier, origin=origin)
            seat.by_kind[kind] = slot
            self._refresh(seat)
        return slot

    def clear(self, seat: Seat) -> None:
        """Take back the slots of a seat; no set may have them any more."""
        self._take_back(seat, list(seat.by_kind.values()))

    def prune(self, used: int) -> None:
        """Take back all slots that are not in the set `used`."""
        for seat in self._seats.values():
            self._take_back(seat, [slot for slot in seat.by_kind.values() if not slot.bit & used])

    def served(self, policy_id: str) -> int:
        """Return the set of slots whose blocks a request with that policy may be given."""
        known = policy_id if policy_id in self._policies else ""
        mask = self._served.get(known)
        if mask is None:
            mask = sum(slot.bit for slot in self._slots() if slot.origin.serves(known))
            self._served[known] = mask
        return mask

    def places(self, mask: int) -> int:
        """Return the set of locations that have one of these slots."""
        places = self._places.get(mask)
        if places is None:
            if len(self._places) >= _MAX_REMEMBERED:
                self._places.clear()
            places = sum(seat.place for seat in self._seats.values() if seat.mask & mask)
            self._places[mask] = places
        return places

    def _take_back(self, seat: Seat, slots: list[Slot]) -> None:
        for slot in slots:
            del seat.by_kind[_kind(slot.tier, slot.origin)]
            self._free_bits.append(slot.bit)
        if slots:
            self._refresh(seat)

    def _refresh(self, seat: Seat) -> None:
        slots = sorted(seat.by_kind.values(), key=lambda slot: slot.tier)
        seat.ranked = tuple(slots)
        seat.mask = sum(slot.bit for slot in slots)
        seat.tier_masks = [0] * len(seat.tier_masks)
        for slot in slots:
            seat.tier_masks[slot.tier] |= slot.bit
        self._policies = {slot.origin.policy_id for slot in self._slots()}
        self._served.clear()
        self._places.clear()

    def _slots(self) -> Iterator[Slot]:
        return (slot for seat in self._seats.values() for slot in seat.ranked)


def _kind(tier: Tier, origin: Origin) -> tuple[int, str]:
    """Return what tells slots of a seat apart; hashing enums and dataclasses would take longer than storing a block."""
    return len(Tier) * origin.provenance + tier, origin.policy_id


class Holders:
    """All blocks with the same holders point to one of these.

    So the end of a location's lifetime is a write per set of holders, whatever the number of blocks.
    """

    __slots__ = ("mask", "num_blocks")

    def __init__(self, mask: int) -> None:
        self.mask = mask
        self.num_blocks = 0


class HolderSets:
    """Every set of holders that some block has, once; after `retire` a set may be there twice, which harms nothing."""

    def __init__(self) -> None:
        self._all: set[Holders] = set()
        self._by_mask: dict[int, Holders] = {}

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Holders]:
        return iter(self._all)

    def acquire(self, mask: int, num_blocks: int) -> Holders:
        """Return the set with these slots, which `num_blocks` more blocks have from now on."""
        holders = self._by_mask.get(mask)
        if holders is None:
            holders = self._by_mask[mask] = Holders(mask)
            self._all.add(holders)
        holders.num_blocks += num_blocks
        return holders

    def release(self, holders: Holders, num_blocks: int) -> None:
        """Say that `num_blocks` blocks no longer have this set."""
        holders.num_blocks -= num_blocks
        if not holders.num_blocks:
            self._all.discard(holders)
            if self._by_mask.get(holders.mask) is holders:
                del self._by_mask[holders.mask]

    def retire(self, mask: int) -> None:
        """Take these slots out of every set."""
        for holders in self._all:
            holders.mask &= ~mask
        self._by_mask = {holders.mask: holders for holders in self._all}

    def used(self) -> int:
        """Return all slots that some block has."""
        mask = 0
        for holders in self._all:
            mask |= holders.mask
        return mask
