"""A context on its way through routers that die, refuse and come back."""

import asyncio
import contextlib

import pytest

from headrace.clock import VirtualClock
from headrace.core.request import FinishReason, Piece, Token
from headrace.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    InternalError,
    InvalidRequest,
    NotReady,
    PeerFailed,
    Saturated,
)
from headrace.testing.context_call import updated
from headrace.testing.frontend import say
from headrace.testing.ingestor import serve_frontend
from headrace.v1 import ingestor_pb2, router_pb2

UPDATE = ingestor_pb2.CONTEXT_MODE_UPDATE
CHECKPOINT = ingestor_pb2.CheckpointContext()


class Router:
    """A scripted router that can die and come back at its port."""

    def __init__(self, frontend, stack):
        self.frontend, self._stack, self._server = frontend, stack, contextlib.AsyncExitStack()
        self.port = 0

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    async def start(self, frontend=None):
        self.frontend = frontend or self.frontend
        self._server = await self._stack.enter_async_context(contextlib.AsyncExitStack())
        server = await self._server.enter_async_context(serve_frontend(self.frontend, self.port))
        self.port = server.port
        return self

    async def die(self):
        await self._server.aclose()


@pytest.fixture
async def routers(make_frontend):
    """Starts scripted routers, and ends them after the ingestor."""
    async with contextlib.AsyncExitStack() as stack:
        yield lambda *answer: Router(make_frontend(*answer), stack).start()


@pytest.fixture
async def opened(routers, caller):
    """A context with some text that a router has."""

    async def start(*others, answer=(), mode=0, request=None, **settings):
        router = await routers(*answer)
        addresses = [each.address for each in (router, *others)]
        ingestor, call = await caller(routers=addresses, **settings)
        first = await call().open(mode=mode, request=request or router_pb2.GenerateRequest())
        await first.append(1, "one two ")
        await router.frontend.seen(lambda contexts: contexts)
        return ingestor, router, first

    return start


def holding(*texts, at):
    """A script that waits for an event before its piece of that number, and the event."""
    go_on, script = asyncio.Event(), say(*texts)

    def play(request):
        pieces = list(script(request))
        return [*pieces[:at], go_on, *pieces[at:]]

    return play, go_on


def shown(text, frontend, version=-1):
    return text.decode(frontend.contexts[-1].versions[version], skip_special=False)


# -- While it is open ---------------------------------------------------------------


async def test_another_router_at_the_same_place_gets_all_that_is_known(opened, make_frontend, text):
    _, router, call = await opened()
    await router.die()
    await call.append(2, "three ")
    await router.start(make_frontend("x", "y"))
    await router.frontend.seen(lambda contexts: contexts)
    await call.close(3, "four")
    assert (await call.finish()).text == "xy"
    assert shown(text, router.frontend, 0) == "one two three"
    assert shown(text, router.frontend) == "one two three four"


async def test_the_next_router_is_taken_when_one_is_lost(opened, routers, text):
    second = await routers("x")
    _, router, call = await opened(second)
    await router.die()
    await second.frontend.seen(lambda contexts: contexts)
    await call.close(2, "four")
    assert (await call.finish()).text == "x"
    assert shown(text, second.frontend) == "one two four"
    assert len(router.frontend.contexts) == 1


async def test_a_context_that_is_closed_while_no_router_is_there_is_answered_when_one_is(opened, make_frontend):
    _, router, call = await opened(reopen_s=1000.0)
    await router.die()
    await call.close(2, "three")
    await asyncio.sleep(0.1)
    await router.start(make_frontend("x"))
    assert (await call.finish()).text == "x"


async def test_what_a_lost_router_had_computed_counts_no_more(opened, make_frontend):
    _, router, call = await opened()
    await call.until(lambda: call.state.computed_tokens)
    await router.die()
    await call.until(lambda: not call.state.computed_tokens)
    await call.operate(2, checkpoint=CHECKPOINT)
    assert call.state.checkpoint_sequence == 0
    await router.start(make_frontend())
    await call.until(lambda: call.state.checkpoint_sequence == 2)
    assert call.state.computed_tokens == len("one two") - 1
    await call.abandon(3)


@pytest.mark.parametrize(
    "error",
    [
        Saturated("full", retry_after_s=1.0),
        NotReady("not yet"),
        Draining("leaving"),
        PeerFailed("lost"),
        Cancelled("?"),
    ],
    ids=lambda error: error.code,
)
async def test_a_router_that_has_no_place_is_asked_again_while_the_context_is_open(routers, caller, error):
    router = await routers()
    router.frontend.refusals = [error] * 4
    _, call = await caller(routers=[router.address])
    first = await call().open()
    await first.append(1, "one two ")
    await router.frontend.seen(lambda contexts: contexts)
    await first.close(2)
    assert (await first.finish()).text == "abc"


async def test_a_router_whose_call_is_too_late_is_not_named_to_the_client(routers, caller):
    router = await routers()
    router.frontend.refusals = [DeadlineExceeded(f"the deadline passed while {router.address} worked")]
    _, call = await caller(routers=[router.address])
    first = await call().open()
    await first.append(1, "one two ")
    with pytest.raises(DeadlineExceeded, match="before the answer was complete"):
        await first.finish()


