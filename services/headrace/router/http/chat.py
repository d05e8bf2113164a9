"""POST /v1/chat/completions."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from headrace.core.request import GenerationRequest, Piece
from headrace.errors import InvalidRequest
from headrace.router.frontend import ServedModel
from headrace.router.http.answer import Answer
from headrace.router.http.bodies import ChatBody, decode, read_body, refuse_unsupported
from headrace.router.http.context import HttpContext
from headrace.router.http.delivery import EventSender, EventStream, run_requests, until_disconnect
from headrace.router.http.head import answer_head, stream_wants_usage
from headrace.router.http.logprobs import chat_logprobs
from headrace.router.http.prompts import (
    chat_messages,
    chat_tokens,
    generation_requests,
    request_draft,
)
from headrace.router.http.request_id import internal_id
from headrace.router.http.sse import DONE, ChunkWriter, encode_json, error_event, usage_value
from headrace.router.tokens import refuse_long_text


async def chat_completions(request: Request, context: HttpContext) -> Response:
    """Answer a chat, whole or as a stream; the client's leaving stops the work.

    Raises:
        HeadraceError: anything that happens before the first event of the answer.
    """
    body = decode(ChatBody, await read_body(request, context.settings))
    refuse_unsupported(body)
    wants_usage = stream_wants_usage(body)
    model = context.frontend.model(body.model)
    requests = await _requests(body, model, request, context)
    head = answer_head(
        "chat.completion.chunk" if body.stream else "chat.completion",
        prefix="chatcmpl",
        model=model,
        request_id=internal_id(request),
        context=context,
    )
    if not body.stream:
        return await _whole(requests, head, model, request, context)
    stream = _ChatStream(requests, ChunkWriter(head, "delta", has_usage=wants_usage), model)
    return EventStream(lambda sender: stream.run(context, sender, wants_usage=wants_usage), error_event)


async def _requests(
    body: ChatBody, model: ServedModel, request: Request, context: HttpContext
) -> tuple[GenerationRequest, ...]:
    is_renamed = body.max_completion_tokens is not None
    if is_renamed and body.max_tokens not in (None, body.max_completion_tokens):
        raise InvalidRequest(
            "max_tokens and max_completion_tokens differ; give one of them", field="max_completion_tokens"
        )
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", field="top_logprobs")
    texts = [message["content"] for message in chat_messages(body.messages)]
    refuse_long_text(model, texts, "messages", context.limits(model))
    prompt = await chat_tokens(
        model, body.messages, add_generation_prompt=body.add_generation_prompt is not False, context=context
    )
    draft = replace(
        request_draft(body, request, context),
        logprobs=num_logprobs,
        max_tokens=body.max_completion_tokens if is_renamed else body.max_tokens,
        names={
            "prompt": "messages",
            "logprobs": "top_logprobs",
            "max_tokens": "max_completion_tokens" if is_renamed else "max_tokens",
        },
    )
    return generation_requests(draft, [prompt], model, context)


async def _whole(
    requests: Sequence[GenerationRequest],
    head: dict[str, object],
    model: ServedModel,
    request: Request,
    context: HttpContext,
) -> Response:
    answer = Answer(requests, keeps_content=True)
    await until_disconnect(request.receive, run_requests(context.frontend, requests, answer.collect))
    answer.check_finished()
    has_logprobs = requests[0].sampling.logprobs is not None
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
            "logprobs": chat_logprobs(model.text, choice.tokens) if has_logprobs else None,
            "finish_reason": choice.finish,
        }
        for index, choice in enumerate(answer.choices)
    ]
    value: dict[str, Any] = {**head, "choices": choices, "usage": usage_value(answer.usage())}
    return Response(encode_json(value), media_type="application/json")


class _ChatStream:
    """Turns pieces into chunks: the role first, then texts, then the finish reason, then usage."""

    def __init__(self, requests: Sequence[GenerationRequest], writer: ChunkWriter, model: ServedModel) -> None:
        self._requests = requests
        self._writer = writer
        self._model = model
        self._answer = Answer(requests, keeps_content=False)
        self._has_logprobs = requests[0].sampling.logprobs is not None

    async def run(self, context: HttpContext, sender: EventSender, *, wants_usage: bool) -> None:
        """Write all events."""
        role = encode_json({"role": "assistant", "content": "", "refusal": None})
        opening = b"".join(self._writer.chunk(index, role, None) for index in range(len(self._answer.choices)))

        async def take(index: int, piece: Piece) -> None:
            # The head waits for the first piece, so that a refusal still has a status of its own.
            events = self._events(index, piece)
            if not sender.is_started:
                events = opening + events
            if events:
                await sender.write(events)

        await run_requests(context.frontend, self._requests, take)
        self._answer.check_finished()
        ending = self._writer.usage(self._answer.usage()) + DONE if wants_usage else DONE
        await sender.write(ending)

    def _events(self, request_index: int, piece: Piece) -> bytes:
        index = self._answer.take(request_index, piece)
        events = b""
        if piece.text or (self._has_logprobs and piece.tokens):
            payload = b'{"content":' + encode_json(piece.text) + b"}"
            events = self._writer.chunk(index, payload, None, self._logprobs(piece))
        if piece.finish is not None:
            events += self._writer.chunk(index, b"{}", piece.finish)
        return events

    def _logprobs(self, piece: Piece) -> bytes:
        if not self._has_logprobs:
            return b"null"
        return encode_json(chat_logprobs(self._model.text, piece.tokens))
