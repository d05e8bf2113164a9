"""The cost of a step: monotone, found again from samples, and inverted without slack."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from headrace.core.cost import NOTHING, CostModel, Sample, StepWork, chunk_work, decode_work, fit
from headrace.errors import InvalidRequest

CPU = CostModel(step_s=12e-3, prompt_s=15e-3, token_s=1e-3, pair_s=4e-7, decode_s=2e-3, context_s=2e-6)

CHUNKS = [(size, done) for size in (1, 16, 64, 128, 256) for done in (0, 512, 2048)]
DECODES = [[context] * count for count in (1, 2, 4, 8, 16) for context in (16, 256, 1024)]
MIXED = [(chunk, contexts) for chunk in CHUNKS[3:7] for contexts in DECODES[6:9]]


def samples_of(model, noise=0.0, seed=0):
    factors = np.random.default_rng(seed).normal(1.0, noise, len(CHUNKS) + len(DECODES) + len(MIXED))
    works = [chunk_work(*chunk) for chunk in CHUNKS]
    works += [decode_work(contexts) for contexts in DECODES]
    works += [chunk_work(*chunk) + decode_work(contexts) for chunk, contexts in MIXED]
    return [
        Sample(work=work, seconds=model.seconds(work) * max(0.1, factor))
        for work, factor in zip(works, factors, strict=True)
    ]


def coefficients(most=1e-2):
    return st.floats(0.0, most, allow_subnormal=False)


models = st.builds(
    CostModel,
    step_s=st.floats(1e-4, 0.1),
    prompt_s=coefficients(),
    token_s=st.floats(1e-6, 1e-2),
    pair_s=coefficients(1e-5),
    decode_s=coefficients(),
    context_s=coefficients(1e-5),
)
WIDE = replace(CPU, wide_from=128, wide_prompt_s=20e-3, wide_token_s=3e-4, wide_pair_s=1e-7)
wide_models = st.builds(
    replace,
    models,
    wide_from=st.integers(1, 2048),
    wide_prompt_s=coefficients(),
    wide_token_s=st.floats(1e-6, 1e-2),
    wide_pair_s=coefficients(1e-5),
)
works = st.builds(
    StepWork,
    prompt_tokens=st.integers(0, 4096),
    prompt_pairs=st.integers(0, 1 << 25),
    num_decodes=st.integers(0, 256),
    context_tokens=st.integers(0, 1 << 20),
)


def test_a_chunk_counts_each_pair_of_a_token_and_one_it_attends_to():
    assert chunk_work(3, 10) == StepWork(prompt_tokens=3, prompt_pairs=11 + 12 + 13)
    assert decode_work([10, 20]) == StepWork(num_decodes=2, context_tokens=30)


def test_one_formula_answers_for_chunks_decodes_and_both():
    chunk, decodes = CPU.step([(128, 512)]), CPU.step(contexts=[100, 200])
    assert chunk == pytest.approx(12e-3 + 15e-3 + 128e-3 + 4e-7 * (128 * 512 + 128 * 129 / 2))
    assert decodes == pytest.approx(12e-3 + 2 * 2e-3 + 300 * 2e-6) == CPU.decode(2, 300)
    assert CPU.step([(128, 512)], [100, 200]) == pytest.approx(chunk + decodes - 12e-3)
    assert CPU.step() == 0.0


@given(size=st.integers(1, 8192), done=st.integers(0, 8192), chunk=st.integers(1, 1024))
def test_a_prompt_costs_the_sum_of_its_chunks(size, done, chunk):
    cuts = [(min(chunk, size - start), done + start) for start in range(0, size, chunk)]
    for model in (CPU, WIDE):
        assert model.prefill(size, done, chunk_tokens=chunk) == pytest.approx(sum(model.step([cut]) for cut in cuts))
        assert model.prefill(size, done) == pytest.approx(model.step([(size, done)]))
    assert 0 < CPU.least_prefill_s(size, done) < CPU.prefill(size, done) <= CPU.prefill(size, done, chunk_tokens=chunk)
    aboard = WIDE.step([(size, done)], [100] * 128) - WIDE.decode(128, 128 * 100)
    assert WIDE.least_prefill_s(size, done) < min(WIDE.prefill(size, done), aboard + WIDE.step_s)


def test_steps_of_many_rows_have_prices_of_their_own():
    aboard_s = 6 * 2e-3 + 600 * 2e-6
    assert WIDE.step([(121, 512)], [100] * 6) == CPU.step([(121, 512)], [100] * 6)
    wide_s = 12e-3 + 20e-3 + 122 * 3e-4 + 1e-7 * (122 * 512 + 122 * 123 / 2)
    assert WIDE.step([(122, 512)], [100] * 6) == pytest.approx(aboard_s + wide_s)
    assert WIDE.decode(200, 1000) == CPU.decode(200, 1000)
    assert (WIDE.prefill_token_s(127), WIDE.prefill_token_s(128), CPU.prefill_token_s(128)) == (1e-3, 3e-4, 1e-3)


def test_a_prompt_that_is_there_costs_nothing():
    assert CPU.prefill(0, 100) == CPU.least_prefill_s(0, 100) == 0.0


@given(model=models, work=works, more=works)
def test_more_work_never_takes_less_time(model, work, more):
    assert model.seconds(work + more) >= model.seconds(work) >= 0


@given(model=models)
def test_known_coefficients_are_found_again(model):
    found = fit(samples_of(model))
    assert found.r2 == pytest.approx(1.0)
    for sample in samples_of(model):
        assert found.seconds(sample.work) == pytest.approx(sample.seconds, rel=1e-6)
    assert found.step_s == pytest.approx(model.step_s, rel=1e-6)
    assert found.token_s == pytest.approx(model.token_s, rel=1e-4)


@given(seed=st.integers(0, 2**32 - 1))
def test_noise_of_five_percent_moves_no_estimate_by_more_than_fifteen(seed):
    found = fit(samples_of(CPU, noise=0.05, seed=seed))
    assert found.is_sound
    for sample in samples_of(CPU):
        assert found.seconds(sample.work) == pytest.approx(sample.seconds, rel=0.15)


@given(seconds=st.lists(st.floats(1e-4, 10.0), min_size=1, max_size=len(CHUNKS)))
def test_whatever_was_measured_no_coefficient_is_negative(seconds):
    found = fit([Sample(work=chunk_work(*chunk), seconds=took) for chunk, took in zip(CHUNKS, seconds, strict=False)])
    names = ("step_s", "prompt_s", "token_s", "pair_s", "decode_s", "context_s")
    assert all(math.isfinite(getattr(found, name)) and getattr(found, name) >= 0 for name in names)
    assert found.r2 <= 1.0


def test_samples_that_do_not_depend_on_their_work_make_no_sound_fit():
    drawn = np.random.default_rng(1).uniform(0.01, 1.0, len(CHUNKS))
    found = fit([Sample(work=chunk_work(*chunk), seconds=took) for chunk, took in zip(CHUNKS, drawn, strict=True)])
    assert not found.is_sound


def test_as_many_coefficients_as_samples_explain_anything_and_make_no_sound_fit():
    few = [Sample(work=decode_work([16] * count), seconds=CPU.decode(count, 16 * count)) for count in (1, 4)]
    assert fit(few).seconds(few[1].work) == pytest.approx(few[1].seconds)
    assert not fit(few).is_sound


def test_prices_of_wide_steps_are_found_again_and_need_a_sample():
    found = fit(samples_of(WIDE), 128)
    assert found.r2 == pytest.approx(1.0)
    for each in samples_of(WIDE):
        assert found.seconds(each.work) == pytest.approx(each.seconds, rel=1e-6)
    assert fit(samples_of(WIDE)).r2 < 0.99
    narrow = [each for each in samples_of(WIDE) if each.work.num_rows < 128]
    wide = [each for each in samples_of(WIDE) if each.work.num_rows >= 128]
    assert fit(narrow).is_sound
    for some in ([], wide[:1], wide[:3]):
        assert not fit([*narrow, *some], 128).is_sound


@pytest.mark.parametrize("samples", [[], [Sample(work=NOTHING, seconds=0.0)]])
def test_a_fit_needs_steps_that_took_time(samples):
    with pytest.raises(InvalidRequest):
        fit(samples)


@given(
    model=models | wide_models,
    target_s=st.floats(0.0, 2.0),
    aboard=works,
    done=st.integers(0, 8192),
    most=st.integers(1, 4096),
)
def test_the_largest_chunk_ends_in_time_and_the_next_larger_one_does_not(model, target_s, aboard, done, most):
    size = model.largest_chunk(target_s, aboard, done, most)
    assert 1 <= size <= most
    event("wide" if model.wide_from and size + aboard.num_rows >= model.wide_from else "not wide")
    assert size == 1 or model.seconds(aboard + chunk_work(size, done)) <= target_s
    larger = {size + 1, model.wide_from - aboard.num_rows} & set(range(size + 1, most + 1))
    assert all(model.seconds(aboard + chunk_work(each, done)) > target_s for each in larger)


def test_the_largest_chunk_shrinks_with_what_it_attends_to_and_with_the_decodes_aboard():
    sizes = [CPU.largest_chunk(0.2, NOTHING, done, 512) for done in (0, 1000, 4000, 8000)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    assert CPU.largest_chunk(0.2, decode_work([500] * 8), 1000, 512) < sizes[1]
