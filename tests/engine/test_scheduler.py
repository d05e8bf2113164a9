import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.block import blocks_for
from headrace.core.plan import Phase, SchedulerView, SequenceView, SwapView
from headrace.core.request import SequenceId
from headrace.engine.scheduler import FirstComeFirstServed, WholeShape, plan_step
from headrace.techniques.sarathi.shape import ChunkedShape
from headrace.techniques.stream2llm.preempt import SwapAlways

BLOCK = 4
FCFS = FirstComeFirstServed()


def running(arrival, num_tokens=9, num_computed=8, *, num_blocks=None, **fields):
    blocks = blocks_for(num_tokens, BLOCK) if num_blocks is None else num_blocks
    defaults = {"is_running": True, "num_exclusive_blocks": blocks}
    return view_of(arrival, num_tokens, num_computed, num_blocks=blocks, **{**defaults, **fields})


def waiting(arrival, num_tokens=9, **fields):
    defaults = {"is_running": False, "num_blocks": 0, "num_blocks_to_admit": blocks_for(num_tokens, BLOCK)}
    return view_of(arrival, num_tokens, 0, **{**defaults, **fields})


def view_of(arrival, num_tokens, num_computed, **fields):
    return SequenceView(
        sequence_id=SequenceId(f"s{arrival}"),
        arrival=arrival,
        num_tokens=num_tokens,
        num_computed=num_computed,
        **fields,
    )


def plan(*sequences, available=10, budget=16, max_running=8, num_done=0, shape=None, order=FCFS):
    view = SchedulerView(
        sequences=sequences,
        num_available=available,
        block_tokens=BLOCK,
        num_layers=3,
        token_budget=budget,
        max_running=max_running,
        num_done=num_done,
    )
    return plan_step(view, order, shape or ChunkedShape(), 0.0)


def test_waiting_sequences_are_admitted_by_arrival_while_blocks_last():
    found = plan(waiting(2, 8), waiting(0, 9), waiting(1, 12), available=7)
    assert found.admit == ("s0", "s1")


def test_one_that_does_not_fit_holds_back_those_behind_it():
    assert plan(waiting(0, 40), waiting(1, 4), available=5).admit == ()


def test_done_sequences_count_against_the_places():
    assert plan(running(1), waiting(2), waiting(3), max_running=3, num_done=1).admit == ("s2",)
    assert plan(waiting(2), max_running=3, num_done=3).admit == ()


def test_held_and_running_sequences_count_against_the_places():
    held = view_of(0, 9, 0, num_blocks=3, is_running=False, is_held=True)
    assert plan(held, running(1), waiting(2), waiting(3), max_running=3).admit == ("s2",)


def test_held_sequences_compute_nothing():
    held = view_of(0, 9, 4, num_blocks=3, is_running=False, is_held=True)
    assert plan(held).items == ()


HASHES = [bytes([index]) for index in range(4)]


def test_who_can_share_blocks_on_their_way_waits_for_them_and_holds_back_nobody():
    leader = running(0, 20, 4, block_hashes=HASHES, num_present_blocks=1)
    follower = waiting(1, 17, block_hashes=[*HASHES[:2], b"x", b"y"], num_present_blocks=1)
    assert plan(leader, follower, waiting(2, 4)).admit == ("s2",)
    ahead = dataclasses.replace(follower, num_present_blocks=2)
    assert plan(leader, ahead, waiting(2, 4)).admit == ("s1", "s2")


def test_of_two_that_begin_alike_the_better_ranked_is_admitted():
    alike = {"block_hashes": HASHES, "num_present_blocks": 0}
    assert plan(waiting(0, 17, **alike), waiting(1, 17, **alike)).admit == ("s0",)
    assert plan(waiting(0, 17, **alike), waiting(1, 17, **alike), order=LastComeFirstServed()).admit == ("s1",)


def test_growth_comes_before_admissions():
    grows = running(0, num_tokens=13, num_computed=12, num_blocks=3)
    assert plan(grows, waiting(1, 8), available=2).admit == ()
    assert plan(grows, waiting(1, 8), available=3).admit == ("s1",)


def test_the_latest_gives_way_when_a_block_is_missing():
    grows = running(0, num_tokens=13, num_computed=12, num_blocks=3)
    found = plan(grows, running(1), running(2), waiting(3, 1), available=0)
    assert found.evict == ("s2",)
    assert [item.sequence_id for item in found.items] == ["s0", "s1"]
    assert found.admit == ()