async def test_what_no_other_attempt_can_mend_ends_the_context(routers, caller):
    router = await routers()
    router.frontend.refusals = [InvalidRequest("no", field="cache_scope")]
    ingestor, call = await caller(routers=[router.address])
    first = await call().open()
    await first.append(1, "one two ")
    with pytest.raises(InvalidRequest, match="no") as caught:
        await first.finish()
    assert caught.value.field == "cache_scope"
    assert ingestor.left() == ""


async def test_the_deadline_ends_the_search_for_a_router(opened):
    clock = VirtualClock(1000.0)
    ingestor, router, call = await opened(clock=clock)
    await router.die()
    clock.advance(601.0)
    with pytest.raises(DeadlineExceeded):
        await call.finish()
    await ingestor.at_rest()


async def test_pauses_are_short_again_after_a_router_was_heard(opened, make_frontend, monkeypatch):
    monkeypatch.setattr("headrace.ingestor.run.PAUSE_S", 0.001)
    paused, sleep = [], asyncio.sleep

    async def note(seconds, *rest):
        if asyncio.current_task().get_coro().__qualname__ == "RouterRun.run":
            paused.append(seconds)
        await sleep(seconds, *rest)

    monkeypatch.setattr(asyncio, "sleep", note)
    _, router, call = await opened()
    for _ in range(2):
        await call.until(lambda: call.state.computed_tokens)
        paused.clear()
        await router.die()
        while len(paused) < 5:
            await sleep(0.001)
        assert paused[:3] == [0.001, 0.002, 0.004]
        await call.until(lambda: not call.state.computed_tokens)
        await router.start(make_frontend())
    await call.abandon(2)


async def test_every_call_to_a_router_has_a_name_of_its_own_that_is_not_too_long(opened, make_frontend):
    request = router_pb2.GenerateRequest(request_id="n" * 128)
    _, router, call = await opened(request=request)
    names = [router.frontend.contexts[0].request.request_id]
    await router.die()
    await router.start(make_frontend())
    await router.frontend.seen(lambda contexts: contexts)
    names.append(router.frontend.contexts[0].request.request_id)
    assert names == ["n" * 128, "n" * 126 + ".1"]
    await call.close(2)
    await call.finish()
    assert {each.piece.request_id for each in call.pieces} == {"n" * 128}


async def test_a_bug_on_the_way_to_the_router_ends_the_context_only(opened, monkeypatch, caplog):
    ingestor, router, call = await opened()
    monkeypatch.setattr("headrace.ingestor.run.num_common", lambda *_: 1 / 0)
    await call.put(2, append=ingestor_pb2.AppendText(text=b"three "))
    with pytest.raises(InternalError, match="its log has the cause"):
        await call.finish()
    assert "context was not sent" in caplog.text
    await ingestor.at_rest()


async def test_a_bug_on_the_way_back_ends_the_context_only(opened, monkeypatch, caplog):
    ingestor, router, call = await opened()
    monkeypatch.setattr("headrace.ingestor.run.piece_from_proto", lambda _: 1 / 0)
    await call.put(2, close=ingestor_pb2.CloseContext())
    with pytest.raises(InternalError, match="its log has the cause"):
        await call.finish()
    assert "context failed" in caplog.text
    await ingestor.at_rest()


# -- While it is answered -------------------------------------------------------------


@pytest.mark.parametrize("num_before", [0, 1, 4])
async def test_an_answer_goes_on_with_another_router_without_a_token_lost_or_twice(opened, routers, num_before):
    words = ("Wa", "ter ", "runs ", "down", ".")
    second = await routers(*words)
    request = router_pb2.GenerateRequest()
    request.sampling.temperature = 1.0
    ingestor, router, call = await opened(second, request=request)
    router.frontend.script, _ = holding(*words, at=num_before)
    await call.close(2, "Why?")
    await router.frontend.until(submitted=1)
    await call.until(lambda: len(call.pieces) == num_before)
    await router.die()
    await call.finish()
    assert (call.text, len(call.pieces)) == ("".join(words), len(words))
    assert [event.cursor for each in call.pieces for event in each.piece.events] == list(range(len(words)))
    before, after = router.frontend.requests[0], second.frontend.requests[0]
    assert before.prompt == after.prompt
    assert (before.sampling.seed, before.sampling.temperature) == (after.sampling.seed, 1.0)
    assert call.pieces[-1].piece.usage.completion_tokens == len(words)


@pytest.mark.parametrize("other", [("Wa", "lk"), ("Wa", "ter")], ids=["different", "shorter"])
async def test_another_answer_of_another_router_ends_the_context(opened, routers, other):
    second = await routers(*other)
    if other[1] == "lk":
        second.frontend.script = lambda request: [_piece(0, 3, "Wa"), _piece(1, 77, "lk", is_last=True)]
    ingestor, router, call = await opened(second)
    router.frontend.script, _ = holding("Wa", "ter ", "runs ", "down", at=3)
    await call.close(2, "Why?")
    await call.until(lambda: len(call.pieces) == 3)
    await router.die()
    with pytest.raises(InternalError, match="differs|shorter"):
        await call.finish()
    assert ingestor.left() == ""


