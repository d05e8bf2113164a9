"""A kvstore and its clients that stop, stall and die at bad moments, as processes and over the real transport."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest

from headrace.clock import WallClock
from headrace.core.block import KvLayout
from headrace.errors import BlockLost, HeadraceError
from headrace.kvstore.config import KvStoreConfig
from headrace.kvstore.messages import Tick
from headrace.kvstore.opening import NUM_KEPT_BLOCKS
from headrace.runtime.channels import Channels
from headrace.testing.connector import Fabric, FakeConnector
from headrace.testing.kvstore import SETTLE_S, StoreClient, fake_kvstore, serve_kvstore
from headrace.transfer.agent import Transport
from headrace.transfer.arena import arena_of, map_blocks
from headrace.transfer.nixl import NixlConnector
from headrace.v1 import cluster_pb2, cluster_pb2_grpc

LAYOUT = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=1, head_dim=64, dtype="fp32")
NUM_BLOCKS = 6
NUM_ROUNDS = 25
CLOCK = WallClock()


def name(number: int) -> bytes:
    return number.to_bytes(16, "little")


def content(number: int) -> bytes:
    return np.random.default_rng(number).bytes(LAYOUT.block_bytes)


@asynccontextmanager
async def process(folder) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    size = str((NUM_BLOCKS + NUM_KEPT_BLOCKS) * LAYOUT.block_bytes)
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.DEVNULL}
    command = [sys.executable, "-m", "headrace.testing.kvstore", size, str(folder)]
    started = await asyncio.create_subprocess_exec(*command, **pipes)
    try:
        async with asyncio.timeout(30.0):
            yield started, (await started.stdout.readline()).decode().strip()
    finally:
        with contextlib.suppress(ProcessLookupError):
            started.kill()
        await started.wait()


@asynccontextmanager
async def client_of(address: str, agent: str) -> AsyncIterator[tuple[StoreClient, Channels]]:
    memory = map_blocks(32, LAYOUT.block_bytes)
    connector = NixlConnector(Transport(agent, is_passive=False), arena_of(memory), agent, CLOCK)
    try:
        async with Channels() as channels:
            yield StoreClient(address, channels, connector, memory, LAYOUT, CLOCK), channels
    finally:
        await connector.close()


async def until(channels: Channels, address: str, is_true: Callable[[cluster_pb2.LoadReport], object]) -> None:
    stub = cluster_pb2_grpc.ClusterServiceStub(channels.get(address))
    async with asyncio.timeout(10.0 + SETTLE_S):
        async for answer in stub.WatchLoad(cluster_pb2.WatchLoadRequest(interval_ms=100)):
            if is_true(answer.load):
                return


async def keep_busy(client: StoreClient, is_busy: asyncio.Event) -> None:
    """Put and get until the store is gone."""
    for number in range(10_000):
        with contextlib.suppress(HeadraceError):
            chain = {name(10 * number + i): content(10 * number + i) for i in range(3)}
            await client.put(chain)
            got = await client.get(list(chain))
            assert got == list(chain.values())[: len(got)]
            if number == NUM_ROUNDS:
                is_busy.set()
            got = await client.get([name(10 * (number // 2))])
            assert got in ([], [content(10 * (number // 2))])


@pytest.mark.cluster
async def test_killed_in_the_midst_of_puts_gets_and_evictions_it_never_gives_a_wrong_byte_again(tmp_path):
    num_found = 0
    for life in range(2):
        async with process(tmp_path) as (started, address), client_of(address, f"busy-{life}") as (client, _):
            is_busy = asyncio.Event()
            busy = asyncio.create_task(keep_busy(client, is_busy))
            async with asyncio.timeout(20.0):
                await is_busy.wait()
            started.kill()
            busy.cancel()
            with contextlib.suppress(asyncio.CancelledError, HeadraceError):
                await busy
    async with process(tmp_path) as (_, address), client_of(address, "after") as (client, channels):
        await client.acquire([])
        await until(channels, address, lambda load: load.store.disk_bytes)
        for number in range(200):
            got = await client.get([name(10 * number + i) for i in range(3)])
            assert got == [content(10 * number + i) for i in range(len(got))]
            num_found += len(got)
    assert num_found > 3


@pytest.mark.cluster
async def test_stopped_for_longer_than_a_lease_it_takes_no_late_commit_and_leaks_nothing(tmp_path):
    async with process(tmp_path) as (started, address), client_of(address, "late") as (client, channels):
        late = await client.reserve([name(1), name(2)], lease_s=0.3)
        started.send_signal(signal.SIGSTOP)
        await asyncio.sleep(0.5)
        started.send_signal(signal.SIGCONT)
        await client.write(late.lease, (0, 1))
        with pytest.raises(BlockLost):
            await client.commit(late.lease)
        silent = await client.reserve([name(3)], lease_s=0.1)
        assert silent.indices
        await until(channels, address, lambda load: load.ledger.free == NUM_BLOCKS and not load.ledger.num_leases)
        assert await client.get([name(1)]) == []


async def test_a_writer_that_stalls_beyond_its_lease_writes_into_no_block_of_others():
    fabric = Fabric()
    config = KvStoreConfig(memory_bytes=(2 + NUM_KEPT_BLOCKS) * LAYOUT.block_bytes, settle_s=0.2)
    async with Channels() as channels:
        parts = fake_kvstore(fabric, config, CLOCK, channels)
        async with serve_kvstore(parts) as server:
            clients = []
            for agent in ("slow", "quick"):
                memory = map_blocks(4, LAYOUT.block_bytes)
                connector = FakeConnector(fabric, agent, memory, "c", CLOCK)
                clients.append(StoreClient(server.address, channels, connector, memory, LAYOUT, CLOCK))
            slow, quick = clients
            put = await slow.reserve([name(1), name(2)], lease_s=0.05)
            fabric.stall("slow")
            writing = asyncio.create_task(slow.write(put.lease, (0, 1)))
            await asyncio.sleep(0.06)
            parts.actor.mailbox.tell(Tick())
            assert await quick.put({name(3): content(3)}) == 0
            fabric.resume("slow")
            await writing
            with pytest.raises(BlockLost):
                await slow.commit(put.lease)
            assert await quick.put({name(3): content(3)}) == 1
            assert await quick.get([name(3)]) == [content(3)]
            parts.actor.verify()
