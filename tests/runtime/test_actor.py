"""An actor handles one message at a time and leaves no question open."""

import asyncio
from dataclasses import dataclass

import pytest

from headrace.errors import Draining, InvalidRequest, Saturated
from headrace.runtime.actor import Actor


@dataclass(frozen=True, slots=True, kw_only=True)
class Add:
    amount: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Total:
    reply: "asyncio.Future[int]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Forget:
    reply: "asyncio.Future[int]"


class Counter:
    """A state with one owner; `gate` holds the handler up."""

    def __init__(self):
        self.total = 0
        self.num_inside = 0
        self.max_inside = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def handle(self, message):
        self.num_inside += 1
        self.max_inside = max(self.max_inside, self.num_inside)
        try:
            await self.gate.wait()
            match message:
                case Add(amount=amount) if amount < 0:
                    raise InvalidRequest("negative")
                case Add(amount=amount):
                    self.total += amount
                case Total(reply=reply) if self.total < 0:
                    reply.set_result(0)
                case Total(reply=reply):
                    if self.total == 13:
                        raise InvalidRequest("thirteen")
                    reply.set_result(self.total)
                case Forget():
                    pass
        finally:
            self.num_inside -= 1


def ask_total(actor):
    return actor.ask(lambda reply: Total(reply=reply))


async def test_messages_are_handled_in_order_and_one_at_a_time():
    counter = Counter()
    actor = Actor("counter", counter.handle, capacity=10)
    async with asyncio.TaskGroup() as tasks:
        actor.start(tasks)
        for amount in (1, 2, 3):
            actor.tell(Add(amount=amount))
        assert await ask_total(actor) == 6
        await actor.stop(grace_s=5)
    assert counter.max_inside == 1
    assert actor.stats().num_handled == 4


async def test_a_full_mailbox_refuses_with_a_time_to_retry():
    counter = Counter()
    actor = Actor("counter", counter.handle, capacity=2)
    actor.tell(Add(amount=1))
    actor.tell(Add(amount=1))
    with pytest.raises(Saturated) as caught:
        actor.tell(Add(amount=1))
    assert caught.value.retry_after_s
    assert actor.stats().depth == actor.stats().max_depth == 2


async def test_a_handler_that_raises_fails_its_question_and_the_actor_lives_on(caplog):
    counter = Counter()
    actor = Actor("counter", counter.handle, capacity=10)
    async with asyncio.TaskGroup() as tasks:
        actor.start(tasks)
        actor.tell(Add(amount=-1))
        actor.tell(Add(amount=13))
        with pytest.raises(InvalidRequest, match="thirteen"):
            await ask_total(actor)
        actor.tell(Add(amount=1))
        assert await ask_total(actor) == 14
        await actor.stop(grace_s=5)
    assert actor.stats().num_failed == 2
    assert "negative" in caplog.text


async def test_stopping_handles_what_waits_and_refuses_the_rest():
    counter = Counter()
    actor = Actor("counter", counter.handle, capacity=10)
    async with asyncio.TaskGroup() as tasks:
        actor.start(tasks)
        actor.tell(Add(amount=1))
        actor.tell(Add(amount=2))
        await actor.stop(grace_s=5)
    assert counter.total == 3
    with pytest.raises(Draining):
        actor.tell(Add(amount=1))


async def test_a_question_that_was_never_answered_fails_when_the_actor_ends():
    counter = Counter()
    actor = Actor("counter", counter.handle, capacity=10)
    async with asyncio.TaskGroup() as tasks:
        actor.start(tasks)
        asking = asyncio.gather(actor.ask(lambda reply: Forget(reply=reply)), return_exceptions=True)
        assert await ask_total(actor) == 0
        await actor.stop(grace_s=5)
        [outcome] = await asking
    assert isinstance(outcome, Draining)


async def test_a_handler_that_does_not_end_is_cancelled_after_the_grace_and_its_question_fails():
    counter = Counter()
    counter.gate.clear()
    actor = Actor("counter", counter.handle, capacity=10)
    async with asyncio.TaskGroup() as tasks:
        actor.start(tasks)
        asking = asyncio.gather(ask_total(actor), ask_total(actor), return_exceptions=True)
        await asyncio.sleep(0)
        await actor.stop(grace_s=0.01)
        assert [type(outcome) for outcome in await asking] == [Draining, Draining]


async def test_a_question_fails_when_the_owner_of_the_actor_dies():
    counter = Counter()
    counter.gate.clear()
    actor = Actor("counter", counter.handle, capacity=10)
    asked = []

    async def own_and_die():
        async with asyncio.TaskGroup() as tasks:
            actor.start(tasks)
            asked.append(asyncio.gather(ask_total(actor), return_exceptions=True))
            await asyncio.sleep(0)
            raise InvalidRequest("owner died")

    with pytest.raises(ExceptionGroup):
        await own_and_die()
    [outcome] = await asked[0]
    assert isinstance(outcome, Draining)


async def test_a_caller_that_leaves_does_not_stop_the_actor():
    counter = Counter()
    counter.gate.clear()
    actor = Actor("counter", counter.handle, capacity=10)
    async with asyncio.TaskGroup() as tasks:
        actor.start(tasks)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(actor.ask(lambda reply: Forget(reply=reply)), timeout=0.01)
        counter.gate.set()
        assert await ask_total(actor) == 0
        await actor.stop(grace_s=5)


async def test_an_actor_that_never_started_can_stop():
    actor = Actor("counter", Counter().handle, capacity=10)
    asking = asyncio.gather(ask_total(actor), return_exceptions=True)
    await asyncio.sleep(0)
    await actor.stop(grace_s=0)
    [outcome] = await asking
    assert isinstance(outcome, Draining)
    with pytest.raises(Draining):
        await ask_total(actor)
