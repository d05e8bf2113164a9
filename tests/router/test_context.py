"""A context that still arrives, through real calls and engines, on a fake model and transport."""

import asyncio
import random
from contextlib import aclosing

import pytest

from headrace.core.request import ContextProgress
from headrace.errors import DeadlineExceeded, InvalidRequest
from headrace.testing.fleet import open_fleet

CLUSTERS = ["h0", "p0 d0", "p0 p1 d0 d1", "p0", "d0"]


class Stream:
    """A context that is fed by a test, and its answer."""

    def __init__(self, fleet, prompt=(), **sampling):
        self.fleet, self.prompt, self.version = fleet, tuple(prompt), 0
        self.run = fleet.context(fleet.spec(prompt, **sampling))
        self.tokens, self.progress, self.pause_s = [], [], 0.0
        self.reading = asyncio.ensure_future(self._read())

    async def _read(self):
        async with aclosing(self.run.events()) as events:
            async for event in events:
                if isinstance(event, ContextProgress):
                    self.progress.append(event)
                else:
                    self.tokens.extend(event.tokens)
                await asyncio.sleep(self.pause_s)

    def revise(self, tokens=(), keep=None, **how):
        keep = len(self.prompt) if keep is None else keep
        self.prompt = (*self.prompt[:keep], *tokens)
        self.version += 1
        self.run.revise(keep, tuple(tokens), **how)

    async def computed(self):
        """Wait until all that may be computed is."""
        num_tokens = len(self.prompt)
        wanted = ContextProgress(version=self.version, num_computed=max(0, num_tokens - 1), num_tokens=num_tokens)
        if wanted.num_computed:
            await self.fleet.until(lambda: wanted in self.progress or self.reading.done(), f"not computed: {wanted}")
            assert not self.reading.done(), self.reading.result()

    async def answer(self):
        async with asyncio.timeout(20.0):
            await self.reading
        assert [token.cursor for token in self.tokens] == list(range(len(self.tokens)))
        return [token.token_id for token in self.tokens]


async def one_shot(fleet, prompt, **sampling):
    return [token.token_id for token in await fleet.tokens(fleet.spec(prompt, **sampling))]


@pytest.mark.parametrize("workers", CLUSTERS)
async def test_a_context_in_pieces_has_the_answer_of_the_whole(tmp_path, roles, prompt_of, workers):
    async with open_fleet(tmp_path, roles(workers)) as fleet:
        prompt = prompt_of(1, 50)
        stream = Stream(fleet, prompt[:7])
        for start in range(7, 49, 6):
            await stream.computed()
            stream.revise(prompt[start : start + 6])
        stream.revise(prompt[49:], is_closed=True)
        assert await stream.answer() == await one_shot(fleet, prompt)
        await fleet.at_rest()


@pytest.mark.parametrize("workers", CLUSTERS)
@pytest.mark.parametrize("keep", [0, 5, 8, 20])
async def test_a_context_that_is_updated_has_the_answer_of_what_it_became(tmp_path, roles, prompt_of, workers, keep):
    async with open_fleet(tmp_path, roles(workers)) as fleet:
        stream = Stream(fleet, prompt_of(1, 20))
        await stream.computed()
        stream.revise(prompt_of(2, 9), keep=keep)
        await stream.computed()
        stream.revise(is_closed=True)
        assert await stream.answer() == await one_shot(fleet, stream.prompt)
        await fleet.at_rest()


@pytest.mark.parametrize("workers", CLUSTERS)
async def test_a_context_may_be_empty_until_it_is_closed(tmp_path, roles, prompt_of, workers):
    async with open_fleet(tmp_path, roles(workers)) as fleet:
        stream = Stream(fleet)
        await asyncio.sleep(0.05)
        stream.revise(prompt_of(1, 9), is_closed=True)
        assert await stream.answer() == await one_shot(fleet, prompt_of(1, 9))
        await fleet.at_rest()


async def test_kv_is_with_the_decode_worker_before_the_context_is_closed(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("p0 d0")) as fleet:
        written = []
        write = fleet.workers["p0"].connector.write

        async def count(agent, local_ids, *rest):
            written.append(len(local_ids))
            await write(agent, local_ids, *rest)

        fleet.workers["p0"].connector.write = count
        stream = Stream(fleet, prompt_of(1, 41))
        await fleet.until(lambda: sum(written) == 10, "not all full blocks pushed")
        stream.revise(prompt_of(2, 3), is_closed=True)
        answer, num_written = await stream.answer(), sum(written)
        assert answer == await one_shot(fleet, stream.prompt)
        assert num_written == 11
        await fleet.at_rest()


