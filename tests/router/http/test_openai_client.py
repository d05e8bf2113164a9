import asyncio

import openai
import pytest

from headrace.core.request import Piece
from headrace.errors import DeadlineExceeded, Overloaded, PeerFailed, Saturated

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def client(base_url):
    async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_chat(client):
    answer = await client.chat.completions.create(model="tiny", messages=HI, n=2, seed=1, stop=["x"], logprobs=True)
    assert [choice.message.content for choice in answer.choices] == ["Hello", "Hello"]
    assert answer.choices[0].logprobs.content[0].logprob == -0.5
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_streamed_chat(client):
    stream = await client.chat.completions.create(
        model="tiny", messages=HI, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == 2


async def test_completion(client):
    answer = await client.completions.create(model="tiny", prompt=["a", "b"], echo=True, max_tokens=3)
    assert [choice.text for choice in answer.choices] == ["aHello", "bHello"]
    logged = await client.completions.create(model="tiny", prompt="a", logprobs=2)
    assert logged.choices[0].logprobs.token_logprobs == [-0.5, -1.0]


async def test_streamed_completion(client):
    stream = await client.completions.create(model="tiny", prompt="a", stream=True)
    assert [chunk.choices[0].text async for chunk in stream] == ["Hel", "lo"]


async def test_models(client):
    assert [model.id async for model in client.models.list()] == ["tiny"]
    assert (await client.models.retrieve("tiny")).id == "tiny"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Overloaded("quota", retry_after_s=1.0), openai.RateLimitError),
        (Saturated("full", retry_after_s=1.0), openai.InternalServerError),
        (DeadlineExceeded("late"), openai.InternalServerError),
    ],
)
async def test_errors_arrive_as_the_clients_own_types(client, frontend, error, kind):
    frontend.script = lambda request: [error]
    with pytest.raises(kind) as caught:
        await client.chat.completions.create(model="tiny", messages=HI)
    assert caught.value.code == error.code


async def test_bad_requests_arrive_as_the_clients_own_types(client):
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="other", messages=HI)
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="tiny", messages=HI, temperature=-1)
    assert caught.value.param == "temperature"


async def test_an_error_in_a_stream_is_raised_while_reading(client, frontend):
    frontend.script = lambda request: [Piece(choice=0, text="a"), PeerFailed("decode died")]
    stream = await client.chat.completions.create(model="tiny", messages=HI, stream=True)
    with pytest.raises(openai.APIError, match="decode died"):
        async for _ in stream:
            pass


async def test_closing_a_stream_early_ends_the_work(client, frontend):
    frontend.script = lambda request: [Piece(choice=0, text="a"), asyncio.Event()]
    stream = await client.chat.completions.create(model="tiny", messages=HI, stream=True)
    async for _ in stream:
        break
    await stream.close()
    async with asyncio.timeout(2.0):
        await frontend.until(ended=1)
