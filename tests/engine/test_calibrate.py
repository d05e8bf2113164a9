"""What steps cost is found by timing them, within the time and the blocks given."""

import itertools
import logging
from dataclasses import replace

import pytest
import torch

from headrace.clock import VirtualClock
from headrace.core.block import KvLayout
from headrace.core.cost import CostModel, chunk_work, decode_work
from headrace.engine.arena import KvArena
from headrace.engine.calibrate import (
    CHECKED,
    CHECKS,
    PROBES,
    agrees,
    blocks_wanted,
    calibrate,
    checked_for,
    filled,
    probes_for,
)
from headrace.testing.runner import FakeRunner

TRUE = CostModel(step_s=10e-3, prompt_s=5e-3, token_s=1e-3, pair_s=4e-7, decode_s=2e-3, context_s=2e-6)
BLOCKS = blocks_wanted(16)


class TimedRunner(FakeRunner):
    """Takes the time that a cost model says; what it answers is unchanged."""

    def __init__(self, clock, cost=TRUE, factors=None, num_blocks=BLOCKS, **options):
        super().__init__(num_blocks, **options)
        self.clock, self.cost, self.factors = clock, cost, factors or itertools.repeat(1.0)

    def run(self, batch):
        sizes = [(len(item.token_ids), item.kv_start) for item in batch.items]
        work = decode_work(done + 1 for size, done in sizes if size == 1)
        for size, done in sizes:
            if size > 1:
                work += chunk_work(size, done)
        self.clock.advance(self.cost.seconds(work) * next(self.factors))
        return super().run(batch)


def found(cost, probes=PROBES):
    return [cost.seconds(probe.work) for probe in probes]


def test_the_cost_of_a_runner_is_found_by_timing_its_steps():
    clock = VirtualClock()
    cost = calibrate(TimedRunner(clock), BLOCKS, clock, limit_s=10.0)
    assert found(cost) == pytest.approx(found(TRUE), rel=1e-6)
    assert cost.r2 == pytest.approx(1.0)
    assert cost.step([(512, 4096)], [2000] * 7) == pytest.approx(TRUE.step([(512, 4096)], [2000] * 7), rel=1e-3)


def test_the_first_time_of_a_step_does_not_count_nor_does_one_that_was_held_up():
    clock = VirtualClock()
    rounds = [7.0, 1.0, 9.0]
    factors = itertools.chain.from_iterable(itertools.repeat(factor, len(PROBES)) for factor in rounds)
    limit_s = sum(found(TRUE)) * sum(rounds) - 0.01
    assert found(calibrate(TimedRunner(clock, factors=factors), BLOCKS, clock, limit_s)) == pytest.approx(found(TRUE))


@pytest.mark.parametrize("limit_s", [0.3, 0.6, 1.5])
def test_it_ends_in_time_but_for_the_step_under_way(limit_s):
    clock = VirtualClock()
    runner = TimedRunner(clock)
    calibrate(runner, BLOCKS, clock, limit_s)
    assert limit_s <= clock.now() < limit_s + max(found(TRUE))


def test_half_of_the_time_is_enough_if_each_step_was_taken_twice():
    clock = VirtualClock()
    runner = TimedRunner(clock)
    calibrate(runner, BLOCKS, clock, limit_s=6.2 * sum(found(TRUE)))
    assert 3 * len(PROBES) < len(runner.batches) < 4 * len(PROBES)
    slow = TimedRunner(clock)
    calibrate(slow, BLOCKS, clock, limit_s=3 * sum(found(TRUE)))
    assert len(slow.batches) == 2 * len(PROBES)


@pytest.mark.parametrize("wide_from", [64, 256, 512])
def test_steps_of_many_rows_are_measured_where_they_are_computed_another_way(wide_from):
    clock = VirtualClock()
    true = replace(TRUE, wide_from=wide_from, wide_prompt_s=20e-3, wide_token_s=3e-4, wide_pair_s=1e-7)
    blocks = blocks_wanted(16, probes_for(wide_from))
    cost = calibrate(TimedRunner(clock, true, num_blocks=blocks), blocks, clock, 20.0, wide_from)
    assert cost.r2 == pytest.approx(1.0)
    few = calibrate(TimedRunner(clock, true, num_blocks=blocks), blocks, clock, sum(found(true)), wide_from)
    assert few.is_sound is (wide_from == 64)
    assert cost.prefill(4096, chunk_tokens=512) == pytest.approx(true.prefill(4096, chunk_tokens=512), rel=1e-3)
    assert found(cost) == pytest.approx(found(true), rel=1e-3)


