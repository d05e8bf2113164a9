"""A prompt that cannot be computed before its deadline is refused before it is computed."""

import pytest

from headrace.core.cost import CostModel
from headrace.engine.messages import Goal
from headrace.errors import DeadlineExceeded

COST = CostModel(step_s=0.0, prompt_s=0.0, token_s=0.1, pair_s=0.0, decode_s=0.1, context_s=0.0)
LENGTH = 100
CERTAIN_S = COST.least_prefill_s(LENGTH)


@pytest.mark.parametrize("goal", [Goal.ANSWER, Goal.FIRST_TOKEN])
def test_a_prompt_that_takes_longer_than_it_has_is_refused_at_once(make_client, prompt_of, goal):
    client = make_client(cost=COST)
    sequence_id = client.open(prompt_of(1, LENGTH), goal=goal, life_s=0.99 * CERTAIN_S)
    client.steps()
    error = client.error(sequence_id)
    assert isinstance(error, DeadlineExceeded)
    assert error.field == "deadline"
    assert "100 prompt tokens" in str(error)
    assert client.stats().computed_tokens == 0
    client.end()


def test_one_that_may_be_done_in_time_is_computed(make_client, prompt_of, reference):
    client = make_client(cost=COST)
    prompt = prompt_of(1, LENGTH)
    assert client.run(prompt, life_s=1.01 * CERTAIN_S) == reference(prompt)


def test_the_bound_leaves_half_of_the_estimate_to_noise():
    assert pytest.approx(COST.prefill(LENGTH) / 2) == CERTAIN_S


def test_without_a_cost_model_nobody_is_refused(make_client, prompt_of, reference):
    client = make_client()
    prompt = prompt_of(1, LENGTH)
    assert client.run(prompt, life_s=0.001) == reference(prompt)


def test_tokens_that_are_present_take_no_time(make_client, prompt_of, reference):
    client = make_client(cost=COST)
    prompt = prompt_of(1, LENGTH)
    client.run(prompt)
    again = client.open(prompt, life_s=0.5 * CERTAIN_S)
    client.steps()
    assert client.tokens(again) == reference(prompt)


def test_kv_that_a_peer_sends_takes_no_time(make_client, prompt_of):
    client = make_client(cost=COST)
    sequence_id = client.open(prompt_of(1, LENGTH), begins=False, arrives_whole=True, life_s=0.5 * CERTAIN_S)
    client.steps()
    assert client.error(sequence_id) is None
    client.begin(sequence_id, LENGTH - 1)
    client.steps()
    assert client.finish(sequence_id) is not None


def test_a_prompt_that_has_fallen_behind_is_dropped_while_others_go_on(make_client, prompt_of, reference):
    client = make_client(cost=COST, budget=10)
    late = client.open(prompt_of(1, LENGTH), life_s=2 * CERTAIN_S)
    other = client.open(prompt_of(2, 20))
    client.steps(3)
    assert client.error(late) is None
    client.clock.advance(1.8 * CERTAIN_S)
    client.steps()
    assert isinstance(client.error(late), DeadlineExceeded)
    assert client.tokens(other) == reference(prompt_of(2, 20))
    client.end()


def test_an_answer_that_has_begun_goes_on_to_its_deadline(make_client, prompt_of):
    client = make_client(cost=COST)
    sequence_id = client.open(prompt_of(1, LENGTH), life_s=2 * CERTAIN_S, max_tokens=50, ignore_eos=True)
    client.steps(5)
    assert client.tokens(sequence_id)
    client.clock.advance(2 * CERTAIN_S - 0.01)
    client.steps()
    assert len(client.tokens(sequence_id)) == 50