@pytest.mark.parametrize(("keep", "num_pushed"), [(21, 5), (17, 4), (14, 3), (0, 3)])
async def test_what_a_revision_leaves_of_an_earlier_version_is_pushed(tmp_path, roles, prompt_of, keep, num_pushed):
    """Pieces that come faster than they are computed must not put off the pushing until the end."""
    async with open_fleet(tmp_path, roles("p0 d0")) as fleet:
        prefill, decode, written = fleet.workers["p0"], fleet.workers["d0"], []
        write = prefill.connector.write

        async def count(agent, local_ids, *rest):
            written.append(len(local_ids))
            await write(agent, local_ids, *rest)

        prefill.connector.write = count
        held = fleet.hold_at("p0 Progress", 2)  # A step has 8 tokens.
        stream = Stream(fleet, prompt_of(1, 13))
        await held.wait()
        await fleet.until(lambda: sum(written) == 3, "the first version is not pushed")
        stream.revise(prompt_of(2, 8))
        await fleet.until(lambda: decode.engine.stats().leased_blocks == 6, "no blocks for the second version")
        stream.revise(prompt_of(3, 8 + 21 - keep), keep=keep)
        await fleet.until(lambda: decode.engine.stats().leased_blocks == 8, "no blocks for the third version")
        await asyncio.sleep(0.05)
        held = fleet.hold_at("p0 Progress", 1)
        prefill.runner.gate.set()
        await held.wait()
        await fleet.until(lambda: sum(written) >= num_pushed, "not pushed while the next step computes")
        await asyncio.sleep(0.05)
        assert sum(written) == num_pushed
        prefill.runner.gate.set()
        stream.revise((5,), is_closed=True)
        assert await stream.answer() == await one_shot(fleet, stream.prompt)
        await fleet.at_rest()


async def test_what_an_update_changes_is_pushed_again_and_nothing_else(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("p0 d0")) as fleet:
        written = []
        write = fleet.workers["p0"].connector.write

        async def count(agent, local_ids, *rest):
            written.append(len(local_ids))
            await write(agent, local_ids, *rest)

        fleet.workers["p0"].connector.write = count
        stream = Stream(fleet, prompt_of(1, 41))
        await fleet.until(lambda: sum(written) == 10, "not all full blocks pushed")
        stream.revise(prompt_of(2, 10), keep=18)
        await fleet.until(lambda: sum(written) == 10 + 2, "the changed blocks are not pushed")
        stream.revise(is_closed=True)
        answer, num_written = await stream.answer(), sum(written)
        assert answer == await one_shot(fleet, stream.prompt)
        assert num_written == 10 + 2 + 1
        await fleet.at_rest()


async def test_only_what_arrived_last_is_computed_after_the_close(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("p0 d0")) as fleet:
        stream = Stream(fleet, prompt_of(1, 41), max_tokens=1)
        await stream.computed()
        before = fleet.workers["p0"].engine.stats().computed_tokens
        stream.revise(prompt_of(2, 3), is_closed=True)
        await stream.answer()
        await fleet.at_rest()
        assert fleet.workers["p0"].engine.stats().computed_tokens - before == 4


async def test_an_update_into_what_a_decode_worker_shares_moves_it_to_other_blocks(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("p0 d0")) as fleet:
        prompt = prompt_of(1, 41)
        wanted = await one_shot(fleet, prompt)
        stream = Stream(fleet, prompt)
        await stream.computed()
        stream.revise(prompt_of(2, 9), keep=6)
        await stream.computed()
        stream.revise(is_closed=True)
        assert await stream.answer() == await one_shot(fleet, stream.prompt)
        assert await one_shot(fleet, prompt) == wanted
        await fleet.at_rest()


