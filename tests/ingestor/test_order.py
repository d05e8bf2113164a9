"""Operations are carried out in the order of their numbers, each once."""

import pytest

from headrace.errors import ContextOverflow, InvalidRequest, UnknownContext
from headrace.testing.context_call import appended, replaced, updated
from headrace.v1 import ingestor_pb2, router_pb2

UPDATE = ingestor_pb2.CONTEXT_MODE_UPDATE
CHECKPOINT = ingestor_pb2.CheckpointContext()


async def test_a_repeated_operation_has_no_effect(caller, frontend, prompt_of):
    _, call = await caller()
    first = await call().open()
    for sequence, text in [(1, "one "), (2, "two "), (1, "one "), (2, "two "), (3, "three")]:
        await first.put(sequence, append=appended(text))
    await first.until(lambda: first.state.answered_sequence == 3)
    await first.close(4)
    assert (await first.finish()).text == "abc"
    assert prompt_of(frontend.requests[0]) == "one two three"
    assert first.refusals == []


async def test_a_repeated_operation_is_refused_again_for_the_same_reason(caller):
    _, call = await caller()
    first = await call().open(mode=UPDATE)
    await first.append(1, b"\xff")
    await first.append(2, "x" * 500)
    await first.append(3, "good")
    again = await call().resume(first.opened.context_id)
    for sequence, text in ((1, b"\xff"), (2, "x" * 500), (3, "good")):
        await again.append(sequence, text)
    expected = [(sequence, type(error), error.message) for sequence, error in first.refusals]
    assert [(sequence, type(error), error.message) for sequence, error in again.refusals] == expected
    assert [kind for _, kind, _ in expected] == [InvalidRequest, ContextOverflow]
    assert again.state.prompt_tokens == len("good")
    await again.abandon(4)


async def test_another_operation_of_a_number_that_was_carried_out_is_refused(caller, frontend, prompt_of):
    _, call = await caller()
    first = await call().open()
    await first.append(1, "one ")
    await first.append(1, "other ")
    await first.put(1, close=ingestor_pb2.CloseContext())
    await first.until(lambda: len(first.refusals) == 2)
    assert {error.field for _, error in first.refusals} == {"operation.sequence"}
    await first.close(2)
    await first.finish()
    assert prompt_of(frontend.requests[0]) == "one "


async def test_refusals_are_remembered_within_bounds(caller, monkeypatch):
    monkeypatch.setattr("headrace.ingestor.session.NUM_REFUSALS", 2)
    _, call = await caller()
    first = await call().open()
    for sequence in (1, 2, 3):
        await first.append(sequence, b"\xff")
    again = await call().resume(first.opened.context_id)
    for sequence in (1, 2, 3):
        await again.append(sequence, b"\xff")
    assert [sequence for sequence, _ in again.refusals] == [2, 3]
    await again.abandon(4)


async def test_whoever_did_not_count_has_a_repeated_number_refused(caller):
    _, call = await caller()
    first = await call().open()
    await first.append(1, "one")
    await first.put(1, append=appended("other"), refuse_repeated=True)
    await first.until(lambda: first.refusals)
    [(sequence, error)] = first.refusals
    assert (sequence, error.field, error.limit) == (1, "operation.sequence", "2")
    await first.operate(2, append=appended(" two"), refuse_repeated=True)
    assert first.state.prompt_tokens == len("one two")
    await first.abandon(3)


@pytest.mark.parametrize("sequence", [0, 3, 2**64 - 1])
async def test_a_wrong_number_ends_the_call_and_leaves_the_context_as_it_was(caller, sequence):
    _, call = await caller()
    first = await call().open()
    await first.append(1, "one")
    await first.put(sequence, append=appended("lost"))
    with pytest.raises(InvalidRequest) as caught:
        await first.finish()
    assert (caught.value.field, caught.value.limit) == ("operation.sequence", "2")
    again = await call().resume(first.opened.context_id)
    assert (again.state.applied_sequence, again.state.prompt_tokens) == (1, 3)
    await again.append(2, " two")
    assert again.state.prompt_tokens == len("one two")
    await again.abandon(3)


async def test_the_refusal_of_an_operation_comes_before_the_state_that_answers_it(caller):
    _, call = await caller()
    first = await call().open()
    await first.append(1, "one")
    await first.append(2, b"\xff")
    assert first.events[-2:] == ["refused", "state"]
    assert first.states[-2].answered_sequence == 1
    await first.abandon(3)


async def test_a_call_is_not_answered_by_the_operation_of_another_one(caller):
    _, call = await caller()
    first = await call().open()
    second = await call().resume(first.opened.context_id)
    await first.append(1, "one")
    await second.until(lambda: second.state.applied_sequence == 1)
    assert second.state.answered_sequence == 0
    await second.append(1, "one")
    assert (second.state.applied_sequence, second.state.answered_sequence) == (1, 1)
    await second.abandon(2)


async def test_two_calls_at_once_share_one_order(caller, frontend, prompt_of):
    _, call = await caller()
    calls = [await call().open()]
    calls.append(await call().resume(calls[0].opened.context_id))
    for sequence in range(1, 9):
        await calls[sequence % 2].append(sequence, f"{sequence} ")
    await calls[0].close(9)
    assert [(await each.finish()).text for each in calls] == ["abc", "abc"]
    assert prompt_of(frontend.requests[0]) == "1 2 3 4 5 6 7 8 "


