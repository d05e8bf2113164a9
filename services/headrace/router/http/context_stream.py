"""The answer to a context in the form of chats and completions."""

from collections.abc import Sequence

from starlette.requests import Request
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

    Args:
        opened: What the context is.
        request: The HTTP request.
        context: Has clock and models.
        has_usage: Whether the client asked for usage.
        has_role: Whether the chunk that names the role comes first; not when the answer is taken up again.
    """

    def __init__(
        self,
        opened: ingestor_pb2.ContextOpened,
        request: Request,
        context: HttpContext,
        *,
        has_usage: bool,
        has_role: bool,
    ) -> None:
        self._text = context.frontend.model(opened.model).text
        self._logprobs = CompletionLogprobs(self._text)
        self._is_chat = opened.is_chat
        self._has_usage = has_usage
        self._needs_role = has_role and opened.is_chat
        self._usage = Usage(prompt_tokens=0, completion_tokens=0, cached_tokens=0)
        head = _head(opened, request, context, is_stream=True)
        self._writer = ChunkWriter(head, "delta" if opened.is_chat else "text", has_usage=has_usage)

    def events(self, piece: Piece) -> bytes:
        """Return the events of the next piece; empty if it shows nothing."""
        self._usage = piece.usage or self._usage
        events = b""
        if self._needs_role:
            self._needs_role = False
            role = encode_json({"role": "assistant", "content": "", "refusal": None})
            events += self._writer.chunk(0, role, None)
        return events + (self._chat(piece) if self._is_chat else self._completion(piece))

    def ending(self) -> bytes:
        """Return the last events."""
        return self._writer.usage(self._usage) + DONE if self._has_usage else DONE

    def _chat(self, piece: Piece) -> bytes:
        events = b""
        shown = _with_logprobs(piece.tokens)
        if piece.text or shown:
            logprobs = encode_json(chat_logprobs(self._text, shown)) if shown else b"null"
            events = self._writer.chunk(0, b'{"content":' + encode_json(piece.text) + b"}", None, logprobs)
        return events if piece.finish is None else events + self._writer.chunk(0, b"{}", piece.finish)

    def _completion(self, piece: Piece) -> bytes:
        shown = _with_logprobs(piece.tokens)
        if not (piece.text or shown or piece.finish is not None):
            return b""
        logprobs = encode_json(self._logprobs.take(shown)) if shown else b"null"
        return self._writer.chunk(0, encode_json(piece.text), piece.finish, logprobs)


def whole_answer(
    pieces: Sequence[Piece], opened: ingestor_pb2.ContextOpened, request: Request, context: HttpContext
) -> Response:
    """Return all pieces of an answer as one."""
    text = "".join(piece.text for piece in pieces)
    shown = _with_logprobs([token for piece in pieces for token in piece.tokens])
    usage = pieces[-1].usage
    choice = {
        "index": 0,
        **_content(text, shown, context.frontend.model(opened.model).text, opened),
        "finish_reason": pieces[-1].finish,
    }
    value: dict[str, object] = {**_head(opened, request, context, is_stream=False), "choices": [choice]}
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


def _head(
    opened: ingestor_pb2.ContextOpened, request: Request, context: HttpContext, *, is_stream: bool
) -> dict[str, object]:
    if opened.is_chat:
        kind, prefix = "chat.completion.chunk" if is_stream else "chat.completion", "chatcmpl"
    else:
        kind, prefix = "text_completion", "cmpl"
    model = context.frontend.model(opened.model)
    return answer_head(kind, prefix=prefix, model=model, request=request, context=context)
