"""What a caller of `AsyncClient.context` sees, over real gRPC on loopback."""

import asyncio

import pytest

from headrace import (
    AsyncClient,
    Cancelled,
    ContextOverflow,
    DeadlineExceeded,
    FinishReason,
    InvalidRequest,
    NotReady,
    Overloaded,
    UnknownContext,
)
from headrace.ingestor.sessions import Sessions
from headrace.testing.ingestor import open_ingestor

# -- All goes well -----------------------------------------------------------------


async def test_a_context_says_what_it_is(place):
    client = await (await place()).client()
    async with client.context("Before. ") as context:
        assert context.context_id.startswith("ingestor.")
        assert (context.model, context.max_context_tokens) == ("tiny", 400)
        assert (context.state.num_tokens, context.state.applied) == (len("Before. "), 0)


async def test_every_change_is_in_the_state_that_its_method_returns(place):
    client = await (await place()).client()
    async with client.context(mode="update") as context:
        states = [
            await context.append("one ", "a"),
            await context.append(bytearray(b"two ")),
            await context.append(memoryview(b"three "), "b"),
            await context.replace("b", [("c", "four "), ("d", b"five ")]),
            await context.update([("c", "four ")]),
            await context.checkpoint(),
        ]
        await context.close().answer()
        assert (context.state.is_closed, context.state.num_segments) == (True, 1)
    assert [state.applied for state in states] == [1, 2, 3, 4, 5, 6]
    assert [state.num_tokens for state in states] == [4, 8, 14, 18, 5, 5]
    assert [state.num_segments for state in states] == [1, 1, 2, 3, 1, 1]
    assert states[-1].checkpoint == 6


async def test_the_answer_is_that_of_any_call(place):
    found = await place()
    client = await found.client()
    async with client.context(temperature=0, max_tokens=7, seed=5, stop="END", request_id="r1") as context:
        await context.append("some text. ")
        answer = await context.close("Why?").answer()
    assert (answer.text, answer.finish) == (found.whole_answer, FinishReason.STOP)
    assert (answer.model, answer.request_id) == ("tiny", "r1")
    assert answer.usage.prompt_tokens == len("some text. Why?")
    assert 0 < answer.ttft_s <= answer.total_s
    [request] = found.frontend.requests
    assert (request.sampling.temperature, request.sampling.max_tokens, request.sampling.seed) == (0, 7, 5)
    assert request.stop == ("END",)


async def test_an_answer_is_iterated_or_asked_for_or_both(place):
    found = await place()
    client = await found.client()
    async with client.context() as context:
        await context.append("some text. ")
        stream = context.close()
        pieces = [await anext(stream), await anext(stream)]
        answer = await stream.answer()
        assert [piece async for piece in stream] == []
        assert await stream.answer() is answer
    assert [piece.text for piece in pieces] == found.words[:2]
    assert answer.text == found.whole_answer


async def test_a_context_is_watched_until_its_answer_begins(place):
    found = await place()
    found.hold(1)
    client = await found.client()
    states = []

    async def watch():
        async for state in context.watch():
            states.append(state)

    async with client.context() as context, asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(watch())
        await context.append("one two three ")
        await context.checkpoint()
        await anext(context.close())
        async with asyncio.timeout(5.0):
            await watching
    assert states[0].applied == 0
    assert any(state.num_computed for state in states)
    assert all(before != after for before, after in zip(states, states[1:], strict=False))


async def test_a_watch_ends_with_the_first_token_even_if_nobody_takes_it(place, drained):
    found = await place()
    go_on = found.hold(0)
    client = await found.client()
    async with client.context() as context:
        await context.append("some text. ")
        watching = asyncio.create_task(drained(context.watch()))
        answering = asyncio.create_task(context.close().answer())
        await found.frontend.until(submitted=1)
        answering.cancel()
        go_on.set()
        async with asyncio.timeout(5.0):
            states = await watching
    assert states[-1].is_closed


async def test_a_context_that_is_abandoned_is_watched_no_longer(place, drained):
    client = await (await place()).client()
    async with client.context() as context, asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(drained(context.watch()))
        await context.append("some text. ")
        await context.abandon()
        async with asyncio.timeout(5.0):
            await watching


async def test_operations_keep_the_order_in_which_tasks_issued_them(place):
    found = await place()
    client = await found.client()
    async with client.context() as context:
        await asyncio.gather(*(context.append(f"{number} ") for number in range(50)))
        await context.close().answer()
    assert found.prompts() == ["".join(f"{number} " for number in range(50))]


# -- Leaving -----------------------------------------------------------------------


async def test_leaving_the_block_early_abandons_the_context(place):
    found = await place()
    found.hold(2)
    client = await found.client()
    async with client.context() as context:
        await context.append("some text. ")
        await anext(context.close())
        name = context.context_id
    await found.frontend.until(ended=1)
    assert found.ingestor.sessions.live() == []
    with pytest.raises(UnknownContext):
        found.ingestor.sessions.resume(name, "default")


async def test_an_error_in_the_block_abandons_the_context(place):
    found = await place()
    client = await found.client()
    with pytest.raises(ZeroDivisionError):
        async with client.context():
            raise ZeroDivisionError
    assert found.ingestor.sessions.live() == []


