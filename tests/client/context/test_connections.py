"""Contexts of the SDK over connections that break; and methods that are cancelled."""

import asyncio
import contextlib
import random

import grpc
import pytest

from headrace import ContextOverflow, InvalidRequest, PeerFailed, UnknownContext
from headrace.client.context_link import ContextLink
from headrace.ingestor.call import ContextCall
from headrace.ingestor.service import IngestorServicer
from headrace.ingestor.session import Session
from headrace.testing.frontend import say


@pytest.mark.parametrize("seed", range(4))
async def test_operations_keep_their_order_over_broken_connections(place, seed):
    found, rng = await place(), random.Random(seed)
    client = await found.client(retries=20)
    async with client.context() as context:
        tasks = []
        for number in range(40):
            tasks.append(asyncio.create_task(context.append(f"{number} ")))
            if rng.random() < 0.1:
                tasks.append(asyncio.create_task(context.checkpoint()))
            if rng.random() < 0.1:
                await asyncio.sleep(rng.random() / 100)
                await found.restart()
        await asyncio.gather(*tasks)
        answer = await context.close().answer()
    assert answer.text == found.whole_answer
    assert found.prompts() == ["".join(f"{number} " for number in range(40))]


@pytest.mark.parametrize("seed", range(4))
async def test_no_piece_is_lost_or_comes_twice_over_broken_connections(place, seed):
    found, rng = await place(), random.Random(seed)
    steps = [asyncio.Event() for _ in found.words]

    def play(request):
        for step, piece in zip(steps, say(*found.words)(request), strict=True):
            yield from (step, piece)

    found.frontend.script = play
    client = await found.client(retries=20)

    async def feed():
        for step in steps:
            step.set()
            await asyncio.sleep(rng.random() / 100)
            if rng.random() < 0.4:
                await found.restart()

    async with client.context() as context:
        await context.append("some text. ")
        stream = context.close()
        feeding = asyncio.create_task(feed())
        pieces = []
        async for piece in stream:
            pieces.append(piece.text)
            await asyncio.sleep(rng.random() / 200)
        await feeding
    assert pieces == found.words


async def test_pieces_that_come_by_two_calls_are_taken_once(place, monkeypatch):
    found, opened, may_open = await place(), asyncio.Event(), asyncio.Event()
    found.hold(5)
    open_link = ContextLink.open

    async def slowly(link):
        await open_link(link)
        opened.set()
        await may_open.wait()

    client = await found.client()
    async with client.context() as context:
        await context.append("some text. ")
        stream = context.close()
        first = await anext(stream)
        link = context._open_link()
        while len(link._pieces) < 4:
            await link.changed.wait()
        monkeypatch.setattr(ContextLink, "open", slowly)
        await found.restart()
        late = asyncio.create_task(context.append("late"))
        await opened.wait()
        pieces = [first, *[await anext(stream) for _ in range(2)]]
        may_open.set()
        with pytest.raises(InvalidRequest):
            await late
        pieces += [await anext(stream) for _ in range(2)]
    assert [piece.text for piece in pieces] == found.words[:5]


async def test_a_checkpoint_is_waited_for_over_a_broken_connection(place):
    found = await place()
    found.frontend.is_computing = False
    client = await found.client()
    async with client.context() as context:
        await context.append("some text. ")
        waiting = asyncio.create_task(context.checkpoint())
        await asyncio.sleep(0)
        await context.append("more text. ")
        await found.restart()
        found.frontend.is_computing = True
        await context.append("last text. ")
        async with asyncio.timeout(5.0):
            assert (await waiting).checkpoint == 2


async def test_whoever_watches_a_context_sees_it_over_a_broken_connection(place):
    found = await place()
    client = await found.client()
    async with client.context() as context:
        watch = context.watch()
        assert (await anext(watch)).applied == 0
        await found.restart()
        await context.append("some text. ")
        async with asyncio.timeout(5.0):
            while (await anext(watch)).applied < 1:
                pass
        await watch.aclose()


