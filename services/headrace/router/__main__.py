"""Composition root of the router."""

import asyncio
import contextlib
import logging
import math
import secrets
import socket
import sys
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from headrace.clock import WallClock
from headrace.errors import ConfigError, InternalError
from headrace.router.actor import LiveRequests
from headrace.router.config import RouterConfig
from headrace.router.http.app import create_app
from headrace.router.http.context import HttpSettings
from headrace.router.ingestors import IngestorForwarder, Ingestors
from headrace.router.member import RouterMember
from headrace.router.sequence import SequenceParts
from headrace.router.service import RouterServicer
from headrace.router.shared_index import SharedIndex
from headrace.router.workers import WorkerTable
from headrace.runtime.channels import Channels
from headrace.runtime.cluster import ClusterServicer
from headrace.runtime.lifecycle import Lifecycle, run_service
from headrace.runtime.logs import setup_logs
from headrace.runtime.server import GrpcServer
from headrace.runtime.telemetry import ClusterCollector, LoopLagProbe, RouterMetrics, VllmView, exposition
from headrace.settings import ServeArgs, environment
from headrace.text.model import TextModel
from headrace.v1 import cluster_pb2_grpc, index_pb2_grpc, ingestor_pb2_grpc, router_pb2_grpc

logger = logging.getLogger(__name__)

NEW_WORK = (
    "/headrace.v1.RouterService/Generate",
    "/headrace.v1.RouterService/GenerateContext",
    "/headrace.v1.IngestorService/StreamContext",
)
DATE_INTERVAL_S = 1.0


def run(args: ServeArgs) -> int:
    """Serve until SIGTERM; returns the exit code."""
    loaded = args.load(RouterConfig, "router")
    if args.print_config:
        sys.stdout.write(loaded.describe() + "\n")
        return 0
    config = loaded.value
    setup_logs(sys.stderr, name=config.name, role="router")
    logger.info("configuration", extra={"settings": loaded.describe()})
    if not config.cache_secret.reveal():
        logger.warning("cache_secret is empty: whoever reaches the stores can compute the keys of tenants")

    async def main(lifecycle: Lifecycle) -> None:
        await serve(config, lifecycle)

    return run_service(main, exit_with_parent=config.exit_with_parent)


async def serve(config: RouterConfig, lifecycle: Lifecycle) -> None:
    """Run the router until the process is asked to leave."""
    clock, registry = WallClock(), CollectorRegistry()
    metrics = RouterMetrics(registry, clock)
    text = await asyncio.to_thread(TextModel.load, config.model)
    index = SharedIndex(config, clock)
    async with Channels() as channels, asyncio.TaskGroup() as tasks:
        table = WorkerTable(
            name=config.name,
            addresses=(*config.workers, *config.kvstores, *config.ingestors),
            channels=channels,
            clock=clock,
            report_timeout_s=config.first_report_timeout_s,
        )
        parts = SequenceParts(
            table=table,
            channels=channels,
            clock=clock,
            tasks=tasks,
            prefixes=index.prefixes,
            drift=index.drift,
            max_moves=config.max_moves,
        )
        live = LiveRequests(config, parts, text, clock, metrics)
        table.on_meet = live.meet
        member = RouterMember(config, secrets.token_hex(8), live, table, lifecycle)
        server = GrpcServer(config.name, config.host, config.grpc_port, new_work=NEW_WORK)
        server.add(cluster_pb2_grpc.add_ClusterServiceServicer_to_server, ClusterServicer(member))
        router = RouterServicer(live, member.cluster, config, clock)
        server.add(router_pb2_grpc.add_RouterServiceServicer_to_server, router)
        ingestors = Ingestors(table, channels, config.ingestors)
        forwarder = IngestorForwarder(ingestors, tasks, config.max_body_bytes)
        server.add(ingestor_pb2_grpc.add_IngestorServiceServicer_to_server, forwarder)
        server.add(index_pb2_grpc.add_IndexServiceServicer_to_server, index.servicer())
        await server.start()
        _register_views(registry, live, member, metrics)
        index.publish(registry)
        probe = LoopLagProbe()
        probe.publish(registry, "router")
        app = _app(config, live, ingestors, registry, clock)
        web, listener = _web_server(config, app), _listen(config.host, config.http_port)
        background = [
            *(tasks.create_task(table.follow(address)) for address in table.members),
            tasks.create_task(live.keep_ready()),
            tasks.create_task(member.publish(server)),
            tasks.create_task(probe.run()),
            tasks.create_task(index.run()),
        ]
        serving = tasks.create_task(web.serve([listener]))
        await asyncio.wait([serving, tasks.create_task(lifecycle.stopped())], return_when=asyncio.FIRST_COMPLETED)
        if not lifecycle.is_stopping:
            raise InternalError("the HTTP server ended by itself")
        live.is_draining = True
        await _finish(server, web, lifecycle.grace_s(config.drain_s), clock)
        await asyncio.wait([serving])
        await server.stop()
        for task in background:
            task.cancel()
        await index.close()


async def _finish(server: GrpcServer, web: "_Web", grace_s: float, clock: WallClock) -> None:
    """Let what runs go on for a while, at both servers together."""
    begun_s = clock.now()
    await server.drain(grace_s)
    web.leave(grace_s - (clock.now() - begun_s))


def _register_views(
    registry: CollectorRegistry, live: LiveRequests, member: RouterMember, metrics: RouterMetrics
) -> None:
    def model_name() -> str:
        return next((model.name for model in live.models()), "")

    registry.register(ClusterCollector(member.loads, model_name))
    registry.register(VllmView(metrics, model_name))


def _listen(host: str, port: int) -> socket.socket:
    """Bind here: uvicorn would end the process with a code that a supervisor takes for a crash."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = f"cannot listen on {host}:{port}: {error.strerror}; choose a free port"
        raise ConfigError(reason, field="http_port") from None


def _app(
    config: RouterConfig, live: LiveRequests, ingestors: Ingestors, registry: CollectorRegistry, clock: WallClock
) -> FastAPI:
    settings = HttpSettings(
        tenancy=config.tenancy(),
        max_body_bytes=config.max_body_bytes,
        default_timeout_s=config.default_timeout_s,
        max_timeout_s=config.max_timeout_s,
    )
    return create_app(live, clock=clock, metrics=lambda: exposition(registry), settings=settings, ingestors=ingestors)


def _web_server(config: RouterConfig, app: FastAPI) -> "_Web":
    web = uvicorn.Config(
        app,
        host=config.host,
        port=config.http_port,
        http="httptools",
        log_config=None,
        access_log=False,
        lifespan="off",
    )
    return _Web(web)


class _Web(uvicorn.Server):
    """uvicorn without its signal handlers: the process's own lifecycle decides when to leave.

    It looks at its clock once a second, for the date in answers; uvicorn's own look, ten times a second, only finds
    out sooner that it is to leave.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._leaving = asyncio.Event()

    def leave(self, grace_s: float) -> None:
        """Take no connection any more, and end when those that are open do, or in about so many seconds."""
        self.config.timeout_graceful_shutdown = max(1, math.ceil(grace_s))
        self.should_exit = True
        self._leaving.set()

    async def main_loop(self) -> None:
        """Keep the date current until told to leave."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DATE_INTERVAL_S):
                    await self._leaving.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture nothing."""
        yield


if __name__ == "__main__":
    sys.exit(run(ServeArgs(env=environment())))
