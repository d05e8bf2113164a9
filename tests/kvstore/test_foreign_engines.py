"""Engines that are none of ours, told to the index by a kvstore: real sockets, stores, and a real Valkey."""

import asyncio
import contextlib
import itertools
import os

import pytest
import zmq.asyncio

from headrace.core.block import block_hashes, root_hash
from headrace.core.placement import Tier
from headrace.errors import ConfigError
from headrace.index import vllm_feeds
from headrace.index.config import VllmFeedsConfig
from headrace.index.vllm_events import EventForm
from headrace.kvstore.config import KvStoreConfig
from headrace.testing.index_log import until
from headrace.testing.indexed_store import LAYOUT
from headrace.testing.kvstore import FINGERPRINT
from headrace.testing.vllm import DocumentedEngine, documented_messages
from headrace.v1 import index_pb2

pytestmark = pytest.mark.cpu

TOKENS = list(range(1000, 1000 + 4 * LAYOUT.block_tokens))
HASHES = block_hashes(root_hash(FINGERPRINT), TOKENS, LAYOUT.block_tokens)
MESSAGES = documented_messages(EventForm.MAP)


def held(num_blocks):
    return {"foreign/pod": [(Tier.DEVICE, num_blocks)]}


@pytest.fixture
async def context():
    context = zmq.asyncio.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def address(tmp_path):
    return f"ipc://{tmp_path}/kv"


@pytest.fixture
def feeds(address):
    return VllmFeedsConfig(engines=(f"pod={address}-pub {address}-replay",), topic="kv-events")


@contextlib.asynccontextmanager
async def engine_at(context, address, **options):
    """Run an engine of vLLM's format."""
    engine = DocumentedEngine(context, MESSAGES, address, **options)
    serving = asyncio.create_task(engine.serve())
    try:
        yield engine
    finally:
        serving.cancel()
        await asyncio.wait([serving])
        engine.close()


async def subscribed(engine):
    """Wait until somebody listens anew: what is published from now on is heard and not only replayed."""
    async with asyncio.timeout(10):
        while await engine.pub.recv() != b"\x01kv-events":
            pass


async def publish(engine, start, stop):
    await engine.publish(engine.stored(HASHES, TOKENS, range(start, stop)))


async def test_another_replica_finds_what_a_foreign_engine_holds(serve, context, address, feeds):
    async with engine_at(context, address) as engine, serve("a", vllm_feeds=feeds) as listener, serve("b") as other:
        await publish(engine, 0, 3)
        await other.until_match(HASHES, held(3))
        await engine.publish(MESSAGES.Removed([int.from_bytes(HASHES[2][-8:], "big")], "GPU"))
        await other.until_match(HASHES, held(2))
        await listener.until_match(HASHES, held(2))
        answer = await other.describe(index_pb2.DescribeIndexRequest())
        assert {place.name: place.num_device_blocks for place in answer.locations} == {"foreign/pod": 2, "a": 0, "b": 0}


async def test_blocks_of_an_engine_that_went_away_vanish_and_those_of_its_next_life_come(
    serve, context, address, feeds
):
    async with serve("a", vllm_feeds=feeds), serve("b") as other:
        async with engine_at(context, address) as engine:
            await publish(engine, 0, 4)
            await other.until_match(HASHES, held(4))
        await other.until_match(HASHES, {})
        async with engine_at(context, address) as reborn:
            await publish(reborn, 0, 2)
            await other.until_match(HASHES, held(2))


async def test_an_engine_that_counts_anew_loses_its_old_blocks(serve, context, address, feeds):
    async with serve("a", vllm_feeds=feeds), serve("b") as other, engine_at(context, address) as engine:
        await subscribed(engine)
        for start in range(4):
            await publish(engine, start, start + 1)
        await other.until_match(HASHES, held(4))
        engine.log, engine.numbers = [], itertools.count()
        await publish(engine, 0, 1)
        await other.until_match(HASHES, held(1))


async def test_a_store_that_leaves_takes_its_engines_along(serve, context, address, feeds):
    async with serve("b") as other, engine_at(context, address) as engine:
        async with serve("a", vllm_feeds=feeds):
            await publish(engine, 0, 4)
            await other.until_match(HASHES, held(4))
        await other.until_match(HASHES, {})


