import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.core.cost import CostModel
from headrace.core.request import FinishReason, Token
from headrace.engine.messages import Goal, Progress
from headrace.engine.scheduler import WholeShape
from headrace.errors import DeadlineExceeded, InternalError, InvalidRequest
from headrace.seams.shape import ShapeContext
from headrace.techniques.sarathi.shape import ChunkedShape

BLOCK = 4


def test_an_answer_is_what_the_model_says_token_by_token(make_client, reference, prompt_of):
    client = make_client()
    assert client.run(prompt_of(1, 21), max_tokens=12, ignore_eos=True) == reference(
        prompt_of(1, 21), max_tokens=12, ignore_eos=True
    )
    client.at_rest()


def test_events_come_in_order_with_cursors_and_one_finish(make_client, prompt_of):
    client = make_client(budget=8)
    answer = client.open(prompt_of(1, 21), max_tokens=3, ignore_eos=True)
    client.steps()
    kinds = [type(event).__name__ for event in client.events[answer]]
    assert kinds == ["Admitted", "Progress", "Progress", "Progress", "Sampled", "Sampled", "Sampled"]
    assert client.progress(answer) == [8, 16, 21]
    assert [token.cursor for token in client.sampled(answer)] == [0, 1, 2]
    assert [token.finish for token in client.sampled(answer)] == [None, None, FinishReason.LENGTH]


def test_admission_names_the_blocks_of_all_known_tokens(make_client, prompt_of):
    client = make_client()
    answer = client.open(prompt_of(1, 10), begins=False)
    client.steps(1)
    admitted = client.admitted(answer)
    assert (len(admitted.block_ids), len(admitted.block_hashes), admitted.num_cached_tokens) == (3, 2, 0)


def test_nothing_is_computed_before_begin(make_client, reference, prompt_of):
    client = make_client()
    answer = client.open(prompt_of(1, 10), begins=False)
    client.steps()
    assert client.runner.batches == []
    client.begin(answer, 0)
    client.steps()
    assert client.tokens(answer) == reference(prompt_of(1, 10))


@pytest.mark.parametrize("present", [0, 1, 4, 9])
def test_kv_that_is_present_is_not_computed(make_client, reference, prompt_of, present):
    client, prompt = make_client(), prompt_of(1, 10)
    answer = client.open(prompt, begins=False)
    client.steps()
    client.runner.write(client.admitted(answer).block_ids, prompt[:present])
    client.begin(answer, present)
    client.steps()
    assert client.tokens(answer) == reference(prompt)
    assert client.runner.batches[0].num_tokens == 10 - present


def test_a_prefilled_sequence_goes_on_after_its_first_token(make_client, reference, prompt_of):
    client, prompt = make_client(), prompt_of(1, 10)
    wanted = reference(prompt, ignore_eos=True)
    answer = client.open(prompt, begins=False, ignore_eos=True)
    client.steps()
    client.runner.write(client.admitted(answer).block_ids, prompt)
    first = Token(cursor=0, token_id=wanted[0], logprob=-0.5, top_logprobs=((wanted[0], -0.5),))
    client.begin(answer, 10, first)
    client.steps()
    assert client.tokens(answer) == wanted
    assert client.sampled(answer)[0] == first
    assert client.progress(answer) == []
    assert all(batch.num_tokens == 1 for batch in client.runner.batches)


@pytest.mark.parametrize(
    ("sampling", "finish"),
    [({"max_tokens": 1}, FinishReason.LENGTH), ({"stop_token_ids": (9,)}, FinishReason.STOP)],
    ids=["length", "stop"],
)
def test_the_first_token_may_be_the_last(make_client, prompt_of, sampling, finish):
    client = make_client()
    answer = client.open(prompt_of(1, 10), begins=False, **sampling)
    client.steps()
    client.begin(answer, 10, Token(cursor=0, token_id=9))
    client.steps()
    assert client.finish(answer) is finish
    assert client.runner.batches == []
    client.at_rest()


def test_a_first_token_with_part_of_the_kv_computes_the_rest(make_client, reference, prompt_of):
    client, prompt = make_client(), prompt_of(1, 10)
    wanted = reference(prompt, ignore_eos=True)
    answer = client.open(prompt, begins=False, ignore_eos=True)
    client.steps()
    client.begin(answer, 0, Token(cursor=0, token_id=wanted[0]))
    client.steps()
    assert client.tokens(answer) == wanted


