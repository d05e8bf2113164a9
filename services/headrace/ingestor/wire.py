"""Operations on contexts, from the wire."""

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


def operation_from_proto(message: ingestor_pb2.ContextOperation) -> Operation:
    """Read an operation.

    Raises:
        InvalidRequest: none is set.
    """
    match message.WhichOneof("operation"):
        case "append":
            return Append(segment_id=message.append.segment_id, text=message.append.text)
        case "replace":
            change = message.replace
            return Replace(from_segment_id=change.from_segment_id, segments=tuple(map(_segment, change.segments)))
        case "update":
            return Replace(from_segment_id=None, segments=tuple(map(_segment, message.update.segments)))
        case "checkpoint":
            return Checkpoint()
        case "close":
            return Close(query=message.close.query)
        case "abandon":
            return Abandon()
    raise InvalidRequest("an operation is empty, or one that only newer clients know", field="operation")


def _segment(message: ingestor_pb2.ContextSegment) -> Segment:
    return Segment(segment_id=message.id, text=message.text)
