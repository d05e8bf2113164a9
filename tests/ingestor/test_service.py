"""Contexts through the SDK, an ingestor and a scripted router."""

import pytest

from headrace import ContextOverflow, InvalidRequest


async def test_the_answer_is_that_of_the_whole_prompt(served, frontend, prompt_of):
    _, client = await served()
    async with client.context("Before: ") as context:
        await context.append("first ")
        await context.append(b"second \xc3", "more")
        state = await context.append(b"\xa9 third", "more")
        assert (state.applied, state.num_segments) == (3, 2)
        answer = await context.close(" Why?").answer()
    assert answer.text == "abc"
    assert [prompt_of(request) for request in frontend.requests] == ["Before: first second é third Why?"]
    assert answer.usage.prompt_tokens == len("Before: first second é third Why?".encode())


async def test_segments_are_replaced(served, frontend, prompt_of):
    _, client = await served()
    async with client.context(mode="update") as context:
        await context.update([("a", "one "), ("b", "two "), ("c", "three ")])
        await context.replace("b", [("d", "four "), ("e", b"five ")])
        await context.append("and more ")
        await context.update([("a", "one "), ("e", "five "), ("b", "two ")])
        await context.replace("b", [])
        [piece async for piece in context.close("?")]
    assert prompt_of(frontend.requests[0]) == "one five ?"


async def test_a_chat_is_rendered_around_the_context(served, frontend, prompt_of, text):
    _, client = await served()
    system = [{"role": "system", "content": "Be brief."}]
    async with client.context(chat=system) as context:
        await context.append("Some text. ")
        assert (await context.close("What?").answer()).text == "abc"
    whole = [*system, {"role": "user", "content": "Some text. What?"}]
    assert prompt_of(frontend.requests[0]) == text.render_chat(whole)


async def test_a_refused_operation_changes_nothing(served, frontend, prompt_of):
    _, client = await served()
    async with client.context(mode="update", max_tokens=5) as context:
        await context.append("x" * 300)
        with pytest.raises(ContextOverflow, match="405 tokens"):
            await context.append("y" * 100)
        assert context.state.num_tokens == 300
        with pytest.raises(InvalidRequest):
            await context.append(b"\xff")
        with pytest.raises(ContextOverflow):
            await context.close("z" * 100).answer()
        await context.update([("short", "short ")])
        await context.close("end").answer()
    assert prompt_of(frontend.requests[0]) == "short end"