async def test_who_stood_by_follows_once_the_other_has_left(serve, context, address, feeds, monkeypatch):
    monkeypatch.setattr(vllm_feeds, "RETRY_S", 0.05)
    async with engine_at(context, address) as engine, serve("a", vllm_feeds=feeds) as stayed:
        await publish(engine, 0, 1)
        await stayed.until_match(HASHES, held(1))
        async with serve("b", vllm_feeds=feeds):
            await until(lambda: stayed.parts.index.feeds.num_followed == 0)
            await publish(engine, 1, 3)
            await stayed.until_match(HASHES, held(3))
        await stayed.until_match(HASHES, held(3))
        assert stayed.parts.index.feeds.num_followed == 1


async def test_who_speaks_something_else_is_tried_again(serve, context, address, feeds):
    babbled = asyncio.Event()

    def babble(_, writer):
        babbled.set()
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 100)
        writer.close()

    babbler = await asyncio.start_unix_server(babble, f"{address.removeprefix('ipc://')}-pub")
    async with serve("a", vllm_feeds=feeds) as store:
        async with asyncio.timeout(10):
            await babbled.wait()
        babbler.close()
        async with engine_at(context, address) as engine:
            await publish(engine, 0, 2)
            await store.until_match(HASHES, held(2))


async def test_what_is_no_event_leaves_the_store_and_the_index_as_they_were(serve, context, address, feeds):
    async with serve("a", vllm_feeds=feeds), serve("b") as other, engine_at(context, address) as engine:
        await publish(engine, 0, 1)
        await other.until_match(HASHES, held(1))
        for frames in ([], [b"short", b"x"], [b"\xff" * 8, b"end"], [os.urandom(8)], [b"\0" * 8, b"x", b"y"]):
            await engine.pub.send_multipart([b"kv-events", *frames])
        for payload in (b"", b"\xdd\x3f\xff\xff\xff", os.urandom(1000)):
            await engine.publish_bytes(payload)
        odd = MESSAGES.Stored([7], None, TOKENS[:24], 24, None, "GPU", None, [None])
        await engine.publish(odd)
        await publish(engine, 1, 2)
        await other.until_match(HASHES, held(2))


async def test_a_message_too_long_costs_what_was_known_and_no_more(serve, context, address, feeds):
    async with serve("a", vllm_feeds=feeds), serve("b") as other, engine_at(context, address) as engine:
        await publish(engine, 0, 1)
        await other.until_match(HASHES, held(1))
        await subscribed(engine)
        await engine.publish_bytes(bytes(2 << 20))
        engine.log = []
        await other.until_match(HASHES, {})
        await subscribed(engine)
        await publish(engine, 0, 2)
        await other.until_match(HASHES, held(2))


async def test_no_more_blocks_are_known_than_allowed(serve, context, address):
    bounded = VllmFeedsConfig(engines=(f"pod={address}-pub {address}-replay",), max_blocks=3)
    async with serve("a", vllm_feeds=bounded), serve("b") as other, engine_at(context, address) as engine:
        double = MESSAGES.Stored([1, 2], None, TOKENS, 2 * LAYOUT.block_tokens, None, "GPU", None, [None])
        await engine.publish(double)
        await other.until_match(HASHES, held(2))


async def test_an_engine_of_another_model_is_not_followed(serve, context, address):
    other_model = VllmFeedsConfig(engines=(f"pod={address}-pub",), fingerprint="another")
    async with serve("a", vllm_feeds=other_model) as store, engine_at(context, address) as engine:
        assert not await engine.pub.poll(200)
        assert await store.match(HASHES) == {}


@pytest.mark.parametrize(
    "engines",
    [
        ("pod",),
        ("po d=tcp://h:1",),
        ("p=h:1",),
        ("p=tcp://h:1 h:2",),
        ("p=tcp://h:99999",),
        ("p=ipc://a ipc://b tcp://h:1",),
        ("p=ipc://a\tb",),
        ("p=tcp://h:1",) * 2,
    ],
)
def test_engines_that_are_not_understood_are_refused(engines):
    with pytest.raises(ConfigError):
        VllmFeedsConfig(engines=engines)


def test_engines_without_an_index_are_refused(feeds):
    with pytest.raises(ConfigError, match=r"redis\.url"):
        KvStoreConfig(vllm_feeds=feeds)
