"""A kvstore to speak to over gRPC: in this process over the fake transport, or alone over NIXL.

Run as `python -m headrace.testing.kvstore MEMORY_BYTES` it serves until its input ends and prints its address.
"""

import asyncio
import os
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
from numpy.typing import NDArray

from headrace.clock import Clock, WallClock
from headrace.kvstore.actor import Edges
from headrace.kvstore.config import KvStoreConfig
from headrace.kvstore.disk import DiskTier
from headrace.kvstore.disk_file import SystemCalls
from headrace.kvstore.parts import KvStoreParts, Outside, assemble, build, running
from headrace.runtime.channels import Channels
from headrace.runtime.server import GrpcServer
from headrace.testing.connector import Fabric, FakeConnector


@asynccontextmanager
async def serve_kvstore(parts: KvStoreParts, port: int = 0) -> AsyncIterator[GrpcServer]:
    """Serve a kvstore on loopback."""
    server = GrpcServer("kvstore", "127.0.0.1", port)
    parts.serve_on(server)
    async with running(parts):
        await server.start()
        try:
            yield server
        finally:
            await server.stop()


def fake_kvstore(
    fabric: Fabric, config: KvStoreConfig, clock: Clock, channels: Channels, calls: SystemCalls = os
) -> KvStoreParts:
    """Return a kvstore whose pool is reached over a fabric; its agent is named after its epoch.

    Args:
        fabric: Connects it with others.
        config: Its settings.
        clock: Ends leases.
        channels: Connections to others.
        calls: Of its disk tier; tests pass a disk that fails.
    """
    epoch = secrets.token_hex(4)

    def connect(blocks: NDArray[np.uint8]) -> FakeConnector:
        return FakeConnector(fabric, f"store-{epoch}", blocks, epoch, clock)

    def connect_canary(blocks: NDArray[np.uint8], number: int) -> FakeConnector:
        return FakeConnector(fabric, f"canary-{epoch}-{number}", blocks, epoch, clock)

    edges = Edges(
        clock=clock,
        connect=connect,
        new_id=lambda: secrets.token_hex(16),
        open_disk=lambda space: DiskTier(space, clock, calls=calls),
    )
    outside = Outside(edges=edges, channels=channels, connect_canary=connect_canary, begin_drain=lambda _: None)
    return assemble(config, epoch, outside)


async def main(memory_bytes: int) -> None:
    """Serve over NIXL until the input ends."""
    config = KvStoreConfig(memory_bytes=memory_bytes)
    async with Channels() as channels:
        parts = build(
            config, epoch=secrets.token_hex(4), clock=WallClock(), channels=channels, begin_drain=lambda _: None
        )
        async with serve_kvstore(parts) as server:
            sys.stdout.write(server.address + "\n")
            sys.stdout.flush()
            await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
