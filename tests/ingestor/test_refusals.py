"""What is asked of a context in vain changes nothing, and the context goes on."""

import asyncio

import pytest

from headrace.core.context import Segment
from headrace.errors import ContextOverflow, InternalError, Overloaded, Saturated
from headrace.ingestor.call import MOST_UNREAD, ContextCall
from headrace.testing.context_call import appended, replaced, updated
from headrace.v1 import ingestor_pb2, router_pb2

UPDATE = ingestor_pb2.CONTEXT_MODE_UPDATE


@pytest.fixture
async def opened(caller):
    """Opens an ingestor and a context of it with some text."""

    async def start(mode=UPDATE, text="some text. ", **settings):
        ingestor, call = await caller(**settings)
        first = await call().open(mode=mode)
        return ingestor, call, await first.append(1, text, "a")

    return start


def refusal(call):
    [(_, error)] = call.refusals
    return error


async def closed(call, sequence, query=""):
    """Close a context and take in its answer."""
    await call.close(sequence, query)
    return (await call.finish()).text


@pytest.mark.parametrize(
    ("operation", "field"),
    [
        ({"append": ingestor_pb2.AppendText(text=b"\xff")}, "append.text"),
        ({"append": ingestor_pb2.AppendText(text=b"x", segment_id="n" * 129)}, "append.segment_id"),
        ({"append": ingestor_pb2.AppendText(text=b"x" * 65)}, "operation"),
        ({"replace": replaced("b")}, "replace.from_segment_id"),
        ({"replace": replaced("a", ("x", "x"), ("x", "x"))}, "segments[1].id"),
        ({"update": updated(("x", "x" * 40), ("y", "y" * 25))}, "operation"),
        ({"update": updated(*((f"{place}", "") for place in range(4)))}, "segments"),
        ({"update": updated(("", "x"))}, "segments[0].id"),
        ({"close": ingestor_pb2.CloseContext(query="q" * 65)}, "operation"),
    ],
    ids=["no UTF-8", "name", "chunk", "unknown", "twice", "together", "segments", "no name", "query"],
)
async def test_what_makes_no_sense_is_refused_and_the_context_goes_on(opened, frontend, prompt_of, operation, field):
    _, _, call = await opened(max_chunk_bytes=64, max_segments=3)
    before = call.state
    await call.operate(2, **operation)
    assert refusal(call).field == field
    assert (call.state.prompt_tokens, call.state.num_segments) == (before.prompt_tokens, before.num_segments)
    assert await closed(call, 3, "Why?") == "abc"
    assert prompt_of(frontend.requests[0]) == "some text. Why?"


@pytest.mark.parametrize("operation", [{"replace": replaced("a")}, {"update": updated()}], ids=["replace", "update"])
async def test_a_context_to_append_to_is_not_replaced(opened, operation):
    _, _, call = await opened(mode=ingestor_pb2.CONTEXT_MODE_APPEND)
    await call.operate(2, **operation)
    assert refusal(call).field == "mode"
    await call.abandon(3)


async def test_a_segment_does_not_begin_inside_a_character(opened, frontend, prompt_of):
    _, _, call = await opened()
    await call.append(2, "é".encode()[:1])
    await call.append(3, "x", "new")
    assert "inside a character" in refusal(call).message
    await call.close(4)
    assert "inside a character" in call.refusals[-1][1].message
    await call.append(5, "é".encode()[1:])
    assert await closed(call, 6) == "abc"
    assert prompt_of(frontend.requests[0]) == "some text. é"


async def test_a_context_has_so_many_characters(opened):
    _, _, call = await opened(max_context_chars=20)
    await call.append(2, "x" * 10)
    assert refusal(call).limit == "20 characters"
    await call.append(3, "x" * 9)
    assert call.state.prompt_tokens == 20
    await call.abandon(4)


async def test_far_too_many_segments_are_not_even_read(opened, monkeypatch):
    made = []

    def make(**fields):
        made.append(fields)
        return Segment(**fields)

    monkeypatch.setattr("headrace.ingestor.wire.Segment", make)
    _, _, call = await opened(max_segments=3)
    await call.operate(2, update=updated(*((f"{place}", "") for place in range(50_000))))
    assert len(made) == 4
    assert refusal(call).field == "segments"
    await call.abandon(3)


