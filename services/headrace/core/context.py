"""A prompt's context that still arrives: what may be done with it, and how far it is."""

from dataclasses import dataclass
from enum import Enum
from typing import NewType, TypeAlias

ContextId = NewType("ContextId", str)
"""Unguessable; names an ingestor and one of its contexts."""


SEQUENCE_FIELD = "operation.sequence"
"""Field at fault of an operation that was refused because of its number."""


class ContextMode(Enum):
    """How a context may change."""

    APPEND = "append"
    UPDATE = "update"


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A named part of a context.

    Attributes:
        segment_id: Unique in the context, not empty.
        text: UTF-8, whole characters.
    """

    segment_id: str
    text: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Append:
    """Add text at the end.

    Attributes:
        segment_id: Segment that it belongs to, the last one or a new one; empty is the last one.
        text: UTF-8, which may be cut inside a character.
    """

    segment_id: str
    text: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Replace:
    """Replace the segment `from_segment_id` and all behind it, or all segments if it is None."""

    from_segment_id: str | None
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tell when all that was sent before is computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """End the context with the text that follows it; the answer comes."""

    query: str


@dataclass(frozen=True, slots=True)
class Abandon:
    """Drop the context and its answer."""


Operation: TypeAlias = Append | Replace | Checkpoint | Close | Abandon


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextState:
    """How far a context is.

    Attributes:
        applied: Last operation that was carried out or refused; 0 before the first.
        checkpoint: Last checkpoint that was reached; 0 before the first.
        num_tokens: Tokens of the prompt so far; of a long text without any place to cut it, at least so many.
        num_computed: Leading tokens whose KV is computed.
        is_closed: Whether it is closed.
        num_segments: Segments of the context.
    """

    applied: int = 0
    checkpoint: int = 0
    num_tokens: int = 0
    num_computed: int = 0
    is_closed: bool = False
    num_segments: int = 0
