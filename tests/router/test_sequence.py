"""A sequence through real servicers, engines and gRPC: the same tokens whatever happens to its workers."""

import asyncio
import dataclasses
from contextlib import aclosing

import grpc
import pytest

from headrace.decode.service import DecodeServicer
from headrace.errors import Cancelled, DeadlineExceeded, InvalidRequest, NotReady, PeerFailed
from headrace.router import sequence
from headrace.testing.fleet import open_fleet

SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
GREEDY = {"temperature": 0.0}


def ids(tokens):
    return [token.token_id for token in tokens]


async def expected(folder, roles, prompts, **sampling):
    """Return what one hybrid worker answers, one prompt after the other."""
    async with open_fleet(folder, roles("h0")) as fleet:
        return [ids(await fleet.tokens(fleet.spec(prompt, **sampling))) for prompt in prompts]


def check(tokens, answer):
    assert ids(tokens) == answer
    assert [token.cursor for token in tokens] == list(range(len(answer)))
    assert [token.finish is not None for token in tokens] == [False] * (len(answer) - 1) + [True]


@pytest.mark.parametrize("workers", ["h0", "p0 d0", "p0 p1 d0 d1", "h0 d0"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "seeded"])
async def test_every_mode_gives_the_tokens_of_one_worker(tmp_path, roles, prompt_of, workers, sampling):
    prompts = [prompt_of(seed, 1 + 5 * seed) for seed in range(8)] + [prompt_of(3, 9), prompt_of(7, 36)]
    answers = await expected(tmp_path, roles, prompts, max_tokens=9, **sampling)
    async with open_fleet(tmp_path, roles(workers), num_blocks=96) as fleet:
        specs = [fleet.spec(prompt, max_tokens=9, **sampling) for prompt in prompts]
        opens, computing = [], {f"{name} Open" for name in fleet.workers if name[0] in "hp"}
        fleet.on_tick = lambda tick: opens.append(tick) if tick in computing else None
        for worker in fleet.workers.values():
            worker.runner.gate.clear()
        asking = asyncio.gather(*map(fleet.tokens, specs))
        # The last two may wait for blocks that they can share.
        await fleet.until(lambda: len(opens) >= len(specs) - 2, "the prompts were not opened")
        for worker in fleet.workers.values():
            worker.runner.gate.set()
        for tokens, answer in zip(await asking, answers, strict=True):
            check(tokens, answer)
        await fleet.at_rest()
        assert max(len(batch.items) for worker in fleet.workers.values() for batch in worker.runner.batches) > 1


async def test_the_index_is_asked_for_blocks_of_the_sequences_own_key(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("h0"), kvstore=True) as fleet:
        asked, look_up = [], fleet.parts.prefixes.look_up

        def noting(hashes, *others):
            asked.append(tuple(hashes))
            return look_up(hashes, *others)

        fleet.parts.prefixes.look_up = noting
        await fleet.tokens(dataclasses.replace(fleet.spec(prompt_of(1, 18)), cache_key=b"a"))
        assert asked == [fleet.workers["h0"].blocks.hashes(prompt_of(1, 18), b"a")]


async def test_workers_offer_the_store_blocks_of_the_sequences_own_key(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("p0 d0"), kvstore=True) as fleet:
        offered = []
        for worker in fleet.workers.values():
            worker.blocks.store_later = lambda _, hashes: offered.append(hashes)
        spec = dataclasses.replace(fleet.spec(prompt_of(1, 18), max_tokens=6), cache_key=b"a")
        known = (*spec.prompt, *ids(await fleet.tokens(spec)))
        named = fleet.workers["d0"].blocks.hashes(known, b"a")
        assert sorted(offered, key=len) == [named[:4], named]


async def test_more_sequences_than_blocks_wait_for_each_other(tmp_path, roles, prompt_of):
    prompts = [prompt_of(seed, 30) for seed in range(10)]
    answers = await expected(tmp_path, roles, prompts, max_tokens=20)
    async with open_fleet(tmp_path, roles("p0 d0"), num_blocks=24) as fleet:
        specs = [fleet.spec(prompt, max_tokens=20) for prompt in prompts]
        for tokens, answer in zip(await asyncio.gather(*map(fleet.tokens, specs)), answers, strict=True):
            check(tokens, answer)
        await fleet.at_rest()


