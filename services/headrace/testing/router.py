"""A front door that answers from a script, for tests of clients and servers without a model."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from enum import Enum
from typing import TypeAlias

import grpc.aio

from headrace.core.request import FinishReason, Piece, Token, Usage
from headrace.core.status import MAX_MESSAGE_BYTES
from headrace.core.tenancy import TENANT_HEADER
from headrace.core.wire import piece_to_proto
from headrace.errors import HeadraceError
from headrace.runtime.server import GrpcServer
from headrace.v1 import cluster_pb2, router_pb2, router_pb2_grpc

GENERATE = "/headrace.v1.RouterService/Generate"


class Act(Enum):
    """What a script may do besides answering and failing."""

    HANG = "hang"
    """Wait until the caller leaves."""
    BREAK = "break"
    """Raise what nobody expected."""


Step: TypeAlias = Piece | HeadraceError | Act
Script: TypeAlias = Sequence[Step]


def answer(text: str, choice: int = 0, *, is_last: bool = True) -> tuple[Piece, ...]:
    """Return one piece per character of `text`; the last one has a finish reason and, if last, the usage."""
    pieces: list[Piece] = []
    for index, character in enumerate(text):
        is_end = index == len(text) - 1
        finish = FinishReason.STOP if is_end else None
        token = Token(cursor=index, token_id=ord(character), logprob=-0.5, finish=finish)
        usage = Usage(prompt_tokens=3, completion_tokens=len(text), cached_tokens=1) if is_end and is_last else None
        pieces.append(Piece(choice=choice, text=character, tokens=(token,), finish=finish, usage=usage))
    return tuple(pieces)


class ScriptedRouter(router_pb2_grpc.RouterServiceServicer):
    """Plays one script per Generate call; the last one repeats.

    Attributes:
        requests: Every Generate request, in order.
        remaining_s: Time each call had left when it arrived.
        tenants: What each call said that its tenant is.
        arrived: Set when a Generate call arrived.
        num_left: Calls whose caller left before the end.
        left: Set when a caller left.
    """

    def __init__(self, *scripts: Script) -> None:
        self.requests: list[router_pb2.GenerateRequest] = []
        self.remaining_s: list[float] = []
        self.tenants: list[object] = []
        self.arrived = asyncio.Event()
        self.num_left = 0
        self.left = asyncio.Event()
        self._scripts = scripts

    async def Generate(
        self, request: router_pb2.GenerateRequest, context: "router_pb2_grpc._ServicerContext"
    ) -> AsyncIterator[router_pb2.GenerateResponse]:
        """Play the next script."""
        script = self._scripts[min(len(self.requests), len(self._scripts) - 1)]
        self.requests.append(request)
        self.remaining_s.append(_remaining_s(context))
        self.tenants.append(dict(context.invocation_metadata() or ()).get(TENANT_HEADER))
        self.arrived.set()
        try:
            for index, step in enumerate(script):
                match step:
                    case Piece():
                        yield piece_to_proto(step, request.request_id or "made-up", "scripted" if index == 0 else "")
                    case Act.HANG:
                        await asyncio.Event().wait()
                    case Act.BREAK:
                        raise ZeroDivisionError("secret inside")
                    case HeadraceError():
                        raise step
        except (asyncio.CancelledError, GeneratorExit):
            self.num_left += 1
            self.left.set()
            raise

    async def Tokenize(
        self, request: router_pb2.TokenizeRequest, context: "router_pb2_grpc._ServicerContext"
    ) -> router_pb2.TokenizeResponse:
        """Return one token per character; of a chat, those of all its messages."""
        text = request.text or "".join(message.content for message in request.chat.messages)
        return router_pb2.TokenizeResponse(token_ids=[ord(character) for character in text], max_context_tokens=99)

    async def Detokenize(
        self, request: router_pb2.DetokenizeRequest, context: "router_pb2_grpc._ServicerContext"
    ) -> router_pb2.DetokenizeResponse:
        """Return one character per token."""
        return router_pb2.DetokenizeResponse(text="".join(chr(token) for token in request.token_ids))

    async def ListModels(
        self, request: router_pb2.ListModelsRequest, context: "router_pb2_grpc._ServicerContext"
    ) -> router_pb2.ListModelsResponse:
        """Return one model."""
        card = router_pb2.ModelCard(name="scripted", max_context_tokens=99, fingerprint="f00d")
        return router_pb2.ListModelsResponse(models=[card])

    async def GetCluster(
        self, request: router_pb2.GetClusterRequest, context: "router_pb2_grpc._ServicerContext"
    ) -> router_pb2.GetClusterResponse:
        """Return one worker."""
        load = cluster_pb2.LoadReport(name="decode-0", num_running=2, is_ready=True)
        member = router_pb2.ClusterMember(
            name="decode-0", role=cluster_pb2.ROLE_DECODE, address="127.0.0.1:1", is_connected=True, load=load
        )
        return router_pb2.GetClusterResponse(members=[member])


def _remaining_s(context: "grpc.aio.ServicerContext[object, object]") -> float:
    remaining: float | None = context.time_remaining()
    return float("inf") if remaining is None else remaining


@asynccontextmanager
async def serve_router(
    router: ScriptedRouter, port: int = 0, max_message_bytes: int = MAX_MESSAGE_BYTES
) -> AsyncIterator[GrpcServer]:
    """Serve a scripted router on loopback; ready at once."""
    server = GrpcServer("router", "127.0.0.1", port, (GENERATE,), max_message_bytes)
    server.add(router_pb2_grpc.add_RouterServiceServicer_to_server, router)
    await server.start()
    await server.set_ready(is_ready=True)
    try:
        yield server
    finally:
        await server.stop()