async def test_an_overflow_in_the_midst_tells_the_number_of_tokens_and_can_be_repaired(opened, frontend, prompt_of):
    _, _, call = await opened(text="x" * 390)
    await call.append(2, "y" * 20, "b")
    error = refusal(call)
    assert isinstance(error, ContextOverflow)
    assert (error.num_tokens, "410 tokens" in error.message) == (410, True)
    assert (call.state.prompt_tokens, call.state.num_segments) == (390, 1)
    await call.operate(3, update=updated(("c", "short. ")))
    assert await closed(call, 4, "Why?") == "abc"
    assert prompt_of(frontend.requests[0]) == "short. Why?"


async def test_an_overflow_far_beyond_the_context_is_refused_before_it_is_encoded(opened, monkeypatch, text):
    _, _, call = await opened(mode=ingestor_pb2.CONTEXT_MODE_APPEND)
    encoded = []
    monkeypatch.setattr(type(text), "encode", lambda self, found, **_: encoded.append(len(found)) or [])
    await call.append(2, "x" * 100_000)
    assert isinstance(refusal(call), ContextOverflow)
    assert encoded == []
    monkeypatch.undo()
    await call.abandon(3)


async def test_an_answer_of_the_length_asked_for_must_fit(caller):
    _, call = await caller()
    request = router_pb2.GenerateRequest()
    request.sampling.max_tokens = 100
    first = await call().open(request=request)
    await first.append(1, "x" * 300)
    await first.append(2, "x")
    assert isinstance(refusal(first), ContextOverflow)
    await first.abandon(3)


async def test_a_context_whose_beginning_does_not_fit_is_not_opened(caller):
    ingestor, call = await caller()
    with pytest.raises(ContextOverflow, match="400 tokens|401 tokens"):
        await call().open(request=router_pb2.GenerateRequest(text="x" * 400))
    assert ingestor.left() == ""


async def test_a_query_that_does_not_fit_can_be_shortened(opened, frontend, prompt_of):
    _, _, call = await opened(text="x" * 390)
    await call.close(2, "y" * 50)
    assert isinstance(refusal(call), ContextOverflow)
    assert (call.state.is_closed, call.state.num_segments) == (False, 1)
    assert await closed(call, 3, "y") == "abc"
    assert prompt_of(frontend.requests[0]) == "x" * 390 + "y"


async def test_an_empty_context_is_not_closed(caller):
    _, call = await caller()
    first = await call().open()
    await first.close(1)
    assert refusal(first).field == "close.query"
    assert await closed(first, 2, "Why?") == "abc"


@pytest.mark.parametrize(
    "operation",
    [
        {"append": ingestor_pb2.AppendText(text=b"late")},
        {"update": updated()},
        {"replace": replaced("a")},
        {"close": ingestor_pb2.CloseContext()},
    ],
    ids=["append", "update", "replace", "close"],
)
async def test_nothing_changes_a_closed_context(opened, frontend, prompt_of, operation):
    _, _, call = await opened()
    frontend.script = _held(frontend)
    await call.close(2)
    await call.until(lambda: call.pieces)
    await call.operate(3, **operation)
    assert "closed" in refusal(call).message
    frontend.held.set()
    assert (await call.finish()).text == "abc"
    assert prompt_of(frontend.requests[0]) == "some text. "


def _held(frontend):
    """The script of the frontend, which waits behind its first piece."""
    frontend.held, script = asyncio.Event(), frontend.script

    def held(request):
        first, *rest = script(request)
        return [first, frontend.held, *rest]

    return held


async def test_a_closed_context_whose_answer_is_there_refuses_what_comes_late(opened):
    _, call, first = await opened()
    await closed(first, 2)
    again = await call().resume(first.opened.context_id, cursor=3)
    await again.append(3, "late")
    assert "closed" in refusal(again).message
    await again.finish()


async def test_a_tenant_has_so_many_contexts_and_others_have_theirs(caller):
    ingestor, call = await caller(max_tenant_streams=2)
    own = [await call("a").open() for _ in range(2)]
    with pytest.raises(Overloaded) as caught:
        await call("a").open()
    assert (caught.value.field, caught.value.limit) == ("x-tenant-id", "2")
    assert caught.value.retry_after_s
    other = await call("b").open()
    await own[0].abandon(1)
    own[0] = await call("a").open()
    for each in (*own, other):
        await each.abandon(1)
    assert ingestor.left() == ""


