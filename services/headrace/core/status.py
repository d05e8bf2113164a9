"""Errors as gRPC statuses, without gRPC: what servers send and what clients read back."""

from collections.abc import Iterable

from google.rpc import code_pb2, status_pb2

from headrace.core.wire import error_from_detail, error_to_detail
from headrace.errors import (
    Cancelled,
    DeadlineExceeded,
    HeadraceError,
    InternalError,
    InvalidRequest,
    Overloaded,
    PeerFailed,
    PeerMismatch,
)
from headrace.v1 import errors_pb2

DETAILS_KEY = "grpc-status-details-bin"
"""Trailing metadata in which gRPC carries google.rpc.Status."""

MAX_MESSAGE_CHARS = 512
"""Longer texts are cut: gRPC refuses headers above 8 KiB and a text travels three times, escaped."""

MAX_MESSAGE_BYTES = 64 << 20
"""Largest message of either direction; gRPC's own default of 4 MiB is less than a long prompt with logprobs."""

KEEPALIVE_MS = 10_000

CONNECTION_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MS // 2),
    # The one that counts: with the option above alone a peer that hangs was given up after a minute (grpcio 1.85).
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_MS // 2),
    ("grpc.http2.max_pings_without_data", 0),
    # Finding the window costs a ping and its answer per message; this one takes all but the longest prompts at once.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1 << 20),
)
"""gRPC options that both ends of a connection share."""

CLIENT_OPTIONS: tuple[tuple[str, int], ...] = (
    *CONNECTION_OPTIONS,
    # A restarted worker must be found again within a heartbeat; gRPC's default waits up to 20 s for the
    # first attempt and backs off to 2 min.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Cluster addresses are direct; an http_proxy in the environment would swallow even loopback calls.
    ("grpc.enable_http_proxy", 0),
)
"""gRPC options of the calling end."""

_BROKEN_WRITE = "Internal error from Core"
"""What grpc.aio says, under the code INTERNAL, of a call that ended, or whose connection broke, under a message that
was being sent (grpcio 1.80 and 1.85); why it ended is lost."""

_BY_STATUS: dict[str, type[HeadraceError]] = {
    "CANCELLED": Cancelled,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "INVALID_ARGUMENT": InvalidRequest,
    "OUT_OF_RANGE": InvalidRequest,
    "NOT_FOUND": InvalidRequest,
    "PERMISSION_DENIED": InvalidRequest,
    "UNAUTHENTICATED": InvalidRequest,
    "RESOURCE_EXHAUSTED": Overloaded,
    "UNAVAILABLE": PeerFailed,
    "UNIMPLEMENTED": PeerMismatch,
}
"""What a status without our detail means: it came from gRPC itself, from a proxy or from another program."""


def short_message(error: HeadraceError) -> str:
    """Return the error's text, cut to what a header carries."""
    text = error.message
    return text if len(text) <= MAX_MESSAGE_CHARS else text[: MAX_MESSAGE_CHARS - 1] + "…"


def status_of(error: HeadraceError, worker: str = "") -> status_pb2.Status:
    """Return the status of a failed call with the machine-readable detail packed in.

    Args:
        error: What went wrong.
        worker: Name of this process; used unless the error already names the one that raised it.
    """
    detail = error_to_detail(error, worker)
    detail.message = short_message(error)
    status = status_pb2.Status(code=code_pb2.Code.Value(error.grpc_status), message=detail.message)
    status.details.add().Pack(detail)
    return status


def error_of(
    code: str, message: str, metadata: Iterable[tuple[str, str | bytes]] = (), peer: str = ""
) -> HeadraceError:
    """Return the error that a failed call stands for.

    Args:
        code: Name of the gRPC status code.
        message: The status text.
        metadata: Trailing metadata of the call.
        peer: Whom the call went to; named when the status does not come from headrace.
    """
    detail = _detail(metadata)
    if detail is not None:
        return error_from_detail(detail)
    kind = _BY_STATUS.get(code, InternalError)
    if kind is InternalError and message == _BROKEN_WRITE:
        return PeerFailed(f"the call to {peer or 'peer'} ended while a message was sent", worker=peer or None)
    if kind is Overloaded and "larger than max" in message:
        # gRPC reports an oversized message with the code of a quota; a retry would not help.
        kind = InvalidRequest
    if kind is DeadlineExceeded:
        # What gRPC says then ("Stream removed", "Deadline Exceeded") adds nothing.
        return DeadlineExceeded(f"the deadline passed while {peer or 'the server'} worked", worker=peer or None)
    return kind(f"call to {peer or 'peer'} failed with {code}: {message}", worker=peer or None)


def _detail(metadata: Iterable[tuple[str, str | bytes]]) -> errors_pb2.ErrorDetail | None:
    for key, value in metadata:
        if key == DETAILS_KEY and isinstance(value, bytes):
            for packed in status_pb2.Status.FromString(value).details:
                detail = errors_pb2.ErrorDetail()
                if packed.Unpack(detail):
                    return detail
    return None
