"""Operations on contexts, from the wire."""

from collections.abc import Sequence
from itertools import islice

from headrace.core.context import (
    Abandon,
    Append,
    Checkpoint,
    Close,
    ContextMode,
    Operation,
    Replace,
    Segment,
)
from headrace.errors import InvalidRequest
from headrace.v1 import ingestor_pb2


def mode_from_proto(mode: "ingestor_pb2.ContextMode.ValueType") -> ContextMode:
    """Read a mode.

    Raises:
        InvalidRequest: it is one that only newer clients know.
    """
    match mode:
        case ingestor_pb2.CONTEXT_MODE_UNSPECIFIED | ingestor_pb2.CONTEXT_MODE_APPEND:
            return ContextMode.APPEND
        case ingestor_pb2.CONTEXT_MODE_UPDATE:
            return ContextMode.UPDATE
    raise InvalidRequest(f"mode {mode} is not known: use append or update", field="mode", limit="append or update")


def mode_to_proto(mode: ContextMode) -> "ingestor_pb2.ContextMode.ValueType":
    """Write a mode."""
    is_append = mode is ContextMode.APPEND
    return ingestor_pb2.CONTEXT_MODE_APPEND if is_append else ingestor_pb2.CONTEXT_MODE_UPDATE


def operation_from_proto(message: ingestor_pb2.ContextOperation, max_segments: int) -> Operation:
    """Read an operation.

    Args:
        message: What to read.
        max_segments: Of more than these only one is read: the operation will be refused, and a message has room for
            so many that reading them takes a minute.

    Raises:
        InvalidRequest: none is set.
    """
    match message.WhichOneof("operation"):
        case "append":
            return Append(segment_id=message.append.segment_id, text=message.append.text)
        case "replace":
            change = message.replace
            segments = _segments(change.segments, max_segments)
            return Replace(from_segment_id=change.from_segment_id, segments=segments)
        case "update":
            return Replace(from_segment_id=None, segments=_segments(message.update.segments, max_segments))
        case "checkpoint":
            return Checkpoint()
        case "close":
            return Close(query=message.close.query)
        case "abandon":
            return Abandon()
    raise InvalidRequest("an operation is empty, or one that only newer clients know", field="operation")


def _segments(messages: Sequence[ingestor_pb2.ContextSegment], most: int) -> tuple[Segment, ...]:
    return tuple(Segment(segment_id=each.id, text=each.text) for each in islice(messages, most + 1))
