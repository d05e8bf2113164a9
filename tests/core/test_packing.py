import pytest

from headrace.core.packing import Packing, row_capacity


def test_a_row_is_as_long_as_the_longest_item_rounded_up_to_the_tile():
    assert [row_capacity([3, length, 2], 8) for length in (7, 8, 9)] == [8, 8, 16]
    assert row_capacity([1]) == 128
    assert row_capacity([], 8) == 0


def test_what_items_leave_free_is_padded():
    packing = Packing(rows=((2, 0), (1,)), capacity_tokens=10)
    assert packing.pads([3, 4, 5]) == (2, 6)
    assert packing.num_tokens == 20


@pytest.mark.parametrize("rows", [((0,),), ((0, 1, 1),), ((0, 1, 2),), ((1, 0), (0,))])
def test_an_item_that_is_missing_unknown_or_in_two_places_is_refused(rows):
    with pytest.raises(ValueError, match="do not hold each of 2 items once"):
        Packing(rows=rows, capacity_tokens=100).pads([3, 4])


def test_a_row_too_short_for_its_items_is_refused():
    with pytest.raises(ValueError, match="row of 6 tokens is too short for its items by 1"):
        Packing(rows=((0, 1),), capacity_tokens=6).pads([3, 4])
