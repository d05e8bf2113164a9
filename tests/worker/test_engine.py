"""The loop's view of the engine: events in order, errors typed, nothing left open."""

import asyncio
import threading

import pytest

from headrace.core.block import BlockHash
from headrace.core.request import SamplingParams, SequenceId, SequenceSpec, Token
from headrace.engine.messages import (
    Admitted,
    Begin,
    Close,
    EngineStats,
    Extended,
    Failed,
    Goal,
    Open,
    Pin,
    Progress,
    Sampled,
    Unpin,
)
from headrace.errors import DeadlineExceeded, InternalError, InvalidRequest, Saturated
from headrace.worker.engine import AsyncEngine

NAME = SequenceId("s")


class ScriptedPort:
    """Records commands; a test plays the engine."""

    def __init__(self):
        self.commands = []
        self.refused = ()

    def send(self, command):
        if isinstance(command, self.refused):
            raise Saturated("full", retry_after_s=1.0)
        self.commands.append(command)

    def stats(self):
        return EngineStats(num_steps=3)

    def sent(self, kind):
        return [command for command in self.commands if isinstance(command, kind)]

    def tell(self, event):
        """Send an event as the engine's thread does."""
        thread = threading.Thread(target=self.sent(Open)[-1].sink, args=(event,))
        thread.start()
        thread.join()


@pytest.fixture
def port():
    return ScriptedPort()


@pytest.fixture
async def engine(port):
    return AsyncEngine(port, asyncio.get_running_loop())


def spec(name=NAME):
    return SequenceSpec(
        sequence_id=name, model="m", prompt=(1, 2, 3), sampling=SamplingParams(), deadline_unix_ms=1 << 60
    )


def admitted(name=NAME):
    return Admitted(sequence_id=name, block_ids=(0,), num_cached_tokens=0, block_hashes=(), num_tokens=1)


def sampled(cursor):
    return Sampled(sequence_id=NAME, token=Token(cursor=cursor, token_id=cursor))


async def enter(engine, port):
    """Return an admitted sequence."""
    opening = asyncio.ensure_future(engine.open(spec(), Goal.ANSWER).__aenter__())
    await asyncio.sleep(0)
    port.tell(admitted())
    return await opening


async def test_entering_waits_for_admission_and_leaving_closes(engine, port):
    sequence = await enter(engine, port)
    assert sequence.admitted == admitted()
    assert port.sent(Close) == []
    await sequence.__aexit__()
    assert port.sent(Close) == [Close(sequence_id=NAME)]


async def test_what_arrives_with_the_admission_is_not_lost(engine, port):
    opening = asyncio.ensure_future(engine.open(spec(), Goal.ANSWER, is_open=True).__aenter__())
    await asyncio.sleep(0)
    extended = Extended(sequence_id=NAME, version=1, block_ids=(0, 1))
    port.tell(admitted())
    port.tell(extended)
    sequence = await opening
    assert sequence.admitted == admitted()
    assert await sequence.events() == [extended]


async def test_events_arrive_in_order_and_none_is_lost_between_wakeups(engine, port):
    sequence = await enter(engine, port)
    sink = port.sent(Open)[0].sink
    burst = threading.Thread(target=lambda: [sink(sampled(cursor)) for cursor in range(5000)])
    burst.start()
    seen = []
    async with asyncio.timeout(10):
        while len(seen) < 5000:
            seen.extend(event.token.cursor for event in await sequence.events())
    burst.join()
    assert seen == list(range(5000))


async def test_events_before_a_failure_are_handed_out_before_it_is_raised(engine, port):
    sequence = await enter(engine, port)
    port.tell(sampled(0))
    port.tell(Failed(sequence_id=NAME, error=DeadlineExceeded("late")))
    assert await sequence.events() == [sampled(0)]
    for _ in range(2):  # Who asks again is told again; it must not wait for ever.
        with pytest.raises(DeadlineExceeded):
            await sequence.events()


async def test_a_failure_from_outside_reaches_the_reader(engine, port):
    sequence = await enter(engine, port)
    reading = asyncio.ensure_future(sequence.events())
    await asyncio.sleep(0)
    sequence.fail(InternalError("elsewhere"))
    with pytest.raises(InternalError, match="elsewhere"):
        await reading


async def test_a_caller_that_leaves_while_it_waits_for_blocks_closes_the_sequence(engine, port):
    opening = asyncio.ensure_future(engine.open(spec(), Goal.ANSWER).__aenter__())
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert port.sent(Close) == [Close(sequence_id=NAME)]


async def test_an_event_before_admission_is_a_bug_and_closes_the_sequence(engine, port):
    opening = asyncio.ensure_future(engine.open(spec(), Goal.ANSWER).__aenter__())
    await asyncio.sleep(0)
    port.tell(Progress(sequence_id=NAME, num_computed=1))
    with pytest.raises(InternalError):
        await opening
    assert port.sent(Close) == [Close(sequence_id=NAME)]


async def test_a_full_mailbox_refuses_a_sequence_and_leaves_its_name_free(engine, port):
    port.refused = Open
    with pytest.raises(Saturated):
        engine.open(spec(), Goal.ANSWER)
    port.refused = ()
    await enter(engine, port)


async def test_a_begin_that_finds_the_mailbox_full_closes_the_sequence(engine, port):
    port.refused = Begin
    sequence = await enter(engine, port)
    with pytest.raises(Saturated):
        sequence.begin(0)
    await sequence.__aexit__()
    assert port.sent(Close) == [Close(sequence_id=NAME)]


async def test_a_second_sequence_of_the_same_name_does_not_end_the_first(engine, port):
    """The engine knows sequences by name: the close of the refused one would free the blocks of the first."""
    sequence = await enter(engine, port)
    with pytest.raises(InvalidRequest) as caught:
        async with engine.open(spec(), Goal.ANSWER):
            pass
    assert caught.value.field == "sequence_id"
    assert len(port.sent(Open)) == 1
    assert port.sent(Close) == []
    await sequence.__aexit__()
    await enter(engine, port)


async def test_closing_twice_closes_once(engine, port):
    """Between the two another sequence may have taken the name."""
    sequence = await enter(engine, port)
    sequence.close()
    sequence.close()
    assert len(port.sent(Close)) == 1


async def test_a_pin_answers_with_the_blocks_that_are_there(engine, port):
    pinning = asyncio.ensure_future(engine.pin("pin", [BlockHash(b"a"), BlockHash(b"b")], 1.0))
    await asyncio.sleep(0)
    [pin] = port.sent(Pin)
    threading.Thread(target=pin.reply, args=((4,),)).start()
    assert await pinning == (4,)


async def test_a_pin_that_nobody_waits_for_any_more_is_ended(engine, port):
    pinning = asyncio.ensure_future(engine.pin("pin", [BlockHash(b"a")], 1.0))
    await asyncio.sleep(0)
    pinning.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pinning
    assert port.sent(Unpin) == [Unpin(lease_id="pin")]
    port.sent(Pin)[0].reply((4,))  # The late answer finds nobody.
    await asyncio.sleep(0)
