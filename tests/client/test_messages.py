"""Calls become messages; what cannot be written names the option at fault."""

import pytest

from headrace.client.messages import chat_request, detokenize_request, member_of, text_request, tokenize_request
from headrace.client.values import GenerateOptions
from headrace.errors import InvalidRequest
from headrace.v1 import cluster_pb2, router_pb2

GIVEN = {
    "model": "m",
    "max_tokens": 5,
    "min_tokens": 2,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.5,
    "presence_penalty": 0.25,
    "frequency_penalty": -0.25,
    "logit_bias": {7: -2.0},
    "stop": ["a", "b"],
    "stop_token_ids": [4, 5],
    "ignore_eos": True,
    "seed": 11,
    "logprobs": 0,
    "n": 2,
    "timeout_s": 3.0,
    "request_id": "r",
    "cache_salt": "s",
    "cache_scope": "tenant",
}


def test_every_option_has_its_place_in_the_message():
    assert GIVEN.keys() == GenerateOptions.__annotations__.keys()
    request = text_request("hi", GIVEN)
    sampling = request.sampling
    assert (request.model, list(request.stop), request.num_choices) == ("m", ["a", "b"], 2)
    assert (request.request_id, request.cache_salt, request.cache_scope, request.text) == ("r", "s", "tenant", "hi")
    for name in GIVEN.keys() - {"model", "stop", "n", "timeout_s", "request_id", "cache_salt", "cache_scope"}:
        written = getattr(sampling, name)
        expected = GIVEN[name]
        if name == "logit_bias":
            assert dict(written) == expected
        elif name == "stop_token_ids":
            assert list(written) == expected
        else:
            assert written == expected, name


def test_an_option_that_is_none_is_left_out():
    request = text_request("hi", dict.fromkeys(GIVEN))
    assert request == text_request("hi", {})
    assert request.sampling.temperature == 1.0


def test_tokens_are_a_prompt_too():
    assert list(text_request([1, 2], {}).tokens.token_ids) == [1, 2]
    assert text_request([], {}).WhichOneof("prompt") == "tokens"


def test_an_empty_prompt_is_sent_and_not_forgotten():
    assert text_request("", {}).WhichOneof("prompt") == "text"
    assert chat_request([], {}).WhichOneof("prompt") == "chat"
    assert tokenize_request("", None).WhichOneof("input") == "text"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", "5"),
        ("n", 0),
        ("top_k", -2),
        ("temperature", "hot"),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", 3),
        ("stop", [1]),
        ("stop_token_ids", 7),
        ("seed", 2**64),
        ("model", 3),
        ("colour", "red"),
    ],
)
def test_what_cannot_be_sent_names_the_option(name, value):
    with pytest.raises(InvalidRequest) as caught:
        text_request("hi", {name: value})
    assert caught.value.field == name


@pytest.mark.parametrize("prompt", [[-1], ["a"], "\ud800", [2**32]])
def test_a_prompt_that_cannot_be_sent_is_refused(prompt):
    with pytest.raises(InvalidRequest) as caught:
        text_request(prompt, {})
    assert caught.value.field == "prompt"


@pytest.mark.parametrize("message", ["hi", {"role": "user"}, {"role": "user", "content": "x", "name": "y"}])
def test_a_message_must_have_a_role_and_a_content(message):
    with pytest.raises(InvalidRequest) as caught:
        chat_request([{"role": "user", "content": "ok"}, message], {})
    assert caught.value.field == "messages[1]"


def test_a_content_that_is_no_text_names_its_place():
    with pytest.raises(InvalidRequest) as caught:
        chat_request([{"role": "user", "content": 3}], {})
    assert caught.value.field == "messages[0].content"


def test_tokens_to_turn_into_text_are_checked():
    with pytest.raises(InvalidRequest):
        detokenize_request([-1], None)


def test_a_role_of_a_newer_router_is_shown_by_its_number():
    known = router_pb2.ClusterMember(name="p", role=cluster_pb2.ROLE_PREFILL)
    newer = router_pb2.ClusterMember.FromString(b"\x0a\x01e\x10\x63")
    assert member_of(known).role == "prefill"
    assert (member_of(newer).name, member_of(newer).role) == ("e", "99")
