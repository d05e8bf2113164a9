"""A kvstore to speak to over gRPC: in this process over the fake transport, or alone over NIXL.

Run as `python -m headrace.testing.kvstore MEMORY_BYTES [DISK_DIR]` it serves until its input ends and prints its
address.
"""

import asyncio
import os
import secrets
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace.clock import Clock, WallClock
from headrace.core.block import KvLayout
from headrace.core.request import PROTOCOL_VERSION
from headrace.core.wire import layout_to_proto
from headrace.kvstore.actor import Edges
from headrace.kvstore.config import KvStoreConfig
from headrace.kvstore.disk import DiskTier
from headrace.kvstore.disk_file import SystemCalls
from headrace.kvstore.parts import KvStoreParts, Outside, assemble, build, running
from headrace.runtime.channels import Channels, translate_errors
from headrace.runtime.server import GrpcServer
from headrace.testing.connector import Fabric, FakeConnector
from headrace.transfer.connector import Connector
from headrace.transfer.wire import pool_to_proto
from headrace.v1 import block_pb2, cluster_pb2, kvstore_pb2, kvstore_pb2_grpc, pool_pb2, pool_pb2_grpc
from headrace.worker.peers import Peers

DISK_BYTES = 1 << 20
SETTLE_S = 0.5
FINGERPRINT = "model"
"""Of the model whose worker a client claims to be."""


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


class StoreClient:
    """A worker in all but name: puts blocks into a kvstore and gets them back, by gRPC and its own connector.

    Args:
        address: Of the kvstore.
        channels: Connections.
        connector: Of `blocks`.
        blocks: Own memory, `[block, byte]`.
        layout: Of a block.
        clock: Deadlines are on it.

    Attributes:
        blocks: Own memory.
        last_get: What the last get was answered.
    """

    def __init__(  # noqa: PLR0913 a worker's parts
        self,
        address: str,
        channels: Channels,
        connector: Connector,
        blocks: NDArray[np.uint8],
        layout: KvLayout,
        clock: Clock,
    ) -> None:
        self.blocks = blocks
        self.puts: kvstore_pb2_grpc.KvStoreServiceAsyncStub = kvstore_pb2_grpc.KvStoreServiceStub(channels.get(address))
        self.pool: pool_pb2_grpc.PoolServiceAsyncStub = pool_pb2_grpc.PoolServiceStub(channels.get(address))
        self.last_get = pool_pb2.AcquireGetResponse()
        self._address = address
        self._channels = channels
        self._connector = connector
        self._layout = layout
        self._clock = clock
        self._peers = Peers(connector, channels, self._introduce, "")

    def of(self, address: str) -> "StoreClient":
        """Return the client of another store, with the same memory."""
        return StoreClient(address, self._channels, self._connector, self.blocks, self._layout, self._clock)

    async def reserve(
        self,
        hashes: Sequence[bytes],
        tenant: str = "",
        lease_s: float = 10.0,
        *,
        num_blocks_before: int = 0,
        segment_key: bytes = b"",
    ) -> kvstore_pb2.ReservePutResponse:
        """Ask for room."""
        await self._peers.ensure(self._address)
        request = kvstore_pb2.ReservePutRequest(
            block_hashes=hashes,
            layout=layout_to_proto(self._layout),
            writer="client",
            tenant=tenant,
            deadline_unix_ms=self._clock.unix_ms() + int(1000 * lease_s),
            num_blocks_before=num_blocks_before,
            segment_key=segment_key,
        )
        async with translate_errors(self._address):
            return await self.puts.ReservePut(request, timeout=5.0)

    async def write(
        self, lease: block_pb2.BlockLease, local_ids: Sequence[int], deadline_s: float | None = None
    ) -> None:
        """Write own blocks into those of a lease."""
        peer = await self._peers.ensure(self._address, lease.epoch)
        end_s = self._clock.now() + 5.0 if deadline_s is None else deadline_s
        await self._connector.write(peer.pool.agent_name, local_ids, lease.block_ids, end_s)

    async def commit(
        self, lease: block_pb2.BlockLease, tenant: str = "", digests: Sequence[int] = (), *, is_complete: bool = True
    ) -> int:
        """End a put."""
        request = kvstore_pb2.CommitPutRequest(
            lease_id=lease.lease_id, epoch=lease.epoch, is_complete=is_complete, tenant=tenant, digests=digests
        )
        async with translate_errors(self._address):
            return (await self.puts.CommitPut(request, timeout=5.0)).num_committed

    async def put(
        self, contents: Mapping[bytes, bytes], tenant: str = "", *, num_blocks_before: int = 0, segment_key: bytes = b""
    ) -> int:
        """Store a chain of blocks by name; returns how many became visible."""
        names = tuple(contents)
        put = await self.reserve(names, tenant, num_blocks_before=num_blocks_before, segment_key=segment_key)
        if not put.indices:
            return 0
        for place, index in enumerate(put.indices):
            self.blocks[place] = np.frombuffer(contents[names[index]], dtype=np.uint8)
        await self.write(put.lease, range(len(put.indices)))
        return await self.commit(put.lease, tenant)

    async def acquire(self, hashes: Sequence[bytes], tenant: str = "", lease_s: float = 10.0) -> block_pb2.BlockLease:
        """Lease stored blocks for reading."""
        await self._peers.ensure(self._address)
        request = pool_pb2.AcquireGetRequest(
            block_hashes=hashes,
            reader="client",
            tenant=tenant,
            deadline_unix_ms=self._clock.unix_ms() + int(1000 * lease_s),
        )
        async with translate_errors(self._address):
            self.last_get = await self.pool.AcquireGet(request, timeout=5.0)
        return self.last_get.lease

    async def release(self, lease: block_pb2.BlockLease, tenant: str = "") -> None:
        """End a read."""
        request = pool_pb2.ReleaseGetRequest(lease_id=lease.lease_id, epoch=lease.epoch, tenant=tenant)
        async with translate_errors(self._address):
            await self.pool.ReleaseGet(request, timeout=5.0)

    async def get(self, hashes: Sequence[bytes], tenant: str = "") -> list[bytes]:
        """Return the contents of the longest stored prefix."""
        lease = await self.acquire(hashes, tenant)
        num_blocks = len(lease.block_ids)
        if not num_blocks:
            return []
        peer = await self._peers.ensure(self._address, lease.epoch)
        deadline_s = self._clock.now() + 5.0
        await self._connector.read(peer.pool.agent_name, range(num_blocks), lease.block_ids, deadline_s)
        await self.release(lease, tenant)
        return [bytes(self.blocks[place]) for place in range(num_blocks)]

    def _introduce(self) -> cluster_pb2.HandshakeRequest:
        return cluster_pb2.HandshakeRequest(
            protocol_version=PROTOCOL_VERSION,
            model_fingerprint=FINGERPRINT,
            name="client",
            role=cluster_pb2.ROLE_PREFILL,
            epoch=self._connector.pool.epoch,
            pool=pool_to_proto(self._connector.pool),
            layout=layout_to_proto(self._layout),
        )


async def main(memory_bytes: int, disk_dir: Path | None) -> None:
    """Serve over NIXL until the input ends."""
    config = KvStoreConfig(memory_bytes=memory_bytes, disk_dir=disk_dir, disk_bytes=DISK_BYTES, settle_s=SETTLE_S)
    async with Channels() as channels:
        parts = build(
            config, epoch=secrets.token_hex(4), clock=WallClock(), channels=channels, begin_drain=lambda _: None
        )
        async with serve_kvstore(parts) as server:
            sys.stdout.write(server.address + "\n")
            sys.stdout.flush()
            await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None))
