"""The asynchronous client."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar, Unpack, cast

import grpc.aio

from headrace.client import messages
from headrace.client.attempts import Attempts
from headrace.client.context import AsyncContext
from headrace.client.context_link import ContextLink
from headrace.client.fold import AnswerFold
from headrace.client.rpc import (
    DEFAULT_ADDRESS,
    DEFAULT_RETRIES,
    DEFAULT_TIMEOUT_S,
    OPTIONS,
    metadata_of,
    policy_of,
    typed_errors,
)
from headrace.client.values import Answer, GenerateOptions, MemberInfo, Message, ModelInfo
from headrace.core.request import Piece
from headrace.errors import Cancelled, HeadraceError
from headrace.v1 import ingestor_pb2, ingestor_pb2_grpc, router_pb2, router_pb2_grpc

if TYPE_CHECKING:
    from headrace.v1.ingestor_pb2_grpc import IngestorServiceAsyncStub
    from headrace.v1.router_pb2_grpc import RouterServiceAsyncStub

    StreamCall = grpc.aio.UnaryStreamCall[router_pb2.GenerateRequest, router_pb2.GenerateResponse]

ResultT = TypeVar("ResultT")


class AsyncClient:
    """Talks to a router; one connection, any number of calls at once on one event loop.

    All methods raise HeadraceError. Calls that failed for lack of room or by a dead process are made
    again, as long as nothing of their answer has arrived. Cancelling a method stops its work in the cluster.

    Args:
        address: host:port of the router's gRPC server.
        timeout_s: Longest time for a call that names none, retries included.
        retries: Most further attempts of a call.
        tenant: Who asks; the router takes "default" for None.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retries: int = DEFAULT_RETRIES,
        tenant: str | None = None,
    ) -> None:
        self._address = address
        self._policy = policy_of(timeout_s, retries)
        self._metadata = metadata_of(tenant)
        self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self._stub: RouterServiceAsyncStub = router_pb2_grpc.RouterServiceStub(self._channel)
        self._contexts: IngestorServiceAsyncStub = ingestor_pb2_grpc.IngestorServiceStub(self._channel)
        self._closed = asyncio.Event()

    async def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Answer:
        """Continue a text, or tokens."""
        async with self.stream(prompt, **options) as stream:
            return await stream.answer()

    async def chat(self, chat: Iterable[Message], **options: Unpack[GenerateOptions]) -> Answer:
        """Answer a chat."""
        async with self.stream_chat(chat, **options) as stream:
            return await stream.answer()

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> "AsyncStream":
        """Continue a text, or tokens, piece by piece."""
        return self._stream_of(messages.text_request(prompt, options), options)

    def stream_chat(self, chat: Iterable[Message], **options: Unpack[GenerateOptions]) -> "AsyncStream":
        """Answer a chat piece by piece."""
        return self._stream_of(messages.chat_request(chat, options), options)

    def context(
        self,
        prefix: str = "",
        *,
        chat: Iterable[Message] | None = None,
        mode: Literal["append", "update"] = "append",
        **options: Unpack[GenerateOptions],
    ) -> AsyncContext:
        """Begin a prompt whose context still arrives.

        Args:
            prefix: Text before the context.
            chat: Messages before the context, which with the query becomes one more message of the user; an empty
                list is a chat too. Without it the prompt is plain text.
            mode: Whether text is only added, or segments may be replaced too.
            options: How to answer; `timeout_s` counts from the opening.
        """
        opening = messages.context_request(prefix, chat, mode, options)

        def connect(first: ingestor_pb2.StreamContextRequest, timeout_s: float) -> ContextLink:
            return ContextLink(
                self._address, lambda: self._contexts.StreamContext(timeout=timeout_s, metadata=self._metadata), first
            )

        def attempts(patience_s: float | None) -> Attempts:
            return Attempts(self._policy, options.get("timeout_s"), patience_s)

        return AsyncContext(connect, opening, attempts, self._pause)

    async def tokenize(self, source: str | Iterable[Message], model: str | None = None) -> tuple[int, ...]:
        """Return the tokens of a text, or of a chat rendered with the prompt for an answer."""
        request = messages.tokenize_request(source, model)
        response = await self._call(lambda timeout_s: self._stub.Tokenize(request, timeout=timeout_s))
        return tuple(response.token_ids)

    async def detokenize(self, token_ids: Sequence[int], model: str | None = None) -> str:
        """Return the text of tokens."""
        request = messages.detokenize_request(token_ids, model)
        response = await self._call(lambda timeout_s: self._stub.Detokenize(request, timeout=timeout_s))
        return response.text

    async def models(self) -> tuple[ModelInfo, ...]:
        """Return the models served."""
        request = router_pb2.ListModelsRequest()
        response = await self._call(lambda timeout_s: self._stub.ListModels(request, timeout=timeout_s))
        return tuple(messages.model_of(card) for card in response.models)

    async def cluster(self) -> tuple[MemberInfo, ...]:
        """Return the processes that the router knows and their last load."""
        request = router_pb2.GetClusterRequest()
        response = await self._call(lambda timeout_s: self._stub.GetCluster(request, timeout=timeout_s))
        return tuple(messages.member_of(member) for member in response.members)

    async def close(self) -> None:
        """Close the connection; calls still running, or waiting to be made again, raise Cancelled."""
        self._closed.set()
        await self._channel.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _stream_of(self, request: router_pb2.GenerateRequest, options: GenerateOptions) -> "AsyncStream":
        def begin(timeout_s: float) -> "StreamCall":
            return self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)

        attempts = Attempts(self._policy, options.get("timeout_s"))
        return AsyncStream(self._address, attempts, begin, request.num_choices or 1, self._pause)

    async def _call(self, begin: Callable[[float], Awaitable[ResultT]]) -> ResultT:
        attempts = Attempts(self._policy, None)
        while True:
            try:
                with typed_errors(self._address):
                    return await begin(attempts.remaining_s())
            except HeadraceError as error:
                await self._pause(attempts.pause_s(error))

    async def _pause(self, pause_s: float) -> None:
        try:
            async with asyncio.timeout(pause_s):
                await self._closed.wait()
        except TimeoutError:
            return
        raise Cancelled(f"the client of {self._address} was closed during the call")


