import json

import pytest

from headrace.errors import Saturated
from headrace.testing.frontend import say

PATH = "/v1/completions"


async def post(http, prompt="ab", **body):
    return await http.post(PATH, json={"prompt": prompt, **body})


def chunks(response):
    *lines, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def test_a_whole_answer_has_openais_form(http):
    answer = (await post(http)).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"]["total_tokens"] == 4


async def test_sixteen_tokens_are_the_default(http, frontend):
    await post(http)
    assert frontend.requests[0].sampling.max_tokens == 16


async def test_a_stream_ends_with_the_reason_on_its_last_text(http):
    choices = [chunk["choices"][0] for chunk in chunks(await post(http, stream=True))]
    assert [(choice["text"], choice["finish_reason"]) for choice in choices] == [("Hel", None), ("lo", "stop")]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("ab", ["ab"]), (["ab", "c"], ["ab", "c"]), ([68, 69], ["cd"]), ([[68], [69, 70]], ["c", "de"])],
)
async def test_prompts_may_be_texts_or_tokens_one_or_many(http, frontend, text, prompt, expected):
    offset = text.encode("c")[0] - 68
    shifted = json.loads(json.dumps(prompt), parse_int=lambda digits: int(digits) + offset)
    response = await post(http, shifted)
    assert response.status_code == 200
    assert [text.decode(request.prompt) for request in frontend.requests] == expected
    assert [choice["index"] for choice in response.json()["choices"]] == list(range(len(expected)))


async def test_choices_of_several_prompts_are_numbered_by_prompt(http, frontend):
    response = await post(http, ["ab", "c"], n=2, echo=True)
    assert [choice["text"] for choice in response.json()["choices"]] == ["abHello", "abHello", "cHello", "cHello"]
    assert response.json()["usage"]["completion_tokens"] == 8
    assert len({request.request_id for request in frontend.requests}) == 2
    assert len({request.sampling.seed for request in frontend.requests}) == 2


async def test_several_prompts_are_streamed_into_one_answer(http):
    found = {0: "", 1: ""}
    for chunk in chunks(await post(http, ["ab", "c"], stream=True, echo=True)):
        choice = chunk["choices"][0]
        found[choice["index"]] += choice["text"]
    assert found == {0: "abHello", 1: "cHello"}


async def test_a_refused_prompt_refuses_the_whole_request_with_its_status(http, frontend):
    good = say("a")
    full = Saturated("no room", retry_after_s=2.5)
    frontend.script = lambda request: [full] if request.request_id.endswith("-1") else good(request)
    response = await post(http, ["ab", "c"], stream=False)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "3"
    assert len(frontend.ended) == 2


@pytest.mark.parametrize("is_stream", [False, True])
async def test_logprobs_carry_offsets_in_the_text(http, frontend, is_stream):
    frontend.script = say("a", "b", "c")
    response = await post(http, logprobs=1, stream=is_stream)
    found = chunks(response) if is_stream else [response.json()]
    entries = [part["choices"][0]["logprobs"] for part in found]
    assert [offset for entry in entries for offset in entry["text_offset"]] == [0, 1, 2]
    assert [logprob for entry in entries for logprob in entry["token_logprobs"]] == [-0.5, -1.0, -1.5]
    assert all(len(best) == 1 for entry in entries for best in entry["top_logprobs"])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a"] * 5}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, 10**6]}, "prompt"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "x" * 200}, "prompt"),
        ({"prompt": "x" * 19_000}, "prompt"),
        ({"prompt": "a", "max_tokens": 200}, "max_tokens"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "suffix": "z"}, "suffix"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
    ],
)
async def test_bad_prompts_and_options_are_refused_by_name(http, frontend, body, param):
    response = await http.post(PATH, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert frontend.requests == []
