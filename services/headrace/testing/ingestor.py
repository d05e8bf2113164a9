"""An ingestor in this process, before a router that may be a script; gRPC runs over loopback."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from headrace.clock import Clock, WallClock
from headrace.errors import Draining
from headrace.ingestor.config import IngestorConfig
from headrace.ingestor.parts import IngestParts, TextRoom
from headrace.ingestor.routers import Routers
from headrace.ingestor.service import IngestorServicer
from headrace.ingestor.sessions import Sessions
from headrace.router.config import RouterConfig
from headrace.router.frontend import Frontend
from headrace.router.service import RouterServicer
from headrace.runtime.channels import Channels
from headrace.runtime.server import GrpcServer
from headrace.text.cuts import SafeCuts
from headrace.text.model import TextModel
from headrace.v1 import ingestor_pb2_grpc, router_pb2, router_pb2_grpc

PATIENCE_S = 5.0
NEW_WORK = ("/headrace.v1.RouterService/Generate", "/headrace.v1.RouterService/GenerateContext")


@asynccontextmanager
async def serve_frontend(frontend: Frontend, port: int = 0, clock: Clock | None = None) -> AsyncIterator[GrpcServer]:
    """Serve the router's gRPC front door before any frontend."""
    config = RouterConfig(workers=("127.0.0.1:1",), model=Path())
    servicer = RouterServicer(frontend, router_pb2.GetClusterResponse, config, clock or WallClock())
    server = GrpcServer("router", "127.0.0.1", port, new_work=NEW_WORK)
    server.add(router_pb2_grpc.add_RouterServiceServicer_to_server, servicer)
    await server.start()
    await server.set_ready(is_ready=True)
    try:
        yield server
    finally:
        await server.stop()


@dataclass(slots=True, kw_only=True)
class Ingestor:
    """An ingestor and how to reach it."""

    sessions: Sessions
    parts: IngestParts
    server: GrpcServer

    @property
    def address(self) -> str:
        """host:port of its gRPC server."""
        return self.server.address

    async def start(self, port: int = 0) -> None:
        """Answer calls, at a port of before or another; what contexts there are is kept over a stop."""
        name = self.parts.config.name
        self.server = GrpcServer(name, "127.0.0.1", port, new_work=("/headrace.v1.IngestorService/StreamContext",))
        servicer = IngestorServicer(self.sessions, self.parts)
        self.server.add(ingestor_pb2_grpc.add_IngestorServiceServicer_to_server, servicer)
        await self.server.start()
        await self.server.set_ready(is_ready=True)

    async def break_off(self) -> int:
        """End all calls as the death of a connection does; return the port that is free now."""
        await self.server.stop()
        return self.server.port

    def left(self) -> str:
        """Return what is held here, or nothing when all is at rest."""
        held = {
            "contexts": len(self.sessions.live()),
            "characters": self.parts.room.num_chars,
            "calls": self.server.num_running,
            "tasks": len(ingestor_tasks()),
        }
        return ", ".join(f"{name}={count}" for name, count in held.items() if count)

    async def at_rest(self) -> None:
        """Wait until nothing is held."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while self.left():  # noqa: ASYNC110 what is waited for are counters
                    await asyncio.sleep(0.002)
        except TimeoutError:
            raise AssertionError(self.left() + "; " + ", ".join(map(repr, ingestor_tasks()))) from None


def ingestor_tasks() -> list["asyncio.Task[object]"]:
    """Return live tasks that some context or call of an ingestor started."""
    words = ("RouterRun.", "ContextCall.", "Session.")
    return [
        task
        for task in asyncio.all_tasks()
        if not task.done() and getattr(task.get_coro(), "__qualname__", "").startswith(words)
    ]


@asynccontextmanager
async def open_ingestor(
    model: TextModel,
    routers: Sequence[str],
    *,
    clock: Clock | None = None,
    cuts: SafeCuts | None = None,
    **settings: object,
) -> AsyncIterator[Ingestor]:
    """Run an ingestor on loopback.

    Args:
        model: Tokenizer of what the routers serve.
        routers: host:port of each.
        clock: The machine's by default; sweep by hand with another.
        cuts: Of the model, which take a while to be found.
        settings: Of `IngestorConfig`.
    """
    config = IngestorConfig(model=Path(), routers=tuple(routers), **settings)  # type: ignore[arg-type]
    seeds = itertools.count(1)
    async with AsyncExitStack() as stack:
        channels = await stack.enter_async_context(Channels())
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        parts = IngestParts(
            config=config,
            model=model,
            cuts=cuts or model.cuts(),
            routers=Routers(config.routers, channels),
            clock=clock or WallClock(),
            tasks=tasks,
            entropy=lambda: next(seeds),
            room=TextRoom(config.max_text_chars),
        )
        sessions = Sessions(parts)
        ingestor = Ingestor(sessions=sessions, parts=parts, server=GrpcServer(config.name, "127.0.0.1", 0))
        await ingestor.start()
        sweeping = tasks.create_task(sessions.keep_sweeping())
        try:
            yield ingestor
        finally:
            sweeping.cancel()
            sessions.end_all(lambda: Draining("the test is over"))
            await sessions.idle()
            await ingestor.server.stop()