def _piece(cursor, token_id, text, *, is_last=False):
    finish = FinishReason.STOP if is_last else None
    return Piece(choice=0, text=text, tokens=(Token(cursor=cursor, token_id=token_id),), finish=finish)


async def test_an_answer_is_asked_for_again_only_for_so_long(opened):
    ingestor, router, call = await opened(reopen_s=0.3)
    router.frontend.script = lambda request: [Saturated("full")]
    await call.put(2, close=ingestor_pb2.CloseContext())
    with pytest.raises(Saturated):
        await call.finish()
    assert len(router.frontend.requests) > 1
    assert ingestor.left() == ""


async def test_a_router_that_hangs_up_before_the_answer_is_complete_is_asked_again(opened):
    _, router, call = await opened()
    scripts = iter([lambda request: [next(iter(say("a", "b")(request)))], say("a", "b")])
    router.frontend.script = lambda request: next(scripts)(request)
    await call.close(2)
    assert (await call.finish()).text == "ab"


async def test_an_answer_that_fails_for_a_reason_ends_the_context_with_it(opened):
    _, router, call = await opened()
    router.frontend.script = lambda request: [*list(say("a", "b")(request))[:1], InternalError("a bug")]
    await call.close(2)
    with pytest.raises(InternalError, match="a bug"):
        await call.finish()
    assert call.text == "a"


# -- What is sent -------------------------------------------------------------------


async def test_nothing_is_sent_before_the_first_operation(routers, caller):
    router = await routers()
    _, call = await caller(routers=[router.address])
    first = await call().open(request=router_pb2.GenerateRequest(text="Before the context. "))
    await asyncio.sleep(0.05)
    assert router.frontend.contexts == []
    await first.append(1, "one ")
    await router.frontend.seen(lambda contexts: contexts)
    await first.abandon(2)


async def test_what_comes_close_together_is_sent_together(opened, text):
    ingestor, router, call = await opened(coalesce_s=0.2)
    for sequence in range(2, 42):
        await call.append(sequence, f"{sequence} ")
    await router.frontend.seen(lambda contexts: text.decode(contexts[0].versions[-1]).endswith("41"))
    assert len(router.frontend.contexts[0].versions) <= 4
    await call.abandon(42)


async def test_a_close_waits_for_nothing(opened):
    _, router, call = await opened(coalesce_s=1.0)
    await call.append(2, "three ")
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    await call.close(3)
    await call.finish()
    assert loop.time() - begun_s < 0.9


async def test_of_an_update_only_what_changes_is_sent(opened, text):
    ingestor, router, call = await opened(mode=UPDATE)
    before = router.frontend.contexts[0].versions[0]
    sent = ingestor.parts.counts.sent_tokens
    await call.operate(2, update=updated(("a", "one 2 three ")))
    await router.frontend.seen(lambda contexts: len(contexts[0].versions) == 2)
    assert (len(before), router.frontend.contexts[0].kept) == (len("one two"), [len("one ")])
    assert shown(text, router.frontend) == "one 2 three"
    assert ingestor.parts.counts.sent_tokens - sent == len("2 three")
    assert ingestor.parts.counts.dropped_tokens == len("two")
    await call.abandon(3)


async def test_all_that_is_sent_of_a_context_that_is_only_added_to_stays(opened):
    _, router, call = await opened(request=router_pb2.GenerateRequest(text="Before. "), coalesce_s=0.0)
    for sequence in range(2, 8):
        await call.append(sequence, f"{sequence} ")
    await call.close(8)
    await call.finish()
    [arrival] = router.frontend.contexts
    assert arrival.finals == [len(version) for version in arrival.versions[:-1]]
    assert arrival.kept == arrival.finals


async def test_of_a_context_that_is_updated_only_what_stands_before_it_stays(opened):
    _, router, call = await opened(mode=UPDATE, request=router_pb2.GenerateRequest(text="Before it. "), coalesce_s=0.0)
    for sequence in range(2, 8):
        await call.operate(sequence, update=updated(("a", f"{sequence} ")))
    await call.close(8)
    await call.finish()
    [arrival] = router.frontend.contexts
    assert set(arrival.finals) == {len("Before it.")}


async def test_an_answer_without_a_seed_gets_one_that_stays(opened, routers, make_frontend):
    second = await routers("a")
    _, router, call = await opened(second)
    router.frontend.script, _ = holding("a", at=0)
    await call.close(2)
    await router.frontend.until(submitted=1)
    await router.die()
    await call.finish()
    seeds = {each.frontend.requests[0].sampling.seed for each in (router, second)}
    assert len(seeds) == 1


async def test_whoever_ends_a_context_ends_the_call_to_its_router(opened):
    ingestor, router, call = await opened()
    router.frontend.script = lambda request: [asyncio.Event()]
    await call.close(2)
    await router.frontend.until(submitted=1)
    await call.abandon(3)
    await router.frontend.until(ended=1)