@pytest.mark.parametrize(("workers", "victim"), [("p0 d0 d1", "d"), ("h0 h1", "h"), ("p0 d0", "d")])
@pytest.mark.parametrize("num_tokens", [1, 2, 7])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "seeded"])
async def test_a_decode_worker_that_dies_costs_no_token(
    tmp_path, roles, prompt_of, workers, victim, num_tokens, sampling
):
    [answer] = await expected(tmp_path, roles, [prompt_of(1, 22)], max_tokens=12, **sampling)
    async with open_fleet(tmp_path, roles(workers)) as fleet:
        looks = []

        def look(tick):
            for each in looks:
                each(tick)

        held = []
        for name in [name for name in fleet.workers if name.startswith(victim)]:
            held.append((name, fleet.hold_at(f"{name} Sampled", num_tokens)))
            looks.append(fleet.on_tick)
        fleet.on_tick = look
        asking = asyncio.ensure_future(fleet.tokens(fleet.spec(prompt_of(1, 22), max_tokens=12, **sampling)))
        await fleet.until(lambda: any(event.is_set() for _, event in held), "nobody generates")
        [name] = [name for name, event in held if event.is_set()]
        fleet.on_tick = lambda _: None
        await fleet.workers.pop(name).kill()
        check(await asking, answer)
        await fleet.at_rest()


class Writing:
    """A sequence of 40 tokens that p0 has begun to write into d0, and goes on writing once its gate is open."""

    def __init__(self, fleet, prompt):
        self.fleet, self.ticks = fleet, []
        self.prefill, self.decode = fleet.workers["p0"], fleet.workers["d0"]
        fleet.table.reserve("p1", "other", 10_000)  # So that p0 is chosen first.
        fleet.table._note = lambda member, load: None
        self._held = fleet.hold_at("p0 Progress", 2)
        look = fleet.on_tick
        fleet.on_tick = lambda tick: (self.ticks.append(tick), look(tick))
        self.asking = asyncio.ensure_future(fleet.tokens(fleet.spec(prompt)))

    async def begun(self):
        await self._held.wait()
        await self.fleet.until(lambda: self.decode.reservations.num_writers(), "p0 never wrote")

    async def part_router_from_prefill(self):
        """Let the router's connection to p0 end, and p0 hear nothing of it."""
        self.prefill.lane.stall()
        await self.fleet.channels.drop(self.prefill.lane.address)


async def test_a_prefill_worker_that_dies_while_it_writes_is_succeeded_in_other_blocks(tmp_path, roles, prompt_of):
    [answer] = await expected(tmp_path, roles, [prompt_of(1, 40)])
    async with open_fleet(tmp_path, roles("p0 p1 d0")) as fleet:
        writing = Writing(fleet, prompt_of(1, 40))
        await writing.begun()
        await fleet.workers.pop("p0").kill()
        check(await writing.asking, answer)
        assert writing.ticks.count("d0 Open") == 2
        assert writing.ticks.count("d0 HoldWriter") == 2
        await fleet.at_rest()


async def test_a_prefill_worker_that_dies_before_it_writes_is_succeeded_in_the_same_reservation(
    tmp_path, roles, prompt_of
):
    [answer] = await expected(tmp_path, roles, [prompt_of(1, 40)])
    async with open_fleet(tmp_path, roles("p0 p1 d0")) as fleet:
        ticks, usable = [], fleet.table.usable()
        fleet.table.reserve("p1", "other", 10_000)
        fleet.table._note = lambda member, load: None
        fleet.table.usable = lambda: usable
        await fleet.workers.pop("p0").kill()
        fleet.on_tick = ticks.append
        fleet.table.release = lambda name, sequence_id: None
        fleet.table.reserve("p1", "other", 10_000)
        check(await fleet.tokens(fleet.spec(prompt_of(1, 40))), answer)
        assert ticks.count("d0 Open") == 1
        assert ticks.count("d0 HoldWriter") == 1
        await fleet.at_rest()


