"""When a context is given up, and what is left of it: nothing."""

import asyncio

import pytest

from headrace.clock import VirtualClock
from headrace.errors import DeadlineExceeded, Draining, InvalidRequest, NotReady, UnknownContext
from headrace.testing.context_call import appended
from headrace.v1 import ingestor_pb2, router_pb2

GRACE_S, IDLE_S = 30.0, 60.0
CHECKPOINT = ingestor_pb2.CheckpointContext()


@pytest.fixture
async def timed(caller):
    """Opens an ingestor on a clock that the test turns; returns what opens contexts, and what lets time pass."""
    clock = VirtualClock(1000.0)
    ingestor, call = await caller(clock=clock, grace_s=GRACE_S, idle_s=IDLE_S)

    def pass_s(seconds):
        clock.advance(seconds)
        ingestor.sessions.sweep()

    async def gone():
        """Wait until the calls that were left are noticed."""
        async with asyncio.timeout(5.0):
            while any(session.num_calls for session in ingestor.sessions.live()):  # noqa: ASYNC110 it is a counter
                await asyncio.sleep(0.001)

    return ingestor, call, pass_s, gone


@pytest.fixture
async def broken(timed, frontend):
    """A context whose only call broke off."""
    _, call, _, gone = timed

    async def start(**opening):
        first = await call().open(**opening)
        await first.append(1, "some text. ")
        await frontend.seen(lambda contexts: contexts)
        first.leave()
        await gone()
        return first.opened.context_id

    return start


async def test_a_context_is_there_for_a_grace_time_after_its_call_broke_off(timed, broken):
    _, call, pass_s, _ = timed
    name = await broken()
    pass_s(GRACE_S - 0.1)
    again = await call().resume(name)
    pass_s(GRACE_S)
    await again.append(2, "more")
    await again.abandon(3)


async def test_after_the_grace_time_a_context_is_gone_and_so_is_all_work_for_it(timed, broken, frontend):
    ingestor, call, pass_s, _ = timed
    name = await broken()
    pass_s(GRACE_S)
    await frontend.seen(lambda contexts: contexts[0].has_ended)
    await ingestor.at_rest()
    assert ingestor.parts.counts.expired == 1
    with pytest.raises(UnknownContext):
        await call().resume(name)


async def test_the_grace_time_begins_anew_with_every_call_that_leaves(timed, broken):
    _, call, pass_s, gone = timed
    name = await broken()
    for _ in range(3):
        pass_s(GRACE_S - 11.0)
        again = await call().resume(name)
        again.leave()
        await gone()
        again = await call().resume(name)
        await again.append(again.state.applied_sequence + 1, "more")
        again.leave()
        await gone()
    await (await call().resume(name)).abandon(5)


async def test_a_context_whose_calls_come_and_go_is_there_for_the_idle_time(timed, broken):
    ingestor, call, pass_s, gone = timed
    name = await broken(is_unattended=True)
    pass_s(GRACE_S + 1.0)
    again = await call().resume(name)
    await again.append(2, "more")
    again.leave()
    await gone()
    pass_s(IDLE_S - 1.0)
    assert ingestor.sessions.live()
    pass_s(1.0)
    await ingestor.at_rest()


async def test_a_closed_context_whose_calls_come_and_go_is_there_for_the_grace_time(timed, broken, frontend):
    ingestor, call, pass_s, gone = timed
    name = await broken(is_unattended=True)
    frontend.script = lambda request: [asyncio.Event()]
    again = await call().resume(name)
    await again.close(2)
    again.leave()
    await gone()
    pass_s(GRACE_S - 1.0)
    assert ingestor.sessions.live()
    pass_s(1.0)
    await ingestor.at_rest()
    await frontend.seen(lambda contexts: contexts[0].has_ended)


async def test_an_open_context_for_which_nothing_comes_is_given_up(timed, frontend):
    ingestor, call, pass_s, _ = timed
    first = await call().open()
    await first.append(1, "some text. ")
    pass_s(IDLE_S - 1.0)
    await first.append(2, "more")
    pass_s(IDLE_S - 1.0)
    assert ingestor.sessions.live()
    pass_s(1.0)
    with pytest.raises(DeadlineExceeded, match="nothing came for the context for 60 s"):
        await first.finish()
    await ingestor.at_rest()
    await frontend.seen(lambda contexts: contexts[0].has_ended)