def test_who_shares_its_blocks_gives_back_only_its_own():
    grows = running(0, num_tokens=13, num_computed=12, num_blocks=3)
    found = plan(grows, running(1, num_exclusive_blocks=1), running(2, num_exclusive_blocks=0), available=0)
    assert found.evict == ("s2", "s1")
    assert [item.sequence_id for item in found.items] == ["s0"]


def test_a_sequence_alone_gives_way_itself():
    grows = running(0, num_tokens=13, num_computed=12, num_blocks=3)
    assert plan(grows, available=0).evict == ("s0",)


def test_who_may_not_be_evicted_waits_for_blocks_instead():
    grows = running(0, num_tokens=13, num_computed=12, num_blocks=3, can_evict=False)
    found = plan(grows, running(1, can_evict=False), available=0)
    assert found.evict == ()
    assert [item.sequence_id for item in found.items] == ["s1"]


@pytest.mark.parametrize("shape", [ChunkedShape(), WholeShape()], ids=["chunked", "whole"])
def test_decodes_that_use_up_the_budget_do_not_starve_a_prompt(shape):
    found = plan(running(0, 9, 8), running(1, 9, 8), running(2, 9, 0), budget=2, shape=shape)
    assert [item.sequence_id for item in found.items] == ["s0", "s1", "s2"]


def test_the_last_token_samples_and_decodes_are_told_apart():
    found = plan(running(0, 9, 8, is_decoding=True), running(1, 30, 8), budget=9)
    decode, chunk = found.items
    assert (decode.phase, decode.tokens, decode.sample) == (Phase.DECODE, (8, 9), True)
    assert (chunk.phase, chunk.tokens, chunk.sample) == (Phase.PREFILL, (8, 16), False)
    assert decode.layers == chunk.layers == (0, 3)


def test_whole_takes_each_prompt_in_one_piece_and_all_decodes():
    found = plan(
        running(0, 9, 8), running(1, 50, 0), running(2, 20, 0), running(3, 9, 8), budget=40, shape=WholeShape()
    )
    assert [(item.sequence_id, item.num_tokens) for item in found.items] == [("s0", 1), ("s3", 1), ("s1", 50)]


class LastComeFirstServed:
    def key(self, sequence, now_s):
        return (-float(sequence.arrival),)


def test_the_order_policy_decides_who_comes_first_and_who_gives_way():
    assert plan(waiting(0, 8), waiting(1, 8), available=2, order=LastComeFirstServed()).admit == ("s1",)
    grows = running(1, num_tokens=13, num_computed=12, num_blocks=3)
    assert plan(running(0), grows, available=0, order=LastComeFirstServed()).evict == ("s0",)


@st.composite
def views(draw):
    sequences = []
    for arrival in range(draw(st.integers(0, 8))):
        num_tokens = draw(st.integers(1, 40))
        kind = draw(st.sampled_from(["running", "held", "waiting"]))
        if kind == "waiting":
            blocks = blocks_for(num_tokens, BLOCK)
            cost = draw(st.integers(0, blocks))
            sequences.append(waiting(arrival, num_tokens, num_blocks_to_admit=cost, is_stalled=draw(st.booleans())))
            continue
        computed = draw(st.one_of(st.just(num_tokens - 1), st.integers(0, num_tokens - 1)))
        missing = draw(st.integers(0, 1)) if computed >= num_tokens - 2 else 0
        blocks = max(blocks_for(computed, BLOCK), blocks_for(num_tokens, BLOCK) - missing)
        sequence = running(
            arrival,
            num_tokens,
            computed,
            num_blocks=blocks,
            num_exclusive_blocks=draw(st.integers(0, blocks)),
            can_evict=draw(st.booleans()),
        )
        is_held, is_open = kind == "held", draw(st.booleans())
        is_extending = is_held and draw(st.booleans())
        sequence = dataclasses.replace(
            sequence,
            is_held=is_held,
            is_running=not is_held,
            is_open=is_open,
            is_extending=is_extending,
            num_blocks_to_admit=draw(st.integers(0, 5)) if is_extending else 0,
            # An open prompt may have been computed as far as it may be.
            num_computed=num_tokens if is_open and draw(st.booleans()) else computed,
            # Who has been told of its blocks keeps them, unless it waits for the rest of its prompt.
            can_evict=sequence.can_evict and (is_open or not is_held),
        )
        sequences.append(sequence)
    return SchedulerView(
        sequences=tuple(draw(st.permutations(sequences))),
        num_available=draw(st.integers(0, 12)),
        block_tokens=BLOCK,
        num_layers=3,
        token_budget=draw(st.integers(1, 24)),
        max_running=draw(st.integers(1, 8)),
        num_done=draw(st.integers(0, 3)),
        num_leaving_blocks=draw(st.integers(0, 5)),
        swap=SwapView(num_free_blocks=draw(st.integers(0, 12))),
    )


