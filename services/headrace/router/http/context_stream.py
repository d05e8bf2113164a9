"""The answer to a context in the form of chats and completions."""

from collections.abc import Sequence

from starlette.responses import Response

from headrace.core.request import Piece, Token, Usage
from headrace.router.http.context import HttpContext
from headrace.router.http.head import answer_head
from headrace.router.http.logprobs import CompletionLogprobs, chat_logprobs
from headrace.router.http.sse import DONE, ChunkWriter, encode_json, usage_value
from headrace.text.model import TextModel
from headrace.v1 import ingestor_pb2


class ContextStream:
    """Turns pieces into chunks: those of a chat if the context is one, else of a completion.

    The event of a piece has its number as id, so that a client can say how far it has come.

    Args:
        opened: What the context is.
        context: Has clock and models.
        has_usage: Whether the client asked for usage.
    """

    def __init__(
        self,
        opened: ingestor_pb2.ContextOpened,
        context: HttpContext,
        *,
        has_usage: bool,
    ) -> None:
        self._text = context.frontend.model(opened.model).text
        self._logprobs = CompletionLogprobs(self._text)
        self._is_chat = opened.is_chat
        self._has_usage = has_usage
        self._usage = Usage(prompt_tokens=0, completion_tokens=0, cached_tokens=0)
        head = _head(opened, context, is_stream=True)
        self._writer = ChunkWriter(head, "delta" if opened.is_chat else "text", has_usage=has_usage)

    def events(self, number: int, piece: Piece) -> bytes:
        """Return the events of the next piece, which are none if it shows nothing.

        Args:
            number: Of the piece, from 1.
            piece: The piece.
        """
        self._usage = piece.usage or self._usage
        shown = _with_logprobs(piece.tokens)
        events = b""
        if number == 1 and self._is_chat:
            events = self._writer.chunk(0, encode_json({"role": "assistant", "content": "", "refusal": None}), None)
        if not (piece.text or shown or piece.finish is not None):
            return events
        # One event, for a client that got only the first of two could not say so.
        event = self._writer.chunk(0, self._payload(piece.text, shown), piece.finish, self._logprobs_of(shown))
        return events + b"id: %d\n" % number + event

    def ending(self) -> bytes:
        """Return the last events."""
        return self._writer.usage(self._usage) + DONE if self._has_usage else DONE

    def _payload(self, text: str, shown: Sequence[Token]) -> bytes:
        if not self._is_chat:
            return encode_json(text)
        return b'{"content":' + encode_json(text) + b"}" if text or shown else b"{}"

    def _logprobs_of(self, shown: Sequence[Token]) -> bytes:
        if not shown:
            return b"null"
        return encode_json(chat_logprobs(self._text, shown) if self._is_chat else self._logprobs.take(shown))


def whole_answer(pieces: Sequence[Piece], opened: ingestor_pb2.ContextOpened, context: HttpContext) -> Response:
    """Return all pieces of an answer as one."""
    text = "".join(piece.text for piece in pieces)
    shown = _with_logprobs([token for piece in pieces for token in piece.tokens])
    usage = pieces[-1].usage
    choice = {
        "index": 0,
        **_content(text, shown, context.frontend.model(opened.model).text, opened),
        "finish_reason": pieces[-1].finish,
    }
    value: dict[str, object] = {**_head(opened, context, is_stream=False), "choices": [choice]}
    if usage is not None:
        value["usage"] = usage_value(usage)
    return Response(encode_json(value), media_type="application/json")


def _content(
    text: str, shown: Sequence[Token], model: TextModel, opened: ingestor_pb2.ContextOpened
) -> dict[str, object]:
    if not opened.is_chat:
        return {"text": text, "logprobs": CompletionLogprobs(model).take(shown) if shown else None}
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"message": message, "logprobs": chat_logprobs(model, shown) if shown else None}


def _with_logprobs(tokens: Sequence[Token]) -> list[Token]:
    return [token for token in tokens if token.logprob is not None]


def _head(opened: ingestor_pb2.ContextOpened, context: HttpContext, *, is_stream: bool) -> dict[str, object]:
    if opened.is_chat:
        kind, prefix = "chat.completion.chunk" if is_stream else "chat.completion", "chatcmpl"
    else:
        kind, prefix = "text_completion", "cmpl"
    model = context.frontend.model(opened.model)
    return answer_head(kind, prefix=prefix, model=model, request_id=opened.request_id, context=context)
