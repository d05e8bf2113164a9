"""Prompts that arrive in pieces and are computed by a peer: their blocks wait here for its KV."""

from headrace.core.request import Token
from headrace.engine.messages import HoldWriter, ReleaseWriter
from headrace.errors import BlockLost, InternalError, Saturated
from headrace.techniques.stream2llm.order import make_order

FCFS = make_order("fcfs")


def hold(client, tokens, **options):
    sequence = client.open(tokens, is_open=True, arrives_whole=True, begins=False, **options)
    client.steps()
    return sequence


def deliver(client, sequence, reference, **sampling):
    """Do what a prefill worker does once the prompt is closed."""
    client.steps()
    tokens, table = client.prompts[sequence], client.extended(sequence)[-1]
    assert table.version == client.versions[sequence]
    client.runner.write(table.block_ids, tokens)
    client.begin(sequence, len(tokens), Token(cursor=0, token_id=reference(tokens, **sampling)[0]))
    client.steps()


def test_a_held_prompt_is_given_blocks_as_it_grows(make_client, reference, prompt_of):
    client = make_client()
    answer = hold(client, prompt_of(1, 6))
    first = client.admitted(answer).block_ids
    client.revise(answer, prompt_of(2, 20))
    client.steps()
    [extended] = client.extended(answer)
    assert extended.block_ids[:2] == first
    assert len(extended.block_ids) == 7
    client.revise(answer, prompt_of(3, 3), keep=10, closed=True)
    deliver(client, answer, reference)
    assert client.tokens(answer) == reference(client.prompts[answer])


def test_blocks_that_a_shorter_prompt_does_not_need_go_when_it_begins(make_client, reference, prompt_of):
    client = make_client()
    answer = hold(client, prompt_of(1, 41))
    client.revise(answer, keep=5, closed=True)
    client.steps()
    assert client.stats().leased_blocks == 11
    client.runner.write(client.extended(answer)[-1].block_ids, client.prompts[answer])
    client.begin(answer, 5, Token(cursor=0, token_id=9))
    assert client.stats().leased_blocks == 2


def test_an_update_into_blocks_that_a_holder_shares_fails_it(make_client, prompt_of):
    client, prompt = make_client(), prompt_of(1, 21)
    client.run(prompt)
    answer = hold(client, prompt)
    assert client.admitted(answer).num_cached_tokens == 20
    client.revise(answer, (5,), keep=19)
    client.steps()
    assert isinstance(client.error(answer), BlockLost)


def test_blocks_that_wait_for_an_open_prompt_are_given_up_for_those_who_compute(make_client, reference, prompt_of):
    client = make_client(num_blocks=12, order=FCFS)
    held = hold(client, prompt_of(1, 33))
    answer = client.open(prompt_of(2, 20), max_tokens=4)
    client.steps()
    assert isinstance(client.error(held), Saturated)
    assert client.tokens(answer) == []
    client.close(held)
    client.steps()
    assert client.tokens(answer) == reference(prompt_of(2, 20), max_tokens=4)


def test_one_context_is_given_up_for_one_who_needs_room_though_its_writer_is_slow(make_client, prompt_of):
    client = make_client(num_blocks=20, order=FCFS, max_running=16)
    contexts = [hold(client, prompt_of(seed, 16)) for seed in range(1, 6)]
    for context in contexts:
        blocks = client.admitted(context).block_ids
        client.engine.apply(HoldWriter(writer_id=f"writer of {context}", block_ids=blocks))
    client.open(prompt_of(9, 15), max_tokens=1)
    for _ in range(10):
        client.steps(1)
        for context in contexts:
            if client.error(context):
                client.close(context)
    assert sum(client.error(context) is not None for context in contexts) == 1
    client.clock.advance(1.5)
    client.steps()
    assert sum(client.error(context) is not None for context in contexts) == 2
    for context in contexts:
        client.engine.apply(ReleaseWriter(writer_id=f"writer of {context}"))


def test_a_begin_before_there_are_blocks_fails_the_sequence(make_client, prompt_of):
    client = make_client(num_blocks=10, order=FCFS)
    first, second = hold(client, prompt_of(1, 9)), hold(client, prompt_of(2, 21))
    client.revise(first, prompt_of(1, 12), closed=True)
    client.steps()
    assert client.extended(first) == []
    assert client.error(second) is not None
    client.begin(first, 21, Token(cursor=0, token_id=5))
    assert isinstance(client.error(first), InternalError)


def test_one_who_leaves_is_waited_for_before_another_is_asked_to(make_client, prompt_of):
    client = make_client(num_blocks=12, order=FCFS)
    first, second = hold(client, prompt_of(1, 20)), hold(client, prompt_of(2, 20))
    client.open(prompt_of(3, 20), max_tokens=4)
    client.steps()
    assert client.error(first) is None
    assert isinstance(client.error(second), Saturated)


def test_an_answer_that_grows_takes_blocks_that_wait_for_an_open_prompt(make_client, reference, prompt_of):
    client = make_client(num_blocks=8, order=FCFS)
    answer = client.open(prompt_of(2, 8), max_tokens=20, ignore_eos=True)
    client.steps(2)
    held = hold(client, prompt_of(1, 20))
    assert isinstance(client.error(held), Saturated)
    client.close(held)
    client.steps()
    assert client.tokens(answer) == reference(prompt_of(2, 8), max_tokens=20, ignore_eos=True)
