import math

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


PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        "top_k": st.sampled_from([None, 1, 7, 64, 90, 5000]),
        "top_p": st.sampled_from([1.0, 0.99, 0.5]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, 0.4]),
        "seed": st.integers(0, 2**64 - 1),
        "position": st.integers(0, 4000),
        "min_tokens": st.sampled_from([0, 3]),
    }
)


@settings(deadline=None, max_examples=40)
@given(rows=st.lists(PARAMS, min_size=2, max_size=6), seed=st.integers(0, 50))
def test_a_token_does_not_depend_on_its_batch(rows, seed):
    logits = torch.stack([logits_of(seed + index, vocab=1500) for index in range(len(rows))])
    # Models in bf16 give many equal logits: choices among equals must not depend on the batch either.
    logits = (logits * 8).round() / 8
    together = sample(logits, [row(output=(3, 4), **params) for params in rows])
    for index, params in enumerate(rows):
        assert sample(logits[index : index + 1], [row(output=(3, 4), **params)])[0] == together[index]


@settings(deadline=None, max_examples=40)
@given(params=PARAMS, seed=st.integers(0, 50))
def test_the_noise_decides_among_what_the_filters_keep(params, seed):
    """The definition, written out: argmax of log p plus noise over the filtered vocabulary."""
    logits = logits_of(seed, vocab=1500)
    own = row(output=(3, 4), **params)
    chosen = sample(logits[None], [own])[0].token_id
    if own.params.temperature == 0:
        return
    scores = logits.clone()
    if params["min_tokens"]:
        scores[2] = -math.inf
    for token in (1, 3, 4):
        penalty = params["repetition_penalty"]
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    scores[[3, 4]] -= params["frequency_penalty"]
    scores /= params["temperature"]
    if params["top_k"] and params["top_k"] < len(scores):
        scores[scores < torch.topk(scores, params["top_k"]).values[-1]] = -math.inf
    if params["top_p"] < 1:
        scores[~nucleus(scores, params["top_p"])] = -math.inf
    probabilities = torch.softmax(scores, -1)
    scores[probabilities < params["min_p"] * probabilities.max() * (1 - 1e-6)] = -math.inf
    key = torch.tensor([noise_key(params["seed"], 0, params["position"])], dtype=torch.int32)
    noise = gumbel(key, torch.arange(len(scores), dtype=torch.int32))[0]
    assert chosen == int(torch.argmax(torch.log_softmax(scores, -1) + noise))


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


def noise(count, position=0, seed=0, start=0, choice=0):
    keys = torch.tensor([noise_key(seed, choice, position)], dtype=torch.int32)
    return gumbel(keys, torch.arange(start, start + count, dtype=torch.int32))[0]


def uniform(values):
    return torch.exp(-torch.exp(-values.to(torch.float64)))


def noise_over(keys, token=41):
    """The noise of one token under many keys."""
    return gumbel(torch.tensor(keys, dtype=torch.int32), torch.tensor([token], dtype=torch.int32))[:, 0]


def assert_flat(counts):
    """Chi-square of equally likely cells; noise is fixed, so five deviations never flicker."""
    counts = counts.to(torch.float64)
    expected = counts.sum() / counts.numel()
    assert float(((counts - expected) ** 2 / expected).sum()) < counts.numel() + 5 * math.sqrt(2 * counts.numel())


AXES = {
    "seeds": lambda index: noise_key(index, 0, 7),
    "high seeds": lambda index: noise_key(index << 40, 0, 7),
    "choices": lambda index: noise_key(3, index, 7),
    "positions": lambda index: noise_key(3, 0, index),
}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("token", [0, 1, 49151])
def test_along_every_axis_the_noise_is_gumbel_and_neighbours_are_independent(axis, token):
    places = (uniform(noise_over([AXES[axis](index) for index in range(20_000)], token)) * 16).long().clamp(max=15)
    assert_flat(torch.bincount(places, minlength=16))
    assert_flat(torch.bincount(places[:-1] * 16 + places[1:], minlength=256))


@pytest.mark.parametrize("step", [1, 2, 16, 4096])
def test_the_noise_of_neighbouring_tokens_is_independent(step):
    places = (uniform(noise(100_000 + step)) * 16).long().clamp(max=15)
    assert_flat(torch.bincount(places[:-step] * 16 + places[step:], minlength=256))


@pytest.mark.parametrize("bit", range(64))
def test_every_bit_of_a_seed_gives_another_stream(bit):
    ones, others = noise(2000, seed=11), noise(2000, seed=11 ^ (1 << bit))
    assert int((ones == others).sum()) < 3
    assert abs(float(torch.corrcoef(torch.stack([ones, others]))[0, 1])) < 5 / math.sqrt(2000)


def test_the_hash_wraps_as_whole_numbers_of_32_bits_do():
    def mix(word):
        for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            word = ((word ^ word >> shift) * multiplier) % 2**32
        return word ^ word >> 16

    tokens = [0, 1, 2, 49151, 151_935, 2**31 - 1]
    for seed in (0, 1, 2**32 - 1, 2**63, 2**64 - 1):
        key = noise_key(seed, 1, 2)
        found = gumbel(torch.tensor([key], dtype=torch.int32), torch.tensor(tokens, dtype=torch.int32))[0]
        words = [mix(mix(token ^ key[0] % 2**32) ^ key[1] % 2**32) % 2**31 for token in tokens]
        wanted = torch.tensor([-math.log(-math.log1p(-(word + 0.5) / 2**31)) for word in words])
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_noise_is_gumbel():
    values = noise(200_000).to(torch.float64)
    uniform = torch.exp(-torch.exp(-values))
    bins = torch.histc(uniform, bins=200, min=0.0, max=1.0)
    statistic = float(((bins - 1000) ** 2 / 1000).sum())
    assert statistic < 200 + 5 * math.sqrt(400)
    assert torch.isfinite(values).all()


@pytest.mark.parametrize("step", [1, 2, 64, 2**20])
def test_the_noise_of_neighbouring_positions_is_unrelated(step):
    ones, others = noise(50_000, position=100), noise(50_000, position=100 + step)
    correlation = torch.corrcoef(torch.stack([ones, others]))[0, 1]
    assert abs(float(correlation)) < 5 / math.sqrt(50_000)


def test_the_noise_of_a_token_can_be_had_alone():
    assert torch.equal(noise(1, start=777), noise(1000)[777:778])


def test_the_noise_is_the_same_forever():
    """Answers with a seed must not change between versions: these numbers are an interface."""
    wanted = torch.tensor([0.6744460, 1.8862889, 2.1016912, 1.1097498])
    torch.testing.assert_close(noise(4, position=3, seed=12345), wanted, rtol=1e-6, atol=1e-6)
