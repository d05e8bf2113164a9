"""What a runner relies on in a pack policy: every one that ships passes this suite."""

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import catalog
from headrace.engine.packing import PaddedRows

TECHNIQUES = [name for name in catalog.names() if "pack" in catalog.load(name).seams]
POLICIES = {"pad": PaddedRows, **{name: catalog.load(name).pack for name in TECHNIQUES}}
LENGTHS = st.lists(st.integers(2, 600), max_size=64)

each_policy = pytest.mark.parametrize("policy", [make() for make in POLICIES.values()], ids=POLICIES)


def test_a_technique_fills_the_seam():
    assert TECHNIQUES


@each_policy
@given(lengths=LENGTHS)
def test_each_item_lies_in_exactly_one_row_and_no_row_is_over_its_capacity(policy, lengths):
    packing = policy.pack(lengths)
    assert sorted(chain.from_iterable(packing.rows)) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in row) <= packing.capacity_tokens for row in packing.rows)


@each_policy
@given(lengths=LENGTHS)
def test_no_row_is_empty_and_rows_are_no_longer_than_the_longest_item_needs(policy, lengths):
    packing = policy.pack(lengths)
    assert all(packing.rows)
    assert packing.capacity_tokens == -(-max(lengths, default=0) // 128) * 128
    assert sum(packing.pads(lengths)) == packing.num_tokens - sum(lengths)


@each_policy
@given(lengths=LENGTHS)
def test_equal_lengths_are_packed_equally_and_the_argument_stays(policy, lengths):
    before = list(lengths)
    assert policy.pack(lengths) == policy.pack(tuple(lengths))
    assert lengths == before
