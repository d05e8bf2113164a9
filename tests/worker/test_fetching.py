"""A worker fills a prompt's blocks from peers and stores: by real calls and engines, a fake model and transport."""

import asyncio
import contextlib
import dataclasses
import math

import pytest

from headrace.core import fetch_plan
from headrace.core.bandwidth import LaneMeter
from headrace.core.cost import CostModel
from headrace.core.placement import Tier
from headrace.core.request import CachedPrefix
from headrace.engine.messages import Goal, Sampled
from headrace.errors import BlockLost
from headrace.testing.fleet import BLOCK_TOKENS, open_fleet
from headrace.worker import pool_link
from headrace.worker.config import WorkerRole

NUM_BLOCKS = 5
PROMPT = tuple(range(3, 3 + NUM_BLOCKS * BLOCK_TOKENS + 1))
SLOW = CostModel(step_s=0.0, prompt_s=0.0, token_s=0.5, pair_s=0.0, decode_s=0.1, context_s=0.0, r2=1.0)
FAST = dataclasses.replace(SLOW, token_s=1e-7)
TIERS = {Tier.DEVICE: 0, Tier.DRAM: 0, Tier.DISK: 0}


class Desk:
    """An owner whose cache holds a prefix, and a reader that wants it."""

    def __init__(self, fleet):
        self.fleet = fleet
        self.owner, self.reader = fleet.workers["h0"], fleet.workers["h1"]
        self.heard = []
        self.reader.blocks.fetcher.on_corrupt = self.heard.append

    async def compute(self, worker, prompt=PROMPT):
        async with worker.engine.open(self.fleet.spec(prompt, max_tokens=1), Goal.ANSWER) as sequence:
            sequence.begin(0)
            while not any(isinstance(event, Sampled) for event in await sequence.events()):
                pass
        await self.fleet.at_rest(worker.name)

    def hint(self, worker=None, start=0, end=NUM_BLOCKS):
        worker = worker or self.owner
        return CachedPrefix(location=worker.name, address=worker.lane.address, tier=Tier.DEVICE, start=start, end=end)

    def spec(self, *sources):
        return dataclasses.replace(self.fleet.spec(PROMPT, max_tokens=1), sources=sources)

    async def fetch(self, *sources):
        """Return the tokens present in a new sequence of the reader, and its blocks' bytes."""
        async with self.reader.engine.open(self.spec(*sources), Goal.ANSWER) as sequence:
            num_present = await self.reader.blocks.fetch(sequence)
            return num_present, self.reader.runner.blocks[list(sequence.admitted.block_ids)].copy()

    def owned(self):
        """Return the bytes of the owner's cached blocks."""
        cache = self.owner.thread._engine._cache.ledger
        hashes = self.reader.blocks.hashes(PROMPT, b"")
        return self.owner.runner.blocks[list(cache.match(hashes))]

    def pool(self, address):
        return self.reader.blocks.fetcher._pools.pool(address)

    def reuse(self):
        return self.reader.blocks.reuse()


@pytest.fixture
def opened(tmp_path):
    async def open_desk(stack, num_owners=1, **shape):
        roles = {f"h{number}": WorkerRole.HYBRID for number in range(num_owners + 1)}
        fleet = await stack.enter_async_context(open_fleet(tmp_path, roles, **shape))
        desk = Desk(fleet)
        for name in roles:
            if name != "h1":
                await desk.compute(fleet.workers[name])
        return desk

    return open_desk


@pytest.fixture
async def stack():
    async with contextlib.AsyncExitStack() as opened:
        yield opened


@pytest.fixture
async def desk(stack, opened):
    return await opened(stack)


async def test_blocks_of_another_workers_cache_are_read_and_counted(desk):
    num_present, found = await desk.fetch(desk.hint())
    assert num_present == NUM_BLOCKS * BLOCK_TOKENS
    assert (found[:NUM_BLOCKS] == desk.owned()).all()
    assert desk.reuse().fetched_tokens == TIERS | {Tier.DEVICE: num_present}
    await desk.fleet.at_rest()


async def test_a_prompt_that_was_fetched_gives_the_same_answer(desk):
    spec = dataclasses.replace(desk.spec(desk.hint()), sampling=desk.fleet.spec(PROMPT, max_tokens=6).sampling)
    answers = []
    for worker in (desk.owner, desk.reader):
        async with worker.engine.open(spec, Goal.ANSWER) as sequence:
            sequence.begin(await worker.blocks.fetch(sequence))
            tokens = []
            while len(tokens) < 6:
                tokens += [event.token.token_id for event in await sequence.events() if isinstance(event, Sampled)]
        answers.append(tokens)
    assert answers[0] == answers[1]
    await desk.fleet.at_rest()
    assert desk.reader.engine.stats().computed_tokens == 1 + 5