@pytest.mark.parametrize("shape", [ChunkedShape(), WholeShape()], ids=["chunked", "whole"])
@given(view=views())
def test_what_is_planned_fits_and_adds_up(shape, view):
    found = plan_step(view, FCFS, shape, 0.0, SwapAlways())
    by_id = {sequence.sequence_id: sequence for sequence in view.sequences}
    gone = [by_id[each] for each in found.evict]
    # Of held ones the blocks come later.
    available = view.num_available + sum(each.num_exclusive_blocks for each in gone if each.is_running)
    for item in found.items:
        sequence = by_id[item.sequence_id]
        assert sequence.is_running
        assert item.tokens[0] == sequence.num_computed < item.tokens[1] <= sequence.num_tokens
        assert item.sample == (item.tokens[1] == sequence.num_tokens and not sequence.is_open)
        available -= max(0, blocks_for(item.tokens[1], BLOCK) - sequence.num_blocks)
    available -= sum(by_id[each].num_blocks_to_admit for each in (*found.admit, *found.extend))
    assert available >= 0
    touched = [*(item.sequence_id for item in found.items), *found.admit, *found.extend, *found.evict]
    assert len(touched) == len(set(touched))
    assert all(each.can_evict or each.is_extending for each in gone)
    assert all(by_id[each].is_extending for each in found.extend)
    # Who needs more blocks does not keep those that it has while it waits, unless they are about to come.
    stuck = {each.sequence_id for each in view.sequences if each.is_extending} - {*found.extend, *found.evict}
    comes = view.num_leaving_blocks or any(each.is_held for each in gone)
    assert not stuck or comes or any(each.is_running for each in gone)
    assert not any(by_id[each].is_stalled for each in found.admit)
    holding = view.num_done + sum(each.is_running or each.is_held for each in view.sequences)
    places = view.max_running - holding + sum(each.is_running for each in gone)
    assert len(found.admit) <= max(0, places)
    saved = [by_id[each] for each in found.save]
    assert {each.sequence_id for each in saved} <= set(found.evict)
    assert all(each.is_running for each in saved)
    assert sum(blocks_for(each.num_computed, BLOCK) for each in saved) <= view.swap.num_free_blocks


@given(view=views())
def test_whoever_waits_displaces_only_open_prompts_behind_it(view):
    found = plan_step(view, FCFS, ChunkedShape(), 0.0)
    wants = [each.arrival for each in view.sequences if each.is_extending or not (each.is_running or each.is_held)]
    for victim in (each for each in view.sequences if each.sequence_id in found.evict):
        # Nobody is admitted in a step that evicts for what already runs.
        if found.admit or found.extend:
            assert victim.is_extending or (victim.is_open and victim.arrival > min(wants))


@pytest.mark.parametrize("shape", [ChunkedShape(), WholeShape()], ids=["chunked", "whole"])
@given(view=views())
def test_the_first_to_come_goes_on_or_what_it_needs_is_held_by_the_unevictable(shape, view):
    found = plan_step(view, FCFS, shape, 0.0)
    in_order = sorted(view.sequences, key=lambda each: each.arrival)
    runners = [each for each in in_order if each.is_running and each.num_remaining]
    if not runners:
        return
    first = runners[0]
    goes_on = any(item.sequence_id == first.sequence_id for item in found.items)
    if first.sequence_id in found.evict:
        makes_room = first.is_open and (found.admit or found.extend)
        assert makes_room or all(each.sequence_id in found.evict or not each.can_evict for each in runners)
    else:
        assert goes_on or blocks_for(first.num_tokens, BLOCK) > first.num_blocks


@given(view=views())
def test_planning_changes_nothing_and_repeats(view):
    before = repr(view)
    assert plan_step(view, FCFS, ChunkedShape(), 0.0) == plan_step(view, FCFS, ChunkedShape(), 0.0)
    assert repr(view) == before
