"""Composition root of the kvstore."""

import logging
import secrets
import sys
from functools import partial

from headrace.clock import Clock, WallClock
from headrace.kvstore.config import KvStoreConfig
from headrace.kvstore.parts import KvStoreParts, build, running
from headrace.runtime.channels import Channels
from headrace.runtime.lifecycle import Lifecycle, run_service
from headrace.runtime.logs import setup_logs
from headrace.runtime.server import GrpcServer
from headrace.settings import ServeArgs, environment

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
    clock = WallClock()
    async with Channels() as channels:
        parts = build(
            config,
            epoch=secrets.token_hex(8),
            clock=clock,
            channels=channels,
            begin_drain=partial(lifecycle.stop, "drain"),
        )
        async with running(parts) as tasks:
            server = GrpcServer(config.name, config.host, config.grpc_port)
            parts.serve_on(server)
            await server.start()
            try:
                proving = tasks.create_task(parts.member.keep_ready(server, parts.canary))
                await lifecycle.stopped()
                proving.cancel()
                await server.drain(0.0)
                await leave(parts, clock, lifecycle.grace_s(config.handover_s if config.siblings else DRAIN_S))
            finally:
                await server.stop()


async def leave(parts: KvStoreParts, clock: Clock, grace_s: float) -> None:
    """Grant nothing any more, hand blocks to siblings and wait for leases, for at most `grace_s` in all."""
    end_s = clock.now() + grace_s
    await parts.actor.close_door()
    await parts.handover.run(end_s)
    await parts.actor.drain(max(0.0, end_s - clock.now()))


if __name__ == "__main__":
    sys.exit(run(ServeArgs(env=environment())))