async def test_a_watch_takes_a_context_up_again_by_itself(place, drained):
    found = await place()
    client = await found.client()
    async with client.context() as context:
        watching = asyncio.create_task(drained(context.watch()))
        await asyncio.sleep(0.02)
        await found.restart()
        await asyncio.sleep(0.1)
        assert found.ingestor.parts.counts.resumed == 1
        await context.abandon()
        async with asyncio.timeout(5.0):
            await watching


async def test_a_context_is_taken_up_once_however_many_wait_for_it(place, drained):
    found = await place()
    found.frontend.is_computing = False
    client = await found.client()
    async with client.context() as context:
        await context.append("some text. ")
        waiting = [asyncio.create_task(context.checkpoint()) for _ in range(5)]
        waiting.append(asyncio.create_task(drained(context.watch())))
        await asyncio.sleep(0.02)
        await found.restart()
        await context.append("more text. ")
        await asyncio.sleep(0.1)
        assert found.ingestor.parts.counts.resumed == 1
        found.frontend.is_computing = True
        await context.append("last text. ")
        await anext(context.close())
        async with asyncio.timeout(5.0):
            await asyncio.gather(*waiting)


async def test_only_pieces_that_have_not_arrived_are_asked_for_again(place, monkeypatch):
    found, cursors, begin = await place(), [], ContextCall.__init__

    def note(self, session, cursor, tasks):
        cursors.append(cursor)
        begin(self, session, cursor, tasks)

    monkeypatch.setattr(ContextCall, "__init__", note)
    go_on = found.hold(3)
    client = await found.client()
    async with client.context() as context:
        stream = context.close("Why?")
        for _ in range(3):
            await anext(stream)
        await found.restart()
        go_on.set()
        assert (await stream.answer()).text == found.whole_answer
    assert cursors == [0, 3]


async def test_a_server_that_leaves_without_a_word_is_one_whose_connection_broke(place, monkeypatch):
    leaves = asyncio.Event()

    class Leaving(IngestorServicer):
        async def StreamContext(self, request_iterator, context):
            async for response in super().StreamContext(request_iterator, context):
                yield response
                if leaves.is_set():
                    leaves.clear()
                    await context.abort(grpc.StatusCode.CANCELLED, "")

    monkeypatch.setattr("headrace.testing.ingestor.IngestorServicer", Leaving)
    found = await place()
    client = await found.client()
    async with client.context() as context:
        leaves.set()
        await context.append("one ")
        await context.append("two ")
        await context.close().answer()
    assert found.ingestor.parts.counts.resumed == 1
    assert found.prompts() == ["one two "]


async def test_a_context_is_abandoned_behind_a_change_that_was_never_sent(place):
    found = await place()
    found.frontend.is_computing = False
    client = await found.client(retries=20)
    async with client.context() as context:
        await context.append("one ")
        waiting = asyncio.create_task(context.checkpoint())
        await asyncio.sleep(0.02)
        port = await found.ingestor.break_off()
        appending = asyncio.create_task(context.append("two "))
        await asyncio.sleep(0.05)
        appending.cancel()
        await found.ingestor.start(port)
        async with asyncio.timeout(5.0):
            while not found.ingestor.parts.counts.resumed:  # noqa: ASYNC110 it is a counter
                await asyncio.sleep(0.005)
    assert found.ingestor.sessions.live() == []
    with pytest.raises(UnknownContext):
        await waiting


async def test_a_refusal_that_was_not_heard_is_told_over_the_next_connection(place, monkeypatch):
    found = await place()
    apply, refused = Session.apply, asyncio.Event()

    async def unheard(*operation, **options):
        outcome = await apply(*operation, **options)
        refused.set()
        await asyncio.Event().wait()
        return outcome

    client = await found.client()
    async with client.context() as context:
        await context.append("some text. ")
        monkeypatch.setattr(Session, "apply", unheard)
        appending = asyncio.create_task(context.append("x" * 400))
        await refused.wait()
        monkeypatch.setattr(Session, "apply", apply)
        await found.restart()
        with pytest.raises(ContextOverflow):
            await appending
        assert context.state.num_tokens == len("some text. ")


