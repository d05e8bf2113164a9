"""What a kvstore is made of."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.clock import Clock
from headrace.index.service import IndexServicer
from headrace.kvstore.actor import Edges, KvStoreActor
from headrace.kvstore.canary import Canary
from headrace.kvstore.config import KvStoreConfig
from headrace.kvstore.disk import DiskTier
from headrace.kvstore.handover import Handover
from headrace.kvstore.member import KvStoreMember
from headrace.kvstore.pool_service import PoolServicer
from headrace.kvstore.service import KvStoreServicer
from headrace.kvstore.store_index import StoreIndex, open_index
from headrace.runtime.channels import Channels
from headrace.runtime.cluster import ClusterServicer
from headrace.runtime.server import GrpcServer
from headrace.transfer.agent import Transport, load_bindings
from headrace.transfer.arena import arena_of
from headrace.transfer.connector import Connector
from headrace.transfer.nixl import NixlConnector
from headrace.v1 import cluster_pb2_grpc, index_pb2_grpc, kvstore_pb2_grpc, pool_pb2_grpc


@dataclass(frozen=True, slots=True, kw_only=True)
class KvStoreParts:
    """A kvstore without its server; `running` runs it.

    Attributes:
        index: None without Redis.
        member: For `runtime.cluster.ClusterServicer`; run `member.keep_ready` with the canary.
    """

    actor: KvStoreActor
    servicer: KvStoreServicer
    pool: PoolServicer
    index: StoreIndex | None
    index_servicer: IndexServicer
    member: KvStoreMember
    canary: Canary
    handover: Handover

    def serve_on(self, server: GrpcServer) -> None:
        """Add all services."""
        server.add(kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server, self.servicer)
        server.add(pool_pb2_grpc.add_PoolServiceServicer_to_server, self.pool)
        server.add(index_pb2_grpc.add_IndexServiceServicer_to_server, self.index_servicer)
        server.add(cluster_pb2_grpc.add_ClusterServiceServicer_to_server, ClusterServicer(self.member))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """What a kvstore needs beside its settings.

    Attributes:
        connect_canary: Makes the canary's connector, with a number in its name.
        begin_drain: Asks the process to leave; gets the seconds that puts and gets under way may go on.
    """

    edges: Edges
    channels: Channels
    connect_canary: Callable[[NDArray[np.uint8], int], Connector]
    begin_drain: Callable[[float], None]


def assemble(config: KvStoreConfig, epoch: str, outside: Outside) -> KvStoreParts:
    """Put a kvstore together; the workers' pool opens when the first worker shakes hands.

    Raises:
        ConfigError: the settings of Redis are wrong.
    """
    clock, channels = outside.edges.clock, outside.channels
    actor = KvStoreActor(config, epoch, outside.edges)
    actor.index = open_index(config, epoch, clock, actor.drop_quarantined)
    handover = Handover(config, epoch, actor, channels, clock)
    return KvStoreParts(
        actor=actor,
        servicer=KvStoreServicer(actor, epoch),
        pool=PoolServicer(actor, epoch, clock),
        index=actor.index,
        index_servicer=IndexServicer(config.name, None if actor.index is None else actor.index.copy),
        member=KvStoreMember(config, epoch, actor, handover, channels, clock=clock, begin_drain=outside.begin_drain),
        canary=Canary(config.name, actor, channels, clock, outside.connect_canary),
        handover=handover,
    )


def build(
    config: KvStoreConfig, *, epoch: str, clock: Clock, channels: Channels, begin_drain: Callable[[float], None]
) -> KvStoreParts:
    """Return a kvstore that moves blocks by NIXL.

    Args:
        config: Its settings.
        epoch: Lifetime of this process.
        clock: Ends leases.
        channels: Connections to others.
        begin_drain: As in `Outside`.

    Raises:
        ConfigError: NIXL is not installed, or the settings of Redis are wrong.
    """
    # Loading takes a second; the first worker's handshake must not wait for it.
    load_bindings()

    def connect(blocks: NDArray[np.uint8]) -> Connector:
        return NixlConnector(Transport(f"{config.name}-{epoch}"), arena_of(blocks), epoch, clock)

    def connect_canary(blocks: NDArray[np.uint8], number: int) -> Connector:
        name = f"{config.name}-{epoch}-canary-{number}"
        return NixlConnector(Transport(name, is_passive=False), arena_of(blocks), epoch, clock)

    edges = Edges(
        clock=clock,
        connect=connect,
        new_id=lambda: secrets.token_hex(16),
        open_disk=lambda space: DiskTier(space, clock),
    )
    outside = Outside(edges=edges, channels=channels, connect_canary=connect_canary, begin_drain=begin_drain)
    return assemble(config, epoch, outside)


@asynccontextmanager
async def running(parts: KvStoreParts) -> AsyncIterator[asyncio.TaskGroup]:
    """Run everything but the server, and end it in order."""
    async with asyncio.TaskGroup() as tasks:
        parts.actor.start(tasks)
        background = [tasks.create_task(parts.actor.run_timer())]
        if parts.index is not None:
            background.append(tasks.create_task(parts.index.run()))
        try:
            yield tasks
        finally:
            for task in background:
                task.cancel()
            await asyncio.wait(background)
            if parts.index is not None:
                await parts.index.close()
            await parts.canary.close()
            await parts.actor.close()
