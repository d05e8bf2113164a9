"""RouterService on the wire: translates and decides nothing."""

import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

import grpc.aio

from headrace.clock import Clock
from headrace.core.draft import draft_from_proto
from headrace.core.request import ContextProgress
from headrace.core.validate import RequestDraft, RequestLimits, build_request
from headrace.core.wire import piece_to_proto
from headrace.errors import InvalidRequest
from headrace.router.arriving import ArrivingContext
from headrace.router.config import RouterConfig
from headrace.router.frontend import Frontend, ServedModel
from headrace.router.tokens import detokenize, refuse_long_text
from headrace.runtime.incoming import first_of, tenant_of_call
from headrace.runtime.off_loop import off_loop
from headrace.v1 import generate_pb2, router_pb2, router_pb2_grpc


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """Translate RouterService to a Frontend.

    Args:
        frontend: The router's verbs.
        cluster: Makes the list of processes.
        config: Limits of requests.
        clock: Turns timeouts into deadlines.
    """

    def __init__(
        self,
        frontend: Frontend,
        cluster: Callable[[], router_pb2.GetClusterResponse],
        config: RouterConfig,
        clock: Clock,
    ) -> None:
        self._frontend = frontend
        self._cluster = cluster
        self._config = config
        self._clock = clock

    async def Generate(
        self, request: router_pb2.GenerateRequest, context: "grpc.aio.ServicerContext[object, object]"
    ) -> AsyncGenerator[router_pb2.GenerateResponse, None]:
        """Stream the answer; cancelling the call stops all its work."""
        self._refuse_large(request.ByteSize())
        model = self._frontend.model(request.model)
        tenant = tenant_of_call(context)
        prompt = await _prompt_tokens(model, request, self._limits(model))
        draft = self._draft(request, prompt, tenant, context.time_remaining())
        checked = build_request(draft, self._limits(model), self._config.tenancy(), now_unix_ms=self._clock.unix_ms())
        async with aclosing(self._frontend.submit(checked)) as pieces:
            name = model.name
            async for piece in pieces:
                yield piece_to_proto(piece, checked.request_id, name)
                name = ""

    async def GenerateContext(
        self,
        request_iterator: AsyncIterator[router_pb2.GenerateContextRequest],
        context: "grpc.aio.ServicerContext[object, object]",
    ) -> AsyncGenerator[router_pb2.GenerateContextResponse, None]:
        """Take a prompt in revisions and stream its answer; cancelling the call stops all its work."""
        first = await first_of(request_iterator)
        if first is None or not first.HasField("open"):
            raise InvalidRequest("the first request of a context opens it, the others do not", field="open")
        opening = first.open
        self._refuse_large(opening.ByteSize())
        model = self._frontend.model(opening.model)
        limits, prompt = self._limits(model), list(opening.tokens.token_ids)
        if opening.WhichOneof("prompt") not in {None, "tokens"} or opening.num_choices > 1:
            raise InvalidRequest("a context has one answer and is opened with tokens, or nothing", field="open")
        draft = self._draft(opening, prompt, tenant_of_call(context), context.time_remaining())
        now_unix_ms = self._clock.unix_ms()
        checked = build_request(draft, limits, self._config.tenancy(), now_unix_ms=now_unix_ms, is_open=True)
        arriving = ArrivingContext(limits, num_tokens=len(prompt), max_tokens=opening.sampling.max_tokens)
        num_final = arriving.check_final(first.final_tokens)
        revisions = arriving.revisions(request_iterator, self._refuse_large)
        async with aclosing(self._frontend.submit_context(checked, num_final, revisions)) as events:
            name = model.name
            async for event in events:
                if isinstance(event, ContextProgress):
                    progress = generate_pb2.ContextProgress(version=event.version, computed_tokens=event.num_computed)
                    yield router_pb2.GenerateContextResponse(progress=progress)
                else:
                    piece = piece_to_proto(event, checked.request_id, name)
                    yield router_pb2.GenerateContextResponse(piece=piece)
                    name = ""

    async def Tokenize(
        self, request: router_pb2.TokenizeRequest, context: "grpc.aio.ServicerContext[object, object]"
    ) -> router_pb2.TokenizeResponse:
        """Turn text or a chat into tokens."""
        self._refuse_large(request.ByteSize())
        model = self._frontend.model(request.model)
        match request.WhichOneof("input"):
            case "text":
                tokens = await _text_tokens(model, request.text)
            case "chat":
                tokens = await _chat_tokens(model, request.chat)
            case _:
                raise InvalidRequest("input is missing: give text or chat", field="input")
        return router_pb2.TokenizeResponse(token_ids=tokens, max_context_tokens=model.max_context_tokens)

    async def Detokenize(
        self, request: router_pb2.DetokenizeRequest, context: "grpc.aio.ServicerContext[object, object]"
    ) -> router_pb2.DetokenizeResponse:
        """Turn tokens into text."""
        model = self._frontend.model(request.model)
        text = detokenize(model, request.token_ids, "token_ids")
        return router_pb2.DetokenizeResponse(text=text)

    async def ListModels(
        self, request: router_pb2.ListModelsRequest, context: "grpc.aio.ServicerContext[object, object]"
    ) -> router_pb2.ListModelsResponse:
        """Name the models served."""
        cards = [
            router_pb2.ModelCard(
                name=model.name, max_context_tokens=model.max_context_tokens, fingerprint=model.fingerprint
            )
            for model in self._frontend.models()
        ]
        return router_pb2.ListModelsResponse(models=cards)

    async def GetCluster(
        self, request: router_pb2.GetClusterRequest, context: "grpc.aio.ServicerContext[object, object]"
    ) -> router_pb2.GetClusterResponse:
        """List the processes and their last reports."""
        return self._cluster()

    def _refuse_large(self, size: int) -> None:
        """Refuse a message over the limit that HTTP bodies have.

        Raises:
            InvalidRequest: it is larger.
        """
        limit = self._config.max_body_bytes
        if size > limit:
            raise InvalidRequest(
                f"the request has {size} bytes; at most {limit} are allowed", field="prompt", limit=f"{limit} bytes"
            )

    def _limits(self, model: ServedModel) -> RequestLimits:
        return model.limits(self._config.default_timeout_s, self._config.max_timeout_s)

    def _draft(
        self, request: router_pb2.GenerateRequest, prompt: list[int], tenant: str, timeout_s: float | None
    ) -> RequestDraft:
        return draft_from_proto(
            request,
            prompt,
            tenant=tenant,
            timeout_s=None if timeout_s is None else min(timeout_s, self._config.max_timeout_s),
            request_id="gen-" + secrets.token_hex(12),
            fresh_seed=secrets.randbits(64),
        )


async def _prompt_tokens(model: ServedModel, request: router_pb2.GenerateRequest, limits: RequestLimits) -> list[int]:
    match request.WhichOneof("prompt"):
        case "text":
            refuse_long_text(model, [request.text], "prompt", limits)
            return await _text_tokens(model, request.text)
        case "tokens":
            return list(request.tokens.token_ids)
        case "chat":
            refuse_long_text(model, [message.content for message in request.chat.messages], "chat.messages", limits)
            return await _chat_tokens(model, request.chat)
        case _:
            raise InvalidRequest("prompt is missing: give text, tokens or chat", field="prompt")


async def _text_tokens(model: ServedModel, text: str) -> list[int]:
    return await off_loop(len(text), lambda: model.text.encode(text))


async def _chat_tokens(model: ServedModel, chat: router_pb2.ChatPrompt) -> list[int]:
    if not chat.messages:
        raise InvalidRequest("chat has no messages: give at least one", field="chat.messages")
    messages = [{"role": message.role, "content": message.content} for message in chat.messages]
    return await off_loop(sum(len(each["content"]) for each in messages), lambda: model.text.chat_tokens(messages))