@pytest.mark.parametrize(("workers", "victim"), [("p0 p1 d0 d1", "p"), ("p0 p1 d0 d1", "d"), ("h0 h1", "h")])
@pytest.mark.parametrize("is_closed", [False, True])
async def test_a_worker_that_dies_costs_a_context_nothing_but_time(
    tmp_path, roles, prompt_of, workers, victim, is_closed
):
    async with open_fleet(tmp_path, roles(workers)) as fleet:
        wanted = await one_shot(fleet, (*prompt_of(1, 30), *prompt_of(2, 13)), max_tokens=12)
        streams = [Stream(fleet, prompt_of(1, 30), max_tokens=12) for _ in range(3)]
        for stream in streams:
            await stream.computed()
            if is_closed:
                stream.revise(prompt_of(2, 13), is_closed=True)
        if is_closed:
            await fleet.until(lambda: any(stream.tokens for stream in streams), "no token")
        await fleet.workers.pop(f"{victim}0").kill()
        if not is_closed:
            for stream in streams:
                stream.revise(prompt_of(2, 13), is_closed=True)
        for stream in streams:
            assert await stream.answer() == wanted
        await fleet.at_rest()


async def test_contexts_that_lose_the_last_decode_worker_are_answered_where_they_are_computed(
    tmp_path, roles, prompt_of
):
    """Its pool has room for each of them once: none may keep blocks there that another one is to fill."""
    async with open_fleet(tmp_path, roles("p0 d0"), num_blocks=14, num_swap_blocks=0) as fleet:
        prompts = [prompt_of(seed, 48) for seed in range(3)]
        streams = [Stream(fleet, prompt[:20]) for prompt in prompts]
        await asyncio.gather(*(stream.computed() for stream in streams))
        await fleet.workers["d0"].kill()
        await fleet.until(lambda: len(fleet.table.usable()) == 1, "the death is not noticed")
        for stream, prompt in zip(streams, prompts, strict=True):
            stream.revise(prompt[20:47])
        await asyncio.sleep(0.8)
        for stream, prompt in zip(streams, prompts, strict=True):
            stream.revise(prompt[47:], is_closed=True)
        for stream, prompt in zip(streams, prompts, strict=True):
            assert await stream.answer() == await one_shot(fleet, prompt)
        await fleet.at_rest("p0")


async def test_without_any_worker_a_context_waits_for_one(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("h0")) as fleet:
        wanted = await one_shot(fleet, prompt_of(1, 30))
        stream = Stream(fleet, prompt_of(1, 20))
        await stream.computed()
        await fleet.workers["h0"].kill()
        stream.revise(prompt_of(1, 30)[20:])
        await asyncio.sleep(0.3)
        await fleet.revive("h0")
        await stream.computed()
        stream.revise(is_closed=True)
        assert await stream.answer() == wanted
        await fleet.at_rest()


async def test_contexts_that_wait_give_their_blocks_to_those_who_ask(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("p0 d0"), num_blocks=24) as fleet:
        streams = [Stream(fleet, prompt_of(seed, 50)) for seed in range(3)]
        await streams[0].computed()
        for seed in range(5, 9):
            await one_shot(fleet, prompt_of(seed, 30))
        for stream in streams:
            stream.revise((5,), is_closed=True)
            assert await stream.answer() == await one_shot(fleet, stream.prompt)
        await fleet.at_rest()


async def test_a_client_may_leave_at_any_time_and_nothing_is_held(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("p0 d0")) as fleet:
        for pause_ms in range(0, 60, 4):
            stream = Stream(fleet, prompt_of(pause_ms, 30))
            await asyncio.sleep(pause_ms / 1000)
            if pause_ms % 8:
                stream.revise(prompt_of(1, 9), keep=13, is_closed=pause_ms % 16 > 8)
                await asyncio.sleep(0.01)
            stream.reading.cancel()
            await asyncio.wait([stream.reading])
            await fleet.at_rest()


async def test_the_deadline_ends_a_context_that_is_never_closed(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("p0 d0")) as fleet:
        stream = Stream(fleet, prompt_of(1, 30), timeout_s=0.3)
        with pytest.raises(DeadlineExceeded):
            await stream.answer()
        await fleet.at_rest()


async def test_the_deadline_ends_a_context_for_which_there_is_no_worker(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("h0")) as fleet:
        await fleet.workers["h0"].kill()
        stream = Stream(fleet, prompt_of(1, 30), timeout_s=0.3)
        with pytest.raises(DeadlineExceeded):
            await stream.answer()


@pytest.mark.parametrize("num_turns", range(5))
async def test_a_context_may_be_closed_at_once(tmp_path, roles, prompt_of, num_turns):
    async with open_fleet(tmp_path, roles("p0 d0")) as fleet:
        stream = Stream(fleet, prompt_of(1, 20))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        stream.revise((5,), is_closed=True)
        assert await stream.answer() == await one_shot(fleet, stream.prompt)
        await fleet.at_rest()


