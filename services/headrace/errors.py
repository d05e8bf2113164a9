"""Errors of headrace.

HeadraceError
├── ConfigError          refuse to start
├── InvalidRequest       INVALID_ARGUMENT     400  do not retry
│   ├── UnknownModel     NOT_FOUND            404  do not retry
│   ├── UnknownContext   NOT_FOUND            404  it was never there, has ended, or is another tenant's
│   └── ContextOverflow  INVALID_ARGUMENT     400  prompt and answer are longer than the model's context
├── Overloaded           RESOURCE_EXHAUSTED   429  a tenant's quota; retry after the given time
├── Saturated            UNAVAILABLE          503  no capacity; retry after the given time
├── NotReady             UNAVAILABLE          503  retry elsewhere
│   └── Draining         UNAVAILABLE          503  retry elsewhere
├── DeadlineExceeded     DEADLINE_EXCEEDED    504  do not retry
├── Cancelled            CANCELLED            499  the caller left
├── BlockLost            ABORTED              503  recompute
├── PeerFailed           UNAVAILABLE          503  retry elsewhere
│   └── PeerMismatch     FAILED_PRECONDITION  500  version or model differs; do not retry
└── InternalError        INTERNAL             500  a bug
"""

from dataclasses import dataclass


@dataclass(eq=False)
class HeadraceError(Exception):
    """Root of all errors that headrace raises on purpose.

    Attributes:
        message: What was wanted, what was found, what to do.
        field: The request or config field at fault, if one is.
        limit: The limit that was exceeded, as text.
        retry_after_s: Seconds to wait before a retry; None when a retry would not help.
        worker: Name of the process that raised it, set where it crosses the wire.
    """

    code = "internal"
    grpc_status = "INTERNAL"
    http_status = 500

    message: str
    field: str | None = None
    limit: str | None = None
    retry_after_s: float | None = None
    worker: str | None = None

    def __str__(self) -> str:
        return self.message


class ConfigError(HeadraceError):
    """A setting is unknown or has a bad value; the process refuses to start."""

    code = "config"
    grpc_status = "FAILED_PRECONDITION"


class InvalidRequest(HeadraceError):
    """The client asked for something that cannot be; do not retry."""

    code = "invalid_request"
    grpc_status = "INVALID_ARGUMENT"
    http_status = 400


class UnknownModel(InvalidRequest):
    """The named model is not served here."""

    code = "model_not_found"
    grpc_status = "NOT_FOUND"
    http_status = 404


class UnknownContext(InvalidRequest):
    """The named context is not kept here."""

    code = "context_not_found"
    grpc_status = "NOT_FOUND"
    http_status = 404


@dataclass(eq=False)
class ContextOverflow(InvalidRequest):
    """Prompt and answer together are longer than the model's context.

    Attributes:
        num_tokens: Tokens of the prompt; of a text too long to be tokenized, at least so many.
    """

    code = "context_length_exceeded"

    num_tokens: int = 0


class Overloaded(HeadraceError):
    """A tenant's quota is used up; retry after `retry_after_s`."""

    code = "overloaded"
    grpc_status = "RESOURCE_EXHAUSTED"
    http_status = 429


class Saturated(HeadraceError):
    """The cluster has no room for this work now; retry after `retry_after_s`."""

    code = "saturated"
    grpc_status = "UNAVAILABLE"
    http_status = 503


class NotReady(HeadraceError):
    """The service has not yet proven its own path; retry elsewhere."""

    code = "not_ready"
    grpc_status = "UNAVAILABLE"
    http_status = 503


class Draining(NotReady):
    """The service admits nothing new; retry elsewhere."""

    code = "draining"


class DeadlineExceeded(HeadraceError):
    """The request's deadline passed before it was done."""

    code = "deadline_exceeded"
    grpc_status = "DEADLINE_EXCEEDED"
    http_status = 504


class Cancelled(HeadraceError):
    """The caller left."""

    code = "cancelled"
    grpc_status = "CANCELLED"
    http_status = 499


class BlockLost(HeadraceError):
    """KV blocks that were promised are gone; recompute them."""

    code = "block_lost"
    grpc_status = "ABORTED"
    http_status = 503


class PeerFailed(HeadraceError):
    """Another process died or cannot be reached; retry elsewhere."""

    code = "peer_failed"
    grpc_status = "UNAVAILABLE"
    http_status = 503


class PeerMismatch(PeerFailed):
    """Another process speaks another protocol version or serves another model."""

    code = "peer_mismatch"
    grpc_status = "FAILED_PRECONDITION"
    http_status = 500


class InternalError(HeadraceError):
    """A bug in headrace."""


def _tree(root: type[HeadraceError]) -> list[type[HeadraceError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]


def by_code() -> dict[str, type[HeadraceError]]:
    """Return every error class of this module under its wire code.

    Parts may refine an error for themselves; on the wire it is the one it refines.
    """
    return {error.code: error for error in _tree(HeadraceError) if error.__module__ == __name__}