async def test_a_repeated_operation_is_no_sign_of_life_that_lasts(timed):
    ingestor, call, pass_s, _ = timed
    first = await call().open()
    await first.append(1, "some text. ")
    pass_s(IDLE_S - 1.0)
    await first.put(1, append=appended("some text. "))
    again = await call().resume(first.opened.context_id)
    await again.append(1, "some text. ")
    pass_s(1.0)
    for each in (first, again):
        with pytest.raises(DeadlineExceeded):
            await each.finish()


async def test_a_context_whose_checkpoint_is_not_reached_yet_is_not_idle(timed, frontend):
    ingestor, call, pass_s, _ = timed
    frontend.is_computing = False
    first = await call().open()
    await first.append(1, "some text. ")
    await first.operate(2, checkpoint=CHECKPOINT)
    pass_s(2 * IDLE_S)
    assert ingestor.sessions.live()
    frontend.is_computing = True
    await first.append(3, "more text. ")
    await first.until(lambda: first.state.checkpoint_sequence == 2)
    pass_s(IDLE_S)
    with pytest.raises(DeadlineExceeded):
        await first.finish()


async def test_a_checkpoint_that_nobody_waits_for_keeps_no_context(timed, frontend):
    ingestor, call, pass_s, gone = timed
    frontend.is_computing = False
    first = await call().open(is_unattended=True)
    await first.append(1, "some text. ")
    await first.operate(2, checkpoint=CHECKPOINT)
    pass_s(2 * IDLE_S)
    assert ingestor.sessions.live()
    first.leave()
    await gone()
    pass_s(IDLE_S - 1.0)
    assert ingestor.sessions.live()
    pass_s(1.0)
    assert not ingestor.sessions.live()
    await ingestor.at_rest()


async def test_a_client_that_opens_and_never_reads_holds_nothing_beyond_the_idle_time(timed, frontend):
    ingestor, call, pass_s, _ = timed
    silent = call()
    await silent.send(open=ingestor_pb2.OpenContext())
    for sequence in range(1, 50):
        await silent.put(sequence, append=appended("text "))
    await frontend.seen(lambda contexts: contexts and len(contexts[0].versions[-1]) > 200)
    assert ingestor.parts.room.num_chars > 0
    pass_s(IDLE_S)
    await frontend.seen(lambda contexts: contexts[0].has_ended)
    assert (ingestor.sessions.live(), ingestor.parts.room.num_chars) == ([], 0)
    await ingestor.sessions.idle()
    silent.leave()


async def test_a_call_that_says_nothing_is_ended(caller, monkeypatch):
    monkeypatch.setattr("headrace.runtime.incoming.FIRST_REQUEST_S", 0.01)
    ingestor, call = await caller()
    with pytest.raises(DeadlineExceeded, match="no request came"):
        await call().finish()
    await ingestor.at_rest()


async def test_the_deadline_ends_a_context_that_is_open(timed, frontend):
    ingestor, call, pass_s, _ = timed
    first = await call().open(timeout_ms=50_000)
    await first.append(1, "some text. ")
    await frontend.seen(lambda contexts: contexts)
    pass_s(49.0)
    assert ingestor.sessions.live()
    pass_s(1.0)
    with pytest.raises(DeadlineExceeded, match="before the answer was complete"):
        await first.finish()
    await ingestor.at_rest()
    await frontend.seen(lambda contexts: contexts[0].has_ended)


async def test_the_deadline_ends_an_answer(timed, frontend):
    ingestor, call, pass_s, _ = timed
    script = frontend.script
    frontend.script = lambda request: [script(request).__next__(), asyncio.Event()]
    first = await call().open(timeout_ms=50_000)
    await first.close(1, "Why?")
    await first.until(lambda: first.pieces)
    pass_s(50.0)
    with pytest.raises(DeadlineExceeded, match="before the answer was complete"):
        await first.finish()
    await ingestor.at_rest()
    await frontend.until(ended=1)


async def test_what_ended_badly_is_told_to_those_who_come_in_time_and_forgotten_later(timed):
    _, call, pass_s, _ = timed
    first = await call().open(timeout_ms=50_000)
    pass_s(50.0)
    with pytest.raises(DeadlineExceeded):
        await first.finish()
    pass_s(GRACE_S - 0.1)
    with pytest.raises(DeadlineExceeded):
        await (await call().resume(first.opened.context_id)).finish()
    pass_s(0.1)
    with pytest.raises(UnknownContext):
        await call().resume(first.opened.context_id)


