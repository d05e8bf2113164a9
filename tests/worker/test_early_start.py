"""A prompt starts with the first layers of its fetched blocks: real calls and engines, a fake model and transport."""

import asyncio
import collections
import contextlib
import dataclasses

import pytest

from headrace.core import fetch_plan
from headrace.core.block import KvLayout
from headrace.core.cost import CostModel
from headrace.core.placement import Tier
from headrace.core.request import CachedPrefix
from headrace.engine.messages import Goal, Sampled
from headrace.errors import BlockLost
from headrace.testing.fleet import BLOCK_TOKENS, open_fleet
from headrace.worker.config import WorkerRole
from headrace.worker.early_start import NUM_SPANS, EarlyStart

NUM_BLOCKS = 5
PROMPT = tuple(range(3, 3 + NUM_BLOCKS * BLOCK_TOKENS + 1))
PATIENT = CostModel(step_s=0.5, prompt_s=0.0, token_s=0.05, pair_s=0.0, decode_s=0.1, context_s=0.0, r2=1.0)
"""Under it a step hides any fetch."""


class Desk:
    """An owner whose cache holds a prefix, and a reader that starts early with it."""

    def __init__(self, fleet, monkeypatch):
        self.fleet = fleet
        self.owner, self.reader = fleet.workers["h0"], fleet.workers["h1"]
        self.ticks, self.spans = [], []
        self.before_read = None
        self._read = self.reader.connector.read
        fleet.on_tick = self.ticks.append
        monkeypatch.setattr(self.reader.connector, "read", self._tapped)

    async def _tapped(self, agent, local_ids, remote_ids, deadline_s, span=None, on_late=None):
        self.spans.append(span)
        if self.before_read is not None:
            await self.before_read(len(self.spans))
        await self._read(agent, local_ids, remote_ids, deadline_s, span, on_late)

    def spec(self, *sources, max_tokens=6):
        return dataclasses.replace(self.fleet.spec(PROMPT, max_tokens=max_tokens), sources=sources)

    def hint(self, worker=None, start=0, end=NUM_BLOCKS):
        worker = worker or self.owner
        return CachedPrefix(location=worker.name, address=worker.lane.address, tier=Tier.DEVICE, start=start, end=end)

    async def answer(self, worker, *sources):
        """Return the tokens of an answer, as a job makes it."""
        tokens = []
        async with worker.engine.open(self.spec(*sources), Goal.ANSWER) as sequence:
            sequence.begin(await worker.blocks.fetch(sequence))
            while len(tokens) < 6:
                tokens += [event.token.token_id for event in await sequence.events() if isinstance(event, Sampled)]
        await self.fleet.at_rest(worker.name)
        return tokens

    def block(self, worker, index):
        """Return the bytes of a cached block."""
        ledger = worker.thread._engine._cache.ledger
        return worker.runner.blocks[ledger.lookup(worker.blocks.hashes(PROMPT, b"")[index])]

    def num_computed(self):
        return self.reader.engine.stats().computed_tokens


@pytest.fixture
async def desk(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_plan, "LEAST_HIDDEN_S", 0.0)
    roles = {"h0": WorkerRole.HYBRID, "h1": WorkerRole.HYBRID, "h2": WorkerRole.HYBRID}
    async with contextlib.AsyncExitStack() as stack:
        desk = Desk(await stack.enter_async_context(open_fleet(tmp_path, roles, cost=PATIENT)), monkeypatch)
        desk.expected = await desk.answer(desk.owner)
        yield desk
        await desk.fleet.at_rest()


async def test_the_step_begins_before_the_last_layers_are_read(desk):
    async def wait_for_step(number):
        if number == 2:
            await asyncio.to_thread(desk.reader.runner.entered.wait, 5.0)

    desk.reader.runner.entered.clear()
    desk.before_read = wait_for_step
    assert await desk.answer(desk.reader, desk.hint()) == desk.expected
    assert desk.reader.runner.entered.is_set()
    layout = desk.reader.runner.layout
    assert desk.spans == [layout.span(range(1)), layout.span(range(1, 2))]
    assert desk.ticks.index("h1 StartEarly") < desk.ticks.index("h1 Begin")
    assert desk.num_computed() == 1 + 5


async def test_layers_of_several_sources_are_waited_for(desk):
    assert await desk.answer(desk.fleet.workers["h2"]) == desk.expected
    assert await desk.answer(desk.reader, desk.hint(end=2), desk.hint(desk.fleet.workers["h2"], 2)) == desk.expected
    assert len(desk.spans) == 4
    assert "h1 StartEarly" in desk.ticks
    assert desk.num_computed() == 1 + 5


