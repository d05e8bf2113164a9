"""Entries of the log, as values and on the wire."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, IntEnum

from google.protobuf.message import DecodeError

from headrace.core.block import HASH_BYTES, BlockHash
from headrace.core.placement import EXACT, Origin, Provenance, Tier
from headrace.errors import InvalidRequest
from headrace.v1 import block_pb2, index_pb2


class ChangeKind(IntEnum):
    """What happened to blocks; numbers are those of the wire."""

    STORED = 1
    REMOVED = 2
    QUARANTINED = 3
    """Their bytes are not to be trusted, wherever they are: every holder lets go of them."""


class Applied(Enum):
    """What became of an event that an index was given."""

    DONE = "done"
    REPEATED = "repeated"
    """It was applied before and is ignored."""
    GAP = "gap"
    """Events before it are missing: it is not applied, and the location must be read anew."""
    FENCED = "fenced"
    """It is of a lifetime that has ended, and is ignored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Blocks that came to or left one tier of a location.

    Attributes:
        tier: Without meaning for quarantined blocks.
        origin: Only of stored blocks.
    """

    kind: ChangeKind
    tier: Tier
    origin: Origin = EXACT
    hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One entry of the log.

    Attributes:
        location: Name of the worker or kvstore.
        epoch: Lifetime of its process.
        sequence: Number of the event within the epoch, from 0.
        changes: What changed, in order; empty only says that the lifetime has begun.
    """

    location: str
    epoch: str
    sequence: int
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that a location holds, before its event `next_sequence`."""

    location: str
    epoch: str
    next_sequence: int
    stored: tuple[Change, ...] = ()


def event_to_bytes(event: Event) -> bytes:
    """Write an event."""
    message = index_pb2.IndexEvent(
        location=event.location,
        epoch=event.epoch,
        sequence=event.sequence,
        changes=map(_change_to_proto, event.changes),
    )
    return message.SerializeToString()


def event_from_bytes(data: bytes) -> Event:
    """Read an event.

    Raises:
        InvalidRequest: it is none.
    """
    message = index_pb2.IndexEvent()
    _parse(message, data)
    return Event(
        location=message.location,
        epoch=message.epoch,
        sequence=message.sequence,
        changes=_changes_from_proto(message.changes),
    )


def snapshot_to_bytes(snapshot: Snapshot) -> bytes:
    """Write a snapshot."""
    message = index_pb2.IndexSnapshot(
        location=snapshot.location,
        epoch=snapshot.epoch,
        next_sequence=snapshot.next_sequence,
        stored=map(_change_to_proto, snapshot.stored),
    )
    return message.SerializeToString()


def snapshot_from_bytes(data: bytes) -> Snapshot:
    """Read a snapshot.

    Raises:
        InvalidRequest: it is none.
    """
    message = index_pb2.IndexSnapshot()
    _parse(message, data)
    return Snapshot(
        location=message.location,
        epoch=message.epoch,
        next_sequence=message.next_sequence,
        stored=_changes_from_proto(message.stored),
    )


def _parse(message: index_pb2.IndexEvent | index_pb2.IndexSnapshot, data: bytes) -> None:
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise InvalidRequest("an entry of the index log is no protobuf message", field="index") from error


def _change_to_proto(change: Change) -> index_pb2.BlockChange:
    is_stored = change.kind is ChangeKind.STORED
    return index_pb2.BlockChange(
        kind=index_pb2.BlockChange.Kind.ValueType(change.kind),
        tier=block_pb2.Tier.ValueType(change.tier),
        provenance=block_pb2.Provenance.ValueType(change.origin.provenance if is_stored else 0),
        policy_id=change.origin.policy_id,
        block_hashes=b"".join(change.hashes),
    )


def _changes_from_proto(messages: Iterable[index_pb2.BlockChange]) -> tuple[Change, ...]:
    return tuple(map(_change_from_proto, messages))


def _change_from_proto(message: index_pb2.BlockChange) -> Change:
    data = message.block_hashes
    if len(data) % HASH_BYTES:
        raise InvalidRequest(f"{len(data)} bytes are no block hashes of {HASH_BYTES} each", field="block_hashes")
    try:
        kind, tier = ChangeKind(message.kind), Tier(message.tier)
        provenance = Provenance(message.provenance or Provenance.EXACT)
    except ValueError as error:
        raise InvalidRequest(f"unknown kind, tier or provenance of blocks: {error}", field="changes") from error
    return Change(
        kind=kind,
        tier=tier,
        origin=Origin(provenance=provenance, policy_id=message.policy_id),
        hashes=tuple(BlockHash(data[start : start + HASH_BYTES]) for start in range(0, len(data), HASH_BYTES)),
    )
