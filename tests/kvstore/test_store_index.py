"""The kvstore as a location of the shared index, over a real Redis-compatible server."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import numpy as np
import pytest

from headrace.clock import WallClock
from headrace.core.block import KvLayout
from headrace.core.placement import Tier
from headrace.index.connection import RedisConfig
from headrace.kvstore import canary, member
from headrace.kvstore.config import KvStoreConfig
from headrace.kvstore.opening import NUM_KEPT_BLOCKS
from headrace.runtime.channels import Channels
from headrace.testing.connector import Fabric, FakeConnector
from headrace.testing.kvstore import StoreClient, fake_kvstore, serve_kvstore
from headrace.testing.redis import redis_server
from headrace.transfer.arena import map_blocks
from headrace.v1 import index_pb2, index_pb2_grpc, kvstore_pb2, pool_pb2

pytestmark = pytest.mark.cpu

LAYOUT = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=1, head_dim=32, dtype="fp32")
CLOCK = WallClock()


def name(number: int) -> bytes:
    return number.to_bytes(16, "little")


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10.0):
        while not is_true():  # noqa: ASYNC110 the log tells nobody of a change
            await asyncio.sleep(0.01)


class Store:
    """A served store and a client of it."""

    def __init__(self, parts, server, client, describe) -> None:
        self.parts, self.server, self.client, self.describe = parts, server, client, describe

    async def put(self, *numbers: int) -> None:
        await self.client.put(
            {name(number): np.random.default_rng(number).bytes(LAYOUT.block_bytes) for number in numbers}
        )

    async def match(self, *numbers: int) -> dict[str, list[tuple[Tier, int]]]:
        request = kvstore_pb2.MatchRequest(block_hashes=map(name, numbers))
        answer = await self.client.puts.Match(request)
        return {
            match.location: [(Tier(part.tier), part.num_blocks) for part in match.tiers] for match in answer.matches
        }

    async def until_match(self, numbers, expected) -> None:
        async with asyncio.timeout(10.0):
            while await self.match(*numbers) != expected:  # noqa: ASYNC110 the log tells nobody of a change
                await asyncio.sleep(0.02)


@pytest.fixture
async def serve(tmp_path) -> AsyncIterator[Callable[..., object]]:
    with redis_server(tmp_path / "redis") as redis:
        fabric = Fabric()

        @asynccontextmanager
        async def start(store_name: str, num_blocks=8, **settings) -> AsyncIterator[Store]:
            config = KvStoreConfig(
                name=store_name,
                memory_bytes=(num_blocks + NUM_KEPT_BLOCKS) * LAYOUT.block_bytes,
                redis=RedisConfig(url=redis.url),
                **settings,
            )
            async with Channels() as channels:
                parts = fake_kvstore(fabric, config, CLOCK, channels)
                async with serve_kvstore(parts) as server:
                    memory = map_blocks(16, LAYOUT.block_bytes)
                    connector = FakeConnector(fabric, f"client-{store_name}", memory, "c", CLOCK)
                    client = StoreClient(server.address, channels, connector, memory, LAYOUT, CLOCK)
                    await client.acquire([])
                    await until(lambda: parts.index.is_connected)
                    describe = index_pb2_grpc.IndexServiceStub(channels.get(server.address)).DescribeIndex
                    yield Store(parts, server, client, describe)

        yield start


async def test_stores_find_each_others_blocks_and_forget_those_of_one_that_left(serve):
    async with serve("a") as first:
        async with serve("b") as second:
            await second.put(1, 2)
            await first.put(1)
            await first.until_match([1, 2], {"b": [(Tier.DRAM, 2)], "a": [(Tier.DRAM, 1)]})
            answer = await first.describe(index_pb2.DescribeIndexRequest())
            assert {place.name: place.num_dram_blocks for place in answer.locations} == {"a": 1, "b": 2}
        await first.until_match([1, 2], {"a": [(Tier.DRAM, 1)]})


async def test_a_block_found_wrong_in_one_store_is_dropped_by_all(serve):
    async with serve("a") as first, serve("b") as second:
        for store in (first, second):
            await store.put(1, 2)
        await first.client.pool.ReportCorrupt(pool_pb2.ReportCorruptRequest(block_hash=name(2), reader="r"))
        for store in (first, second):
            await store.until_match([1, 2], {"a": [(Tier.DRAM, 1)], "b": [(Tier.DRAM, 1)]})
        assert second.parts.actor.view().totals.num_quarantined_blocks == 1
        second.parts.actor.verify()


async def test_tiers_are_published(serve, tmp_path):
    disk = {"disk_dir": tmp_path / "disk", "disk_bytes": 1 << 20}
    async with serve("a", num_blocks=2, **disk) as first, serve("b") as second:
        await first.put(1, 2)
        await first.parts.actor._errands.settled()
        await first.put(3, 4)
        await second.until_match([1, 2], {"a": [(Tier.DISK, 2)]})
        await second.until_match([3, 4], {"a": [(Tier.DRAM, 2)]})


async def test_the_canary_goes_through_the_index(serve, monkeypatch):
    monkeypatch.setattr(member, "CANARY_INTERVAL_S", 0.01)
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(serve("a"))
        assert await store.parts.canary.try_once(store.server.address) == ""
        monkeypatch.setattr(canary, "INDEX_TIMEOUT_S", 0.2)
        monkeypatch.setattr(store.parts.index, "match", lambda hashes: [])
        reason = await store.parts.canary.try_once(store.server.address)
        assert reason == "the canary block was not found through the index"
