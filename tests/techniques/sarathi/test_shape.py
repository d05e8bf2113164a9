import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import catalog
from headrace.core.cost import CostModel
from headrace.core.plan import SequenceView
from headrace.core.request import SequenceId
from headrace.errors import ConfigError
from headrace.seams.shape import ShapeContext
from headrace.techniques.sarathi.shape import LEAST_CHUNK_TOKENS

COST = CostModel(step_s=10e-3, prompt_s=10e-3, token_s=1e-3, pair_s=1e-6, decode_s=2e-3, context_s=1e-6)
LONG = 8000


def sequences_of(remaining, computed=None):
    return [
        SequenceView(
            sequence_id=SequenceId(f"s{index}"),
            arrival=index,
            num_tokens=100 if computed is None else computed + size,
            num_computed=100 - size if computed is None else computed,
            num_blocks=7,
            is_running=True,
        )
        for index, size in enumerate(remaining)
    ]


def cut(remaining, budget, computed=None, **context):
    shape = catalog.load("sarathi").shape(ShapeContext(**context))
    return [(sequence.arrival, size) for sequence, size in shape.cut(sequences_of(remaining, computed), budget)]


def within(target_s, remaining, budget=512, computed=500):
    return cut(remaining, budget, computed, cost=COST, tbt_target_s=target_s)


def step_s(found, remaining, computed):
    chunks = [(size, computed) for index, size in found if remaining[index] > 1]
    return COST.step(chunks, [computed + 1 for index, _ in found if remaining[index] == 1])


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
    assert within(0.1, []) == []


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


@given(
    remaining=st.lists(st.one_of(st.just(1), st.integers(1, LONG)), min_size=1, max_size=8),
    target_s=st.floats(0.0, 1.0),
    budget=st.integers(1, 512),
    computed=st.integers(0, LONG),
)
def test_a_step_with_decodes_ends_within_the_target_and_is_as_large_as_that_allows(
    remaining, target_s, budget, computed
):
    found = within(target_s, [1, *remaining], budget, computed)
    remaining = [1, *remaining]
    decodes = sum(size == 1 for size in remaining)
    chunks = [(index, size) for index, size in found if remaining[index] > 1]
    assert len(found) - len(chunks) == decodes
    assert [index for index, _ in chunks] == [index for index, size in enumerate(remaining) if size > 1][: len(chunks)]
    assert sum(size for _, size in found) <= max(budget, decodes + 1)
    if not chunks:
        assert max(remaining) == 1
        return
    is_least = len(chunks) == 1 and chunks[0][1] <= LEAST_CHUNK_TOKENS
    assert is_least or step_s(found, remaining, computed) <= target_s
    index, size = chunks[-1]
    is_budget_used = sum(size for _, size in found) >= max(budget, decodes + 1)
    larger = [*found[:-1], (index, size + 1)]
    assert size == remaining[index] or is_budget_used or step_s(larger, remaining, computed) > target_s


def test_without_decodes_nobody_waits_and_the_whole_token_budget_is_used():
    assert within(0.03, [LONG, LONG], budget=512) == [(0, 512)]


def test_a_chunk_shrinks_with_the_decodes_aboard_and_with_the_tokens_before_it():
    def chunk(num_decodes, computed):
        return within(0.2, [1] * num_decodes + [LONG], computed=computed)[-1][1]

    assert chunk(1, 500) > chunk(8, 500) > chunk(8, 4000) > LEAST_CHUNK_TOKENS


def test_where_decodes_alone_miss_the_target_a_prompt_still_moves():
    assert within(0.001, [1, 1, LONG, LONG]) == [(0, 1), (1, 1), (2, LEAST_CHUNK_TOKENS)]


def test_a_second_prompt_takes_the_time_that_a_short_first_one_leaves():
    found = within(0.2, [1, 20, LONG])
    assert [index for index, _ in found] == [0, 1, 2]
    assert found[1][1] == 20
    assert step_s(found, [1, 20, LONG], 500) <= 0.2


def test_dynamic_chunks_keep_the_time_of_a_step_while_fixed_ones_let_it_grow():
    def times(**context):
        found = [cut([LONG], 256, done, **context)[0][1] for done in (0, 1000, 2000, 4000, 8000)]
        return [COST.step([(size, done)]) for size, done in zip(found, (0, 1000, 2000, 4000, 8000), strict=True)]

    dynamic, fixed = times(cost=COST, is_dynamic=True), times(cost=COST)
    assert max(dynamic) == dynamic[0] == fixed[0]
    assert min(dynamic) > 0.95 * dynamic[0]
    assert fixed[-1] > 5 * fixed[0]


def test_a_fixed_budget_does_not_ask_what_steps_cost():
    remaining = [1, 300, LONG]
    assert cut(remaining, 512, 500, cost=COST) == cut(remaining, 512, 500)


@pytest.mark.parametrize(
    ("context", "field"), [({"tbt_target_s": 0.1}, "tbt_target_ms"), ({"is_dynamic": True}, "dynamic_chunks")]
)
def test_what_needs_the_cost_of_steps_is_refused_without_it(context, field):
    with pytest.raises(ConfigError) as caught:
        catalog.load("sarathi").shape(ShapeContext(**context))
    assert caught.value.field == field
