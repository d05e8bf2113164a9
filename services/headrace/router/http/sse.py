"""Bytes of server-sent events, built from parts so that a token costs no dictionary."""

import msgspec

from headrace.core.request import FinishReason, Usage
from headrace.errors import HeadraceError
from headrace.router.http.errors import error_body

DONE = b"data: [DONE]\n\n"
_ENCODER = msgspec.json.Encoder()


def encode_json(value: object) -> bytes:
    """Return compact JSON."""
    return _ENCODER.encode(value)


def error_event(error: HeadraceError) -> bytes:
    """Return the event of an error after the first token, and the end of the stream."""
    return b"data: " + encode_json(error_body(error)) + b"\n\n" + DONE


def usage_value(usage: Usage) -> dict[str, object]:
    """Return token counts in OpenAI's form."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


class ChunkWriter:
    """Builds the chunks of one answer.

    Args:
        head: Fields that all chunks share: id, object, created, model.
        field: What a choice calls its payload: "delta" or "text".
        has_usage: Whether the client asked for usage, which every chunk then mentions.
    """

    def __init__(self, head: dict[str, object], field: str, *, has_usage: bool) -> None:
        self._head = b"data: " + encode_json(head)[:-1]
        self._before = self._head + b',"choices":[{"index":'
        self._field = b',"' + field.encode() + b'":'
        self._after = b'}],"usage":null}\n\n' if has_usage else b"}]}\n\n"

    def chunk(self, index: int, payload: bytes, finish: FinishReason | None, logprobs: bytes = b"null") -> bytes:
        """Return one event of one choice.

        Args:
            index: Index of the choice.
            payload: JSON of the choice's delta or text.
            finish: Set on the last chunk of the choice.
            logprobs: JSON of the tokens' probabilities.
        """
        reason = b"null" if finish is None else b'"' + finish.value.encode() + b'"'
        return b"".join(
            (
                self._before,
                b"%d" % index,
                self._field,
                payload,
                b',"logprobs":',
                logprobs,
                b',"finish_reason":',
                reason,
                self._after,
            )
        )

    def usage(self, usage: Usage) -> bytes:
        """Return the event that carries the token counts."""
        return self._head + b',"choices":[],"usage":' + encode_json(usage_value(usage)) + b"}\n\n"