async def test_operations_need_not_wait_for_those_before(caller, frontend, prompt_of):
    _, call = await caller()
    first = call()
    await first.send(open=ingestor_pb2.OpenContext(mode=UPDATE))
    await first.put(1, update=updated(("a", "one "), ("b", "two ")))
    await first.put(2, append=appended(b"\xff"))
    await first.put(3, replace=replaced("b", ("c", "three ")))
    await first.put(4, close=ingestor_pb2.CloseContext(query="four"))
    await first.finish()
    assert (first.text, [sequence for sequence, _ in first.refusals]) == ("abc", [2])
    assert prompt_of(frontend.requests[0]) == "one three four"


@pytest.mark.parametrize(
    "requests",
    [
        [],
        [{}],
        [{"operation": ingestor_pb2.ContextOperation(sequence=1, append=appended("x"))}],
        [{"open": ingestor_pb2.OpenContext(mode=7)}],
        [{"open": ingestor_pb2.OpenContext(request=router_pb2.GenerateRequest(num_choices=2))}],
        [{"open": ingestor_pb2.OpenContext(request=router_pb2.GenerateRequest(tokens=router_pb2.TokenPrompt()))}],
        [{"open": ingestor_pb2.OpenContext(request=router_pb2.GenerateRequest(request_id="a b"))}],
        [{"open": ingestor_pb2.OpenContext(request=router_pb2.GenerateRequest(cache_scope="everybody"))}],
        [{"open": ingestor_pb2.OpenContext(timeout_ms=2**32 - 1)}],
    ],
    ids=["nothing", "empty", "operation", "mode", "choices", "tokens", "request id", "scope", "timeout"],
)
async def test_a_call_that_does_not_open_a_context_properly_is_refused(caller, requests):
    ingestor, call = await caller()
    first = call()
    for request in requests:
        await first.send(**request)
    await first.call.done_writing()
    with pytest.raises(InvalidRequest):
        await first.finish()
    assert ingestor.left() == ""


@pytest.mark.parametrize(
    "request_of",
    [
        lambda context_id: {"open": ingestor_pb2.OpenContext()},
        lambda context_id: {"resume": ingestor_pb2.ResumeContext(context_id=context_id)},
        lambda context_id: {},
        lambda context_id: {"operation": ingestor_pb2.ContextOperation(sequence=1)},
    ],
    ids=["open", "resume", "nothing", "operation of no kind"],
)
async def test_what_is_no_operation_ends_the_call_and_leaves_the_context(caller, request_of):
    _, call = await caller()
    first = await call().open()
    await first.send(**request_of(first.opened.context_id))
    with pytest.raises(InvalidRequest):
        await first.finish()
    again = await call().resume(first.opened.context_id)
    assert again.state.applied_sequence == 0
    await again.abandon(1)


async def test_an_unknown_model_is_told_by_its_name(caller):
    _, call = await caller()
    with pytest.raises(InvalidRequest, match="'large' is not served here; served is 'tiny'"):
        await call().open(request=router_pb2.GenerateRequest(model="large"))


async def test_a_checkpoint_is_reached_when_all_before_it_is_computed(caller, frontend):
    _, call = await caller()
    frontend.is_computing = False
    first = await call().open()
    await first.append(1, "one two ")
    await first.operate(2, checkpoint=CHECKPOINT)
    assert first.state.checkpoint_sequence == 0
    frontend.is_computing = True
    await first.append(3, "three ")
    await first.until(lambda: first.state.checkpoint_sequence == 2)
    assert first.state.computed_tokens >= len("one two ") - 2
    await first.abandon(4)


async def test_a_checkpoint_of_a_context_without_tokens_is_reached_at_once(caller):
    _, call = await caller()
    first = await call().open()
    await first.operate(1, checkpoint=CHECKPOINT)
    assert first.state.checkpoint_sequence == 1
    await first.abandon(2)


async def test_a_checkpoint_that_nobody_computed_before_the_close_is_reached_with_the_answer(caller, frontend):
    _, call = await caller()
    frontend.is_computing = False
    first = await call().open()
    await first.append(1, "one two ")
    await first.operate(2, checkpoint=CHECKPOINT)
    await first.close(3)
    await first.finish()
    assert first.state.checkpoint_sequence == 2


async def test_checkpoints_that_are_reached_together_are_kept_once(caller, frontend):
    ingestor, call = await caller()
    frontend.is_computing = False
    first = await call().open(mode=UPDATE)
    await first.append(1, "one two ")
    for sequence in range(2, 40, 2):
        await first.operate(sequence, checkpoint=CHECKPOINT)
        await first.operate(sequence + 1, update=updated(("a", f"{sequence} two ")))
    [session] = ingestor.sessions.live()
    assert len(session._checkpoints) <= 2
    await first.abandon(40)


async def test_a_client_that_has_no_more_to_say_is_told_of_its_checkpoint_before_the_call_ends(caller, frontend):
    _, call = await caller()
    first = await call().open()
    await first.put(1, append=appended("one two "))
    await first.put(2, checkpoint=CHECKPOINT)
    await first.call.done_writing()
    await first.finish()
    assert first.state.checkpoint_sequence == 2
    again = await call().resume(first.opened.context_id)
    await again.abandon(3)


async def test_to_abandon_a_context_ends_the_call_in_peace_and_forgets_it(caller, frontend):
    ingestor, call = await caller()
    first = await call().open()
    await first.append(1, "one two ")
    await frontend.seen(lambda contexts: contexts)
    await first.abandon(2)
    assert first.state.answered_sequence == 2
    await frontend.seen(lambda contexts: contexts[0].has_ended)
    assert ingestor.left() == ""
    with pytest.raises(UnknownContext):
        await call().resume(first.opened.context_id)