async def test_a_hint_that_promises_too_much_brings_what_is_there(desk):
    desk.owner.thread._engine._cache.ledger.unname(desk.reader.blocks.hashes(PROMPT, b"")[3])
    num_present, found = await desk.fetch(desk.hint())
    assert num_present == 3 * BLOCK_TOKENS
    assert (found[:3] == desk.owned()).all()


async def test_parts_of_several_sources_are_put_together(stack, opened):
    desk = await opened(stack, kvstore=True)
    [store] = desk.fleet.kvstores
    hashes = desk.owner.blocks.hashes(PROMPT, b"")
    desk.owner.blocks.store_later(desk.spec(), hashes)
    storing = asyncio.create_task(desk.owner.blocks.run_stores())
    await desk.fleet.until(lambda: desk.owner.blocks.reuse().num_stored_blocks == NUM_BLOCKS, "not stored")
    storing.cancel()
    kept = CachedPrefix(location="kvstore", address=store, tier=Tier.DRAM, start=2, end=NUM_BLOCKS)
    num_present, found = await desk.fetch(desk.hint(end=2), kept)
    assert num_present == NUM_BLOCKS * BLOCK_TOKENS
    assert (found[:NUM_BLOCKS] == desk.owned()).all()
    assert desk.reuse().fetched_tokens == TIERS | {Tier.DEVICE: 2 * BLOCK_TOKENS, Tier.DRAM: 3 * BLOCK_TOKENS}


async def test_what_lies_behind_a_gap_is_not_used(stack, opened):
    desk = await opened(stack)
    dead = CachedPrefix(location="gone", address="127.0.0.1:1", tier=Tier.DEVICE, start=0, end=2)
    num_present, _ = await desk.fetch(dead, desk.hint(start=2))
    assert num_present == 0
    assert desk.reuse().fetched_tokens == TIERS


async def test_what_lies_behind_a_gap_is_not_read_any_more(stack, opened, monkeypatch):
    desk = await opened(stack, kvstore=True)
    monkeypatch.setattr(fetch_plan, "GROUP_BYTES", desk.owner.runner.blocks.shape[1])
    [address] = desk.fleet.kvstores
    empty = CachedPrefix(location="kvstore", address=address, tier=Tier.DRAM, start=0, end=2)
    reader, has_missed = desk.pool(address).reader, asyncio.Event()
    read = reader.read

    async def tell(*args):
        result = await read(*args)
        await staller.is_stalled.wait()
        has_missed.set()
        return result

    reader.read = tell
    staller = Staller(desk, 1)
    fetching = asyncio.create_task(desk.fetch(empty, desk.hint(start=2)))
    await has_missed.wait()
    staller.end()
    assert (await fetching)[0] == 0
    assert desk.reader.connector.stats().num_done == 1


async def test_the_own_cache_is_no_source(desk):
    asked = []
    desk.fleet.on_tick = asked.append
    assert (await desk.fetch(desk.hint(desk.reader)))[0] == 0
    assert "h1 Pin" not in asked


async def test_a_dead_source_is_a_miss_and_is_then_left_alone(desk):
    await desk.owner.lane.cut()
    assert (await desk.fetch(desk.hint()))[0] == 0
    link = desk.pool(desk.owner.lane.address).reader.link
    assert link.num_failures == 1
    assert (await desk.fetch(desk.hint()))[0] == 0
    assert link.num_failures == 1


async def test_a_prompt_that_is_computed_faster_is_not_fetched(stack, opened):
    desk = await opened(stack, cost=FAST)
    assert (await desk.fetch(desk.hint()))[0] == 0
    assert desk.reuse().declined_tokens == NUM_BLOCKS * BLOCK_TOKENS
    assert desk.reader.connector.stats().num_done == 0


async def test_a_flipped_bit_is_a_miss_and_its_block_is_let_go_everywhere(desk):
    await desk.fetch(desk.hint())
    await desk.fleet.at_rest()
    corrupt = desk.reader.blocks.hashes(PROMPT, b"")[2]
    # Its digest was taken when it was first lent.
    block = desk.owner.thread._engine._cache.ledger.lookup(corrupt)
    desk.owner.runner.blocks[block, 7] ^= 4
    num_present, _ = await desk.fetch(desk.hint())
    assert num_present == 2 * BLOCK_TOKENS
    assert desk.reuse().num_corrupt_blocks == 1
    assert desk.heard == [corrupt]
    await desk.fleet.until(
        lambda: desk.owner.thread._engine._cache.ledger.lookup(corrupt) is None, "the owner kept a corrupt block"
    )
    assert (await desk.fetch(desk.hint()))[0] == 2 * BLOCK_TOKENS


