"""The official openai client works unchanged against `headrace up`."""

import openai
import pytest

from headrace.testing.cluster import LocalCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

CHAT = [{"role": "user", "content": "Name three rivers of Europe."}]


@pytest.fixture
def client(cluster: LocalCluster):
    with openai.OpenAI(base_url=f"{cluster.http}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


@pytest.fixture(autouse=True)
def leaves_nothing_behind(cluster: LocalCluster):
    yield
    cluster.wait_quiet()


def test_a_chat_is_answered_and_counted(client, model):
    answer = client.chat.completions.create(model=model, messages=CHAT, max_tokens=12, temperature=0)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_a_streamed_chat_says_the_same_as_a_whole_one(client, model):
    options = {"model": model, "messages": CHAT, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 24
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert len(chunks) > 4


def test_a_completion_takes_text_and_tokens(client, model):
    by_text = client.completions.create(model=model, prompt="One, two, three,", max_tokens=8, temperature=0)
    tokens = client.post("/../tokenize", body={"model": model, "prompt": "One, two, three,"}, cast_to=object)["tokens"]
    by_tokens = client.completions.create(model=model, prompt=tokens, max_tokens=8, temperature=0)
    assert by_text.choices[0].text == by_tokens.choices[0].text


def test_a_stop_text_ends_the_answer_and_is_not_shown(client, model):
    options = {"model": model, "prompt": "1, 2, 3, 4, 5,", "max_tokens": 40, "temperature": 0}
    free = client.completions.create(**options).choices[0].text
    stop = free[10:14]
    assert len(stop) == 4
    stopped = client.completions.create(**options, stop=[stop]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == free[: free.index(stop)]
    pieces = client.completions.create(**options, stop=[stop], stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == stopped.text


def test_two_choices_differ_and_a_seed_repeats_them(client, model):
    options = {"model": model, "messages": CHAT, "max_tokens": 16, "n": 2, "temperature": 1.0, "seed": 11}
    first = client.chat.completions.create(**options)
    again = client.chat.completions.create(**options)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1]
    assert texts[0] != texts[1]
    assert texts == [choice.message.content for choice in again.choices]
    other = client.chat.completions.create(**{**options, "seed": 12})
    assert texts != [choice.message.content for choice in other.choices]


def test_logprobs_are_sorted_and_belong_to_the_tokens(client, model):
    answer = client.chat.completions.create(
        model=model, messages=CHAT, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 6
    for entry in content:
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert entry.token == entry.top_logprobs[0].token
        assert entry.logprob == pytest.approx(values[0])
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"model": "no-such-model"}, openai.NotFoundError, "no-such-model"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"temperature": "hot"}, openai.BadRequestError, "temperature"),
        ({"top_p": 0}, openai.BadRequestError, "top_p"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": 1_000_000}, openai.BadRequestError, "max_tokens"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"stop": ["x"] * 17}, openai.BadRequestError, "stop"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": "hello"}, openai.BadRequestError, "messages"),
        ({"logit_bias": {"99999999": 1}}, openai.BadRequestError, "logit_bias"),
        ({"extra_body": {"no_such_option": 1}}, openai.BadRequestError, "no_such_option"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
    ],
)
def test_a_bad_request_is_refused_by_name(client, model, options, error, named):
    with pytest.raises(error) as refused:
        client.chat.completions.create(**{"model": model, "messages": CHAT, "max_tokens": 4} | options)
    assert named in str(refused.value.body)
    assert refused.value.type
