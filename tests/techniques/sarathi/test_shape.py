from hypothesis import given
from hypothesis import strategies as st

from headrace import catalog
from headrace.core.plan import SequenceView
from headrace.core.request import SequenceId


def sequences_of(remaining):
    return [
        SequenceView(
            sequence_id=SequenceId(f"s{index}"),
            arrival=index,
            num_tokens=100,
            num_computed=100 - size,
            num_blocks=7,
            is_running=True,
        )
        for index, size in enumerate(remaining)
    ]


def cut(remaining, budget):
    shape = catalog.load("sarathi").shape()
    return [(sequence.arrival, size) for sequence, size in shape.cut(sequences_of(remaining), budget)]


def test_decodes_come_first_and_prompts_fill_the_rest_in_order():
    assert cut([50, 1, 30, 1], 64) == [(1, 1), (3, 1), (0, 50), (2, 12)]


def test_a_long_prompt_is_cut_at_the_budget():
    assert cut([90], 16) == [(0, 16)]


def test_the_last_chunk_of_a_prompt_may_be_one_token():
    assert cut([1], 16) == [(0, 1)]


def test_no_decode_is_left_out_and_a_prompt_still_moves_by_one():
    assert cut([1, 1, 1, 9], 2) == [(0, 1), (1, 1), (2, 1), (3, 1)]


def test_nothing_gives_nothing():
    assert cut([], 16) == []


@given(remaining=st.lists(st.one_of(st.just(1), st.integers(1, 99)), max_size=12), budget=st.integers(1, 64))
def test_a_step_keeps_to_its_budget_and_leaves_no_room_unused(remaining, budget):
    found = cut(remaining, budget)
    decodes = sum(size == 1 for size in remaining)
    total = sum(size for _, size in found)
    assert len({index for index, _ in found}) == len(found)
    assert all(1 <= size <= remaining[index] for index, size in found)
    assert total <= max(budget, decodes + 1)
    assert total == min(sum(remaining), max(budget, decodes + 1)) or decodes >= budget
    chunks = [index for index, _ in found if remaining[index] > 1]
    prompts = [index for index, size in enumerate(remaining) if size > 1]
    assert chunks == prompts[: len(chunks)]
