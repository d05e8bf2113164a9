"""Kvstores that share an index in a real Redis-compatible server, each with a client."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from headrace.clock import WallClock
from headrace.core.block import BlockHash, KvLayout
from headrace.core.placement import Tier
from headrace.index.connection import RedisConfig
from headrace.kvstore.config import KvStoreConfig
from headrace.kvstore.opening import NUM_KEPT_BLOCKS
from headrace.kvstore.parts import KvStoreParts
from headrace.runtime.channels import Channels
from headrace.runtime.server import GrpcServer
from headrace.testing.connector import Fabric, FakeConnector
from headrace.testing.kvstore import StoreClient, fake_kvstore, serve_kvstore
from headrace.transfer.arena import map_blocks
from headrace.v1 import index_pb2, index_pb2_grpc, kvstore_pb2

LAYOUT = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=1, head_dim=32, dtype="fp32")
PATIENCE_S = 10.0


def block_name(number: int) -> BlockHash:
    """Return a hash."""
    return BlockHash(number.to_bytes(16, "little"))


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedStore:
    """A served store and a client of it."""

    parts: KvStoreParts
    server: GrpcServer
    client: StoreClient
    channels: Channels

    async def describe(self, request: index_pb2.DescribeIndexRequest) -> index_pb2.DescribeIndexResponse:
        """Return what the store says of its copy of the index."""
        stub = index_pb2_grpc.IndexServiceStub(self.channels.get(self.server.address))
        return await stub.DescribeIndex(request)

    async def put(self, *numbers: int) -> None:
        """Store blocks of any bytes."""
        blocks = {
            bytes(block_name(number)): np.random.default_rng(number).bytes(LAYOUT.block_bytes) for number in numbers
        }
        await self.client.put(blocks)

    async def match(self, hashes: Sequence[bytes]) -> dict[str, list[tuple[Tier, int]]]:
        """Return how many leading blocks each location holds, by tier."""
        answer = await self.client.puts.Match(kvstore_pb2.MatchRequest(block_hashes=hashes))
        return {
            match.location: [(Tier(part.tier), part.num_blocks) for part in match.tiers] for match in answer.matches
        }

    async def until_match(self, wanted: Sequence[int | bytes], expected: dict[str, list[tuple[Tier, int]]]) -> None:
        """Wait until the store finds blocks, by number or hash, exactly there.

        Raises:
            AssertionError: it never does.
        """
        hashes = [block_name(each) if isinstance(each, int) else each for each in wanted]
        found = None
        try:
            async with asyncio.timeout(PATIENCE_S):
                while (found := await self.match(hashes)) != expected:  # noqa: ASYNC110 the log tells nobody of a change
                    await asyncio.sleep(0.02)
        except TimeoutError as error:
            raise AssertionError(f"found {found}, not {expected}") from error


@asynccontextmanager
async def serve_indexed(
    fabric: Fabric, redis_url: str, name: str, num_blocks: int = 8, **settings: object
) -> AsyncIterator[IndexedStore]:
    """Serve a store that a client has met and that is connected to the index.

    Args:
        fabric: Connects it with others.
        redis_url: Where the index is.
        name: Of the store.
        num_blocks: In memory.
        settings: Further ones.
    """
    clock = WallClock()
    config = KvStoreConfig(
        name=name,
        memory_bytes=(num_blocks + NUM_KEPT_BLOCKS) * LAYOUT.block_bytes,
        redis=RedisConfig(url=redis_url),
        **cast(Any, settings),
    )
    async with Channels() as channels:
        parts = fake_kvstore(fabric, config, clock, channels)
        async with serve_kvstore(parts) as server:
            memory = map_blocks(16, LAYOUT.block_bytes)
            connector = FakeConnector(fabric, f"client-{name}", memory, "c", clock)
            client = StoreClient(server.address, channels, connector, memory, LAYOUT, clock)
            index = parts.index
            assert index is not None
            await _until(lambda: index.is_connected)
            # Last, as in a cluster: a disk opens only now.
            await client.acquire([])
            yield IndexedStore(parts=parts, server=server, client=client, channels=channels)


async def _until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not is_true():  # noqa: ASYNC110 the log tells nobody of a change
            await asyncio.sleep(0.01)
