"""Composition root of the router."""

import asyncio
import logging
import secrets
import sys

from prometheus_client import CollectorRegistry

from headrace.clock import WallClock
from headrace.errors import InternalError
from headrace.router.actor import LiveRequests
from headrace.router.config import RouterConfig
from headrace.router.http.app import create_app
from headrace.router.http.context import HttpSettings
from headrace.router.http.server import WebServer, listen
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
        # Up to twice the limit a request is refused with an error that says more than gRPC's own.
        server = GrpcServer(config.name, config.host, config.grpc_port, NEW_WORK, 2 * config.max_body_bytes)
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
        web = _web(config, live, ingestors, registry, clock)
        listener = listen(config.host, config.http_port)
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


async def _finish(server: GrpcServer, web: WebServer, grace_s: float, clock: WallClock) -> None:
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


def _web(
    config: RouterConfig, live: LiveRequests, ingestors: Ingestors, registry: CollectorRegistry, clock: WallClock
) -> WebServer:
    settings = HttpSettings(
        tenancy=config.tenancy(),
        max_body_bytes=config.max_body_bytes,
        receive_timeout_s=config.receive_timeout_s,
        default_timeout_s=config.default_timeout_s,
        max_timeout_s=config.max_timeout_s,
    )
    app = create_app(live, clock=clock, metrics=lambda: exposition(registry), settings=settings, ingestors=ingestors)
    return WebServer(app, config.host, config.http_port, config.receive_timeout_s)


if __name__ == "__main__":
    sys.exit(run(ServeArgs(env=environment())))
