"""One seed, one answer: alone, in company, preempted or moved, whatever the options (ARCHITECTURE section 5)."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.engine.messages import Goal
from headrace.techniques.sarathi.shape import ChunkedShape

MAX_TOKENS = 12
TOKEN_IDS = st.integers(0, 63)
OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.4, 1.0, 1.8]),
        "top_k": st.sampled_from([None, 1, 5, 40]),
        "top_p": st.sampled_from([1.0, 0.95, 0.6]),
        "min_p": st.sampled_from([0.0, 0.08]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.5]),
        "frequency_penalty": st.sampled_from([0.0, -0.4]),
        "logit_bias": st.dictionaries(TOKEN_IDS, st.floats(-6, 6, width=16), max_size=3).map(
            lambda bias: tuple(bias.items())
        ),
        "min_tokens": st.integers(0, MAX_TOKENS),
        "stop_token_ids": st.lists(TOKEN_IDS, max_size=2).map(tuple),
        "ignore_eos": st.booleans(),
        "seed": st.integers(0, 2**64 - 1),
        "logprobs": st.sampled_from([None, 0, 4]),
        "choice": st.integers(0, 3),
    }
)
ASKED = st.tuples(st.integers(0, 4), st.integers(4, 30), OPTIONS)
"""Which prompt, its length, and the options; equal prompts share their blocks."""
EIGHT = st.lists(ASKED, min_size=8, max_size=8)
few_examples = settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


def open_in(client, prompt_of, asked, **more):
    seed, length, options = asked
    return client.open(prompt_of(seed, length), max_tokens=MAX_TOKENS, **options, **more)


def alone(make_client, reference, prompt_of, asked):
    """Everything told of one answer, log-probabilities too, when nothing else runs."""
    client = make_client()
    answer = open_in(client, prompt_of, asked)
    client.steps()
    seed, length, options = asked
    assert client.tokens(answer) == reference(prompt_of(seed, length), max_tokens=MAX_TOKENS, **options)
    return client.sampled(answer)


@few_examples
@given(data=st.data(), asked=EIGHT, budget=st.sampled_from([5, 16, 64]))
def test_eight_together_in_any_order_answer_as_each_alone(make_client, reference, prompt_of, data, asked, budget):
    order = data.draw(st.permutations(range(8)))
    client = make_client(num_blocks=200, budget=budget, shape=ChunkedShape())
    answers = {index: open_in(client, prompt_of, asked[index]) for index in order}
    client.steps()
    for index, answer in answers.items():
        assert client.sampled(answer) == alone(make_client, reference, prompt_of, asked[index])
    client.at_rest()


def test_preempted_ones_answer_as_each_alone(make_client, reference, prompt_of):
    preemptions = []

    @few_examples
    @given(asked=EIGHT, num_blocks=st.sampled_from([12, 16, 22]))
    def check(asked, num_blocks):
        client = make_client(num_blocks=num_blocks, budget=16)
        answers = [open_in(client, prompt_of, one) for one in asked]
        client.steps()
        preemptions.append(client.stats().num_preemptions)
        for one, answer in zip(asked, answers, strict=True):
            assert client.sampled(answer) == alone(make_client, reference, prompt_of, one)
        client.at_rest()

    check()
    assert sum(count > 0 for count in preemptions) > len(preemptions) // 3


def copy_blocks(source, source_ids, target, target_ids):
    """What a transfer does: the bytes of blocks, from one arena into another."""
    for name in ("_tokens", "_positions"):
        getattr(target, name)[list(target_ids)] = getattr(source, name)[list(source_ids)]


def prefilled(prefill, decode, prompt_of, asked):
    """Take a prompt through one engine and go on in the other; returns the answer's id there."""
    moved = open_in(prefill, prompt_of, asked, goal=Goal.FIRST_TOKEN)
    answer = open_in(decode, prompt_of, asked, begins=False, arrives_whole=True)
    prefill.steps()
    while not decode.events[answer]:
        decode.steps(1)
    copy_blocks(prefill.runner, prefill.admitted(moved).block_ids, decode.runner, decode.admitted(answer).block_ids)
    (first,) = prefill.sampled(moved)
    prefill.close(moved)
    decode.begin(answer, asked[1], first)
    return answer


@few_examples
@given(asked=EIGHT, num_blocks=st.sampled_from([60, 200]))
def test_prefill_in_one_engine_and_decode_in_another_answer_as_one(
    make_client, reference, prompt_of, asked, num_blocks
):
    prefill, decode = make_client(budget=8), make_client(num_blocks=num_blocks)
    # Each begins while those before it decode.
    answers = [prefilled(prefill, decode, prompt_of, one) for one in asked]
    decode.steps()
    for one, answer in zip(asked, answers, strict=True):
        assert decode.sampled(answer) == alone(make_client, reference, prompt_of, one)
    if not decode.stats().num_preemptions:
        assert all(batch.num_tokens <= len(asked) for batch in decode.runner.batches)
    prefill.at_rest()
    decode.at_rest()