async def test_nothing_is_computed_into_blocks_that_somebody_still_reads_behind_a_gap(desk):
    loser = desk.fleet.workers["h2"]
    assert await desk.answer(loser) == desk.expected
    loser.thread._engine._cache.ledger.unname(desk.reader.blocks.hashes(PROMPT, b"")[1])

    async def slowly(_):
        await asyncio.sleep(0.02)

    desk.before_read = slowly
    assert await desk.answer(desk.reader, desk.hint(loser, end=2), desk.hint(start=2)) == desk.expected
    assert desk.num_computed() == 4 * BLOCK_TOKENS + 1 + 5
    assert "h1 StartEarly" not in desk.ticks
    assert desk.reader.blocks.reuse().num_corrupt_blocks == 0


async def test_a_source_that_has_lost_the_end_of_a_prefix_does_not_keep_it_from_starting(desk):
    desk.owner.thread._engine._cache.ledger.unname(desk.reader.blocks.hashes(PROMPT, b"")[3])
    assert await desk.answer(desk.reader, desk.hint()) == desk.expected
    assert "h1 StartEarly" in desk.ticks
    assert desk.num_computed() == 2 * BLOCK_TOKENS + 1 + 5


async def test_a_lane_that_fails_ends_a_step_that_has_begun(desk):
    other = desk.fleet.workers["h2"]
    assert await desk.answer(other) == desk.expected
    num_reads = collections.Counter()
    read = desk.reader.connector.read

    async def cut_second(agent, *args):
        num_reads[agent] += 1
        if agent == desk.owner.epoch and num_reads[agent] == 2:
            await desk.fleet.until(lambda: "h1 StartEarly" in desk.ticks, "not started")
            desk.fleet.fabric.kill(agent)
        await read(agent, *args)

    desk.reader.connector.read = cut_second
    assert await desk.answer(desk.reader, desk.hint(other, end=2), desk.hint(start=2)) == desk.expected
    assert desk.num_computed() == 3 * BLOCK_TOKENS + 1 + 5


async def test_a_step_on_wrong_bytes_does_not_count(desk):
    await desk.answer(desk.fleet.workers["h2"], desk.hint())
    # Its digest was taken when it was first lent.
    desk.block(desk.owner, 3)[7] ^= 4
    assert await desk.answer(desk.reader, desk.hint()) == desk.expected
    assert "h1 StartEarly" in desk.ticks
    assert desk.num_computed() == 2 * BLOCK_TOKENS + 1 + 5
    assert desk.reader.blocks.reuse().num_corrupt_blocks == 1
    for index in range(3):
        assert (desk.block(desk.reader, index) == desk.block(desk.owner, index)).all()


async def test_a_source_that_dies_between_layers_is_a_miss(desk):
    async def cut(number):
        if number == 2:
            desk.fleet.fabric.kill(desk.owner.epoch)

    desk.before_read = cut
    assert await desk.answer(desk.reader, desk.hint()) == desk.expected
    assert "h1 StartEarly" in desk.ticks
    assert desk.num_computed() == len(PROMPT) + 5


async def test_a_source_that_stalls_between_layers_costs_the_blocks_and_stops_no_other_sequence(desk):
    desk.reader.blocks.fetcher._config = dataclasses.replace(desk.reader.blocks.fetcher._config, deadline_s=0.4)
    desk.fleet.on_tick = desk.ticks.append

    async def stall(number):
        if number == 2:
            desk.fleet.fabric.stall(desk.owner.epoch)

    desk.before_read = stall
    failing = asyncio.create_task(desk.answer(desk.reader, desk.hint()))
    await desk.fleet.until(lambda: "h1 StartEarly" in desk.ticks, "did not start")
    async with desk.reader.engine.open(desk.fleet.spec((5, 6, 7), max_tokens=1), Goal.ANSWER) as other:
        other.begin(0)
        assert [event for event in await other.events() if isinstance(event, Sampled)] or await other.events()
    with pytest.raises(BlockLost):
        await failing
    desk.fleet.fabric.resume(desk.owner.epoch)
    await desk.fleet.at_rest("h1")
    assert not desk.reader.engine.stats().leased_blocks
    assert await desk.answer(desk.reader) == desk.expected


async def test_a_request_that_leaves_while_layers_land_leaves_nothing(desk):
    stalled = asyncio.Event()

    async def stall(number):
        if number == 2:
            desk.fleet.fabric.stall(desk.owner.epoch)
            stalled.set()

    desk.before_read = stall
    leaving = asyncio.create_task(desk.answer(desk.reader, desk.hint()))
    await stalled.wait()
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    desk.fleet.fabric.resume(desk.owner.epoch)
    await desk.fleet.at_rest("h1")
    assert desk.num_computed() in (0, 1)
    desk.reader.thread._engine._cache.ledger.verify()


@pytest.mark.parametrize("num_layers", [1, 3, 4, 30])
def test_spans_are_whole_layers_and_together_a_block(num_layers):
    layout = KvLayout(num_layers=num_layers, block_tokens=16, num_kv_heads=3, head_dim=64, dtype="bf16")
    spans = EarlyStart(None, None, layout, None, None).spans
    assert len(spans) == min(NUM_SPANS, num_layers)
    assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])]
    assert spans[-1].end == layout.block_bytes
    assert all((span.end - span.start) % (layout.block_bytes // num_layers) == 0 for span in spans)