def test_a_slow_machine_has_measured_something_of_everything_when_half_of_the_steps_are_done():
    clock = VirtualClock()
    half = PROBES[: len(PROBES) // 2]
    cost = calibrate(TimedRunner(clock), BLOCKS, clock, limit_s=sum(found(TRUE, half)) - 1e-6)
    assert found(cost) == pytest.approx(found(TRUE), rel=0.2)


def test_too_few_steps_make_no_model_and_say_so(caplog):
    clock = VirtualClock()
    assert calibrate(TimedRunner(clock), BLOCKS, clock, limit_s=0.01) is None
    assert calibrate(TimedRunner(clock), 0, clock, limit_s=1.0) is None
    assert [record.message for record in caplog.records] == ["too few steps to model their cost"] * 2


def test_only_the_blocks_and_the_context_given_are_used():
    clock = VirtualClock()
    runner = TimedRunner(clock, max_context_tokens=512)
    calibrate(runner, 40, clock, limit_s=3.0)
    items = [item for batch in runner.batches for item in batch.items]
    assert max(max(item.block_table) for item in items) < 40
    assert max(item.kv_length for item in items) < 512
    assert all(len(item.block_table) * 16 >= item.kv_length for item in items)


def test_sequences_of_a_step_have_blocks_of_their_own():
    clock = VirtualClock()
    runner = TimedRunner(clock)
    calibrate(runner, BLOCKS, clock, limit_s=1.0)
    for batch in runner.batches:
        used = [block for item in batch.items for block in item.block_table]
        assert len(used) == len(set(used))


def test_a_fit_that_explains_little_is_a_warning(caplog):
    clock = VirtualClock()
    factors = itertools.cycle([9.0, 1.0, 0.1][index % 3] for index in range(len(PROBES)))
    cost = calibrate(TimedRunner(clock, factors=factors), BLOCKS, clock, limit_s=20.0)
    assert not cost.is_sound
    [record] = caplog.records
    assert (record.levelno, record.message, record.r2) == (logging.WARNING, "cost of steps measured", cost.r2)


def test_blocks_are_full_while_it_measures_and_zero_afterwards():
    layout = KvLayout(num_layers=2, block_tokens=16, num_kv_heads=1, head_dim=8, dtype="bf16")
    arena = KvArena(layout, 4, torch.device("cpu"))
    with filled(arena, 3):
        assert arena.data[:3].float().abs().sum(dim=(1, 2, 3, 4, 5)).min() > 0
        assert not arena.data[3].any()
    assert not arena.data.any()


@pytest.mark.parametrize(("factor", "is_believed"), [(0.4, False), (0.6, True), (1.0, True), (1.9, True), (2.1, False)])
def test_a_kept_cost_is_believed_while_steps_take_about_as_long_as_it_says(factor, is_believed):
    clock = VirtualClock()
    assert agrees(TRUE, TimedRunner(clock, factors=itertools.repeat(factor)), BLOCKS, clock) is is_believed


def test_one_undisturbed_step_of_a_kind_is_enough_to_believe_a_kept_cost():
    clock = VirtualClock()
    factors = itertools.cycle([9.0] * (CHECKS - 1) + [1.0])
    assert agrees(TRUE, TimedRunner(clock, factors=factors), BLOCKS, clock)


def test_a_kept_cost_is_checked_within_the_blocks_there_are():
    clock = VirtualClock()
    wide = replace(TRUE, wide_from=256, wide_token_s=3e-4)
    for num_blocks, num_probes in ((blocks_wanted(16, checked_for(256)), 3), (8, 2)):
        runner = TimedRunner(clock, wide, num_blocks=num_blocks)
        assert agrees(wide, runner, num_blocks, clock)
        assert len(runner.batches) == num_probes * CHECKS
        assert max(block for batch in runner.batches for item in batch.items for block in item.block_table) < num_blocks


def test_a_change_in_either_kind_of_step_is_noticed():
    for index in range(len(CHECKED)):
        factors = [1.0] * CHECKS * len(CHECKED)
        factors[index * CHECKS : (index + 1) * CHECKS] = [3.0] * CHECKS
        clock = VirtualClock()
        assert not agrees(TRUE, TimedRunner(clock, factors=iter(factors)), BLOCKS, clock)
