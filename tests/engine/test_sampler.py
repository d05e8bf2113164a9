import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.request import SamplingParams
from headrace.engine.gumbel import gumbel, noise_key
from headrace.engine.sampler import SamplingRow, sample

VOCAB = 50
EOS = frozenset({2})


def row(position=10, *, choice=0, prompt=(1,), output=(), **params):
    return SamplingRow(
        params=SamplingParams(**params),
        choice=choice,
        position=position,
        prompt=prompt,
        output=output,
        eos_token_ids=EOS,
    )


def logits_of(seed=0, vocab=VOCAB, scale=2.0):
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale


def draw(logits, count=3000, **params):
    """Token ids drawn at `count` positions from the same logits."""
    rows = [row(position, **params) for position in range(count)]
    return torch.tensor([chosen.token_id for chosen in sample(logits.expand(count, -1), rows)])


def choose(logits, **params):
    return sample(logits[None], [row(**params)])[0].token_id


def chi_square(drawn, probabilities):
    expected = probabilities * len(drawn)
    likely = expected >= 5
    seen = torch.bincount(drawn, minlength=len(probabilities)).to(torch.float64)
    rest = torch.stack([seen[~likely].sum(), expected[~likely].sum()])
    parts = (seen[likely] - expected[likely]) ** 2 / expected[likely]
    extra = (rest[0] - rest[1]) ** 2 / rest[1] if rest[1] > 5 else torch.tensor(0.0)
    return float(parts.sum() + extra), int(likely.sum())


def assert_drawn_from(drawn, probabilities):
    statistic, cells = chi_square(drawn, probabilities.to(torch.float64))
    # Mean and deviation of chi-square; noise is fixed, so five deviations never flicker.
    assert statistic < cells + 5 * math.sqrt(2 * cells)


def test_greedy_takes_the_best_token_and_of_equals_the_first():
    logits = torch.zeros(VOCAB)
    logits[[7, 9]] = 3.0
    assert choose(logits, temperature=0.0) == 7


@pytest.mark.parametrize("temperature", [1e-4, 1e-6, 1e-30, 1e-45])
@pytest.mark.parametrize("params", [{}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.999}])
def test_the_lowest_temperatures_are_greedy(temperature, params):
    logits = logits_of(1, scale=30.0)
    assert set(draw(logits, 50, temperature=temperature, **params).tolist()) == {int(torch.argmax(logits))}


def test_tokens_are_drawn_in_proportion_to_their_probability():
    logits = logits_of(1)
    assert_drawn_from(draw(logits), torch.softmax(logits, -1))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature):
    logits = logits_of(2)
    assert_drawn_from(draw(logits, temperature=temperature), torch.softmax(logits / temperature, -1))


def keep(logits, kept):
    return torch.softmax(logits.masked_fill(~kept, -math.inf), -1)


def test_top_k_keeps_the_k_most_likely():
    logits = logits_of(3)
    kept = torch.zeros(VOCAB, dtype=torch.bool)
    kept[torch.topk(logits, 5).indices] = True
    assert_drawn_from(draw(logits, top_k=5), keep(logits, kept))


def nucleus(logits, share):
    values, ids = torch.sort(torch.softmax(logits, -1), descending=True)
    before = torch.cumsum(values, -1) - values
    kept = torch.zeros(len(logits), dtype=torch.bool)
    kept[ids[before < share]] = True
    return kept


def test_top_p_keeps_the_smallest_set_of_that_share():
    logits = logits_of(4)
    assert_drawn_from(draw(logits, top_p=0.7), keep(logits, nucleus(logits, 0.7)))


def test_top_p_counts_within_what_top_k_kept():
    logits = torch.log(torch.tensor([0.4, 0.21, 0.19, 0.11, 0.09]))
    # Of the best two together, 0.4 is more than 0.6; of the whole vocabulary it is not.
    assert set(draw(logits, 300, top_k=2, top_p=0.6).tolist()) == {0}
    assert set(draw(logits, 300, top_p=0.6).tolist()) == {0, 1}


def test_top_p_counts_within_a_wide_top_k():
    drawn = draw(torch.arange(200) * -1e-4, 4000, top_k=100, top_p=0.5)
    assert set(drawn.tolist()) == set(range(50))


def test_min_p_keeps_what_is_likely_beside_the_best():
    logits = logits_of(5)
    probabilities = torch.softmax(logits, -1)
    kept = probabilities >= 0.2 * probabilities.max()
    assert_drawn_from(draw(logits, min_p=0.2), keep(logits, kept))
    for others in ({"top_k": 40}, {"top_k": VOCAB}, {"top_p": 0.99999}):
        assert_drawn_from(draw(logits, min_p=0.2, **others), keep(logits, kept))


def test_top_p_over_a_flat_vocabulary_looks_at_all_of_it():
    logits = logits_of(6, vocab=4000, scale=0.01)
    drawn = draw(logits, 800, top_p=0.999)
    assert len(drawn.unique()) > 600