class Staller:
    """Stops the owner's transport when the reader's n-th READ begins."""

    def __init__(self, desk, count):
        self._fabric, self._agent = desk.fleet.fabric, desk.owner.epoch
        self._read, self._left = desk.reader.connector.read, count
        self.is_stalled = asyncio.Event()
        desk.reader.connector.read = self

    async def __call__(self, *args):
        self._left -= 1
        if not self._left:
            self._fabric.stall(self._agent)
            self.is_stalled.set()
        await self._read(*args)

    def end(self):
        self._fabric.resume(self._agent)


async def test_a_read_that_stalls_costs_its_blocks_but_not_those_that_had_landed(stack, opened, monkeypatch):
    desk = await opened(stack, cost=dataclasses.replace(SLOW, token_s=0.05))
    monkeypatch.setattr(fetch_plan, "GROUP_BYTES", desk.owner.runner.blocks.shape[1])
    monkeypatch.setattr(fetch_plan, "LOSS_SHARE", 0.1)
    monkeypatch.setattr(fetch_plan, "LEAST_HIDDEN_S", math.inf)
    staller = Staller(desk, 3)
    with pytest.raises(BlockLost):
        await desk.fetch(desk.hint())
    await desk.fleet.until(lambda: desk.reader.engine.stats().num_waiting == 0, "the sequence did not end")
    assert desk.reader.engine.stats().leased_blocks == NUM_BLOCKS
    staller.end()
    await desk.fleet.at_rest("h1")
    assert desk.reader.engine.stats().cached_blocks == 2
    assert (await desk.fetch())[0] == 2 * BLOCK_TOKENS
    assert desk.reuse().local_tokens == 2 * BLOCK_TOKENS


async def test_a_lane_whose_read_was_given_up_is_known_once_that_has_ended(stack, opened, monkeypatch):
    desk = await opened(stack, cost=dataclasses.replace(SLOW, token_s=0.05))
    monkeypatch.setattr(fetch_plan, "LEAST_HIDDEN_S", math.inf)
    monkeypatch.setattr(fetch_plan, "LOSS_SHARE", 0.2)
    monkeypatch.setattr(pool_link, "HASTY_S", math.inf)
    num_bytes = NUM_BLOCKS * desk.owner.runner.blocks.shape[1]
    meter = desk.pool(desk.owner.lane.address).meter(Tier.DEVICE)
    staller = Staller(desk, 1)
    with pytest.raises(BlockLost):
        await desk.fetch(desk.hint())
    guessed_s = meter.seconds(num_bytes, desk.fleet.clock.now())
    assert guessed_s > NUM_BLOCKS * BLOCK_TOKENS * 0.05
    staller.end()
    await desk.fleet.at_rest("h1")
    assert meter.seconds(num_bytes, desk.fleet.clock.now()) < guessed_s / 3
    assert (await desk.fetch(desk.hint()))[0] == NUM_BLOCKS * BLOCK_TOKENS


async def test_a_read_that_was_given_up_and_never_lands_tells_nothing_of_the_lane(stack, opened, monkeypatch):
    desk = await opened(stack, cost=dataclasses.replace(SLOW, token_s=0.01))
    monkeypatch.setattr(fetch_plan, "LEAST_HIDDEN_S", math.inf)
    monkeypatch.setattr(fetch_plan, "LOSS_SHARE", 1.0)
    num_bytes = NUM_BLOCKS * desk.owner.runner.blocks.shape[1]
    meter = desk.pool(desk.owner.lane.address).meter(Tier.DEVICE)
    Staller(desk, 1)
    with pytest.raises(BlockLost):
        await desk.fetch(desk.hint())
    guessed_s = meter.seconds(num_bytes, desk.fleet.clock.now())
    desk.fleet.fabric.kill(desk.owner.epoch)
    await desk.fleet.at_rest("h1")
    assert meter.seconds(num_bytes, desk.fleet.clock.now()) == guessed_s