async def test_there_are_only_so_many_contexts(caller):
    _, call = await caller(max_streams=2)
    own = [await call(tenant).open() for tenant in "ab"]
    with pytest.raises(Saturated) as caught:
        await call("c").open()
    assert caught.value.retry_after_s
    for each in own:
        await each.abandon(1)


async def test_of_those_who_come_at_once_only_as_many_as_may_are_let_in(caller):
    ingestor, call = await caller(max_streams=3)
    calls = [call() for _ in range(12)]
    for each in calls:
        await each.send(open=ingestor_pb2.OpenContext(request=router_pb2.GenerateRequest(text="before ")))
    num_refused = 0
    for each in calls:
        try:
            await each.until(lambda: each.states)  # noqa: B023 called before the next one
        except Saturated:
            num_refused += 1
    assert num_refused == 9
    assert ingestor.parts.room.num_chars == 3 * len("before ")
    for each in calls:
        if each.states:
            await each.abandon(1)


async def test_a_client_that_reads_no_refusals_is_not_listened_to_any_longer(caller):
    ingestor, call = await caller(max_chunk_bytes=1)
    name = (await call().open()).opened.context_id
    session, num_taken, num_sent = ingestor.sessions.resume(name, "default"), 0, 3 * MOST_UNREAD

    async def requests():
        nonlocal num_taken
        for number in range(num_sent):
            num_taken += 1
            operation = ingestor_pb2.ContextOperation(sequence=number + 1, append=appended("xx"))
            yield ingestor_pb2.StreamContextRequest(operation=operation)
        leaving = ingestor_pb2.ContextOperation(sequence=num_sent + 1, abandon=ingestor_pb2.AbandonContext())
        yield ingestor_pb2.StreamContextRequest(operation=leaving)

    responses = ContextCall(session, 0, ingestor.parts.tasks).responses(requests())
    assert (await anext(responses)).HasField("opened")
    async with asyncio.timeout(5.0):
        while num_taken <= MOST_UNREAD:  # noqa: ASYNC110 it is a counter
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.1)
    assert num_taken == MOST_UNREAD + 1
    refused = [response.refused.sequence async for response in responses if response.HasField("refused")]
    assert refused == list(range(1, num_sent + 1))


async def test_text_for_which_there_is_no_room_is_taken_once_another_context_has_ended(opened):
    ingestor, call, first = await opened(max_text_chars=30)
    second = await call().open()
    await second.append(1, "x" * 20)
    error = refusal(second)
    assert isinstance(error, Saturated)
    assert error.retry_after_s
    assert (second.state.prompt_tokens, ingestor.parts.room.num_chars) == (0, len("some text. "))
    await first.abandon(2)
    await second.append(2, "x" * 20)
    assert second.state.prompt_tokens == 20
    await second.abandon(3)


@pytest.mark.parametrize("operation", [{"append": "x" * 395}, {"close": "x" * 395}], ids=["append", "close"])
async def test_text_that_was_refused_is_not_kept(opened, operation):
    ingestor, _, call = await opened()
    [session] = ingestor.sessions.live()
    await (call.append if "append" in operation else call.close)(2, *operation.values())
    assert isinstance(refusal(call), ContextOverflow)
    assert session._growing.text == "some text. "
    await call.abandon(3)


async def test_a_closed_context_takes_no_room_for_text(opened, frontend):
    ingestor, _, call = await opened()
    frontend.script = _held(frontend)
    await call.close(2)
    assert ingestor.parts.room.num_chars == 0
    frontend.held.set()
    await call.finish()


async def test_a_bug_in_one_context_ends_that_one_only(opened, monkeypatch):
    ingestor, call, first = await opened()
    second = await call().open()
    monkeypatch.setattr("headrace.ingestor.segments.SegmentedText.replace", lambda *_: 1 / 0)
    await first.put(2, update=updated())
    with pytest.raises(InternalError):
        await first.finish()
    await second.append(1, "fine")
    assert second.state.prompt_tokens == 4
    await second.abandon(2)
