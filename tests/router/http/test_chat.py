import json

import pytest

from headrace.core.request import FinishReason, Piece, Usage
from headrace.core.tenancy import tenant_key
from headrace.errors import InternalError, PeerFailed
from headrace.testing.frontend import say

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def events(body):
    """Return the decoded events of a stream, "[DONE]" last."""
    lines = body.split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


async def post(http, **body):
    return await http.post(CHAT, json={"messages": HI, **body})


async def test_a_whole_answer_has_openais_form(http):
    answer = (await post(http, model="tiny", max_tokens=9)).json()
    assert answer == {
        "id": "chatcmpl-0000000000000001",
        "object": "chat.completion",
        "created": 1000,
        "model": "tiny",
        "system_fingerprint": "fp_" + "f" * 16,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 21,
            "completion_tokens": 2,
            "total_tokens": 23,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_the_prompt_is_the_rendered_chat_and_the_answer_may_fill_the_context(http, frontend, text):
    await post(http)
    (request,) = frontend.requests
    assert text.decode(request.prompt, skip_special=False) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert request.sampling.max_tokens == 200 - len(request.prompt)
    assert request.sampling.temperature == 1.0
    assert request.sampling.logprobs is None


async def test_a_stream_is_role_then_texts_then_reason_then_done(http):
    response = await post(http, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)


async def test_usage_comes_in_a_last_chunk_without_choices_when_asked_for(http, frontend):
    frontend.script = say("a", cached_tokens=16)
    response = await post(http, stream=True, stream_options={"include_usage": True})
    *chunks, last, done = events(response.text)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}
    assert done == "[DONE]"


async def test_several_choices_each_get_their_role_text_and_reason(http):
    whole = (await post(http, n=2)).json()
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["Hello", "Hello"]
    *chunks, _ = events((await post(http, n=2, stream=True)).text)
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in own) == "Hello"
        assert own[-1]["finish_reason"] == "stop"


async def test_logprobs_carry_token_bytes_and_alternatives(http, text):
    entry = (await post(http, logprobs=True, top_logprobs=2)).json()["choices"][0]["logprobs"]["content"][1]
    assert entry["token"] == text.token_bytes(4).decode()
    assert entry["bytes"] == list(text.token_bytes(4))
    assert entry["logprob"] == -1.0
    assert [best["logprob"] for best in entry["top_logprobs"]] == [-1.0, -2.0]


async def test_logprobs_of_tokens_without_text_are_streamed_too(http, frontend):
    def held(request):
        first, second = say("", "ab")(request)
        return [first, second]

    frontend.script = held
    *chunks, _ = events((await post(http, logprobs=True, stream=True)).text)
    found = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [len(entry["content"]) for entry in found if entry] == [1, 1]


async def test_options_arrive_at_the_frontend(http, frontend):
    response = await post(
        http,
        temperature=0,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"5": 2},
        max_completion_tokens=7,
        min_tokens=2,
        stop="END",
        stop_token_ids=[9],
        ignore_eos=True,
        seed=42,
        cache_salt="s",
        user="u",
        metadata={"a": "b"},
        response_format={"type": "text"},
        timeout=2.5,
    )
    assert response.status_code == 200
    (request,) = frontend.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0.5, 3, 0.1)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, 1, -1)
    assert (sampling.logit_bias, sampling.max_tokens, sampling.min_tokens) == (((5, 2.0),), 7, 2)
    assert (sampling.stop_token_ids, sampling.ignore_eos, sampling.seed) == ((9,), True, 42)
    assert (request.stop, request.deadline_unix_ms) == (("END",), 1_002_500)
    assert (request.tenant, request.cache_key) == ("default", tenant_key(b"secret", "default", b"s"))


async def test_the_shorter_of_two_timeouts_counts(http, frontend):
    for header, body, expected in (("1", 2.0, 1_001_000), ("3", 2.0, 1_002_000)):
        await http.post(CHAT, json={"messages": HI, "timeout": body}, headers={"X-Request-Timeout": header})
        assert frontend.requests[-1].deadline_unix_ms == expected


async def test_without_a_seed_each_request_gets_a_fresh_one(http, frontend):
    for _ in range(2):
        await post(http)
    first, second = frontend.requests
    assert first.sampling.seed != second.sampling.seed


async def test_content_parts_are_joined_and_developer_is_system(http, frontend, text):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "d"}, {"role": "user", "content": parts}]
    await http.post(CHAT, json={"messages": messages})
    prompt = text.decode(frontend.requests[0].prompt, skip_special=False)
    assert prompt.startswith("<|im_start|>system\nd<|im_end|>\n<|im_start|>user\na\nb<|im_end|>")


@pytest.mark.parametrize("error", [PeerFailed("prefill died", retry_after_s=1.0), InternalError("bug")])
async def test_an_error_after_the_first_token_becomes_an_event(http, frontend, error):
    frontend.script = lambda request: [Piece(choice=0, text="a"), error]
    response = await post(http, stream=True)
    assert response.status_code == 200
    *_, last, done = events(response.text)
    assert last["error"]["message"] == error.message
    assert last["error"]["code"] == error.code
    assert done == "[DONE]"


async def test_an_answer_that_just_stops_is_an_error_not_a_success(http, frontend):
    frontend.script = lambda request: [Piece(choice=0, text="a")]
    assert (await post(http)).status_code == 500
    assert events((await post(http, stream=True)).text)[-2]["error"]["code"] == "internal"


async def test_a_reason_of_length_is_passed_on(http, frontend):
    frontend.script = say("a", finish=FinishReason.LENGTH)
    assert (await post(http)).json()["choices"][0]["finish_reason"] == "length"


async def test_usage_may_come_after_the_reason(http, frontend):
    usage = Usage(prompt_tokens=1, completion_tokens=1, cached_tokens=0)
    frontend.script = lambda request: [
        Piece(choice=0, text="a", finish=FinishReason.STOP),
        Piece(choice=0, text="", usage=usage),
    ]
    answer = (await post(http)).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["total_tokens"] == 2


async def test_texts_are_escaped_as_json(http, frontend):
    nasty = '"\\\n\u2028🙂</script>\x00'
    usage = Usage(prompt_tokens=1, completion_tokens=1, cached_tokens=0)
    frontend.script = lambda request: [Piece(choice=0, text=nasty, finish=FinishReason.STOP, usage=usage)]
    assert events((await post(http, stream=True)).text)[1]["choices"][0]["delta"]["content"] == nasty
