"""A kvstore to speak to over gRPC: in this process over the fake transport, or alone over NIXL.

Run as `python -m headrace.testing.kvstore MEMORY_BYTES` it serves until its input ends and prints its address.
"""

import asyncio
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
from numpy.typing import NDArray

from headrace.clock import Clock, WallClock
from headrace.kvstore.actor import KvStoreActor
from headrace.kvstore.canary import Canary
from headrace.kvstore.config import KvStoreConfig
from headrace.kvstore.member import KvStoreMember, KvStoreParts, build
from headrace.kvstore.pool_service import PoolServicer
from headrace.kvstore.service import KvStoreServicer
from headrace.runtime.channels import Channels
from headrace.runtime.cluster import ClusterServicer
from headrace.runtime.server import GrpcServer
from headrace.testing.connector import Fabric, FakeConnector
from headrace.transfer.arena import map_blocks
from headrace.v1 import cluster_pb2_grpc, kvstore_pb2_grpc, pool_pb2_grpc


@asynccontextmanager
async def serve_kvstore(parts: KvStoreParts, port: int = 0) -> AsyncIterator[GrpcServer]:
    """Serve a kvstore on loopback."""
    server = GrpcServer("kvstore", "127.0.0.1", port)
    server.add(kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server, parts.servicer)
    server.add(pool_pb2_grpc.add_PoolServiceServicer_to_server, parts.pool)
    server.add(cluster_pb2_grpc.add_ClusterServiceServicer_to_server, ClusterServicer(parts.member))
    async with asyncio.TaskGroup() as tasks:
        parts.actor.mailbox.start(tasks)
        timer = tasks.create_task(parts.actor.run_timer())
        await server.start()
        try:
            yield server
        finally:
            await server.stop()
            timer.cancel()
            await parts.canary.close()
            await parts.actor.close()


def fake_kvstore(fabric: Fabric, config: KvStoreConfig, clock: Clock, channels: Channels) -> KvStoreParts:
    """Return a kvstore whose pool is reached over a fabric; its agent is named after its epoch."""
    epoch = secrets.token_hex(4)

    def connect(num_blocks: int, block_bytes: int) -> FakeConnector:
        return FakeConnector(fabric, f"store-{epoch}", map_blocks(num_blocks, block_bytes), epoch, clock)

    def connect_canary(blocks: NDArray[np.uint8], number: int) -> FakeConnector:
        return FakeConnector(fabric, f"canary-{epoch}-{number}", blocks, epoch, clock)

    actor = KvStoreActor(config, epoch, clock, connect, lambda: secrets.token_hex(16))
    member = KvStoreMember(config, epoch, actor, channels, clock, lambda _: None)
    canary = Canary(config.name, actor, channels, clock, connect_canary)
    return KvStoreParts(
        actor=actor,
        servicer=KvStoreServicer(actor, epoch),
        pool=PoolServicer(actor, epoch, clock),
        member=member,
        canary=canary,
    )


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