async def test_nothing_is_reused_while_a_late_write_of_an_earlier_version_moves(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("p0 d0"), transfer_deadline_s=0.3) as fleet:
        prefill, decode = fleet.workers["p0"], fleet.workers["d0"]
        fleet.parts.table.suspect = lambda _: None
        fleet.fabric.stall(decode.epoch)
        stream = Stream(fleet, prompt_of(1, 61))
        await stream.computed()
        await fleet.until(lambda: prefill.connector.stats().num_inflight, "nothing is written")
        stream.revise(prompt_of(2, 10), keep=0)
        await stream.computed()
        await fleet.until(lambda: prefill.connector.stats().num_failed, "the write goes on")
        stream.reading.cancel()
        await asyncio.wait([stream.reading])
        await asyncio.sleep(0.1)
        assert prefill.connector.stats().num_inflight
        assert decode.reservations.num_writers()
        assert decode.engine.stats().leased_blocks >= 15
        fleet.fabric.resume(decode.epoch)
        await fleet.at_rest()


async def test_blocks_of_versions_that_nobody_wants_any_more_are_given_back(tmp_path, roles, prompt_of):
    # Room for both prompts and no block more: 11 each.
    async with open_fleet(tmp_path, roles("p0 d0 d1"), num_blocks=22) as fleet:
        peers, met = fleet.workers["p0"].peers, asyncio.Event()
        ensure = peers.ensure

        async def slowly(*address):
            await met.wait()
            return await ensure(*address)

        peers.ensure = slowly
        streams = [Stream(fleet, prompt_of(seed, 1)) for seed in (1, 2)]
        for seed, stream in zip((1, 2), streams, strict=True):
            stream.revise(prompt_of(seed, 41)[1:])
        for stream in streams:
            await stream.computed()
        for seed, stream in zip((5, 6), streams, strict=True):
            stream.revise(prompt_of(seed, 41), keep=0)
        await asyncio.sleep(0.1)
        met.set()
        for stream in streams:
            stream.revise((5,), is_closed=True)
            assert await stream.answer() == await one_shot(fleet, stream.prompt)
        await fleet.at_rest()


async def test_a_closed_context_waits_for_a_decode_worker_without_blocks_of_the_prefill_worker(
    tmp_path, roles, prompt_of
):
    async with open_fleet(tmp_path, roles("p0 d0"), num_blocks=24) as fleet:
        held = fleet.hold_at("d0 Sampled", 3)
        first = asyncio.ensure_future(one_shot(fleet, prompt_of(3, 60), max_tokens=20))
        await held.wait()
        await fleet.until(lambda: not fleet.workers["p0"].engine.stats().leased_blocks, "not handed over")
        stream = Stream(fleet, prompt_of(1, 50))
        await stream.computed()
        stream.revise((5,), is_closed=True)
        await asyncio.sleep(0.1)
        second = asyncio.ensure_future(one_shot(fleet, prompt_of(4, 70)))
        await asyncio.sleep(0.1)
        fleet.workers["d0"].runner.gate.set()
        async with asyncio.timeout(10.0):
            answers = await asyncio.gather(first, second, stream.answer())
        assert answers[2] == await one_shot(fleet, stream.prompt)
        await fleet.at_rest()


@pytest.mark.parametrize("workers", ["h0", "p0 d0"])
async def test_a_context_that_was_opened_on_a_full_worker_is_answered(tmp_path, roles, prompt_of, workers):
    async with open_fleet(tmp_path, roles(workers), num_blocks=24) as fleet:
        name = workers.split()[-1]
        held = fleet.hold_at(f"{name} Sampled", 3)
        first = asyncio.ensure_future(one_shot(fleet, prompt_of(3, 60), max_tokens=30))
        await held.wait()
        stream = Stream(fleet, prompt_of(1, 50))
        await asyncio.sleep(1.3)  # Longer than a stream may be silent before it has stalled.
        fleet.workers[name].runner.gate.set()
        await first
        stream.revise((5,), is_closed=True)
        assert await stream.answer() == await one_shot(fleet, stream.prompt)
        await fleet.at_rest()


