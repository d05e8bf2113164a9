"""What a worker's cache holds is told to the index and to readers of vLLM's events."""

import asyncio
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq.asyncio

from headrace.clock import WallClock
from headrace.core.block import BlockHash, KvLayout, block_hashes, root_hash
from headrace.core.chained_block import ChainedBlock
from headrace.core.digest import block_digest
from headrace.core.placement import Provenance
from headrace.engine.messages import CacheChange
from headrace.index.config import IndexConfig
from headrace.index.connection import RedisConfig
from headrace.index.copy import open_copy
from headrace.index.vllm_publisher import VllmPublisherConfig
from headrace.testing.redis import redis_server
from headrace.worker.announcing import Announcer, publications
from headrace.worker.config import WorkerConfig, WorkerRole
from headrace.worker.digests import BlockDigests

LAYOUT = KvLayout(num_layers=1, block_tokens=4, num_kv_heads=1, head_dim=4, dtype="fp32")
HASHES = block_hashes(root_hash("model"), range(12), 4)


def settings(**changes):
    return WorkerConfig(name="w0", role=WorkerRole.PREFILL, model=Path("m"), **changes)


@pytest.fixture
def blocks():
    return np.zeros((3, LAYOUT.block_bytes), dtype=np.uint8)


@pytest.fixture
def digests(blocks):
    return BlockDigests(LAYOUT, 1.0, blocks.__getitem__)


async def until(is_true):
    async with asyncio.timeout(5.0):
        while not is_true():  # noqa: ASYNC110 what is waited for sets no event
            await asyncio.sleep(0.005)


async def test_the_index_hears_what_came_and_went_and_what_is_corrupt_until_the_worker_leaves(tmp_path, digests):
    with redis_server(tmp_path) as server:
        redis, heard = RedisConfig(url=server.url), []
        copy = open_copy(redis, IndexConfig(), WallClock(), on_quarantine=heard.extend)
        following = asyncio.create_task(copy.replica.run())
        announcer = Announcer(digests, publications(settings(redis=redis), "e0", "model", WallClock()))
        announcer.note(CacheChange(stored=HASHES[:2], decoded=HASHES[1:2]))
        running = asyncio.create_task(announcer.run())
        await until(lambda: copy.index.match(HASHES))
        [found] = copy.index.match(HASHES)
        assert (found.location, found.num_blocks) == ("w0", 2)
        origins = {origin.provenance for _, origin, _ in found.counts}
        assert origins == {Provenance.EXACT, Provenance.DECODED}
        announcer.note(CacheChange(removed=HASHES[1:2]))
        await until(lambda: copy.index.match(HASHES)[0].num_blocks == 1)
        announcer.note_corrupt(HASHES[0])
        await until(lambda: heard == [HASHES[0]])
        announcer.note(CacheChange(stored=HASHES[:1]))
        await until(lambda: copy.index.match(HASHES))
        running.cancel()
        await asyncio.wait([running])
        await announcer.close()
        await until(lambda: not copy.index.match(HASHES))
        following.cancel()
        await asyncio.wait([following])
        await copy.close()


async def test_readers_of_vllm_events_hear_public_blocks_with_their_tokens(digests):
    config = settings(
        vllm_events=VllmPublisherConfig(endpoint="tcp://127.0.0.1:*", replay_endpoint="tcp://127.0.0.1:*")
    )
    [publication] = publications(config, "e0", "model", WallClock())
    announcer = Announcer(digests, (publication,))
    root = root_hash("model")
    block = ChainedBlock(block_hash=HASHES[0], parent=root, root=root, tokens=tuple(range(4)))
    announcer.note(CacheChange(stored=HASHES[:1], described=(block,)))
    running = asyncio.create_task(announcer.run())
    context = zmq.asyncio.Context()
    with context.socket(zmq.DEALER) as reader:
        reader.linger = 0
        reader.connect(publication._publisher.replay_endpoint)
        await reader.send_multipart((b"", (1).to_bytes(8, "big")))
        async with asyncio.timeout(5.0):
            *_, payload = await reader.recv_multipart()
    context.term()
    events = msgspec.msgpack.decode(payload)[1]
    assert events[0][0] == "BlockStored"
    assert [0, 1, 2, 3] in events[0]
    running.cancel()
    await asyncio.wait([running])
    await announcer.close()


async def test_a_worker_without_redis_and_readers_tells_nobody(digests):
    assert publications(settings(), "e0", "model", WallClock()) == ()
    announcer = Announcer(digests)
    announcer.note(CacheChange(stored=HASHES))
    announcer.note_corrupt(BlockHash(HASHES[0]))
    await announcer.run()
    await announcer.close()


async def test_the_digest_of_a_block_that_left_is_forgotten(digests, blocks):
    await digests.take(HASHES[:1], [0])
    Announcer(digests).note(CacheChange(removed=HASHES[:1]))
    blocks[0] = 9
    assert await digests.take(HASHES[:1], [0]) == [block_digest(blocks[0], LAYOUT)]