async def test_a_complete_answer_is_there_for_the_grace_time(timed):
    _, call, pass_s, _ = timed
    first = await call().open()
    await first.close(1, "Why?")
    await first.finish()
    pass_s(GRACE_S - 0.1)
    again = await call().resume(first.opened.context_id)
    assert (await again.finish()).text == "abc"
    pass_s(GRACE_S - 0.1)  # The time begins anew with every call that leaves.
    assert (await (await call().resume(first.opened.context_id, 1)).finish()).text == "bc"
    pass_s(GRACE_S)
    with pytest.raises(UnknownContext):
        await call().resume(first.opened.context_id)


async def test_an_abandoned_context_is_not_kept(timed):
    ingestor, call, pass_s, _ = timed
    await (await call().open()).abandon(1)
    pass_s(0.0)
    assert not ingestor.sessions.num_kept


async def test_of_too_many_ended_contexts_the_tenant_with_most_loses_its_oldest(caller):
    clock = VirtualClock(1000.0)
    ingestor, call = await caller(clock=clock, grace_s=GRACE_S, max_ended=3)
    names = []
    for tenant in ("a", "b", "b", "b"):
        context = await call(tenant).open()
        await context.close(1, "Why?")
        await context.finish()
        clock.advance(0.1)
        names.append((tenant, context.opened.context_id))
    ingestor.sessions.sweep()
    assert ingestor.sessions.num_kept == 3
    for tenant, name in (names[0], *names[2:]):
        assert (await (await call(tenant).resume(name)).finish()).text == "abc"
    with pytest.raises(UnknownContext):
        await call("b").resume(names[1][1])


async def test_a_context_takes_the_time_that_it_names_or_that_its_call_has(caller):
    clock = VirtualClock(1000.0)
    ingestor, call = await caller(clock=clock, default_timeout_s=100.0, max_timeout_s=200.0)

    async def left_ms(**opening):
        first = await call().open(**opening)
        [session] = ingestor.sessions.live()
        await first.abandon(1)
        return session.opening.deadline_unix_ms - clock.unix_ms()

    assert await left_ms() == 100_000
    assert await left_ms(timeout_ms=1) == 1
    assert await left_ms(timeout_ms=200_000) == 200_000
    with pytest.raises(InvalidRequest, match="200"):
        await left_ms(timeout_ms=200_001)


@pytest.mark.parametrize(("is_unattended", "wanted_s"), [(False, 20.0), (True, 600.0)])
async def test_a_context_that_names_no_time_ends_with_its_call_unless_calls_come_and_go(
    caller, is_unattended, wanted_s
):
    ingestor, call = await caller()
    first = await call(timeout_s=20.0).open(is_unattended=is_unattended)
    [session] = ingestor.sessions.live()
    left_s = (session.opening.deadline_unix_ms - ingestor.parts.clock.unix_ms()) / 1000
    assert wanted_s - 10.0 < left_s <= wanted_s + 0.1
    await first.abandon(1)


async def test_the_text_of_a_context_that_was_given_up_is_not_kept(timed):
    ingestor, call, pass_s, _ = timed
    first = await call().open()
    await first.append(1, "some text. ")
    [session] = ingestor.sessions.live()
    pass_s(IDLE_S)
    with pytest.raises(DeadlineExceeded):
        await first.finish()
    assert session._growing.text == ""
    assert session._segments.text == ""


async def test_an_ingestor_that_leaves_opens_no_context_but_serves_those_that_are_there(caller):
    ingestor, call = await caller()
    first = await call().open()
    ingestor.sessions.is_draining = True
    with pytest.raises(Draining):
        await call().open()
    await first.append(1, "some text. ")
    await first.close(2)
    assert (await first.finish()).text == "abc"


async def test_contexts_that_an_ingestor_leaves_behind_are_told(caller):
    ingestor, call = await caller()
    first = await call().open()
    ingestor.sessions.end_all(lambda: Draining("leaving"))
    with pytest.raises(Draining):
        await first.finish()
    await ingestor.sessions.idle()


async def test_without_a_router_no_context_is_opened(caller, free_port):
    ingestor, call = await caller(routers=[f"127.0.0.1:{free_port}"])
    with pytest.raises(NotReady) as caught:
        await call().open(request=router_pb2.GenerateRequest(text="before"))
    assert caught.value.retry_after_s
    assert ingestor.left() == ""


async def test_without_a_worker_no_context_is_opened(caller, frontend):
    _, call = await caller()
    frontend._models = ()
    with pytest.raises(NotReady, match="no worker"):
        await call().open()