async def test_a_context_is_abandoned_while_another_task_waits_for_it(place):
    found = await place()
    found.frontend.is_computing = False
    client = await found.client()
    async with client.context() as context:
        await context.append("some text. ")
        waiting = asyncio.create_task(context.checkpoint())
        await asyncio.sleep(0.02)
    assert found.ingestor.sessions.live() == []
    with pytest.raises(UnknownContext):
        await waiting


async def test_nothing_can_be_done_with_a_context_before_it_is_open_or_after(place):
    client = await (await place()).client()
    context = client.context()
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="async with"):
            await context.append("x")
    await context.abandon()
    async with context:
        await context.abandon()
        with pytest.raises(InvalidRequest, match="is over"):
            await context.append("x")
        await context.abandon()


async def test_nothing_can_be_added_to_a_context_that_is_closed(place):
    found = await place()
    go_on = found.hold(1)
    client = await found.client()
    async with client.context() as context:
        await context.append("some text. ")
        stream = context.close()
        await anext(stream)
        with pytest.raises(InvalidRequest, match="is closed"):
            await context.append("late")
        with pytest.raises(InvalidRequest, match="is closed"):
            await anext(context.close())
        go_on.set()
        assert (await stream.answer()).text == found.whole_answer
        with pytest.raises(InvalidRequest, match="is over"):
            await context.append("late")


# -- Refusals ----------------------------------------------------------------------


async def test_a_close_that_is_refused_can_be_tried_again(place):
    found = await place()
    client = await found.client()
    async with client.context() as context:
        await context.append("x" * 390)
        stream = context.close("y" * 50)
        for _ in range(2):
            with pytest.raises(ContextOverflow, match="441 tokens|440 tokens"):
                await anext(stream)
        await context.close("y").answer()
    assert found.prompts() == ["x" * 390 + "y"]


@pytest.mark.parametrize(
    ("act", "field"),
    [
        (lambda context: context.append("\ud800"), "text"),
        (lambda context: context.append(5), "text"),
        (lambda context: context.append("x", "\ud800"), "segment"),
        (lambda context: context.replace("\ud800", []), "from_segment"),
        (lambda context: context.update([("a", "x"), ("b",)]), "segments[1]"),
        (lambda context: context.update([(5, "x")]), "segments[0].id"),
        (lambda context: context.update([("a", "\ud800")]), "segments[0].text"),
        (lambda context: anext(context.close("\ud800")), "query"),
        (lambda context: anext(context.close(b"\xff")), "query"),
        (lambda context: context.append(b"\xff"), "append.text"),
        (lambda context: context.replace("z", []), "replace.from_segment_id"),
    ],
)
async def test_what_cannot_be_sent_or_done_is_an_invalid_request_and_the_context_goes_on(place, act, field):
    found = await place()
    client = await found.client()
    async with client.context(mode="update") as context:
        await context.append("one ", "a")
        with pytest.raises(InvalidRequest) as caught:
            await act(context)
        assert caught.value.field == field
        await context.append("two ", "b")
        await context.close().answer()
    assert found.prompts() == ["one two "]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"mode": "both"}, "mode"),
        ({"prefix": "x", "chat": []}, "prefix"),
        ({"prefix": "\ud800"}, "prefix"),
        ({"unknown": 1}, "unknown"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"timeout_s": 1e9}, "timeout_s"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
async def test_an_opening_that_makes_no_sense_is_refused_before_it_is_sent(options, field):
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(InvalidRequest) as caught:
            client.context(**options)
    assert caught.value.field == field


async def test_a_context_waits_for_a_place(place):
    found = await place(max_tenant_streams=1)
    client = await found.client()
    async with client.context() as first, asyncio.TaskGroup() as tasks:
        await first.append("x")
        second = tasks.create_task(_answer_of(client, "second"))
        await asyncio.sleep(0.05)
        assert not second.done()
        await first.abandon()
        assert (await second).text == found.whole_answer


async def _answer_of(client, text, **options):
    async with client.context(**options) as context:
        await context.append(text)
        return await context.close().answer()


async def test_whoever_does_not_wait_for_a_place_is_told(place):
    found = await place(max_tenant_streams=1)
    client = await found.client(retries=0)
    async with client.context():
        with pytest.raises(Overloaded):
            await _answer_of(client, "x")


async def test_an_ingestor_without_a_router_is_not_ready(place, free_port, text, cuts):
    async with open_ingestor(text, [f"127.0.0.1:{free_port}"], cuts=cuts) as ingestor:
        async with AsyncClient(ingestor.address, retries=0) as client:
            with pytest.raises(NotReady):
                await _answer_of(client, "x")


async def test_the_deadline_ends_a_context(place):
    found = await place()
    found.hold(1)
    client = await found.client()
    async with client.context(timeout_s=0.3) as context:
        await context.append("some text. ")
        with pytest.raises(DeadlineExceeded):
            await context.close().answer()
    await found.frontend.until(ended=1)


async def test_a_context_under_which_the_client_is_closed_is_cancelled(place):
    found = await place(grace_s=0.1)
    found.hold(1)
    client = await found.client()
    async with client.context() as context:
        await context.append("some text. ")
        stream = context.close()
        await anext(stream)
        reading = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        await client.close()
        with pytest.raises(Cancelled):
            await reading


async def test_an_opening_that_is_cancelled_leaves_no_call(place, no_link_is_left, monkeypatch):
    found, asked = await place(), asyncio.Event()

    async def hang(*_):
        asked.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Sessions, "open", hang)
    client = await found.client()
    opening = asyncio.create_task(client.context().__aenter__())
    await asked.wait()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    no_link_is_left()