async def test_late_data_of_a_prefill_worker_that_only_seemed_dead_reach_nobody(tmp_path, roles, prompt_of):
    """The router's connection to it is gone, it lives and writes on: PAINS P4."""
    answers = await expected(tmp_path, roles, [prompt_of(1, 40), prompt_of(2, 60)])
    async with open_fleet(tmp_path, roles("p0 p1 d0"), num_blocks=24) as fleet:
        writing = Writing(fleet, prompt_of(1, 40))
        await writing.begun()
        await writing.part_router_from_prefill()
        check(await writing.asking, answers[0])
        other = asyncio.ensure_future(fleet.tokens(fleet.spec(prompt_of(2, 60))))
        await fleet.until(lambda: writing.ticks.count("d0 Open") == 3, "never asked")
        num_ticks = len(writing.ticks)
        writing.prefill.runner.gate.set()
        check(await other, answers[1])
        ticks = writing.ticks[num_ticks:]
        assert "p0 written" in ticks, "p0 has written nothing late"
        assert "p0 written" not in ticks[ticks.index("d0 Admitted") :], "it got blocks that p0 still wrote into"
        writing.prefill.lane.resume()
        await fleet.at_rest()


async def test_blocks_of_a_prefill_worker_that_dies_out_of_reach_come_back(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("p0 p1 d0")) as fleet:
        writing = Writing(fleet, prompt_of(1, 40))
        await writing.begun()
        await writing.part_router_from_prefill()
        await writing.asking
        assert "leased=1" in writing.decode.left()
        await fleet.workers.pop("p0").kill()
        await fleet.at_rest()


@pytest.mark.parametrize("is_reborn", [False, True], ids=["refused", "reborn"])
async def test_blocks_of_a_prefill_worker_killed_after_its_client_left_come_back_at_once(
    tmp_path, roles, prompt_of, is_reborn
):
    """Nobody calls it any more, so the decode worker must find out by itself, and not by the request's deadline."""
    async with open_fleet(tmp_path, roles("p0 p1 d0")) as fleet:
        writing = Writing(fleet, prompt_of(1, 40))
        await writing.begun()
        writing.prefill.lane.stall()
        writing.asking.cancel()
        await asyncio.wait([writing.asking])
        await fleet.until(lambda: not writing.decode.server.num_running, "the stream goes on")
        assert "writers=1" in writing.decode.left()
        await writing.prefill.kill()
        if is_reborn:
            await fleet.revive("p0")
        await fleet.at_rest("d0")


async def test_the_decode_worker_computes_the_prompt_when_no_prefill_worker_is_left(tmp_path, roles, prompt_of):
    [answer] = await expected(tmp_path, roles, [prompt_of(1, 40)])
    async with open_fleet(tmp_path, roles("p0 d0")) as fleet:
        held = fleet.hold_at("p0 Progress", 2)
        asking = asyncio.ensure_future(fleet.tokens(fleet.spec(prompt_of(1, 40))))
        await held.wait()
        await fleet.workers.pop("p0").kill()
        check(await asking, answer)
        await fleet.at_rest()


async def test_a_failed_prefill_does_not_put_its_decode_worker_under_suspicion(tmp_path, roles, prompt_of):
    """The router cancels the decode call itself then; that must not look like the death of its worker."""
    async with open_fleet(tmp_path, roles("p0 d0")) as fleet:
        suspected = []
        suspect = fleet.table.suspect
        fleet.table.suspect = lambda name: (suspected.append(name), suspect(name))
        held = fleet.hold_at("p0 Progress", 1)
        asking = asyncio.ensure_future(fleet.tokens(fleet.spec(prompt_of(1, 40))))
        await held.wait()
        await fleet.workers.pop("p0").kill()
        await asking
        assert suspected == ["p0"]


async def test_the_error_of_a_failed_prefill_is_the_error_of_the_sequence(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("p0 d0")) as fleet:
        fleet.workers["p0"].runner.failure = ValueError("a bug in the model")
        with pytest.raises(Exception, match="the engine failed on this step") as caught:
            await fleet.tokens(fleet.spec(prompt_of(1, 20)))
        assert (caught.value.code, caught.value.worker) == ("internal", "p0")
        await fleet.at_rest()
        assert len(await fleet.tokens(fleet.spec(prompt_of(1, 20)))) == 8


async def test_a_dead_decode_worker_is_not_blamed_on_the_prefill_worker(tmp_path, roles, prompt_of):
    [answer] = await expected(tmp_path, roles, [prompt_of(1, 40)])
    async with open_fleet(tmp_path, roles("p0 d0 d1")) as fleet:
        suspected = []
        suspect = fleet.table.suspect
        fleet.table.suspect = lambda name: (suspected.append(name), suspect(name))
        held = fleet.hold_at("p0 Progress", 2)
        asking = asyncio.ensure_future(fleet.tokens(fleet.spec(prompt_of(1, 40))))
        await held.wait()
        [victim] = [name for name in ("d0", "d1") if fleet.workers[name].engine.stats().leased_blocks]
        await fleet.workers.pop(victim).kill()
        fleet.workers["p0"].runner.gate.set()
        check(await asking, answer)
        assert "p0" not in suspected
        await fleet.at_rest()


