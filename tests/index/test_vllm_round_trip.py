"""Our publisher and subscriber against the messages of vLLM's documentation, over real sockets.

The classes of the messages and what both ends of the sockets do are re-created from docs/interop.md's sources, those
of an engine in `headrace.testing.vllm`.
"""

import asyncio
import contextlib
import itertools

import msgspec
import pytest
import zmq
import zmq.asyncio

from headrace.clock import VirtualClock
from headrace.core.block import block_hashes, root_hash
from headrace.core.chained_block import ChainedBlock
from headrace.core.placement import Tier
from headrace.errors import ConfigError
from headrace.index.events import ChangeKind
from headrace.index.vllm_blocks import ForeignBlocks
from headrace.index.vllm_events import EventForm
from headrace.index.vllm_publisher import VllmPublisher, VllmPublisherConfig
from headrace.index.vllm_subscriber import ResetReason, VllmFeed, VllmSubscriber, VllmSubscriberConfig
from headrace.testing.vllm import END, DocumentedEngine, documented_messages, int_name

ROOT = root_hash("model")
BLOCK = 4
TOKENS = list(range(100, 116))
OURS = block_hashes(ROOT, TOKENS, BLOCK)


@pytest.fixture(params=list(EventForm), ids=lambda form: form.value)
def messages(request):
    return documented_messages(request.param)


@pytest.fixture
async def context():
    context = zmq.asyncio.Context()
    yield context
    context.destroy(linger=0)


@contextlib.asynccontextmanager
async def running(work):
    task = asyncio.create_task(work)
    try:
        async with asyncio.timeout(8):
            yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def chained(tokens, root=ROOT):
    hashes = block_hashes(root, tokens, BLOCK)
    return [
        ChainedBlock(
            block_hash=block_hash,
            parent=hashes[index - 1] if index else root,
            root=root,
            tokens=tuple(tokens[index * BLOCK : (index + 1) * BLOCK]),
        )
        for index, block_hash in enumerate(hashes)
    ]


# Our publisher


def publisher_of(context, **options):
    config = VllmPublisherConfig(endpoint="tcp://127.0.0.1:*", replay_endpoint="tcp://127.0.0.1:*", **options)
    return VllmPublisher(config, ROOT, context, VirtualClock(12.5))


@pytest.fixture
async def publisher(context, messages):
    publisher = publisher_of(context, topic="kv@pod@model", form=messages.form, rank=3)
    yield publisher
    publisher.close()


@contextlib.contextmanager
def reader_of(context, endpoint):
    """A reader as documented: a SUB socket that takes all topics."""
    with context.socket(zmq.SUB) as sub:
        sub.linger = 0
        sub.subscribe(b"")
        sub.connect(endpoint)
        yield sub


async def replay_of(context, publisher, start):
    """Ask as documented: a REQ socket sends the first sequence and reads until the end marker."""
    batches = []
    with context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(publisher.replay_endpoint)
        await dealer.send_multipart([b"", start.to_bytes(8, "big")])
        while (frames := await dealer.recv_multipart())[1] != END:
            batches.append((int.from_bytes(frames[1], "big"), frames[2]))
    assert frames == [b"", END, b""]
    return batches


async def test_a_documented_reader_hears_what_we_store_and_remove(context, messages, publisher):
    with reader_of(context, publisher.endpoint) as sub:
        while not await sub.poll(10):
            publisher.publish(Tier.DRAM, removed=[OURS[3]])
        publisher.publish(Tier.DEVICE, stored=chained(TOKENS))
        publisher.publish(Tier.DISK, removed=OURS[:1])
        decoder, heard, numbers = msgspec.msgpack.Decoder(messages.Batch), [], []
        while not heard or getattr(heard[-1].events[0], "medium", "") != "STORAGE":
            topic, sequence, payload = await sub.recv_multipart()
            heard.append(decoder.decode(payload))
            numbers.append(int.from_bytes(sequence, "big"))
    stored, removed = heard[-2].events[0], heard[-1].events[0]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert (topic, heard[-1].ts, heard[-1].data_parallel_rank) == (b"kv@pod@model", 12.5, 3)
    assert stored == messages.Stored([*map(int_name, OURS)], None, TOKENS, BLOCK, None, "GPU", None)
    assert removed == messages.Removed([int_name(OURS[0])], "STORAGE")


async def test_a_documented_reader_is_replayed_what_it_missed(context, messages, publisher):
    for block in chained(TOKENS):
        publisher.publish(Tier.DEVICE, stored=[block])
    async with running(publisher.run()):
        batches = await replay_of(context, publisher, 0)
        assert [number for number, _ in await replay_of(context, publisher, 3)] == [3, 4]
    events = [msgspec.msgpack.decode(payload, type=messages.Batch).events for _, payload in batches]
    assert [number for number, _ in batches] == list(range(5))
    assert events[0] == [messages.Cleared()]
    assert [event.parent_block_hash for (event,) in events[1:]] == [None, *map(int_name, OURS[:3])]