async def test_an_operation_whose_answer_was_not_heard_is_carried_out_once(place, monkeypatch):
    found = await place()
    apply, applied = Session.apply, asyncio.Event()

    async def unheard(*operation, **options):
        await apply(*operation, **options)
        applied.set()
        await asyncio.Event().wait()

    client = await found.client()
    async with client.context() as context:
        await context.append("one ")
        monkeypatch.setattr(Session, "apply", unheard)
        appending = asyncio.create_task(context.append("two "))
        await applied.wait()
        monkeypatch.setattr(Session, "apply", apply)
        await found.restart()
        await appending
        await context.close().answer()
    assert found.prompts() == ["one two "]


async def test_a_change_that_is_cancelled_before_its_turn_is_not_carried_out(place, monkeypatch):
    found, begun, go_on = await place(), asyncio.Event(), asyncio.Event()
    apply = Session.apply

    async def slowly(*operation, **options):
        begun.set()
        await go_on.wait()
        return await apply(*operation, **options)

    client = await found.client()
    async with client.context() as context:
        monkeypatch.setattr(Session, "apply", slowly)
        first = asyncio.create_task(context.append("one "))
        await begun.wait()
        second = asyncio.create_task(context.append("two "))
        await asyncio.sleep(0)
        second.cancel()
        go_on.set()
        await first
        await context.append("three")
        await context.close().answer()
    assert found.prompts() == ["one three"]


@pytest.mark.parametrize("is_sent", [True, False])
async def test_a_change_that_is_cancelled_under_way_leaves_a_context_that_goes_on(place, is_sent):
    found = await place()
    client = await found.client(retries=20)
    async with client.context() as context:
        await context.append("one ")
        port = None if is_sent else await found.ingestor.break_off()
        appending = asyncio.create_task(context.append("two "))
        await asyncio.sleep(0 if is_sent else 0.05)
        appending.cancel()
        if port is not None:
            await found.ingestor.start(port)
        await context.append("three ")
        await context.close().answer()
    assert found.prompts() == ["one two three "]


async def test_a_close_that_is_cancelled_under_way_can_be_asked_for_its_answer_again(place):
    found = await place()
    client = await found.client(retries=20)
    async with client.context() as context:
        await context.append("one ")
        stream = context.close("Why?")
        port = await found.ingestor.break_off()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await stream.answer()
        await found.ingestor.start(port)
        assert (await stream.answer()).text == found.whole_answer
    assert found.prompts() == ["one Why?"]


async def test_nothing_is_added_to_a_context_of_which_it_is_not_known_what_it_has(place):
    found = await place(grace_s=0.3)
    client = await found.client(retries=1)
    async with client.context() as context:
        await context.append("one ")
        port = await found.ingestor.break_off()
        with pytest.raises(PeerFailed):
            await context.append("two ")
        await found.ingestor.start(port)
        while True:
            with contextlib.suppress(PeerFailed):
                async with client.context():
                    break
        with pytest.raises(PeerFailed):
            await context.append("two ")


async def test_a_context_that_was_given_up_meanwhile_is_unknown(place):
    found = await place(grace_s=0.05)
    client = await found.client(retries=20)
    async with client.context() as context:
        await context.append("one ")
        port = await found.ingestor.break_off()
        async with asyncio.timeout(5.0):
            while found.ingestor.sessions.live():  # noqa: ASYNC110 it is a counter
                await asyncio.sleep(0.01)
        await found.ingestor.start(port)
        with pytest.raises(UnknownContext):
            await context.append("two ")
