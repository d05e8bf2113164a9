"""Fields at the head of every answer, and what a stream was asked to carry."""

from headrace.errors import InvalidRequest
from headrace.router.frontend import ServedModel
from headrace.router.http.bodies import SamplingBody
from headrace.router.http.context import HttpContext


def answer_head(
    kind: str, *, prefix: str, model: ServedModel, request_id: str, context: HttpContext
) -> dict[str, object]:
    """Return the fields that all chunks of an answer, or the whole answer, start with.

    Args:
        kind: Value of `object`.
        prefix: Start of the id.
        model: The model asked.
        request_id: Rest of the id: unique, and what logs call the request.
        context: Has the clock.
    """
    return {
        "id": f"{prefix}-{request_id}",
        "object": kind,
        "created": context.clock.unix_ms() // 1000,
        "model": model.name,
        "system_fingerprint": f"fp_{model.fingerprint[:16]}",
    }


def stream_wants_usage(body: SamplingBody) -> bool:
    """Return whether a stream ends with a chunk of token counts.

    Raises:
        InvalidRequest: stream options without a stream.
    """
    if body.stream_options is None:
        return False
    if not body.stream:
        raise InvalidRequest("stream_options needs stream to be true", field="stream_options")
    return bool(body.stream_options.include_usage)