async def test_chains_are_told_apart_and_tenants_are_not_told(context, messages):
    publisher = publisher_of(context, has_int_hashes=False, form=messages.form)
    other, private = chained([9] * BLOCK), chained(TOKENS, root_hash("model", b"tenant"))
    publisher.publish(Tier.DEVICE, stored=[*chained(TOKENS), *other, *private])
    async with running(publisher.run()):
        ((_, payload),) = await replay_of(context, publisher, 1)
    publisher.close()
    events = msgspec.msgpack.decode(payload, type=messages.Batch).events
    assert [event.block_hashes for event in events] == [[*OURS], [other[0].block_hash]]


async def test_replay_keeps_the_last_batches_within_its_bytes(context):
    by_count, by_bytes = publisher_of(context, replay_batches=4), publisher_of(context, replay_bytes=400)
    for _ in range(50):
        by_count.publish(Tier.DEVICE, removed=OURS)
        by_bytes.publish(Tier.DEVICE, removed=OURS)
    async with running(by_count.run()), running(by_bytes.run()):
        assert [number for number, _ in await replay_of(context, by_count, 0)] == [47, 48, 49, 50]
        kept = await replay_of(context, by_bytes, 0)
    by_count.close()
    by_bytes.close()
    assert kept[-1][0] == 50
    assert 1 < len(kept) < 10
    assert sum(len(payload) for _, payload in kept) <= 400


async def test_a_request_that_is_none_is_not_answered_and_harms_nobody(context):
    publisher = publisher_of(context)
    async with running(publisher.run()):
        with context.socket(zmq.DEALER) as dealer:
            dealer.linger = 0
            dealer.connect(publisher.replay_endpoint)
            for frames in ([b""], [b"", b"short"], [b"", b"x" * 8, b"more"], [b"only"]):
                await dealer.send_multipart(frames)
        assert len(await replay_of(context, publisher, 0)) == 1
    publisher.close()


async def test_an_endpoint_that_is_taken_is_refused(context, publisher):
    with pytest.raises(ConfigError, match="cannot publish"):
        VllmPublisher(VllmPublisherConfig(endpoint=publisher.endpoint), ROOT, context, VirtualClock())


# Our subscriber


def told(engine, first, last, name=int_name):
    return engine.stored(OURS, TOKENS, range(first, last), name)


class Followed:
    """A subscriber of ours, and what it said."""

    def __init__(self, context, address, *, has_replay=True):
        self.events = asyncio.Queue()
        epochs = map(str, itertools.count())
        blocks = ForeignBlocks(ROOT, BLOCK)
        self.feed = VllmFeed("pod", blocks, lambda: next(epochs), self.events.put_nowait)
        config = VllmSubscriberConfig(
            endpoint=f"{address}-pub",
            replay_endpoint=f"{address}-replay" if has_replay else "",
            topic="kv-events",
        )
        self.subscriber = VllmSubscriber(config, self.feed, context)

    async def hashes(self):
        """Return what the next event stores."""
        (change,) = (await self.events.get()).changes
        assert (change.kind, change.tier) == (ChangeKind.STORED, Tier.DEVICE)
        return change.hashes

    async def begun(self):
        """Return the epoch that the next event begins."""
        event = await self.events.get()
        assert (event.location, event.sequence, event.changes) == ("pod", 0, ())
        return event.epoch


@pytest.fixture
def address(tmp_path):
    return f"ipc://{tmp_path}/kv"


@contextlib.asynccontextmanager
async def followed_engine(context, messages, address, *, kept=100, has_replay=True):
    engine = DocumentedEngine(context, messages, address, kept=kept)
    followed = Followed(context, address, has_replay=has_replay)
    try:
        async with running(engine.serve()), running(followed.subscriber.run()):
            assert await followed.begun() == "0"
            assert await engine.pub.recv() == b"\x01kv-events"
            yield engine, followed
    finally:
        engine.close()


@pytest.mark.parametrize("name", [int_name, bytes], ids=["int", "bytes"])
async def test_hashes_of_a_followed_engine_are_ours(context, messages, address, name):
    async with followed_engine(context, messages, address) as (engine, followed):
        await engine.publish(told(engine, 0, 2, name))
        await engine.publish(told(engine, 2, 4, name), messages.Removed([name(OURS[3])], "GPU"))
        assert await followed.hashes() == OURS[:2]
        stored, removed = (await followed.events.get()).changes
        assert (stored.hashes, removed.hashes) == (OURS[2:], OURS[3:])
        assert removed.kind is ChangeKind.REMOVED


async def test_what_was_published_before_we_came_is_replayed(context, messages, address):
    engine, followed = DocumentedEngine(context, messages, address), Followed(context, address)
    await engine.publish(told(engine, 0, 3))
    async with running(engine.serve()), running(followed.subscriber.run()):
        await followed.begun()
        assert await followed.hashes() == OURS[:3]
    engine.close()


