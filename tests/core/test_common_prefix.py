"""How much two sequences begin with in common."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.common_prefix import num_common

# Few different items, so that long common beginnings are likely.
TOKENS = st.lists(st.integers(0, 2), max_size=40)
TEXT = st.text(alphabet="aé🌊", max_size=40)


def one_by_one(one, other):
    """The same, item by item."""
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


@given(TOKENS, TOKENS)
def test_lists_agree_up_to_the_first_item_that_differs(one, other):
    assert num_common(one, other) == one_by_one(one, other)


@given(TEXT, TEXT)
def test_texts_agree_up_to_the_first_character_that_differs(one, other):
    assert num_common(one, other) == one_by_one(one, other)


@given(TOKENS, TOKENS, TOKENS)
def test_a_beginning_that_both_were_given_is_found(begin, one, other):
    assert num_common(begin + one, begin + other) == len(begin) + one_by_one(one, other)


@given(TOKENS, TOKENS)
def test_it_does_not_matter_who_comes_first(one, other):
    assert num_common(one, other) == num_common(other, one)


@pytest.mark.parametrize("place", [0, 1, 999, 1000, 123_456, 999_999])
def test_a_difference_is_found_anywhere_in_long_lists(place):
    one = list(range(1_000_000))
    other = [*one[:place], -1, *one[place + 1 :]]
    assert num_common(one, other) == place
