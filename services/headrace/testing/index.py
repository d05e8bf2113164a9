"""The simplest index that is right: sets of blocks by location, for tests of what feeds one."""

from dataclasses import dataclass, field

from headrace.core.block import BlockHash
from headrace.core.placement import Origin, Tier
from headrace.index.events import Applied, Change, ChangeKind, Event, Snapshot


@dataclass(slots=True)
class Held:
    """What one location holds."""

    epoch: str
    next_sequence: int
    blocks: dict[tuple[Tier, BlockHash], Origin] = field(default_factory=dict)


class SimpleIndex:
    """Implements `index.replica.Index`.

    Attributes:
        held: By location.
        num_restores: Snapshots taken in.
    """

    def __init__(self) -> None:
        self.held: dict[str, Held] = {}
        self.num_restores = 0

    def apply(self, event: Event) -> Applied:
        """Apply an event if it is the location's next."""
        held = self.held.get(event.location)
        if held is None or held.epoch != event.epoch:
            if event.sequence:
                return Applied.GAP
            held = self.held[event.location] = Held(event.epoch, 0)
        if event.sequence != held.next_sequence:
            return Applied.REPEATED if event.sequence < held.next_sequence else Applied.GAP
        held.next_sequence += 1
        for change in event.changes:
            self._change(held, change)
        return Applied.DONE

    def restore(self, snapshot: Snapshot) -> None:
        """Replace all that is known of a location."""
        self.num_restores += 1
        held = self.held[snapshot.location] = Held(snapshot.epoch, snapshot.next_sequence)
        for change in snapshot.stored:
            self._change(held, change)

    def forget(self, location: str) -> None:
        """Drop a location."""
        self.held.pop(location, None)

    def blocks(self, location: str) -> dict[tuple[Tier, BlockHash], Origin] | None:
        """Return what a location holds; none if it is unknown."""
        held = self.held.get(location)
        return None if held is None else held.blocks

    def _change(self, held: Held, change: Change) -> None:
        for block_hash in change.hashes:
            match change.kind:
                case ChangeKind.STORED:
                    held.blocks[change.tier, block_hash] = change.origin
                case ChangeKind.REMOVED:
                    held.blocks.pop((change.tier, block_hash), None)
                case ChangeKind.QUARANTINED:
                    for other in self.held.values():
                        for tier in Tier:
                            other.blocks.pop((tier, block_hash), None)
