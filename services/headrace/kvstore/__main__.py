"""Composition root of the kvstore."""

import asyncio
import logging
import secrets
import sys
from functools import partial

from headrace.clock import WallClock
from headrace.kvstore.config import KvStoreConfig
from headrace.kvstore.member import build
from headrace.runtime.channels import Channels
from headrace.runtime.cluster import ClusterServicer
from headrace.runtime.lifecycle import Lifecycle, run_service
from headrace.runtime.logs import setup_logs
from headrace.runtime.server import GrpcServer
from headrace.settings import ServeArgs, environment
from headrace.v1 import cluster_pb2_grpc, kvstore_pb2_grpc, pool_pb2_grpc

logger = logging.getLogger(__name__)

DRAIN_S = 2.0


def run(args: ServeArgs) -> int:
    """Serve until SIGTERM; returns the exit code."""
    loaded = args.load(KvStoreConfig, "kvstore")
    if args.print_config:
        sys.stdout.write(loaded.describe() + "\n")
        return 0
    config = loaded.value
    setup_logs(sys.stderr, name=config.name, role="kvstore")
    logger.info("configuration", extra={"settings": loaded.describe()})

    async def main(lifecycle: Lifecycle) -> None:
        await serve(config, lifecycle)

    return run_service(main, exit_with_parent=config.exit_with_parent)


async def serve(config: KvStoreConfig, lifecycle: Lifecycle) -> None:
    """Run the kvstore until the process is asked to leave."""
    async with Channels() as channels, asyncio.TaskGroup() as tasks:
        parts = build(
            config,
            epoch=secrets.token_hex(8),
            clock=WallClock(),
            channels=channels,
            begin_drain=partial(lifecycle.stop, "drain"),
        )
        parts.actor.mailbox.start(tasks)
        timer = tasks.create_task(parts.actor.run_timer())
        server = GrpcServer(config.name, config.host, config.grpc_port)
        server.add(kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server, parts.servicer)
        server.add(pool_pb2_grpc.add_PoolServiceServicer_to_server, parts.pool)
        server.add(cluster_pb2_grpc.add_ClusterServiceServicer_to_server, ClusterServicer(parts.member))
        await server.start()
        try:
            proving = tasks.create_task(parts.member.keep_ready(server, parts.canary))
            await lifecycle.stopped()
            proving.cancel()
            await server.drain(0.0)
            await parts.actor.drain(lifecycle.grace_s(DRAIN_S))
        finally:
            await server.stop()
        timer.cancel()
        await parts.canary.close()
        await parts.actor.close()


if __name__ == "__main__":
    sys.exit(run(ServeArgs(env=environment())))