async def test_a_prefill_worker_that_cannot_reach_the_decode_worker_is_not_dead(tmp_path, roles, prompt_of):
    """The error names the decode worker; taking it for the prefill worker's end would cost a healthy one."""
    [answer] = await expected(tmp_path, roles, [prompt_of(1, 22)])
    async with open_fleet(tmp_path, roles("p0 d0")) as fleet:
        suspected = []
        fleet.table.suspect = suspected.append

        async def ensure(address, epoch=None):
            raise PeerFailed("a partition", worker=address)

        fleet.workers["p0"].peers.ensure = ensure
        check(await fleet.tokens(fleet.spec(prompt_of(1, 22))), answer)
        assert suspected == []
        await fleet.at_rest()


async def test_tokens_that_a_second_worker_repeats_are_dropped(tmp_path, roles, prompt_of, monkeypatch):
    [answer] = await expected(tmp_path, roles, [prompt_of(1, 22)])
    forgetful = sequence.spec_to_proto
    monkeypatch.setattr(sequence, "spec_to_proto", lambda spec: forgetful(dataclasses.replace(spec, output=())))
    async with open_fleet(tmp_path, roles("h0 h1")) as fleet:
        fleet.table.reserve("h1", "other", 10_000)
        fleet.table._note = lambda member, load: None
        run, found = fleet.run(fleet.spec(prompt_of(1, 22))), []
        fleet.hold_at("h0 Sampled", 3)
        async with aclosing(run.batches()) as batches:
            async for batch in batches:
                found.extend(batch.tokens)
                if len(found) == 3 and "h0" in fleet.workers:
                    await fleet.workers.pop("h0").kill()
        check(found, answer)


async def test_a_call_that_its_worker_cancelled_goes_on_elsewhere(tmp_path, roles, prompt_of, monkeypatch):
    """Nobody here has cancelled it; the client must not be told that it did."""
    decode, calls = DecodeServicer.Decode, []

    async def cancel_first(self, request, context):
        calls.append(request)
        if len(calls) == 1:
            await context.abort(grpc.StatusCode.CANCELLED, "leaving")
        async for response in decode(self, request, context):
            yield response

    [answer] = await expected(tmp_path, roles, [prompt_of(1, 22)])
    monkeypatch.setattr(DecodeServicer, "Decode", cancel_first)
    async with open_fleet(tmp_path, roles("h0 h1")) as fleet:
        check(await fleet.tokens(fleet.spec(prompt_of(1, 22))), answer)
        assert len(calls) == 2


async def test_a_transfer_that_does_not_move_sends_the_sequence_elsewhere(tmp_path, roles, prompt_of):
    """The request has time left: the end of the transport's patience is not the request's deadline."""
    [answer] = await expected(tmp_path, roles, [prompt_of(1, 40)])
    async with open_fleet(tmp_path, roles("p0 d0"), transfer_deadline_s=0.05) as fleet:
        stalled = fleet.workers["d0"].epoch
        fleet.fabric.stall(stalled)
        check(await fleet.tokens(fleet.spec(prompt_of(1, 40))), answer)
        assert fleet.workers["d0"].reservations.num_writers(), "late data may still land in d0"
        assert "leased" in fleet.workers["d0"].left()
        fleet.fabric.resume(stalled)
        await fleet.at_rest()


async def test_a_worker_that_gives_its_calls_up_to_leave_hands_its_sequences_over(tmp_path, roles, prompt_of):
    [answer] = await expected(tmp_path, roles, [prompt_of(1, 22)], max_tokens=12)
    for workers, victim, what in (("h0 h1", "h", "Sampled"), ("p0 p1 d0", "p", "Progress")):
        async with open_fleet(tmp_path, roles(workers)) as fleet:
            names = [name for name in fleet.workers if name.startswith(victim)]
            fleet.table.reserve(names[1], "other", 10_000)
            fleet.table._note = lambda member, load: None
            held = fleet.hold_at(f"{names[0]} {what}", 2)
            asking = asyncio.ensure_future(fleet.tokens(fleet.spec(prompt_of(1, 22), max_tokens=12)))
            await held.wait()
            leaving = fleet.workers[names[0]]
            assert await leaving.server.drain(0.01) == 1
            leaving.runner.gate.set()
            await leaving.server.stop()
            check(await asking, answer)
            await fleet.at_rest()