class AsyncStream:
    """The pieces of one call as they arrive; leaving it early stops the work in the cluster.

    Iterate it, ask it for the whole `answer`, or both. The call begins with the first of these.
    """

    def __init__(
        self,
        address: str,
        attempts: Attempts,
        begin: "Callable[[float], StreamCall]",
        num_choices: int,
        pause: Callable[[float], Awaitable[None]],
    ) -> None:
        self._address = address
        self._attempts = attempts
        self._begin = begin
        self._pause = pause
        self._fold = AnswerFold(num_choices, attempts.begun_s)
        self._call: StreamCall | None = None
        self._answer: Answer | None = None

    def __aiter__(self) -> "AsyncStream":
        return self

    async def __anext__(self) -> Piece:
        if self._answer is not None:
            raise StopAsyncIteration
        response = await (self._read() if self._call is not None else self._read_first())
        now_s = self._attempts.now_s()
        if response is None:
            self._answer = self._fold.answer(now_s)
            raise StopAsyncIteration
        return self._fold.add(response, now_s)

    async def answer(self) -> Answer:
        """Take in the rest and return the whole answer."""
        async for _ in self:
            pass
        return cast(Answer, self._answer)

    async def close(self) -> None:
        """Stop the work in the cluster if it still runs."""
        if self._call is not None:
            self._call.cancel()

    async def __aenter__(self) -> "AsyncStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _read_first(self) -> router_pb2.GenerateResponse | None:
        while True:
            try:
                with typed_errors(self._address):
                    self._call = self._begin(self._attempts.remaining_s())
                return await self._read()
            except HeadraceError as error:
                await self._pause(self._attempts.pause_s(error))

    async def _read(self) -> router_pb2.GenerateResponse | None:
        call = cast("StreamCall", self._call)
        with typed_errors(self._address):
            response = await call.read()
        return None if response is grpc.aio.EOF else cast(router_pb2.GenerateResponse, response)
