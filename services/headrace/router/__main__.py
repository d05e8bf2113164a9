"""Composition root of the router."""

import asyncio
import logging
import secrets
import sys

import uvicorn

from headrace.clock import WallClock
from headrace.errors import ConfigError
from headrace.router.actor import LiveRequests
from headrace.router.config import RouterConfig
from headrace.router.http.app import create_app
from headrace.router.http.settings import HttpSettings
from headrace.router.member import RouterMember
from headrace.router.sequence import SequenceParts
from headrace.router.service import RouterServicer
from headrace.router.workers import WorkerTable
from headrace.runtime.channels import Channels
from headrace.runtime.cluster import ClusterServicer
from headrace.runtime.lifecycle import Lifecycle, run_service
from headrace.runtime.server import GrpcServer
from headrace.runtime.telemetry import RouterMetrics
from headrace.settings import ServeArgs, environment
from headrace.text.model import TextModel
from headrace.v1 import cluster_pb2_grpc, router_pb2_grpc

logger = logging.getLogger(__name__)

GENERATE = "/headrace.v1.RouterService/Generate"
DRAIN_S = 10.0


def run(args: ServeArgs) -> int:
    """Serve until SIGTERM; returns the exit code."""
    loaded = args.load(RouterConfig, "router")
    if args.print_config:
        sys.stdout.write(loaded.describe() + "\n")
        return 0
    logger.info("configuration", extra={"settings": loaded.describe()})
    config = loaded.value

    async def main(lifecycle: Lifecycle) -> None:
        await serve(config, lifecycle)

    return run_service(main, exit_with_parent=config.exit_with_parent)


async def serve(config: RouterConfig, lifecycle: Lifecycle) -> None:
    """Run the router until the process is asked to leave."""
    clock, metrics = WallClock(), RouterMetrics()
    text = await asyncio.to_thread(TextModel.load, config.model)
    async with Channels() as channels, asyncio.TaskGroup() as tasks:
        table = WorkerTable(
            name=config.name,
            addresses=(*config.workers, *([config.kvstore] if config.kvstore else [])),
            channels=channels,
            clock=clock,
            report_timeout_s=config.first_report_timeout_s,
        )
        parts = SequenceParts(
            table=table,
            channels=channels,
            clock=clock,
            tasks=tasks,
            kvstore=config.kvstore,
            max_moves=config.max_moves,
        )
        live = LiveRequests(config, parts, text, clock, metrics)
        table.on_meet = live.meet
        member = RouterMember(config, secrets.token_hex(8), live, table, lifecycle)
        server = GrpcServer(config.name, config.host, config.grpc_port, new_work=(GENERATE,))
        server.add(cluster_pb2_grpc.add_ClusterServiceServicer_to_server, ClusterServicer(member))
        router = RouterServicer(live, member.cluster, config, clock)
        server.add(router_pb2_grpc.add_RouterServiceServicer_to_server, router)
        await server.start()
        web = _web_server(config, live, metrics, clock)
        background = [
            *(tasks.create_task(table.follow(address)) for address in table.members),
            tasks.create_task(live.keep_ready()),
            tasks.create_task(member.publish(server, metrics)),
        ]
        serving = tasks.create_task(web.serve())
        await asyncio.wait([serving, tasks.create_task(lifecycle.stopped())], return_when=asyncio.FIRST_COMPLETED)
        if not lifecycle.is_stopping:
            raise ConfigError(f"cannot listen on {config.host}:{config.http_port}: choose a free port")
        live.is_draining = True
        await server.drain(DRAIN_S)
        web.should_exit = True
        await asyncio.wait([serving])
        await server.stop()
        for task in background:
            task.cancel()


def _web_server(config: RouterConfig, live: LiveRequests, metrics: RouterMetrics, clock: WallClock) -> uvicorn.Server:
    app = create_app(live, clock=clock, metrics=metrics.exposition, settings=HttpSettings.of(config))
    web = uvicorn.Config(
        app,
        host=config.host,
        port=config.http_port,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=int(DRAIN_S),
    )
    server = uvicorn.Server(web)
    # The process's own lifecycle handles signals; uvicorn would end the loop under the gRPC server.
    server.install_signal_handlers = lambda: None  # type: ignore[method-assign]
    return server


if __name__ == "__main__":
    sys.exit(run(ServeArgs(env=environment())))
