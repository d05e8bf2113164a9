"""The recorder passes calls on and writes those that succeeded, with their times."""

import asyncio
import io

import pytest

from headrace.errors import InvalidRequest


@pytest.fixture(scope="module")
def recorder(traces):
    return traces("recorder")


@pytest.fixture(scope="module")
def contexts(traces):
    return traces("contexts")


@pytest.fixture
def record(recorder, contexts, run, tmp_path):
    """Return a function that records what a program does with a client, and reads the file."""

    def recorded(client, program):
        file = io.BytesIO()

        async def main():
            await program(recorder.Recorder(client, recorder.writer(file), asyncio.get_running_loop().time))

        run(main())
        (tmp_path / "trace").write_bytes(file.getvalue())
        return contexts.read(tmp_path / "trace")

    return recorded


def test_every_call_is_written_with_the_time_of_its_begin(record, contexts, fake_sdk):
    async def program(client):
        await asyncio.sleep(1.0)
        async with client.context("before ", mode="update", max_tokens=3) as context:
            await context.append("a", "x")
            await context.append(b"\xc3", "x")
            await context.update(iter([("x", "b"), ("y", b"c")]))
            await asyncio.sleep(1.0)
            await context.replace("y", iter([("z", "d")]))
            await context.checkpoint()
            assert [piece.text async for piece in context.close("why?")] == ["one", " two", ""]

    client = fake_sdk(call_s=0.5, token_s=0.5)
    at = {"context": "1"}
    segments = (contexts.Segment("x", "b"), contexts.Segment("y", contexts.Bytes(b"c")))
    assert record(client, program) == (
        contexts.Open(at_s=1.0, mode="update", prefix="before ", options={"max_tokens": 3}, **at),
        contexts.Append(at_s=1.0, text="a", segment="x", **at),
        contexts.Append(at_s=1.5, text=contexts.Bytes(b"\xc3"), segment="x", **at),
        contexts.Update(at_s=2.0, segments=segments, **at),
        contexts.Replace(at_s=3.0, from_segment="y", segments=(contexts.Segment("z", "d"),), **at),
        contexts.Checkpoint(at_s=3.0, **at),
        contexts.Close(at_s=3.0, query="why?", **at),
    )
    assert client.operations(0) == ["open", "append", "append", "update", "replace", "checkpoint", "close"]


def test_contexts_side_by_side_have_names_of_their_own(record, contexts, fake_sdk):
    async def use(client, text):
        chat = iter([{"role": "user", "content": text}])
        async with client.context(chat=chat) as context:
            await context.append(text)
            async for _ in context.close():
                pass

    async def program(client):
        await asyncio.gather(use(client, "one"), use(client, "two"))

    found = contexts.by_context(record(fake_sdk(call_s=1.0), program))
    assert {name: events[1].text for name, events in found.items()} == {"1": "one", "2": "two"}
    assert found["1"][0].chat == ({"role": "user", "content": "one"},)


def test_a_refused_call_is_not_written(record, contexts, fake_sdk):
    async def program(client):
        async with client.context() as context:
            with pytest.raises(InvalidRequest):
                await context.append("a")
            with pytest.raises(InvalidRequest):
                await anext(context.close("too long"))
            await context.append("b")
            async for _ in context.close("short"):
                pass

    client = fake_sdk()
    client.errors = {(0, "append"): InvalidRequest("no"), (0, "close"): InvalidRequest("no")}
    _, append, close = record(client, program)
    assert (append.text, close.query) == ("b", "short")


@pytest.mark.parametrize("is_told", [True, False])
def test_a_context_that_is_left_is_abandoned(record, contexts, fake_sdk, is_told):
    async def program(client):
        async with client.context() as context:
            await asyncio.sleep(2.0)
            if is_told:
                await context.abandon()

    _, abandon = record(fake_sdk(), program)
    assert abandon == contexts.Abandon(at_s=2.0, context="1")


