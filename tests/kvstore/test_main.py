"""The kvstore as a process: it comes up ready and leaves in order."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace.clock import WallClock
from headrace.core.block import KvLayout
from headrace.core.request import PROTOCOL_VERSION
from headrace.core.wire import layout_to_proto
from headrace.errors import Draining, HeadraceError
from headrace.runtime.channels import Channels, translate_errors
from headrace.v1 import cluster_pb2, cluster_pb2_grpc, kvstore_pb2, kvstore_pb2_grpc

pytestmark = pytest.mark.cluster

LAYOUT = KvLayout(num_layers=2, block_tokens=16, num_kv_heads=2, head_dim=16, dtype="fp32")
PATIENCE_S = 20.0
LEFT_BY_A_PUT = 2
"""Its lease and its writer."""
CLOCK = WallClock()


@asynccontextmanager
async def process(port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    env = os.environ | {"HEADRACE_KVSTORE_GRPC_PORT": str(port), "HEADRACE_KVSTORE_MEMORY_BYTES": str(1 << 20)}
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "headrace.kvstore", env=env, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()


class Stubs:
    """What a worker and an operator say to a kvstore."""

    def __init__(self, channels: Channels, address: str) -> None:
        self.health = health_pb2_grpc.HealthStub(channels.get(address))
        self.cluster = cluster_pb2_grpc.ClusterServiceStub(channels.get(address))
        self.kvstore = kvstore_pb2_grpc.KvStoreServiceStub(channels.get(address))

    async def is_ready(self) -> bool:
        try:
            async with translate_errors("kvstore"):
                answer = await self.health.Check(health_pb2.HealthCheckRequest(), timeout=5)
        except HeadraceError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    async def meet(self) -> None:
        hello = cluster_pb2.HandshakeRequest(
            protocol_version=PROTOCOL_VERSION, name="w", epoch="e", layout=layout_to_proto(LAYOUT)
        )
        await self.cluster.Handshake(hello, timeout=5)

    async def reserve(self, number: int) -> kvstore_pb2.ReservePutResponse:
        request = kvstore_pb2.ReservePutRequest(
            block_hashes=[number.to_bytes(16, "little")],
            layout=layout_to_proto(LAYOUT),
            writer="w",
            deadline_unix_ms=CLOCK.unix_ms() + 60_000,
        )
        async with translate_errors("kvstore"):
            return await self.kvstore.ReservePut(request, timeout=5)

    async def drain(self, grace_ms: int) -> int:
        return (await self.cluster.Drain(cluster_pb2.DrainRequest(grace_ms=grace_ms), timeout=5)).num_running


@pytest.fixture
async def store(free_port: int) -> AsyncIterator[tuple[asyncio.subprocess.Process, Stubs]]:
    async with process(free_port) as started, Channels() as channels:
        stubs = Stubs(channels, f"127.0.0.1:{free_port}")
        async with asyncio.timeout(PATIENCE_S):
            while not await stubs.is_ready():  # noqa: ASYNC110 another process sets no event here
                await asyncio.sleep(0.02)
        yield started, stubs


async def status_of(started: asyncio.subprocess.Process) -> int:
    async with asyncio.timeout(PATIENCE_S):
        return await started.wait()


async def test_it_leaves_as_soon_as_the_last_put_under_way_has_ended(store):
    started, stubs = store
    await stubs.meet()
    put = await stubs.reserve(1)
    assert await stubs.drain(60_000) == LEFT_BY_A_PUT
    with pytest.raises(Draining):
        await stubs.reserve(2)
    commit = kvstore_pb2.CommitPutRequest(lease_id=put.lease.lease_id, epoch=put.lease.epoch, is_complete=True)
    assert (await stubs.kvstore.CommitPut(commit, timeout=5)).num_committed == 1
    assert await status_of(started) == 0


async def test_it_leaves_at_the_end_of_the_grace_whatever_is_under_way(store):
    started, stubs = store
    await stubs.meet()
    await stubs.reserve(1)
    assert await stubs.drain(0) == LEFT_BY_A_PUT
    assert await status_of(started) == 0