@pytest.mark.parametrize("ends_first", [False, True], ids=["after the other", "before the other"])
async def test_a_late_read_is_measured_from_its_own_begin_to_its_own_end(stack, opened, monkeypatch, ends_first):
    desk = await opened(stack, num_owners=2, cost=dataclasses.replace(SLOW, token_s=0.05))
    monkeypatch.setattr(fetch_plan, "LEAST_HIDDEN_S", math.inf)
    late, other = desk.owner, desk.fleet.workers["h2"]
    is_stalled, is_other_done, told = asyncio.Event(), asyncio.Event(), {}
    read, note = desk.reader.connector.read, LaneMeter.note

    def listen(meter, num_bytes, seconds, now_s, *, is_whole=True):
        if is_whole:
            told[num_bytes] = seconds
        note(meter, num_bytes, seconds, now_s, is_whole=is_whole)

    monkeypatch.setattr(LaneMeter, "note", listen)

    async def tapped(agent, local_ids, remote_ids, deadline_s, *rest):
        if agent == late.epoch:
            desk.fleet.fabric.stall(agent)
            is_stalled.set()
            deadline_s = desk.fleet.clock.now() + 0.05
        else:
            await asyncio.wait_for(is_other_done.wait(), 5.0)
        await read(agent, local_ids, remote_ids, deadline_s, *rest)

    monkeypatch.setattr(desk.reader.connector, "read", tapped)
    monkeypatch.setattr(fetch_plan.FetchPlan, "may_go_on", lambda *_: True)
    clock = desk.fleet.clock
    begun_s = clock.now()
    fetching = asyncio.create_task(desk.fetch(desk.hint(late, end=2), desk.hint(other, start=2)))
    await is_stalled.wait()
    stalled_s = clock.now()
    if not ends_first:
        asyncio.get_running_loop().call_later(0.2, is_other_done.set)
        with pytest.raises(BlockLost):
            await fetching
    await asyncio.sleep(0.3)
    desk.fleet.fabric.resume(late.epoch)
    least_s = clock.now() - stalled_s
    await desk.fleet.until(lambda: desk.reader.connector.stats().num_inflight == 0, "did not land")
    most_s = clock.now() - begun_s
    if ends_first:
        await asyncio.sleep(0.3)
        is_other_done.set()
        await fetching
    await desk.fleet.at_rest("h1")
    assert least_s <= told[2 * late.runner.blocks.shape[1]] <= most_s


@pytest.mark.parametrize("when", ["met first", "met again"])
async def test_the_time_of_connecting_is_not_that_of_the_lane(stack, opened, monkeypatch, when):
    desk = await opened(stack, cost=dataclasses.replace(SLOW, token_s=0.01))
    num_bytes = NUM_BLOCKS * desk.owner.runner.blocks.shape[1]
    link, meter = desk.pool(desk.owner.lane.address).reader.link, desk.pool(desk.owner.lane.address).meter(Tier.DEVICE)
    step = "meet" if when == "met first" else "agent"
    connect, asked = getattr(link, step), []
    monkeypatch.setattr(fetch_plan, "LOSS_SHARE", 1.0)
    await link.parts.peers.ensure(link.address)

    async def slowly(*args):
        asked.append(args)
        await asyncio.sleep(0.4)
        return await connect(*args)

    monkeypatch.setattr(link, step, slowly)
    known_s = meter.seconds(num_bytes, desk.fleet.clock.now())
    assert (await desk.fetch(desk.hint()))[0] == 0
    assert meter.seconds(num_bytes, desk.fleet.clock.now()) == known_s
    assert len(asked) == 1
    monkeypatch.setattr(link, step, connect)
    assert (await desk.fetch(desk.hint()))[0] == NUM_BLOCKS * BLOCK_TOKENS


async def test_a_request_that_leaves_during_a_fetch_leaves_no_further_reads_and_no_blocks(stack, opened, monkeypatch):
    desk = await opened(stack)
    monkeypatch.setattr(fetch_plan, "GROUP_BYTES", desk.owner.runner.blocks.shape[1])
    staller = Staller(desk, 2)
    fetching = asyncio.create_task(desk.fetch(desk.hint()))
    await staller.is_stalled.wait()
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    await desk.fleet.until(lambda: desk.reader.engine.stats().num_waiting == 0, "the sequence did not end")
    assert desk.reader.engine.stats().leased_blocks == NUM_BLOCKS
    staller.end()
    await desk.fleet.at_rest("h1")
    assert desk.reader.connector.stats().num_done == 2
    desk.reader.thread._engine._cache.ledger.verify()


async def test_a_lane_that_was_slow_is_not_chosen(stack, opened):
    desk = await opened(stack, cost=dataclasses.replace(SLOW, token_s=0.01))
    meter = desk.pool(desk.owner.lane.address).meter(Tier.DEVICE)
    meter.note(desk.owner.runner.blocks.shape[1], 10.0, desk.fleet.clock.now())
    assert (await desk.fetch(desk.hint()))[0] == 0
    assert desk.reuse().declined_tokens == NUM_BLOCKS * BLOCK_TOKENS