def test_a_context_that_cannot_be_opened_is_not_written(record, fake_sdk):
    async def program(client):
        with pytest.raises(InvalidRequest):
            async with client.context():
                pass

    client = fake_sdk()
    client.errors = {(0, "open"): InvalidRequest("no")}
    assert record(client, program) == ()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_text_of_any_kind_is_written_as_what_it_says(record, contexts, fake_sdk, kind):
    async def program(client):
        async with client.context(mode="update") as context:
            await context.append(kind(b"caf\xc3"), "x")
            await context.update([("x", kind(b"\xc3\xa9"))])

    _, append, update, _ = record(fake_sdk(), program)
    assert append.text == contexts.Bytes(b"caf\xc3")
    assert update.segments == (contexts.Segment("x", contexts.Bytes(b"\xc3\xa9")),)


def test_calls_side_by_side_are_written_in_the_order_of_their_begins(record, contexts, fake_sdk):
    async def program(client):
        async with client.context() as context:
            await context.append("x" * 10)
            async with asyncio.TaskGroup() as group:
                group.create_task(context.checkpoint())
                await asyncio.sleep(1.0)
                await context.append("b")
            async for _ in context.close():
                pass

    events = record(fake_sdk(byte_s=1.0), program)
    assert [(event.at_s, type(event).__name__) for event in events] == [
        (0.0, "Open"),
        (0.0, "Append"),
        (0.0, "Checkpoint"),
        (1.0, "Append"),
        (10.0, "Close"),
    ]


def test_what_is_under_way_at_the_end_does_not_hold_the_rest_back(record, fake_sdk):
    async def program(client):
        async with asyncio.TaskGroup() as group:
            async with client.context() as context:
                await context.append("x" * 10)
                group.create_task(context.checkpoint())
                await asyncio.sleep(1.0)
                await context.append("b")

    events = record(fake_sdk(byte_s=1.0), program)
    assert [type(event).__name__ for event in events] == ["Open", "Append", "Checkpoint", "Append", "Abandon"]


def test_an_empty_name_is_the_last_segment_s_as_in_the_sdk(record, fake_sdk):
    async def program(client):
        async with client.context() as context:
            await context.append("a", "x")
            await context.append("b", "")

    _, _, append, _ = record(fake_sdk(), program)
    assert (append.text, append.segment) == ("b", None)


async def cancelled(*calls):
    """Make calls side by side, and cancel them while they are under way, the last one first."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    await asyncio.sleep(0.1)
    for task in reversed(tasks):
        task.cancel()
        await asyncio.wait([task])


def test_a_change_that_was_cancelled_was_sent(record, fake_sdk):
    async def program(client):
        async with client.context() as context:
            await cancelled(context.append("a"))
            await context.append("b")

    events = record(fake_sdk(call_s=1.0), program)
    assert [event.text for event in events[1:-1]] == ["a", "b"]


def test_a_change_that_was_cancelled_before_its_turn_was_not_sent(record, fake_sdk):
    async def program(client):
        async with client.context() as context:
            await cancelled(context.append("a"), context.append("never"))
            await context.append("b")

    events = record(fake_sdk(call_s=1.0), program)
    assert [event.text for event in events[1:-1]] == ["a", "b"]


def test_a_close_that_was_cancelled_ends_the_context_unless_another_call_succeeds(record, fake_sdk):
    async def program(client):
        for has_more in (False, True):
            async with client.context() as context:
                await context.append("a")
                await cancelled(anext(context.close("?")))
                if has_more:
                    await context.append("b")

    events = record(fake_sdk(byte_s=1.0), program)
    assert [type(event).__name__ for event in events if event.context == "1"] == ["Open", "Append", "Close"]
    assert [type(event).__name__ for event in events if event.context == "2"] == ["Open", "Append", "Append", "Abandon"]


def test_a_recorded_context_has_what_the_sdk_s_has(record, fake_sdk):
    seen = []

    async def program(client):
        async with client.context() as context:
            await context.append("a")
            seen.extend([context.context_id, context.model, context.max_context_tokens, context.state.num_segments])
            seen.extend([state.num_segments async for state in context.watch()])
            answer = context.close("why?")
            seen.append((await anext(answer)).text)
            seen.append((await answer.answer()).text)

    *_, close = record(fake_sdk(), program)
    assert seen == ["context-0", "fake", 64, 1, 1, "one", "one two"]
    assert close.query == "why?"


def test_what_is_no_context_is_passed_on_and_not_written(record, fake_sdk):
    seen = []

    async def program(client):
        seen.append(await client.generate("hm"))
        with pytest.raises(AttributeError):
            client.sing()

    assert record(fake_sdk(), program) == ()
    assert seen == ["hm!"]
