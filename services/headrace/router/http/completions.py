"""POST /v1/completions."""

from collections.abc import Sequence
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response

from headrace.core.request import GenerationRequest, Piece
from headrace.errors import InvalidRequest
from headrace.router.frontend import ServedModel
from headrace.router.http.answer import Answer, Choice
from headrace.router.http.bodies import CompletionBody, decode, read_body, refuse_unsupported
from headrace.router.http.context import HttpContext
from headrace.router.http.delivery import EventSender, EventStream, run_requests, until_disconnect
from headrace.router.http.head import answer_head, stream_wants_usage
from headrace.router.http.logprobs import CompletionLogprobs
from headrace.router.http.prompts import generation_requests, request_draft, text_tokens
from headrace.router.http.request_id import internal_id
from headrace.router.http.sse import DONE, ChunkWriter, encode_json, error_event, usage_value
from headrace.router.tokens import refuse_long_text

# OpenAI's default for this endpoint.
_DEFAULT_MAX_TOKENS = 16


async def completions(request: Request, context: HttpContext) -> Response:
    """Go on with prompts, whole or as a stream; the client's leaving stops the work.

    Raises:
        HeadraceError: anything that happens before the first event of the answer.
    """
    body = decode(CompletionBody, await read_body(request, context.settings))
    refuse_unsupported(body)
    _refuse_combinations(body)
    wants_usage = stream_wants_usage(body)
    model = context.frontend.model(body.model)
    prompts = _split(body.prompt, context.settings.max_prompts)
    tokens = await _prompt_tokens(prompts, model, context)
    draft = replace(
        request_draft(body, request, context), logprobs=body.logprobs, default_max_tokens=_DEFAULT_MAX_TOKENS
    )
    requests = generation_requests(draft, tokens, model, context)
    echoes = _echoes(prompts, model) if body.echo else ("",) * len(prompts)
    head = answer_head("text_completion", prefix="cmpl", model=model, request_id=internal_id(request), context=context)
    shape = _CompletionShape(requests, echoes, model)
    if not body.stream:
        await until_disconnect(request.receive, run_requests(context.frontend, requests, shape.answer.collect))
        return Response(encode_json({**head, **shape.whole()}), media_type="application/json")
    writer = ChunkWriter(head, "text", has_usage=wants_usage)
    stream = _CompletionStream(shape, writer)
    return EventStream(lambda sender: stream.run(context, sender, wants_usage=wants_usage), error_event)


def _refuse_combinations(body: CompletionBody) -> None:
    if body.echo and body.logprobs is not None:
        raise InvalidRequest("echo together with logprobs is not supported", field="echo")
    if body.best_of not in (None, 1 if body.n is None else body.n):
        raise InvalidRequest("best_of is supported only where it equals n", field="best_of", limit=str(body.n or 1))


def _split(prompt: str | list[str | int | list[int]], max_prompts: int) -> list[str | list[int]]:
    """Return the prompts of a request: a text, token ids, or a list of either.

    Raises:
        InvalidRequest: none, too many, or a mixture of numbers and prompts.
    """
    if isinstance(prompt, str):
        return [prompt]
    numbers = [item for item in prompt if isinstance(item, int)]
    if numbers and len(numbers) == len(prompt):
        return [numbers]
    prompts = [item for item in prompt if not isinstance(item, int)]
    if numbers:
        raise InvalidRequest("prompt mixes token ids with whole prompts", field="prompt")
    if not 1 <= len(prompts) <= max_prompts:
        limit = f"1 to {max_prompts} prompts"
        raise InvalidRequest(f"prompt must hold {limit}, found {len(prompts)}", field="prompt", limit=limit)
    return prompts


async def _prompt_tokens(
    prompts: Sequence[str | list[int]], model: ServedModel, context: HttpContext
) -> list[list[int]]:
    for prompt in prompts:
        if isinstance(prompt, str):
            refuse_long_text(model, [prompt], "prompt", context.limits(model))
    return [
        await text_tokens(model, prompt, add_special=True, context=context) if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]


def _echoes(prompts: Sequence[str | list[int]], model: ServedModel) -> tuple[str, ...]:
    return tuple(prompt if isinstance(prompt, str) else model.text.decode(prompt) for prompt in prompts)


class _CompletionShape:
    """The choices of an answer in the form of this endpoint."""

    def __init__(self, requests: Sequence[GenerationRequest], echoes: Sequence[str], model: ServedModel) -> None:
        self.requests = requests
        self.echoes = echoes
        self.model = model
        self.has_logprobs = requests[0].sampling.logprobs is not None
        self.answer = Answer(requests, keeps_content=True)

    def whole(self) -> dict[str, object]:
        """Return choices and usage of the finished answer."""
        self.answer.check_finished()
        choices = [self._choice(index, choice) for index, choice in enumerate(self.answer.choices)]
        return {"choices": choices, "usage": usage_value(self.answer.usage())}

    def echo(self, index: int) -> str:
        """Return the prompt that a choice repeats, or nothing."""
        return self.echoes[self.answer.prompt_index(index)]

    def _choice(self, index: int, choice: Choice) -> dict[str, object]:
        logprobs = CompletionLogprobs(self.model.text).take(choice.tokens) if self.has_logprobs else None
        return {
            "index": index,
            "text": self.echo(index) + "".join(choice.texts),
            "logprobs": logprobs,
            "finish_reason": choice.finish,
        }


class _CompletionStream:
    """Turns pieces into chunks; the last chunk of a choice carries its finish reason."""

    def __init__(self, shape: _CompletionShape, writer: ChunkWriter) -> None:
        self._shape = shape
        self._writer = writer
        self._answer = Answer(shape.requests, keeps_content=False)
        self._logprobs = [CompletionLogprobs(shape.model.text) for _ in self._answer.choices]

    async def run(self, context: HttpContext, sender: EventSender, *, wants_usage: bool) -> None:
        """Write all events."""
        opening = self._opening()

        async def take(index: int, piece: Piece) -> None:
            events = self._events(index, piece)
            if not sender.is_started:
                events = opening + events
            if events:
                await sender.write(events)

        await run_requests(context.frontend, self._shape.requests, take)
        self._answer.check_finished()
        ending = self._writer.usage(self._answer.usage()) + DONE if wants_usage else DONE
        await sender.write(ending)

    def _opening(self) -> bytes:
        echoes = [(index, self._shape.echo(index)) for index in range(len(self._answer.choices))]
        return b"".join(self._writer.chunk(index, encode_json(echo), None) for index, echo in echoes if echo)

    def _events(self, request_index: int, piece: Piece) -> bytes:
        index = self._answer.take(request_index, piece)
        has_logprobs = self._shape.has_logprobs and bool(piece.tokens)
        if not piece.text and piece.finish is None and not has_logprobs:
            return b""
        logprobs = encode_json(self._logprobs[index].take(piece.tokens)) if has_logprobs else b"null"
        return self._writer.chunk(index, encode_json(piece.text), piece.finish, logprobs)