async def test_a_gap_is_filled_from_the_replay_in_order(context, messages, address):
    async with followed_engine(context, messages, address) as (engine, followed):
        # Once this is heard the first replay has been answered: what follows is live.
        await engine.publish(told(engine, 0, 1))
        assert await followed.hashes() == OURS[:1]
        await engine.publish(told(engine, 1, 2), is_lost=True)
        await engine.publish(told(engine, 2, 3), is_lost=True)
        await engine.publish(told(engine, 3, 4))
        assert [await followed.hashes() for _ in range(3)] == [(block_hash,) for block_hash in OURS[1:]]
    counts = followed.feed.counts
    assert (counts.num_gaps, counts.num_malformed, counts.num_batches) == (1, 0, 4)
    assert counts.resets == {ResetReason.CONNECTED: 1}


@pytest.mark.parametrize("has_replay", [True, False])
async def test_a_gap_that_nobody_can_fill_forgets_the_engine(context, messages, address, has_replay):
    async with followed_engine(context, messages, address, kept=1, has_replay=has_replay) as (engine, followed):
        await engine.publish(told(engine, 0, 1))
        assert await followed.hashes() == OURS[:1]
        await engine.publish(told(engine, 1, 2), is_lost=True)
        await engine.publish(told(engine, 0, 1))
        assert await followed.begun() == "1"
        assert await followed.hashes() == OURS[:1]
        await engine.publish(told(engine, 1, 2))
        assert await followed.hashes() == OURS[1:2]
    assert followed.feed.counts.resets[ResetReason.GAP] == 1


async def test_an_engine_that_clears_its_cache_begins_an_epoch(context, messages, address):
    async with followed_engine(context, messages, address) as (engine, followed):
        await engine.publish(told(engine, 0, 1), messages.Cleared(), told(engine, 0, 2))
        assert await followed.begun() == "1"
        assert await followed.hashes() == OURS[:2]


async def test_a_restarted_engine_is_forgotten_and_read_from_its_start(context, messages, address):
    async with followed_engine(context, messages, address) as (engine, followed):
        await engine.publish(told(engine, 0, 4))
        assert await followed.hashes() == OURS
        engine.close()
        assert await followed.begun() == "1"
        reborn = DocumentedEngine(context, messages, address)
        await reborn.publish(told(reborn, 0, 2))
        async with running(reborn.serve()):
            assert await followed.begun() == "2"
            assert await followed.hashes() == OURS[:2]
        reborn.close()
    counts = followed.feed.counts
    assert counts.resets[ResetReason.DISCONNECTED] >= 1
    assert counts.resets[ResetReason.GAP] == 0


async def test_an_engine_that_counts_anew_without_a_word_is_read_from_its_start(context, messages, address):
    async with followed_engine(context, messages, address) as (engine, followed):
        await engine.publish(told(engine, 0, 2))
        await engine.publish(told(engine, 2, 4))
        await followed.hashes()
        await followed.hashes()
        engine.log, engine.numbers = [], itertools.count()
        await engine.publish(told(engine, 0, 1))
        assert await followed.begun() == "1"
        assert await followed.hashes() == OURS[:1]
    assert followed.feed.counts.resets[ResetReason.RESTARTED] == 1


async def test_garbage_is_counted_and_what_follows_it_is_read(context, messages, address):
    async with followed_engine(context, messages, address) as (engine, followed):
        await engine.publish(told(engine, 0, 1))
        assert await followed.hashes() == OURS[:1]
        await engine.publish_bytes(b"\xdd\x3f\xff\xff\xff")
        for frames in ([], [b"short", b"x"], [b"\xff" * 8, b"end"], [b"\0" * 8, b"x", b"y"]):
            await engine.pub.send_multipart([b"kv-events", *frames])
        await engine.publish(told(engine, 1, 2))
        assert await followed.hashes() == OURS[1:2]
    assert followed.feed.counts.num_malformed == 5


async def test_our_publisher_is_followed_by_our_subscriber(context, address):
    config = VllmPublisherConfig(endpoint=f"{address}-pub", replay_endpoint=f"{address}-replay", topic="kv-events")
    publisher = VllmPublisher(config, ROOT, context, VirtualClock())
    publisher.publish(Tier.DEVICE, stored=chained(TOKENS))
    followed = Followed(context, address)
    async with running(publisher.run()), running(followed.subscriber.run()):
        assert [await followed.begun(), await followed.begun()] == ["0", "1"]
        assert await followed.hashes() == OURS
    publisher.close()


async def test_an_endpoint_that_is_none_is_refused(context):
    with pytest.raises(ConfigError, match="cannot follow"):
        await Followed(context, "nonsense").subscriber.run()