async def test_an_update_while_blocks_are_fetched_counts_what_it_keeps_as_reused(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("p0 d0")) as fleet:
        await one_shot(fleet, prompt_of(1, 40))
        blocks, fetched = fleet.workers["p0"].prefill.blocks, asyncio.Event()
        fetch = blocks.fetch

        async def slowly(sequence):
            present = await fetch(sequence)
            await fetched.wait()
            return present

        blocks.fetch = slowly
        stream = Stream(fleet, prompt_of(1, 40))
        await asyncio.sleep(0.1)
        stream.revise(prompt_of(2, 6), keep=0, is_closed=True)
        await asyncio.sleep(0.05)
        fetched.set()
        answer = await stream.answer()
        blocks.fetch = fetch
        assert answer == await one_shot(fleet, stream.prompt)
        await fleet.at_rest()


async def test_a_context_leaves_no_charge_no_suspicion_and_no_task(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("p0 d0")) as fleet:
        suspected = []
        fleet.parts.table.suspect = suspected.append
        for seed in range(5):
            stream = Stream(fleet, prompt_of(seed, 20))
            stream.pause_s = 0.02
            await stream.computed()
            stream.revise((5,), is_closed=True)
            await stream.answer()
        late = fleet.context(fleet.spec(prompt_of(1, 20), timeout_s=0.0))
        with pytest.raises(DeadlineExceeded):
            await anext(late.events())
        await fleet.at_rest()
        assert suspected == []
        assert not any(member.reserved for member in fleet.table.members.values())
        pollers = [task for task in asyncio.all_tasks() if "consume_request" in task.get_coro().__qualname__]
        await fleet.until(lambda: all(task.done() for task in pollers), "somebody waits for requests")


@pytest.mark.parametrize(
    "revisions",
    [[(21, (), False)], [(0, (), True)], [(20, (), True), (20, (5,), False)]],
    ids=["keeps too much", "closed empty", "after the close"],
)
async def test_a_revision_that_makes_no_sense_is_refused_and_changes_nothing(tmp_path, roles, prompt_of, revisions):
    async with open_fleet(tmp_path, roles("p0 d0")) as fleet:
        stream = Stream(fleet, prompt_of(1, 20))
        *good, (keep, tokens, is_closed) = revisions
        for kept, added, closes in good:
            stream.revise(added, kept, is_closed=closes)
        with pytest.raises(InvalidRequest):
            stream.run.revise(keep, tokens, is_closed=is_closed)
        if not good:
            stream.revise(is_closed=True)
        assert await stream.answer() == await one_shot(fleet, prompt_of(1, 20))
        await fleet.at_rest()


class Script:
    """Streams that are fed, starved and robbed of their workers in random order."""

    def __init__(self, fleet, prompt_of, seed):
        self.fleet, self.prompt_of, self.random = fleet, prompt_of, random.Random(seed)
        self.streams = [Stream(fleet, max_tokens=4) for _ in range(4)]
        self.killed = []

    def piece(self):
        return self.prompt_of(self.random.choice([1, 2, 3]), self.random.randint(0, 20))

    async def run(self, num_operations):
        for _ in range(num_operations):
            await self._do(self.random.choice(["append", "append", "update", "wait", "wait", "kill"]))
        for stream in self.streams:
            stream.revise(() if stream.prompt and self.random.random() < 0.5 else (5,), is_closed=True)
            await asyncio.sleep(self.random.random() / 50)

    async def _do(self, operation):
        stream = self.random.choice(self.streams)
        match operation:
            case "append" if len(stream.prompt) < 60:
                stream.revise(self.piece())
            case "update":
                stream.revise(self.piece(), keep=self.random.randint(0, len(stream.prompt)))
            case "wait":
                await asyncio.sleep(self.random.random() / 20)
            case "kill" if self.random.random() < 0.2:
                name = self.random.choice(list(self.fleet.workers))
                await self.fleet.workers[name].kill()
                await self.fleet.revive(name)


@pytest.mark.parametrize("workers", ["p0 p1 d0 d1", "h0 h1", "p0 d0"])
@pytest.mark.parametrize("seed", range(4))
async def test_any_script_has_the_answers_of_its_final_prompts(tmp_path, roles, prompt_of, workers, seed):
    async with open_fleet(tmp_path, roles(workers), num_blocks=40) as fleet:
        script = Script(fleet, prompt_of, seed)
        await script.run(40)
        for stream in script.streams:
            found = await stream.answer()
            assert found == await one_shot(fleet, stream.prompt, max_tokens=4)
        await fleet.at_rest()