@pytest.mark.parametrize("params", [{"top_k": 3}, {"top_p": 0.1}, {"top_k": 64}, {"top_k": 70, "top_p": 0.99}])
def test_tokens_as_likely_as_the_last_one_kept_are_kept_too(params):
    logits = torch.zeros(200)
    assert len(draw(logits, 4000, **params).unique()) == 200


def test_over_many_seeds_tokens_come_in_proportion_too():
    logits = logits_of(1)
    rows = [row(seed=seed) for seed in range(3000)]
    drawn = torch.tensor([chosen.token_id for chosen in sample(logits.expand(3000, -1), rows)])
    assert_drawn_from(drawn, torch.softmax(logits, -1))


def test_the_same_seed_gives_the_same_tokens_and_another_gives_others():
    logits = logits_of(7)
    assert torch.equal(draw(logits, 200, seed=5), draw(logits, 200, seed=5))
    assert not torch.equal(draw(logits, 200, seed=5), draw(logits, 200, seed=6))
    assert not torch.equal(draw(logits, 200, choice=0), draw(logits, 200, choice=1))
    assert not torch.equal(draw(logits, 200, seed=5), draw(logits, 200, seed=5 + 2**32))


def edited_scores(logits, own):
    """One row's logits after bias, penalties and the minimum length, written out."""
    params, scores = own.params, logits.clone()
    for token, addend in params.logit_bias:
        scores[token] += addend
    for token in {*own.prompt, *own.output}:
        penalty = params.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token, count in Counter(own.output).items():
        scores[token] -= params.presence_penalty + params.frequency_penalty * count
    if len(own.output) < params.min_tokens:
        scores[[*own.eos_token_ids, *params.stop_token_ids]] = -math.inf
    return scores


def filtered(scores, params):
    """Scores over the temperature; -inf where top-k, top-p or min-p leave a token out."""
    scores = scores / params.temperature
    if params.top_k and params.top_k < len(scores):
        scores[scores < torch.topk(scores, params.top_k).values[-1]] = -math.inf
    if params.top_p < 1:
        scores[~nucleus(scores, params.top_p)] = -math.inf
    probabilities = torch.softmax(scores, -1)
    scores[probabilities < params.min_p * probabilities.max() * (1 - 1e-6)] = -math.inf
    return scores


def by_definition(logits, own):
    """The token of one row: argmax of log p plus noise over the filtered vocabulary."""
    scores = edited_scores(logits, own)
    if own.params.temperature == 0:
        return int(torch.argmax(scores))
    key = torch.tensor([noise_key(own.params.seed, own.choice, own.position)], dtype=torch.int32)
    noise = gumbel(key, torch.arange(len(scores), dtype=torch.int32))[0]
    return int(torch.argmax(torch.log_softmax(filtered(scores, own.params), -1) + noise))


WIDE = 1536
TOKEN_IDS = st.integers(0, WIDE - 1)
PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        "top_k": st.sampled_from([None, 1, 7, 64, 90, 5000]),
        "top_p": st.sampled_from([1.0, 0.99, 0.5]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "repetition_penalty": st.sampled_from([1.0, 1.6]),
        "presence_penalty": st.sampled_from([0.0, -1.2]),
        "frequency_penalty": st.sampled_from([0.0, 0.9]),
        "logit_bias": st.dictionaries(TOKEN_IDS, st.floats(-9, 9, width=16), max_size=3).map(
            lambda bias: tuple(bias.items())
        ),
        "seed": st.integers(0, 2**64 - 1),
        "min_tokens": st.sampled_from([0, 3]),
        "stop_token_ids": st.lists(TOKEN_IDS, max_size=2).map(tuple),
        "logprobs": st.sampled_from([None, 0, 3, 20]),
        "position": st.integers(0, 4000),
        "choice": st.integers(0, 3),
        "prompt": st.lists(TOKEN_IDS, min_size=1, max_size=9).map(tuple),
        # Few kinds of tokens, so that some come often.
        "output": st.lists(st.integers(0, 5), max_size=12).map(tuple),
    }
)


