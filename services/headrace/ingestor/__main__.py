"""Composition root of the ingestor."""

import asyncio
import logging
import secrets
import sys
from contextlib import suppress

from headrace.clock import WallClock
from headrace.errors import Draining
from headrace.ingestor.config import IngestorConfig
from headrace.ingestor.member import IngestorMember
from headrace.ingestor.parts import IngestParts, TextRoom
from headrace.ingestor.routers import Routers
from headrace.ingestor.service import IngestorServicer
from headrace.ingestor.sessions import Sessions
from headrace.runtime.channels import Channels
from headrace.runtime.cluster import ClusterServicer
from headrace.runtime.lifecycle import Lifecycle, run_service
from headrace.runtime.logs import setup_logs
from headrace.runtime.server import GrpcServer
from headrace.settings import ServeArgs, environment
from headrace.text.cuts import SafeCuts
from headrace.text.model import TextModel
from headrace.v1 import cluster_pb2_grpc, ingestor_pb2_grpc

logger = logging.getLogger(__name__)

LAST_WORDS_S = 1.0
"""Time for calls to tell their clients why their contexts have ended."""


def run(args: ServeArgs) -> int:
    """Serve until SIGTERM; returns the exit code."""
    loaded = args.load(IngestorConfig, "ingestor")
    if args.print_config:
        sys.stdout.write(loaded.describe() + "\n")
        return 0
    config = loaded.value
    setup_logs(sys.stderr, name=config.name, role="ingestor")
    logger.info("configuration", extra={"settings": loaded.describe()})

    async def main(lifecycle: Lifecycle) -> None:
        await serve(config, lifecycle)

    return run_service(main, exit_with_parent=config.exit_with_parent)


async def serve(config: IngestorConfig, lifecycle: Lifecycle) -> None:
    """Run the ingestor until the process is asked to leave."""
    model, cuts = await asyncio.to_thread(_text, config)
    async with Channels() as channels, asyncio.TaskGroup() as tasks:
        parts = IngestParts(
            config=config,
            model=model,
            cuts=cuts,
            routers=Routers(config.routers, channels),
            clock=WallClock(),
            tasks=tasks,
            entropy=lambda: secrets.randbits(64),
            room=TextRoom(config.max_text_chars),
        )
        sessions = Sessions(parts)
        member = IngestorMember(secrets.token_hex(8), sessions, parts, lifecycle)
        server = GrpcServer(config.name, config.host, config.grpc_port)
        server.add(cluster_pb2_grpc.add_ClusterServiceServicer_to_server, ClusterServicer(member))
        server.add(ingestor_pb2_grpc.add_IngestorServiceServicer_to_server, IngestorServicer(sessions, parts))
        await server.start()
        background = [tasks.create_task(sessions.keep_sweeping()), tasks.create_task(member.keep_ready(server))]
        await lifecycle.stopped()
        sessions.is_draining = True
        await server.drain(0.0)
        # Calls for contexts that are there come and go until these have ended.
        with suppress(TimeoutError):
            async with asyncio.timeout(lifecycle.grace_s(config.drain_s)):
                await sessions.idle()
        sessions.end_all(lambda: Draining("this ingestor has left"))
        await sessions.idle()
        await server.stop(LAST_WORDS_S)
        for task in background:
            task.cancel()


def _text(config: IngestorConfig) -> tuple[TextModel, SafeCuts]:
    model = TextModel.load(config.model)
    return model, model.cuts()


if __name__ == "__main__":
    sys.exit(run(ServeArgs(env=environment())))