def test_the_first_token_goal_keeps_the_blocks_until_close(make_client, reference, prompt_of):
    client, prompt = make_client(budget=4), prompt_of(1, 10)
    sequence = client.open(prompt, goal=Goal.FIRST_TOKEN, max_tokens=1)
    client.steps()
    assert client.progress(sequence) == [4, 8, 10]
    assert client.tokens(sequence) == reference(prompt, max_tokens=1)
    assert client.finish(sequence) is None
    assert client.stats().leased_blocks == 3
    client.close(sequence)
    client.at_rest()
    assert client.stats().cached_blocks == 2


@pytest.mark.parametrize("present", [-1, 11, 10], ids=["negative", "too many", "all, without a first token"])
def test_a_begin_that_leaves_nothing_to_sample_fails_the_sequence(make_client, prompt_of, present):
    client = make_client()
    sequence = client.open(prompt_of(1, 10), begins=False)
    client.steps()
    client.begin(sequence, present)
    client.steps()
    assert isinstance(client.error(sequence), InternalError)
    client.close(sequence)
    client.at_rest()


@pytest.mark.parametrize("token_id", [-1, 64])
def test_a_first_token_that_does_not_exist_fails_its_sequence_and_no_other(make_client, reference, prompt_of, token_id):
    client = make_client()
    other = client.open(prompt_of(2, 9))
    sequence = client.open(prompt_of(1, 10), begins=False)
    client.steps(1)
    client.begin(sequence, 10, Token(cursor=0, token_id=token_id))
    client.steps()
    assert isinstance(client.error(sequence), InternalError)
    assert client.tokens(other) == reference(prompt_of(2, 9))


def test_what_the_local_cache_has_is_not_computed_though_begin_counts_less(make_client, reference, prompt_of):
    client, prompt = make_client(), prompt_of(1, 10)
    client.run(prompt)
    again = client.open(prompt, begins=False)
    client.steps()
    before = client.stats().computed_tokens
    client.begin(again, 0)
    client.steps(1)
    assert client.stats().computed_tokens - before == 2
    client.steps()
    assert client.tokens(again) == reference(prompt)


def test_eos_ends_the_answer_and_is_shown(make_client, prompt_of):
    client = make_client()
    answer = client.open(prompt_of(1, 5), logit_bias=((2, 100.0),), min_tokens=3)
    client.steps()
    assert client.tokens(answer)[-1] == 2
    assert len(client.tokens(answer)) == 4
    assert client.finish(answer) is FinishReason.STOP


def test_eos_is_a_token_like_others_when_ignored(make_client, prompt_of):
    client = make_client()
    answer = client.open(prompt_of(1, 5), logit_bias=((2, 100.0),), ignore_eos=True, max_tokens=3)
    client.steps()
    assert client.tokens(answer) == [2, 2, 2]
    assert client.finish(answer) is FinishReason.LENGTH


def test_any_stop_token_ends_the_answer_but_not_before_the_minimum(make_client, reference, prompt_of):
    client, prompt = make_client(), prompt_of(1, 10)
    wanted = reference(prompt, ignore_eos=True)
    stopped = client.open(prompt, stop_token_ids=(62, wanted[2]), ignore_eos=True)
    client.steps()
    assert client.tokens(stopped) == wanted[:3]
    assert client.finish(stopped) is FinishReason.STOP
    patient = client.open(prompt, stop_token_ids=(wanted[2],), ignore_eos=True, min_tokens=5)
    client.steps()
    assert len(client.tokens(patient)) >= 5
    assert wanted[2] not in client.tokens(patient)[:5]


