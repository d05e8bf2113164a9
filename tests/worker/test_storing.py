"""Full blocks go to the stores that keep their segments, at a pace."""

import asyncio
import contextlib
import dataclasses
import time

import pytest

from headrace.core.block import BlockHash
from headrace.core.placement import DECODED, EXACT
from headrace.core.segments import SEGMENT_BLOCKS, segments, store_of
from headrace.engine.messages import Goal, Sampled
from headrace.testing.fleet import BLOCK_TOKENS, open_fleet
from headrace.worker import storing
from headrace.worker.blocks import BlockExchange
from headrace.worker.config import WorkerRole
from headrace.worker.exchange_parts import ExchangeConfig
from headrace.worker.storing import MAX_QUEUED_CHAINS, Chain

NUM_BLOCKS = 2 * SEGMENT_BLOCKS + 6
PROMPT = tuple(3 + number % 200 for number in range(NUM_BLOCKS * BLOCK_TOKENS + 1))
DEAD = tuple(f"127.0.{number // 250}.{number % 250 + 1}:1" for number in range(10_000))
"""So many that some of them come before any store, whatever its port, for the first segment."""


class Desk:
    def __init__(self, fleet):
        self.fleet = fleet
        self.writer, self.reader = fleet.workers["h0"], fleet.workers["h1"]

    async def compute(self, prompt=PROMPT):
        async with self.writer.engine.open(self.fleet.spec(prompt, max_tokens=1), Goal.ANSWER) as sequence:
            sequence.begin(0)
            while not any(isinstance(event, Sampled) for event in await sequence.events()):
                pass
        await self.fleet.at_rest("h0")
        return self.writer.blocks.hashes(prompt, b"")

    def exchange(self, worker, **config):
        settings = ExchangeConfig(**{"stores": self.fleet.kvstores, "deadline_s": 2.0, **config})
        return BlockExchange(worker._exchange(self.fleet), settings)

    async def store(self, exchange, hashes):
        exchange.store_later(self.fleet.spec(PROMPT), hashes)
        running = asyncio.create_task(exchange.run_stores())
        await self.fleet.until(lambda: exchange.reuse().num_stored_blocks == len(hashes), "not all stored")
        running.cancel()

    async def fetch(self, exchange, prompt=PROMPT):
        async with self.reader.engine.open(self.fleet.spec(prompt, max_tokens=1), Goal.ANSWER) as sequence:
            return await exchange.fetch(sequence)

    def num_kept(self, address):
        return self.fleet.stores[address].member.load().ledger.cached


@pytest.fixture
async def open_desk(tmp_path):
    async with contextlib.AsyncExitStack() as stack:

        async def open_desk(**shape):
            roles = {"h0": WorkerRole.HYBRID, "h1": WorkerRole.HYBRID}
            shape = {"kvstore": True, "num_blocks": 160, **shape}
            return Desk(await stack.enter_async_context(open_fleet(tmp_path, roles, **shape)))

        yield open_desk


async def test_every_segment_goes_to_the_store_of_its_key_and_is_found_there_without_hints(open_desk):
    desk = await open_desk(num_kvstores=3)
    hashes = await desk.compute()
    await desk.store(desk.exchange(desk.writer), hashes)
    expected = dict.fromkeys(desk.fleet.kvstores, 0)
    for segment in segments(hashes):
        expected[store_of(segment.key, desk.fleet.kvstores)] += segment.end - segment.start
    assert {address: desk.num_kept(address) for address in expected} == expected
    assert await desk.fetch(desk.exchange(desk.reader)) == NUM_BLOCKS * BLOCK_TOKENS


async def test_segments_of_a_dead_store_go_to_the_next_and_are_looked_for_there(open_desk):
    desk = await open_desk()
    hashes, [live] = await desk.compute(), desk.fleet.kvstores
    dead = next(name for name in DEAD if store_of(hashes[0], (live, name)) == name)
    stores = (live, dead)
    await desk.store(desk.exchange(desk.writer, stores=stores), hashes)
    assert desk.num_kept(live) == NUM_BLOCKS
    reading = desk.exchange(desk.reader, stores=stores)
    await desk.fetch(reading)
    assert await desk.fetch(reading) == NUM_BLOCKS * BLOCK_TOKENS


