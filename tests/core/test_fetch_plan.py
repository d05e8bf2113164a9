"""A plan fetches what is faster to fetch, from whoever has it, and loses little when a source turns out to be slow."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.bandwidth import EXPECTED, LaneMeter, LaneSpeed
from headrace.core.cost import CostModel
from headrace.core.fetch_plan import FetchTotals, Part, Prompt, Source, plan_fetch, regret_s
from headrace.core.placement import Tier

CPU = CostModel(step_s=12e-3, prompt_s=15e-3, token_s=1e-3, pair_s=4e-7, decode_s=2e-3, context_s=2e-6)
FAST = LaneSpeed(latency_s=2e-3, byte_s=0.2e-9)
SLOW = LaneSpeed(latency_s=2e-3, byte_s=500e-9)
PROMPT = Prompt(num_tokens=1601, num_local=0, block_tokens=16, block_bytes=1 << 16, remaining_s=30.0)


def source(name="kv-0", held=((0, 100),), speed=FAST, tier=Tier.DRAM):
    return Source(name=name, tier=tier, held=held, speed=speed)


def ranges(plan):
    return [(part.name, part.start, part.end) for part in plan.parts]


def loads_s(plan, sources, block_bytes):
    """Return when each source is done, counted anew from the parts."""
    return [
        one.speed.seconds(
            block_bytes
            * sum(part.end - part.start for part in plan.parts if (part.name, part.tier) == (one.name, one.tier))
        )
        for one in sources
    ]


models = st.builds(
    CostModel,
    step_s=st.floats(0, 0.03),
    prompt_s=st.floats(0, 0.03),
    token_s=st.floats(1e-6, 1e-3),
    pair_s=st.floats(0, 1e-6),
    decode_s=st.just(0.0),
    context_s=st.just(0.0),
)
speeds = st.builds(LaneSpeed, latency_s=st.floats(1e-4, 0.1), byte_s=st.floats(1e-11, 1e-6))
prompts = st.builds(
    Prompt,
    num_tokens=st.integers(1, 1000),
    num_local=st.integers(0, 20),
    block_tokens=st.sampled_from([8, 16]),
    block_bytes=st.sampled_from([4096, 1 << 16]),
    remaining_s=st.floats(0.01, 60),
    waiting_tokens=st.sampled_from([0, 0, 500]),
    chunk_tokens=st.sampled_from([None, 128]),
).map(lambda prompt: replace(prompt, num_local=min(prompt.num_local, prompt.num_usable)))


@st.composite
def several(draw, most=4, last=70):
    held = st.lists(
        st.tuples(st.integers(0, last), st.integers(0, last)).map(lambda pair: tuple(sorted(pair))), max_size=4
    )
    return [
        Source(name=f"kv-{index}", tier=draw(st.sampled_from(Tier)), held=tuple(draw(held)), speed=draw(speeds))
        for index in range(draw(st.integers(0, most)))
    ]


def test_a_fast_source_delivers_all_that_it_holds():
    plan = plan_fetch(PROMPT, CPU, [source(held=((0, 40),))])
    assert plan.parts == (Part(name="kv-0", tier=Tier.DRAM, start=0, end=40),)
    assert plan.predicted_fetch_s == pytest.approx(FAST.seconds(40 << 16))
    assert plan.predicted_recompute_s == pytest.approx(CPU.prefill(1601) - CPU.prefill(1601 - 640, 640))
    assert plan.predicted_end_s == pytest.approx(plan.predicted_fetch_s + CPU.prefill(1601 - 640, 640))
    assert plan.num_declined == 0


def test_what_is_fetched_slower_than_computed_is_computed():
    plan = plan_fetch(PROMPT, CPU, [source(speed=SLOW)])
    assert plan.parts == ()
    assert plan.num_declined == 100
    assert plan.predicted_end_s == pytest.approx(CPU.prefill(1601))


def test_only_what_lies_behind_the_local_hit_is_fetched():
    plan = plan_fetch(replace(PROMPT, num_local=30), CPU, [source()])
    assert ranges(plan) == [("kv-0", 30, 100)]


def test_the_block_of_the_last_token_is_computed():
    assert plan_fetch(replace(PROMPT, num_tokens=1600), CPU, [source()]).parts[-1].end == 99


def test_nothing_behind_a_gap_is_fetched():
    plan = plan_fetch(PROMPT, CPU, [source(held=((0, 10), (11, 100)))])
    assert ranges(plan) == [("kv-0", 0, 10)]


def test_a_source_fills_the_gap_of_another():
    sources = [source("kv-0", ((0, 10), (20, 100))), source("kv-1", ((10, 20),))]
    assert ranges(plan_fetch(PROMPT, CPU, sources)) == [("kv-0", 0, 10), ("kv-1", 10, 20), ("kv-0", 20, 100)]


def test_equal_sources_share_the_work():
    sources = [source("kv-0", speed=LaneSpeed(latency_s=1e-3, byte_s=5e-9)) for _ in range(2)]
    sources[1] = replace(sources[1], name="kv-1")
    plan = plan_fetch(PROMPT, CPU, sources)
    assert loads_s(plan, sources, 1 << 16) == pytest.approx([plan.predicted_fetch_s] * 2, rel=0.05)


def test_the_only_holder_of_the_rest_is_not_kept_busy_with_what_others_hold():
    lane = LaneSpeed(latency_s=1e-3, byte_s=5e-9)
    sources = [source("peer", ((0, 50),), lane, Tier.DEVICE), source("kv-0", ((0, 100),), lane)]
    plan = plan_fetch(PROMPT, CPU, sources)
    assert ranges(plan) == [("peer", 0, 50), ("kv-0", 50, 100)]


def test_a_fetch_that_ends_before_the_engine_comes_to_it_is_free():
    assert plan_fetch(PROMPT, CPU, [source(speed=SLOW)]).parts == ()
    waiting = replace(PROMPT, waiting_tokens=10_000)
    assert plan_fetch(waiting, CPU, [source(speed=SLOW)]).num_blocks == 100


@pytest.mark.parametrize("cost", [None, replace(CPU, r2=0.5)])
def test_without_a_sound_model_all_is_fetched(cost):
    plan = plan_fetch(PROMPT, cost, [source(speed=SLOW)])
    assert plan.num_blocks == 100
    assert plan.predicted_recompute_s is None
    assert plan.patience_s == plan.lost_after_s(0, 0.0, is_layered=True) == PROMPT.remaining_s
    assert regret_s(plan, 1e6) == 0.0


def test_a_fetch_ends_before_the_deadline():
    lane = LaneSpeed(latency_s=1e-3, byte_s=5e-9)
    remaining_s = lane.seconds(50 << 16)
    plan = plan_fetch(replace(PROMPT, remaining_s=remaining_s), CPU, [source(speed=lane)])
    assert 40 <= plan.num_blocks <= 50
    assert plan.predicted_fetch_s <= remaining_s


def test_a_read_takes_sixteen_mebibytes_but_at_least_one_block():
    assert plan_fetch(PROMPT, CPU, [source()]).group_blocks == 256
    assert plan_fetch(replace(PROMPT, block_bytes=1 << 30), CPU, [source()]).group_blocks == 1


@given(prompts, models, several())
def test_parts_have_no_gaps_and_lie_where_their_source_has_blocks(prompt, cost, sources):
    place = prompt.num_local
    for part in plan_fetch(prompt, cost, sources).parts:
        assert part.start == place < part.end <= prompt.num_usable
        (holder,) = (one for one in sources if (one.name, one.tier) == (part.name, part.tier))
        assert set(range(part.start, part.end)) <= {block for start, end in holder.held for block in range(start, end)}
        place = part.end


@given(prompts, models, several())
def test_a_plan_keeps_what_it_promises_by_the_model(prompt, cost, sources):
    plan = plan_fetch(prompt, cost, sources)
    assert plan.predicted_fetch_s == pytest.approx(max(loads_s(plan, sources, prompt.block_bytes), default=0.0))
    assert plan.predicted_fetch_s <= prompt.remaining_s
    assert end_s(prompt, cost, plan.num_blocks, plan.predicted_fetch_s) == pytest.approx(plan.predicted_end_s)


@given(prompts, models, several())
def test_a_plan_never_ends_later_than_computing_all_or_fetching_all_from_one(prompt, cost, sources):
    plan = plan_fetch(prompt, cost, sources)
    assert plan.predicted_end_s <= end_s(prompt, cost, 0, 0.0) * (1 + 1e-9)
    for one in sources:
        blocks = {block for start, end in one.held for block in range(start, end)}
        wanted = range(prompt.num_local, prompt.num_usable)
        num_blocks = next((count for count, block in enumerate(wanted) if block not in blocks), len(wanted))
        fetch_s = one.speed.seconds(num_blocks * prompt.block_bytes)
        if fetch_s <= prompt.remaining_s:
            assert plan.predicted_end_s <= end_s(prompt, cost, num_blocks, fetch_s) * (1 + 1e-9)


@given(prompts, models, speeds, st.integers(0, 70), st.integers(0, 70))
def test_a_longer_hit_never_turns_a_fetch_into_a_computation(prompt, cost, speed, hit, more):
    prompt = replace(prompt, remaining_s=1e9)
    before = plan_fetch(prompt, cost, [source(held=((0, hit),), speed=speed)])
    after = plan_fetch(prompt, cost, [source(held=((0, hit + more),), speed=speed)])
    assert after.num_blocks >= before.num_blocks
    assert after.predicted_end_s <= before.predicted_end_s * (1 + 1e-9)


@given(models, speeds, st.integers(1, 60), st.integers(1, 60))
def test_a_longer_prompt_never_turns_a_fetch_into_a_computation(cost, speed, num_blocks, more):
    def num_fetched(usable):
        prompt = replace(PROMPT, num_tokens=usable * 16 + 1, remaining_s=1e9)
        return plan_fetch(prompt, cost, [source(held=((0, usable),), speed=speed)]).num_blocks

    assert num_fetched(num_blocks + more) >= num_fetched(num_blocks)


def end_s(prompt, cost, num_blocks, fetch_s):
    """Return when a prompt ends, by the model."""
    done = (prompt.num_local + num_blocks) * prompt.block_tokens
    rest_s = cost.prefill(prompt.num_tokens - done, done, chunk_tokens=prompt.chunk_tokens)
    return max(fetch_s, cost.token_s * prompt.waiting_tokens) + rest_s


def best_end_s(prompt, cost, sources):
    """Return when the prompt could end, over every cut and every choice of a source for each block."""
    best_s, options = end_s(prompt, cost, 0, 0.0), []
    for block in range(prompt.num_local, prompt.num_usable):
        options.append([place for place, one in enumerate(sources) if any(a <= block < b for a, b in one.held)])
        for chosen in product(*options):
            loads = [sources[place].speed.seconds(chosen.count(place) * prompt.block_bytes) for place in set(chosen)]
            if max(loads) <= prompt.remaining_s:
                best_s = min(best_s, end_s(prompt, cost, len(options), max(loads)))
    return best_s


small_prompts = prompts.map(lambda prompt: replace(prompt, num_local=0, num_tokens=5 * prompt.block_tokens + 1))


@settings(max_examples=60)
@given(small_prompts, models, st.lists(speeds, min_size=2, max_size=3), st.lists(st.integers(0, 3), max_size=5))
def test_where_every_block_has_one_holder_no_plan_ends_sooner(prompt, cost, lanes, owners):
    sources = [
        source(f"kv-{place}", tuple((block, block + 1) for block, owner in enumerate(owners) if owner == place), lane)
        for place, lane in enumerate(lanes)
    ]
    found_s = plan_fetch(prompt, cost, sources).predicted_end_s
    assert found_s == pytest.approx(best_end_s(prompt, cost, sources), rel=1e-9)


@settings(max_examples=60)
@given(small_prompts, models, several(most=3, last=5))
def test_where_sources_overlap_a_plan_is_close_to_the_best(prompt, cost, sources):
    best_s = best_end_s(prompt, cost, sources)
    assert best_s * (1 - 1e-9) <= plan_fetch(prompt, cost, sources).predicted_end_s <= 1.5 * best_s


def test_what_lands_pays_for_its_time():
    plan = plan_fetch(PROMPT, CPU, [source()])
    assert plan.may_go_on(0, plan.patience_s)
    assert not plan.may_go_on(0, plan.patience_s * 1.01)
    half_s = plan.predicted_recompute_s / 2
    assert plan.may_go_on(50, plan.patience_s + half_s)
    assert not plan.may_go_on(50, plan.patience_s * 1.01 + half_s)


def test_a_read_in_flight_is_given_the_same_patience_again():
    plan = plan_fetch(PROMPT, CPU, [source()])
    assert plan.lost_after_s(0, 0.0, is_layered=False) == pytest.approx(2 * plan.patience_s)
    assert plan.lost_after_s(50, 9.0, is_layered=False) == pytest.approx(
        2 * plan.patience_s + plan.predicted_recompute_s / 2
    )


@given(st.integers(100, 8192), st.integers(16, 8192), st.integers(1, 2048), st.floats(0.05, 0.9))
def test_a_lane_as_fast_as_predicted_is_not_given_up_while_layers_are_read(num_held, chunk, num_own, share):
    num_tokens = num_held // 16 * 16
    prompt = replace(PROMPT, num_tokens=num_tokens + num_own, chunk_tokens=chunk, remaining_s=1e6)
    byte_s = share * CPU.prefill(num_tokens, chunk_tokens=chunk) / (num_tokens // 16 * PROMPT.block_bytes)
    lane = LaneSpeed(latency_s=2e-3, byte_s=byte_s)
    plan = plan_fetch(prompt, CPU, [source(held=((0, num_tokens // 16),), speed=lane)])
    if plan.layered_from is not None:
        num_whole = plan.layered_from - plan.parts[0].start
        whole_s = lane.seconds(num_whole * prompt.block_bytes)
        assert plan.lost_after_s(num_whole, whole_s, is_layered=True) >= plan.predicted_fetch_s


def test_no_patience_outlasts_the_deadline():
    plan = plan_fetch(replace(PROMPT, remaining_s=0.5), CPU, [source()])
    assert plan.may_go_on(100, 0.5)
    assert not plan.may_go_on(100, 0.51)
    assert plan.lost_after_s(100, 0.4, is_layered=True) == 0.5


def test_patience_is_two_first_groups_and_a_small_share_of_the_prompt():
    plan = plan_fetch(PROMPT, CPU, [source()])
    assert plan.patience_s == pytest.approx(2 * FAST.seconds(100 << 16) + 0.03 * CPU.prefill(1601))


@pytest.mark.parametrize("num_tokens", [1601, 1700])
def test_as_many_of_the_last_blocks_are_read_by_layers_as_the_step_behind_them_hides(num_tokens):
    prompt = replace(PROMPT, num_tokens=num_tokens)
    assert plan_fetch(prompt, CPU, [source()]).layered_from == 0
    plan = plan_fetch(prompt, CPU, [source(speed=LaneSpeed(latency_s=2e-3, byte_s=20e-9))])
    step_s = CPU.prefill(num_tokens - 1600, 1600)
    assert plan.first_step_s == pytest.approx(step_s)
    hidden_s = (100 - plan.layered_from) * plan.predicted_fetch_s / 100
    assert step_s - plan.predicted_fetch_s / 100 < hidden_s <= step_s or plan.layered_from == 0


def test_a_step_hides_no_more_than_a_chunk_of_the_prompt():
    prompt = replace(PROMPT, num_tokens=2600, chunk_tokens=16)
    assert plan_fetch(prompt, CPU, [source()]).first_step_s == pytest.approx(CPU.prefill(16, 1600))


@pytest.mark.parametrize(
    "change", [{"may_layer": False}, {"num_tokens": 161}, {"waiting_tokens": 1000}], ids=["not asked", "short", "busy"]
)
def test_blocks_are_read_whole_where_layers_hide_nothing(change):
    plan = plan_fetch(replace(PROMPT, **change), CPU, [source()])
    assert plan.parts
    assert plan.layered_from is None


def test_without_a_cost_model_nobody_knows_what_a_step_hides():
    assert plan_fetch(PROMPT, None, [source()]).layered_from is None


def test_a_fetch_is_regretted_when_computing_would_have_been_faster():
    plan = plan_fetch(PROMPT, CPU, [source()])
    assert regret_s(plan, plan.predicted_recompute_s) == 0.0
    assert regret_s(plan, plan.predicted_recompute_s + 0.25) == pytest.approx(0.25)
    assert regret_s(plan, plan.predicted_recompute_s, num_landed=50) == pytest.approx(plan.predicted_recompute_s / 2)


def test_time_in_which_the_engine_was_busy_anyway_is_not_regretted():
    plan = plan_fetch(replace(PROMPT, waiting_tokens=1000), CPU, [source()])
    assert regret_s(plan, plan.predicted_recompute_s + 1000 * CPU.token_s) == pytest.approx(0.0)


def test_a_plan_that_fetches_nothing_is_never_regretted():
    assert regret_s(plan_fetch(PROMPT, CPU, []), 5.0) == 0.0


def test_totals_tell_where_blocks_came_from_and_what_was_regretted():
    totals = FetchTotals()
    sources = [source("peer", ((0, 10),), tier=Tier.DEVICE), source("kv-0", ((10, 100),), tier=Tier.DISK)]
    plan = plan_fetch(PROMPT, CPU, sources)
    totals.note(plan, 0.01, 100)
    totals.note(plan, 3.0, 30)
    totals.note(plan_fetch(PROMPT, CPU, [source(speed=SLOW)]), 0.0, 0)
    assert totals.num_fetched_blocks == {Tier.DEVICE: 20, Tier.DRAM: 0, Tier.DISK: 110}
    assert (totals.num_declined_blocks, totals.num_given_up, totals.num_regretted) == (100, 1, 1)
    assert totals.regretted_s == pytest.approx(3.0 - 0.3 * plan.predicted_recompute_s)


def fetched_s(plan, group_s, prompt):
    """Carry out a plan; return its seconds and how many blocks landed."""
    elapsed_s, landed = 0.0, 0
    while landed < plan.num_blocks:
        if not plan.may_go_on(landed, elapsed_s):
            return elapsed_s, landed
        size = min(plan.group_blocks, plan.num_blocks - landed)
        took_s = group_s(size * prompt.block_bytes, is_first=not landed)
        lost_s = plan.lost_after_s(landed, elapsed_s, is_layered=False)
        if elapsed_s + took_s > lost_s:
            # A READ that may still land: the sequence starts anew in other blocks, with nothing.
            return lost_s, 0
        elapsed_s, landed = elapsed_s + took_s, landed + size
    return elapsed_s, landed


def share_of_time(cost, lane, gap_s=5.0, num_prompts=100):
    """Return the time of prompts, one after the other, with a tier over that without, and the totals."""
    rng, meter, totals = np.random.default_rng(0), LaneMeter(EXPECTED[Tier.DRAM]), FetchTotals()
    now_s = spent_s = computed_s = 0.0
    for _ in range(num_prompts):
        prompt = replace(PROMPT, num_tokens=int(rng.integers(256, 8192)))
        plan = plan_fetch(prompt, cost, [source(held=((0, 512),), speed=meter.speed(now_s))])
        took_s, landed = 0.0, 0
        if plan.parts:
            meter.note_try(now_s)
            took_s, landed = fetched_s(plan, lane(rng, now_s), prompt)
            measured_s = took_s if landed else max(took_s, plan.predicted_recompute_s)
            asked = (landed or plan.num_blocks) * prompt.block_bytes
            meter.note(asked, measured_s, now_s + took_s, is_whole=landed > 0)
        totals.note(plan, took_s, landed)
        ends_s = took_s + end_s(prompt, cost, landed, 0.0)
        now_s, spent_s, computed_s = (
            now_s + ends_s + gap_s,
            spent_s + ends_s,
            computed_s + cost.prefill(prompt.num_tokens),
        )
    return spent_s / computed_s, totals


def steady(factor, noise=0.0):
    """Return a lane slower than expected by a factor."""

    def lane(rng, _now_s):
        def group_s(num_bytes, *, is_first):
            expected = EXPECTED[Tier.DRAM]
            seconds = expected.seconds(num_bytes) - (0.0 if is_first else expected.latency_s)
            return factor * seconds * float(rng.lognormal(0.0, noise))

        return group_s

    return lane


def changing(rng, now_s):
    """Be fast for a minute, and hang for the next."""
    return steady(1.0 if now_s % 120 < 60 else 1e9)(rng, now_s)


def hanging_at_times(rng, now_s):
    """Hang once in twenty transfers."""
    return steady(1e9 if rng.random() < 0.05 else 1.0)(rng, now_s)


GPU = CostModel(step_s=5e-3, prompt_s=1e-3, token_s=3e-5, pair_s=2e-9, decode_s=0.0, context_s=0.0)
LANES = {
    "as expected": steady(1.0),
    "slower than computing": steady(30.0, noise=0.5),
    "noisy": steady(3.0, noise=1.0),
    "slow": steady(100.0),
    "very slow": steady(1e4),
    "dead": steady(1e9),
    "changing": changing,
    "hanging at times": hanging_at_times,
}


@pytest.mark.parametrize("cost", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("lane", LANES)
def test_over_many_prompts_no_lane_makes_a_tier_slower_than_none(lane, cost):
    share, _ = share_of_time(cost, LANES[lane])
    assert share < 1.03


@pytest.mark.parametrize("cost", [CPU, GPU], ids=["cpu", "gpu"])
def test_where_prompts_are_rare_a_dead_lane_is_not_tried_by_each(cost):
    share, totals = share_of_time(cost, LANES["dead"], gap_s=61.0)
    assert share < 1.03
    assert totals.num_given_up < 12


def test_a_good_lane_saves_most_of_the_time_and_nothing_is_regretted():
    share, totals = share_of_time(CPU, LANES["as expected"])
    assert share < 0.15
    assert (totals.num_regretted, totals.num_given_up, totals.num_declined_blocks) == (0, 0, 0)


def test_a_lane_that_recovers_is_used_again():
    def recovering(rng, now_s):
        return steady(1e9 if now_s < 30 else 1.0)(rng, now_s)

    _, totals = share_of_time(CPU, recovering)
    assert totals.num_fetched_blocks[Tier.DRAM] > 5_000
