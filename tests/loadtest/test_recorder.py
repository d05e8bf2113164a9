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