async def test_a_worker_that_is_told_not_to_store_does_not(open_desk):
    desk = await open_desk()
    exchange = desk.exchange(desk.writer, stores_blocks=False)
    exchange.store_later(desk.fleet.spec(PROMPT), (BlockHash(bytes(16)),))
    assert exchange.storer._queue.empty()


async def test_chains_beyond_the_bound_are_dropped_and_counted(open_desk):
    desk = await open_desk()
    exchange = desk.exchange(desk.writer)
    for _ in range(MAX_QUEUED_CHAINS + 3):
        exchange.store_later(desk.fleet.spec(PROMPT), (BlockHash(bytes(16)), BlockHash(bytes(16))))
    assert exchange.reuse().num_dropped_blocks == 6


async def test_puts_keep_to_their_rate_while_the_engine_works_and_only_then(open_desk, monkeypatch):
    desk = await open_desk()
    block_bytes = desk.writer.runner.layout.block_bytes
    monkeypatch.setattr(storing, "GROUP_BYTES", block_bytes)
    short, longer = PROMPT[: 6 * BLOCK_TOKENS + 1], PROMPT[7 : 7 + 6 * BLOCK_TOKENS + 1]
    hashes, others = await desk.compute(short), await desk.compute(longer)
    exchange = desk.exchange(desk.writer, store_bytes_per_s=20.0 * block_bytes)
    begun_s = time.monotonic()
    await desk.store(exchange, hashes)
    assert time.monotonic() - begun_s < 0.2
    at_rest = desk.writer.engine.stats
    desk.writer.engine.stats = lambda: dataclasses.replace(at_rest(), num_running=1)
    begun_s = time.monotonic()
    exchange.store_later(desk.fleet.spec(PROMPT), others)
    running = asyncio.create_task(exchange.run_stores())
    await desk.fleet.until(lambda: exchange.reuse().num_stored_blocks == 12, "not all stored")
    running.cancel()
    assert time.monotonic() - begun_s > 0.2


async def test_blocks_of_a_put_that_ran_out_of_time_stay_in_place_until_the_transport_is_done_with_them(open_desk):
    desk = await open_desk()
    fleet, [address] = desk.fleet, desk.fleet.kvstores
    hashes = (await desk.compute())[:SEGMENT_BLOCKS]
    exchange = desk.exchange(desk.writer, deadline_s=0.2)
    [store] = exchange.storer._pools.stores
    await store.link.meet()
    agent = fleet.stores[address].actor.connector.pool.agent_name
    fleet.fabric.stall(agent)
    exchange.store_later(fleet.spec(PROMPT), hashes)
    running = asyncio.create_task(exchange.run_stores())
    await fleet.until(lambda: store.link.num_failures, "the put did not run out of time")
    for _ in range(2):  # The engine ends by the clock what it ends between one command and the next.
        held = await desk.writer.engine.holders()
    assert [holder.num_blocks for holder in held] == [SEGMENT_BLOCKS]
    fleet.fabric.resume(agent)
    await fleet.at_rest("h0")
    running.cancel()


def test_a_put_never_mixes_segments_or_provenances():
    hashes = tuple(BlockHash(number.to_bytes(16, "little")) for number in range(2 * SEGMENT_BLOCKS + 2))
    size, num_exact = SEGMENT_BLOCKS, SEGMENT_BLOCKS + 6
    found = list(storing._stretches(Chain(hashes=hashes, num_exact=num_exact, tenant="acme")))
    starts = [0, size, num_exact, 2 * size]
    assert [len(stretch.hashes) for stretch in found] == [size, 6, size - 6, 2]
    assert [stretch.facts.num_blocks_before for stretch in found] == starts
    assert [stretch.facts.origin for stretch in found] == [EXACT, EXACT, DECODED, DECODED]
    assert [stretch.facts.segment_key for stretch in found] == [hashes[i] for i in (0, size, size, 2 * size)]
    assert [stretch.facts.parent for stretch in found] == [None, *(hashes[start - 1] for start in starts[1:])]
    assert {stretch.facts.tenant for stretch in found} == {"acme"}
