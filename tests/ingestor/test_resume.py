"""A context outlives the calls that are made for it."""

import asyncio
import random

import pytest

from headrace.errors import InvalidRequest, PeerFailed, UnknownContext
from headrace.runtime.off_loop import off_loop
from headrace.testing.context_call import appended
from headrace.testing.frontend import say
from headrace.v1 import router_pb2

ANSWER = tuple("a long answer")


@pytest.fixture
def held(frontend):
    """Makes the router wait behind the first pieces of its answer until it is told to go on."""

    def hold(num_pieces):
        go_on, script = asyncio.Event(), say(*ANSWER)

        def play(request):
            pieces = list(script(request))
            return [*pieces[:num_pieces], go_on, *pieces[num_pieces:]]

        frontend.script = play
        return go_on

    return hold


def cursors(call):
    return [each.cursor for each in call.pieces]


async def test_a_context_goes_on_where_its_call_broke_off(caller, frontend, prompt_of):
    _, call = await caller()
    first = await call().open(request=router_pb2.GenerateRequest(text="Before. "))
    await first.append(1, "one ")
    await first.append(2, "é".encode()[:1], "new")
    first.leave()
    again = await call().resume(first.opened.context_id)
    assert (again.state.applied_sequence, again.state.answered_sequence) == (2, 0)
    assert again.opened == first.opened
    await again.append(3, "é".encode()[1:], "new")
    await again.close(4, " Why?")
    assert (await again.finish()).text == "abc"
    assert prompt_of(frontend.requests[0]) == "Before. one é Why?"


async def test_an_operation_is_carried_out_whole_when_its_call_breaks_off(caller, monkeypatch, frontend, prompt_of):
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(*work):
        begun.set()
        await go_on.wait()
        return await off_loop(*work)

    ingestor, call = await caller()
    first = await call().open()
    monkeypatch.setattr("headrace.ingestor.session.off_loop", slowly)
    await first.put(1, append=appended("one "))
    await begun.wait()
    first.leave()
    again = await call().resume(first.opened.context_id)
    assert again.state.applied_sequence == 0
    go_on.set()
    await again.append(1, "one ")
    await again.close(2, "two")
    await again.finish()
    assert prompt_of(frontend.requests[0]) == "one two"


async def test_an_answer_waits_for_whoever_closed_its_context(caller, held, frontend):
    _, call = await caller()
    go_on = held(0)
    first = await call().open()
    await first.close(1, "Why?")
    first.leave()
    go_on.set()
    await frontend.until(ended=1)
    again = await call().resume(first.opened.context_id)
    assert again.state.is_closed
    assert (await again.finish()).text == "".join(ANSWER)
    assert cursors(again) == list(range(1, len(ANSWER) + 1))


async def test_an_answer_goes_on_behind_what_has_arrived(caller, held):
    _, call = await caller()
    go_on = held(4)
    first = await call().open()
    await first.close(1, "Why?")
    await first.until(lambda: len(first.pieces) == 4)
    first.leave()
    again = await call().resume(first.opened.context_id, cursor=3)
    await again.until(lambda: again.pieces)
    assert cursors(again) == [4]
    go_on.set()
    await again.finish()
    assert first.text[:3] + again.text == "".join(ANSWER)
    assert (first.pieces[0].piece.model, again.pieces[0].piece.model) == ("tiny", "")
    assert again.pieces[-1].piece.usage.completion_tokens == len(ANSWER)


@pytest.mark.parametrize("seed", range(6))
async def test_however_often_a_call_breaks_off_no_piece_is_lost_or_comes_twice(caller, frontend, seed):
    rng = random.Random(seed)
    _, call = await caller()
    steps = [asyncio.Event() for _ in ANSWER]

    def play(request):
        for step, piece in zip(steps, say(*ANSWER)(request), strict=True):
            yield from (step, piece)

    frontend.script = play
    current, found, num_open = await call().open(), [], 0
    await current.close(1, "Why?")
    while len(found) < len(ANSWER):
        released = rng.randint(0, 3)
        for step in steps[num_open : num_open + released]:
            step.set()
        num_open = min(len(ANSWER), num_open + released)
        taken = rng.randint(0, num_open - len(found))
        await current.until(lambda: len(current.pieces) >= taken)  # noqa: B023 called at once
        found += [each.cursor for each in current.pieces[:taken]]
        name = current.opened.context_id
        current.leave()
        current = await call().resume(name, cursor=len(found))
    assert found == list(range(1, len(ANSWER) + 1))
    await current.finish()
    assert current.pieces == []


async def test_an_answer_that_is_complete_can_be_read_again(caller):
    _, call = await caller()
    first = await call().open()
    await first.close(1, "Why?")
    await first.finish()
    for cursor in range(4):
        again = await (await call().resume(first.opened.context_id, cursor=cursor)).finish()
        assert cursors(again) == list(range(cursor + 1, 4))


async def test_two_calls_at_once_get_the_whole_answer_each(caller, held):
    _, call = await caller()
    go_on = held(4)
    first = await call().open()
    second = await call().resume(first.opened.context_id)
    await first.close(1, "Why?")
    await second.until(lambda: len(second.pieces) == 4)
    third = await call().resume(first.opened.context_id, cursor=2)
    go_on.set()
    assert [(await each.finish()).text for each in (first, second)] == ["".join(ANSWER)] * 2
    assert (await third.finish()).text == "".join(ANSWER[2:])


async def test_a_cursor_beyond_the_answer_is_refused_and_leaves_the_context(caller):
    _, call = await caller()
    first = await call().open()
    with pytest.raises(InvalidRequest) as caught:
        await call().resume(first.opened.context_id, cursor=1)
    assert (caught.value.field, caught.value.limit) == ("resume.cursor", "0")
    await first.append(1, "fine")
    await first.abandon(2)


@pytest.mark.parametrize("name", ["", "ingestor.x", "another.x"])
async def test_a_context_that_never_was_is_not_found(caller, name):
    _, call = await caller()
    with pytest.raises(UnknownContext):
        await call().resume(name)


async def test_a_context_of_another_tenant_is_not_found(caller):
    _, call = await caller()
    first = await call("a").open()
    for tenant in ("b", None):
        with pytest.raises(UnknownContext):
            await call(tenant).resume(first.opened.context_id)
    await (await call("a").resume(first.opened.context_id)).abandon(1)


async def test_names_of_contexts_cannot_be_guessed(caller):
    _, call = await caller()
    calls = [await call().open() for _ in range(3)]
    names = [each.opened.context_id for each in calls]
    assert len(set(names)) == 3
    for name, each in zip(names, calls, strict=True):
        assert name.partition(".")[0] == "ingestor"
        assert len(name.partition(".")[2]) >= 32
        await each.abandon(1)


async def test_contexts_outlive_all_connections_of_their_ingestor(caller):
    ingestor, call = await caller()
    first = await call().open()
    await first.append(1, "one ")
    port = await ingestor.break_off()
    with pytest.raises(PeerFailed):
        await first.finish()
    await ingestor.start(port)
    again = await call().resume(first.opened.context_id)
    await again.append(2, "two")
    await again.close(3)
    assert (await again.finish()).text == "abc"
    assert ingestor.parts.counts.resumed == 1
