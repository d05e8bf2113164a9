import math

import pytest
import torch

from headrace.engine.gumbel import gumbel, noise_key


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
