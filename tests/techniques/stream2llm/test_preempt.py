import dataclasses

import pytest

from headrace import catalog
from headrace.core.cost import CostModel
from headrace.core.plan import SchedulerView, SequenceView, SwapView
from headrace.core.request import SequenceId
from headrace.seams.preempt import PreemptContext

COST = CostModel(step_s=0.01, prompt_s=0.0, token_s=1e-3, pair_s=0.0, decode_s=1e-3, context_s=0.0)
VICTIM = SequenceView(
    sequence_id=SequenceId("s"), arrival=0, num_tokens=1600, num_computed=1600, num_blocks=100, is_running=True
)
RECOMPUTE_S = COST.prefill(1600, chunk_tokens=512)


def saves(save_s, load_s, cost=COST, **fields):
    """Return what the policy says of a victim whose 100 blocks take so long to copy."""
    view = SchedulerView(
        num_available=0,
        block_tokens=16,
        num_layers=1,
        token_budget=512,
        max_running=1,
        swap=SwapView(num_free_blocks=1000, save_s=save_s / 100, load_s=load_s / 100),
    )
    policy = catalog.load("stream2llm").preempt(PreemptContext(cost=cost))
    return policy.saves(dataclasses.replace(VICTIM, **fields), view)


@pytest.mark.parametrize("out", [0.01, 0.5, 0.99])
def test_both_ways_of_the_copy_count(out):
    assert saves(0.99 * RECOMPUTE_S * out, 0.99 * RECOMPUTE_S * (1 - out))
    assert not saves(1.01 * RECOMPUTE_S * out, 1.01 * RECOMPUTE_S * (1 - out))


def test_it_is_the_victims_tokens_that_count():
    assert saves(0.5, 0.5)
    assert not saves(50.0, 50.0)
    assert not saves(50.0, 50.0, num_computed=16)


def test_what_the_next_revision_throws_away_need_not_be_computed_again():
    assert saves(0.5, 0.5, is_open=True, kept_share=1.0)
    assert not saves(0.5, 0.5, is_open=True, kept_share=0.1)
    assert saves(0.5, 0.5, is_open=False, kept_share=0.1)


def test_without_a_cost_model_everything_is_copied():
    assert saves(0.0, 0.0, cost=None)
