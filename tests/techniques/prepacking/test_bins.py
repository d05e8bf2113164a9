from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import catalog
from headrace.engine.packing import PaddedRows
from headrace.techniques.prepacking.bins import FirstFitDecreasing

LENGTHS = st.lists(st.integers(2, 300), max_size=64)
TILES = st.sampled_from([1, 16, 128])


def test_the_longest_come_first_and_each_goes_to_the_first_row_with_room():
    packing = FirstFitDecreasing(tile_tokens=10).pack([3, 10, 6, 4, 7, 2])
    assert packing.capacity_tokens == 10
    assert packing.rows == ((1,), (4, 0), (2, 3), (5,))


def test_the_manifest_makes_bins_of_whole_tiles():
    packing = catalog.load("prepacking").pack().pack([100, 6, 20, 7])
    assert packing.capacity_tokens == 128
    assert packing.rows == ((0, 2, 3), (1,))


@given(lengths=LENGTHS, tile=TILES)
def test_bins_are_never_worse_than_padding(lengths, tile):
    bins, padded = FirstFitDecreasing(tile).pack(lengths), PaddedRows(tile).pack(lengths)
    assert bins.capacity_tokens == padded.capacity_tokens
    assert sum(lengths) <= bins.num_tokens <= padded.num_tokens


@given(lengths=LENGTHS, tile=TILES)
def test_no_two_rows_would_fit_into_one(lengths, tile):
    packing = FirstFitDecreasing(tile).pack(lengths)
    filled = [sum(lengths[item] for item in row) for row in packing.rows]
    assert all(one + other > packing.capacity_tokens for one, other in combinations(filled, 2))


@pytest.mark.parametrize(
    ("num_prompts", "of_padding", "of_varlen"), [(8, 0.42, 1.25), (32, 0.35, 1.08), (64, 0.34, 1.04)]
)
def test_bins_of_uneven_prompts_compute_a_third_of_the_tokens_of_padding(num_prompts, of_padding, of_varlen):
    """The lengths of loadtest/ratios/bench_prepacking.py: median 64, sigma 0.8."""
    bins = padded = asked = 0
    for seed in range(1, 21):
        drawn = np.random.default_rng(seed).lognormal(np.log(64), 0.8, num_prompts)
        lengths = [int(length) for length in np.clip(drawn, 8, 256)]
        bins += FirstFitDecreasing().pack(lengths).num_tokens
        padded += PaddedRows().pack(lengths).num_tokens
        asked += sum(lengths)
    assert bins < of_padding * padded
    assert asked <= bins < of_varlen * asked
