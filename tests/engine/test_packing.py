import pytest

from headrace.core.packing import Packing
from headrace.engine.batch import batch_item
from headrace.engine.packing import PaddedRows, lay_out

PADS = (90, 91)
SLOTS = 8


class Rows:
    """A policy that answers what it was told."""

    def __init__(self, rows, capacity_tokens):
        self._packing = Packing(rows=rows, capacity_tokens=capacity_tokens)
        self.asked = None

    def pack(self, lengths):
        self.asked = list(lengths)
        return self._packing


def items_of(*lengths):
    return tuple(batch_item([7] * length, 0, [index], sample=True) for index, length in enumerate(lengths))


def lie(layout):
    """What lies where: the block of an item, or minus the number of pads."""
    return [-len(item.token_ids) if item.block_table == PADS else item.block_table[0] for item in layout.items]


def test_single_tokens_lie_side_by_side_before_the_rows():
    policy = Rows(((1,), (0,)), 5)
    layout = lay_out(items_of(4, 1, 3, 1), policy, PADS, SLOTS)
    assert policy.asked == [4, 3]
    assert lie(layout) == [1, 3, 2, -2, 0, -1]
    assert [layout.items[place].block_table[0] for place in layout.places] == [0, 1, 2, 3]


def test_items_share_a_row_in_the_order_of_the_policy():
    assert lie(lay_out(items_of(2, 3, 4), Rows(((2, 0), (1,)), 6), PADS, SLOTS)) == [2, 0, 1, -3]


def test_a_full_row_has_no_pads():
    assert lie(lay_out(items_of(2, 4), Rows(((0, 1),), 6), PADS, SLOTS)) == [0, 1]


def test_single_tokens_alone_are_never_padded():
    assert lie(lay_out(items_of(1, 1, 1), PaddedRows(), PADS, SLOTS)) == [0, 1, 2]


def test_a_long_run_of_pads_is_cut_to_the_slots_there_are():
    layout = lay_out(items_of(2), PaddedRows(tile_tokens=32), PADS, SLOTS)
    assert lie(layout) == [0, -8, -8, -8, -6]


def test_pads_are_sequences_of_their_own_that_nobody_samples():
    [_, pad] = lay_out(items_of(5), PaddedRows(tile_tokens=8), PADS, SLOTS).items
    assert (pad.positions, pad.kv_start, pad.block_table, pad.sample) == ((0, 1, 2), 0, PADS, False)


def test_rows_that_lose_an_item_are_refused():
    with pytest.raises(ValueError, match="each of 2 items once"):
        lay_out(items_of(2, 3), Rows(((0,),), 8), PADS, SLOTS)