@settings(deadline=None, max_examples=40)
@given(data=st.data(), rows=st.lists(PARAMS, min_size=2, max_size=8), seed=st.integers(0, 50))
def test_a_token_does_not_depend_on_its_batch(data, rows, seed):
    logits = torch.stack([logits_of(seed + index, vocab=WIDE) for index in range(len(rows))])
    # Models in bf16 give many equal logits: choices among equals must not depend on the batch either.
    logits = (logits * 8).round() / 8
    alone = [sample(logits[index : index + 1], [row(**params)])[0] for index, params in enumerate(rows)]
    order = data.draw(st.permutations(range(len(rows))))
    assert sample(logits[order], [row(**rows[index]) for index in order]) == [alone[index] for index in order]


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(PARAMS, min_size=1, max_size=8), seed=st.integers(0, 50))
def test_every_row_of_a_batch_is_chosen_by_the_definition(rows, seed):
    logits = torch.stack([logits_of(seed + index, vocab=WIDE) for index in range(len(rows))])
    # The tokens of outputs compete for the first place: otherwise penalties would decide nothing.
    logits[:, :6] += 5
    rows = [row(**params) for params in rows]
    for chosen, own, scores in zip(sample(logits, rows), rows, logits, strict=True):
        assert chosen.token_id == by_definition(scores, own)
        if own.params.logprobs is None:
            assert (chosen.logprob, chosen.top_logprobs) == (None, ())
            continue
        logprobs = torch.log_softmax(scores, -1)
        values, ids = torch.topk(logprobs, own.params.logprobs)
        assert chosen.logprob == float(logprobs[chosen.token_id])
        assert chosen.top_logprobs == tuple(zip(ids.tolist(), values.tolist(), strict=True))


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 12, "top_p": 0.9, "min_p": 0.02},
        {"top_p": 0.8, "repetition_penalty": 1.5, "presence_penalty": 0.5},
        {"top_k": 40, "frequency_penalty": 0.7, "logit_bias": ((2, 3.0), (9, 2.5)), "min_tokens": 9},
        {"min_p": 0.1, "logit_bias": ((4, 1.5), (5, 1.5))},
    ],
)
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_under_any_options_tokens_are_drawn_from_the_filtered_distribution(params, temperature):
    logits, known = logits_of(11), {"prompt": (1, 3), "output": (4, 4, 6)}
    own = row(**known, temperature=temperature, **params)
    wanted = torch.softmax(filtered(edited_scores(logits, own), own.params), -1)
    drawn = draw(logits, 6000, seed=17, **known, temperature=temperature, **params)
    assert_drawn_from(drawn, wanted)
    assert not wanted[drawn].eq(0).any()


@pytest.mark.parametrize("vocab", [50, 127, 128, 1000, 1536, 49152])
@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_the_best_are_found_in_any_vocabulary(vocab, count):
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab))
    values, ids = torch.topk(torch.log_softmax(logits, -1), count)
    for index, chosen in enumerate(sample(logits, [row(temperature=0.0, logprobs=count)] * 3)):
        assert chosen.top_logprobs == tuple(zip(ids[index].tolist(), values[index].tolist(), strict=True))


def test_logit_bias_can_force_and_forbid():
    logits = logits_of(8)
    assert choose(logits, temperature=0.0, logit_bias=((17, 100.0),)) == 17
    best = int(torch.argmax(logits))
    assert choose(logits, temperature=0.0, logit_bias=((best, -100.0),)) != best


def test_repetition_penalty_weakens_tokens_of_prompt_and_answer():
    logits = torch.tensor([2.0, 1.9, 1.8, -1.0])
    assert choose(logits, temperature=0.0, repetition_penalty=2.0, prompt=(0,), output=(1,)) == 2
    negative = torch.tensor([-1.0, -1.5])
    assert choose(negative, temperature=0.0, repetition_penalty=2.0, prompt=(0,)) == 1


def test_presence_and_frequency_count_the_answer_only():
    logits = torch.tensor([2.0, 1.0, 0.0, 0.0])
    assert choose(logits, temperature=0.0, presence_penalty=1.5, prompt=(0, 0)) == 0
    assert choose(logits, temperature=0.0, presence_penalty=1.5, output=(0,)) == 1
    assert choose(logits, temperature=0.0, frequency_penalty=0.4, output=(0, 0)) == 0
    assert choose(logits, temperature=0.0, frequency_penalty=0.4, output=(0, 0, 0)) == 1


def test_no_stop_token_comes_before_the_minimum_length():
    logits = torch.tensor([0.0, 1.0, 9.0, 8.0, 2.0])
    assert choose(logits, temperature=0.0, min_tokens=2, stop_token_ids=(3,), output=(0,)) == 4
    assert choose(logits, temperature=0.0, min_tokens=2, stop_token_ids=(3,), output=(0, 0)) == 2


def test_logprobs_are_those_of_the_raw_logits_best_first():
    logits = logits_of(9)
    wanted = torch.log_softmax(logits, -1)
    best = int(torch.argmax(logits))
    chosen = sample(logits[None], [row(temperature=0.0, logprobs=3, logit_bias=((best, -100.0),))])[0]
    assert chosen.token_id != best
    assert chosen.logprob == pytest.approx(float(wanted[chosen.token_id]))
    assert [token for token, _ in chosen.top_logprobs] == torch.topk(wanted, 3).indices.tolist()
    assert chosen.top_logprobs[0][1] == pytest.approx(float(wanted[best]))


def test_logprobs_zero_reports_the_chosen_token_only():
    chosen = sample(logits_of(9)[None], [row(logprobs=0)])[0]
    assert chosen.logprob is not None
    assert chosen.top_logprobs == ()


def test_the_logits_given_are_not_changed():
    logits = logits_of(10)[None]
    before = logits.clone()
    sample(logits, [row(logit_bias=((1, 5.0),), repetition_penalty=1.5, top_k=4, min_tokens=4)])
    assert torch.equal(logits, before)


def test_logits_that_are_no_numbers_still_give_a_token():
    for params in ({}, {"top_k": 4}, {"top_p": 0.5}, {"min_p": 0.1}, {"temperature": 0.0}):
        assert 0 <= choose(torch.full((VOCAB,), math.nan), **params) < VOCAB
