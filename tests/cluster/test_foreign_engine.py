"""A vLLM engine's cache becomes part of a cluster's index, and nothing that the cluster does depends on it."""

import asyncio

import grpc
import pytest
import zmq.asyncio

from headrace import AsyncClient
from headrace.index.vllm_events import EventForm
from headrace.testing.cluster import LocalCluster
from headrace.testing.vllm import DocumentedEngine, documented_messages
from headrace.v1 import index_pb2, index_pb2_grpc

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

NUM_BLOCKS = 8
TOKENS = list(range(2000, 2000 + NUM_BLOCKS * 16))
NAMES = [bytes([place]) * 16 for place in range(NUM_BLOCKS)]
PATIENCE_S = 15.0


async def routers_view(cluster: LocalCluster) -> index_pb2.DescribeIndexResponse:
    async with grpc.aio.insecure_channel(cluster.grpc) as channel:
        return await index_pb2_grpc.IndexServiceStub(channel).DescribeIndex(index_pb2.DescribeIndexRequest())


async def until_held(cluster: LocalCluster, num_blocks: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            locations = {each.name: each.num_device_blocks for each in (await routers_view(cluster)).locations}
            if locations.get("foreign/pod", 0) == num_blocks:
                return
            await asyncio.sleep(0.05)


def test_what_a_vllm_engine_holds_is_known_to_the_router_and_promised_to_nobody(start_cluster, tmp_path):
    address = f"ipc://{tmp_path}/kv"
    cluster = start_cluster(
        "prefill=1,decode=1",
        "auto",
        f"kvstore.vllm_feeds.engines=pod={address}-pub {address}-replay",
        "kvstore.vllm_feeds.topic=kv-events",
    )
    before = cluster.footprint()

    async def play() -> None:
        context = zmq.asyncio.Context()
        engine = DocumentedEngine(context, documented_messages(EventForm.MAP), address)
        serving = asyncio.create_task(engine.serve())
        try:
            await engine.publish(engine.stored(NAMES, TOKENS, range(NUM_BLOCKS)))
            await until_held(cluster, NUM_BLOCKS)
            promised = (await routers_view(cluster)).predicted_tokens
            async with AsyncClient(cluster.grpc) as client:
                answer = await client.generate([*TOKENS, 5], max_tokens=2, temperature=0.0, cache_scope="public")
            assert answer.usage.cached_tokens == 0
            assert (await routers_view(cluster)).predicted_tokens == promised
        finally:
            serving.cancel()
            await asyncio.wait([serving])
            engine.close()
            context.destroy(linger=0)
        await until_held(cluster, 0)

    asyncio.run(play())
    cluster.assert_no_leaks(before)