async def test_new_work_that_a_leaving_worker_refuses_goes_elsewhere(tmp_path, roles, prompt_of):
    [answer] = await expected(tmp_path, roles, [prompt_of(1, 22)])
    async with open_fleet(tmp_path, roles("p0 p1 d0 d1")) as fleet:
        await fleet.workers["p0"].server.drain(0.01)
        await fleet.workers["d0"].server.drain(0.01)
        for _ in range(4):
            check(await fleet.tokens(fleet.spec(prompt_of(1, 22))), answer)
        await fleet.at_rest()


@pytest.mark.parametrize(
    ("workers", "what"),
    [("p0 d0", "p0 Progress"), ("p0 d0", "d0 Sampled"), ("h0", "h0 Progress"), ("h0", "h0 Sampled")],
)
async def test_the_deadline_ends_a_sequence_at_every_stage(tmp_path, roles, prompt_of, workers, what):
    async with open_fleet(tmp_path, roles(workers)) as fleet:
        held = fleet.hold_at(what, 1)
        with pytest.raises(DeadlineExceeded):
            await fleet.tokens(fleet.spec(prompt_of(1, 40), timeout_s=0.3, max_tokens=50))
        assert held.is_set()
        for worker in fleet.workers.values():
            worker.runner.gate.set()
        await fleet.at_rest()


@pytest.mark.parametrize("workers", ["p0 d0", "h0"])
async def test_the_deadline_ends_a_sequence_that_waits_for_blocks(tmp_path, roles, prompt_of, workers):
    async with open_fleet(tmp_path, roles(workers), num_blocks=16) as fleet:
        name = workers.split()[-1]
        held = fleet.hold_at(f"{name} Sampled", 1)
        long = asyncio.ensure_future(fleet.tokens(fleet.spec(prompt_of(1, 50), max_tokens=4)))
        await held.wait()
        with pytest.raises(DeadlineExceeded):
            await fleet.tokens(fleet.spec(prompt_of(2, 50), timeout_s=0.3))
        fleet.workers[name].runner.gate.set()
        assert len(await long) == 4
        await fleet.at_rest()


async def test_a_deadline_that_has_passed_reaches_no_worker(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("h0")) as fleet:
        ticks = []
        fleet.on_tick = ticks.append
        with pytest.raises(DeadlineExceeded):
            await fleet.tokens(fleet.spec(prompt_of(1, 4), timeout_s=-1.0))
        assert ticks == []


async def test_what_the_client_did_wrong_is_not_tried_elsewhere(tmp_path, roles):
    async with open_fleet(tmp_path, roles("h0 h1")) as fleet:
        ticks = []
        fleet.on_tick = ticks.append
        with pytest.raises(InvalidRequest):
            await fleet.tokens(fleet.spec([10**6]))
        assert [tick for tick in ticks if tick.endswith("Open")] == [ticks[0]]


async def test_a_cluster_without_workers_is_not_ready(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("h0")) as fleet:
        await fleet.workers.pop("h0").kill()
        with pytest.raises((NotReady, PeerFailed)) as caught:
            await fleet.tokens(fleet.spec(prompt_of(1, 4)))
        assert not isinstance(caught.value, Cancelled)


async def test_a_reborn_worker_serves_again(tmp_path, roles, prompt_of):
    [answer] = await expected(tmp_path, roles, [prompt_of(1, 22)])
    async with open_fleet(tmp_path, roles("p0 d0")) as fleet:
        for name in ("d0", "p0"):
            check(await fleet.tokens(fleet.spec(prompt_of(1, 22))), answer)
            await fleet.workers[name].kill()
            await fleet.until(lambda: len(fleet.table.usable()) == 1, "not noticed")
            await fleet.revive(name)
            await fleet.until(lambda: len(fleet.table.usable()) == 2, "not met again")
            ticks = []
            fleet.on_tick = ticks.append
            tokens = await fleet.tokens(fleet.spec(prompt_of(1, 22)))
            check(tokens, answer)
            await fleet.at_rest()
            assert "d0 HoldWriter" in ticks