SAMPLINGS = [
    {},
    {"temperature": 0.9, "seed": 4},
    {"temperature": 0.9, "seed": 2**63 + 5, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"temperature": 0.0, "repetition_penalty": 1.4, "min_tokens": 5, "logit_bias": ((2, 6.0),)},
    {"temperature": 1.2, "seed": 1, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("has_kv", [False, True], ids=["recomputed", "pushed"])
def test_a_move_at_any_token_changes_no_later_token(make_client, reference, prompt_of, sampling, has_kv):
    prompt = prompt_of(1, 10)
    wanted = reference(prompt, **sampling)
    for cut in range(1, len(wanted)):
        client, output = make_client(), tuple(wanted[:cut])
        answer = client.open(prompt, output=output, begins=False, **sampling)
        client.steps()
        known = (*prompt, *output)
        present = len(known) - 1 if has_kv else 0
        client.runner.write(client.admitted(answer).block_ids, known[:present])
        client.begin(answer, present)
        client.steps()
        assert client.tokens(answer) == wanted[cut:]
        assert client.sampled(answer)[0].cursor == cut


def test_tokens_from_before_a_move_count(make_client, reference, prompt_of):
    client, prompt = make_client(), prompt_of(1, 10)
    wanted = reference(prompt, ignore_eos=True, temperature=0.9, seed=4, presence_penalty=0.5)
    answer = client.open(prompt, output=wanted[:5], ignore_eos=True, temperature=0.9, seed=4, presence_penalty=0.5)
    client.steps()
    assert client.tokens(answer) == wanted[5:]
    assert [token.cursor for token in client.sampled(answer)] == [5, 6, 7]
    assert client.finish(answer) is FinishReason.LENGTH


@pytest.mark.parametrize("limits", [{"context": 16}, {"num_blocks": 4}], ids=["context", "pool"])
def test_an_answer_ends_where_nothing_more_fits(make_client, prompt_of, limits):
    client = make_client(**limits)
    answer = client.open(prompt_of(1, 10), max_tokens=100, ignore_eos=True)
    client.steps()
    assert len(client.tokens(answer)) == 6
    assert client.finish(answer) is FinishReason.LENGTH
    client.at_rest()


@pytest.mark.parametrize(
    ("prompt", "sampling", "field"),
    [
        ((), {}, "prompt"),
        ((3,) * 64, {}, "prompt"),
        ((3, 64), {}, "prompt"),
        ((3, -1), {}, "prompt"),
        ((3,), {"stop_token_ids": (64,)}, "stop_token_ids"),
        ((3,), {"logit_bias": ((99, 1.0),)}, "logit_bias"),
        ((3,), {"output": (4, 5), "max_tokens": 2}, "max_tokens"),
        ((3,), {"max_tokens": 0}, "max_tokens"),
    ],
    ids=[
        "empty",
        "too long",
        "unknown token",
        "negative token",
        "unknown stop token",
        "unknown biased token",
        "complete already",
        "nothing to generate",
    ],
)
def test_what_cannot_be_served_is_refused_at_once(make_client, prompt, sampling, field):
    client = make_client(num_blocks=16)
    sequence = client.open(prompt, **sampling)
    error = client.error(sequence)
    assert isinstance(error, InvalidRequest)
    assert error.field == field
    client.at_rest()


def test_an_id_cannot_be_open_twice(make_client, prompt_of):
    client = make_client()
    client.open(prompt_of(1, 5))
    client.num_opened = 0
    assert client.open(prompt_of(2, 5)) == "s0"
    assert isinstance(client.error("s0"), InvalidRequest)


def test_a_second_open_of_an_id_leaves_the_first_alone(make_client, reference, prompt_of):
    client = make_client()
    first = client.open(prompt_of(1, 9))
    client.steps(2)
    kept, client.num_opened = client.events[first], 0
    client.open(prompt_of(2, 5))
    client.events[first] = kept
    client.steps()
    assert client.error(first) is None
    assert client.tokens(first) == reference(prompt_of(1, 9))


@pytest.mark.parametrize("num_steps", [0, 1, 2, 4])
def test_a_closed_sequence_leaves_nothing_behind(make_client, prompt_of, num_steps):
    client = make_client(budget=8)
    sequence = client.open(prompt_of(1, 20))
    client.steps(num_steps) if num_steps else None
    client.close(sequence)
    client.steps()
    client.at_rest()


@pytest.mark.parametrize("num_steps", [0, 3, 6])
def test_a_deadline_ends_a_sequence_wherever_it_is(make_client, reference, prompt_of, num_steps):
    client = make_client(budget=8)
    late = client.open(prompt_of(1, 20), life_s=10.0, max_tokens=100, ignore_eos=True)
    other = client.open(prompt_of(2, 9))
    client.steps(num_steps) if num_steps else None
    client.clock.advance(11.0)
    client.steps()
    assert isinstance(client.error(late), DeadlineExceeded)
    assert client.tokens(other) == reference(prompt_of(2, 9))
    client.at_rest()


def test_a_failed_sequence_fails_once_and_sets_no_alarm(make_client, prompt_of):
    client = make_client()
    held = client.open(prompt_of(1, 12), begins=False, life_s=10.0)
    assert client.engine.next_deadline_s() == pytest.approx(1010.0)
    client.steps()
    client.clock.advance(11.0)
    client.steps()
    client.steps()
    assert client.error(held)
    assert client.engine.next_deadline_s() is None
    client.begin(held, 0)
    client.steps()
    assert client.tokens(held) == []


def test_a_failing_step_fails_its_sequences_and_no_others(make_client, reference, prompt_of, caplog):
    client = make_client(max_running=1)
    hit = client.open(prompt_of(1, 9))
    spared = client.open(prompt_of(2, 9))
    client.steps(1)
    client.runner.failure = RuntimeError("device lost")
    client.steps()
    assert isinstance(client.error(hit), InternalError)
    assert client.tokens(spared) == reference(prompt_of(2, 9))
    assert "step failed" in caplog.messages
    client.at_rest()


def test_the_end_fails_whoever_is_left_once(make_client, prompt_of):
    client = make_client()
    sequences = [client.open(prompt_of(seed, 9), begins=seed > 1) for seed in range(4)]
    client.steps(2)
    client.engine.fail_all(InternalError("leaving"))
    client.engine.fail_all(InternalError("leaving"))
    assert all(client.error(sequence) for sequence in sequences)


REQUEST = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 4),
        "length": st.integers(1, 40),
        "max_tokens": st.integers(1, 12),
        "temperature": st.sampled_from([0.0, 0.8]),
        "key": st.integers(0, 3),
        "pause": st.integers(0, 3),
    }
)
COST = CostModel(step_s=1e-3, prompt_s=1e-3, token_s=1e-3, pair_s=1e-4, decode_s=1e-3, context_s=1e-5)
SHAPES = [
    *((ChunkedShape(), budget) for budget in (1, 3, 16, 64, 512)),
    (ChunkedShape(ShapeContext(cost=COST, tbt_target_s=0.02)), 64),
    (ChunkedShape(ShapeContext(cost=COST, is_dynamic=True)), 16),
    (WholeShape(), 64),
]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=st.lists(REQUEST, min_size=1, max_size=7),
    shape=st.sampled_from(SHAPES),
    num_blocks=st.sampled_from([15, 20, 40, 200]),
    max_running=st.integers(1, 8),
)
def test_answers_do_not_depend_on_chunks_memory_company_or_cache(
    make_client, reference, prompt_of, requests, shape, num_blocks, max_running
):
    client = make_client(num_blocks=num_blocks, shape=shape[0], budget=shape[1], max_running=max_running)
    sequences = []
    for request in requests:
        options = {name: request[name] for name in ("max_tokens", "temperature")}
        options |= {"seed": request["key"], "choice": request["key"] % 2}
        prompt = prompt_of(request["seed"], request["length"])
        sequences.append((client.open(prompt, **options), prompt, options))
        if request["pause"]:
            client.steps(request["pause"])
    client.steps()
    for sequence, prompt, options in sequences:
        assert client.tokens(sequence) == reference(prompt, **options)
    client.at_rest()


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=st.lists(REQUEST, min_size=1, max_size=6), budget=st.integers(1, 40), num_blocks=st.integers(14, 30))
def test_each_token_is_computed_once_between_preemptions(make_client, prompt_of, requests, budget, num_blocks):
    client = make_client(num_blocks=num_blocks, budget=budget)
    runs = {}
    plan_run = client.engine._run

    def watch(plan):
        for item in plan.items:
            start, end = runs.get(item.sequence_id, (None, None))
            admitted = client.admitted(item.sequence_id).num_cached_tokens
            assert item.tokens[0] == (admitted if end is None else end)
            assert item.layers == (0, client.runner.num_layers)
            runs[item.sequence_id] = (start, item.tokens[1])
        decodes = sum(item.num_tokens == 1 for item in plan.items)
        assert plan.num_tokens <= max(budget, decodes + 1)
        plan_run(plan)

    client.engine._run = watch
    make_room = client.engine._make_room

    def note(plan):
        make_room(plan)
        for sequence_id in (*plan.evict, *plan.admit):
            runs.pop(sequence_id, None)
        for sequence_id in plan.admit:
            runs[sequence_id] = (0, client.engine._sequences[sequence_id].kv_length)

    client.engine._make_room = note
    for request in requests:
        client.open(prompt_of(request["seed"], request["length"]), max_tokens=request["max_tokens"], ignore_eos=True)
    client.steps()
    client.at_rest()


def test_progress_is_not_told_while_decoding(make_client, prompt_of):
    client = make_client()
    answer = client.open(prompt_of(1, 10), max_tokens=5, ignore_eos=True)
    client.steps()
    assert sum(isinstance(event, Progress) for event in client.events[answer]) == 1
