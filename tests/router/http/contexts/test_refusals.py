"""What /v1/contexts refuses, and how."""

import json

import httpx
import pytest

from headrace.clock import VirtualClock
from headrace.errors import Saturated
from headrace.router.http.app import create_app

SYSTEM = {"role": "system", "content": "Be brief."}

VERBS = [
    ("GET", "", None),
    ("DELETE", "", None),
    ("POST", "/append", {"text": "x"}),
    ("POST", "/update", {"segments": []}),
    ("POST", "/close", {}),
    ("POST", "/close", {"stream": True}),
]


@pytest.mark.parametrize(("method", "verb", "body"), VERBS)
@pytest.mark.parametrize("name", ["ingestor.unknown", "nobody.unknown", "unknown", "%00"])
async def test_an_unknown_context_is_404(api, http, method, verb, body, name):
    error = api.error_of(await http.request(method, f"{api.url}/{name}{verb}", json=body), 404)
    assert (error["code"], error["type"]) == ("context_not_found", "invalid_request_error")


@pytest.mark.parametrize(("method", "verb", "body"), VERBS)
async def test_the_context_of_another_tenant_is_404(api, http, ingestor, method, verb, body):
    path = await api.open(headers={"X-Tenant-Id": "team-a"})
    error = api.error_of(await http.request(method, path + verb, json=body, headers={"X-Tenant-Id": "team-b"}), 404)
    assert error["code"] == "context_not_found"
    [session] = ingestor.sessions.live()
    assert session.state().applied == 0


async def test_the_tenant_of_a_context_is_told_to_the_frontend(api, http, frontend):
    headers = {"X-Tenant-Id": "team-a"}
    path = await api.open(headers=headers)
    assert (await http.post(f"{path}/close", json={"query": "?"}, headers=headers)).status_code == 200
    assert frontend.requests[0].tenant == "team-a"


@pytest.mark.parametrize(("method", "verb", "body"), [("POST", None, {}), *VERBS])
async def test_a_header_that_names_no_tenant_is_refused(api, http, method, verb, body):
    url = api.url if verb is None else f"{api.url}/ingestor.x{verb}"
    error = api.error_of(await http.request(method, url, json=body, headers={"X-Tenant-Id": "a b"}), 400)
    assert error["param"] == "x-tenant-id"


WRONG_OPENINGS = [
    ({"made_up": 1}, "made_up"),
    ({"mode": "replace"}, "mode"),
    ({"mode": 1}, "mode"),
    ({"prefix": 1}, "prefix"),
    ({"prefix": "a", "messages": []}, "prefix"),
    ({"prefix": "", "messages": [SYSTEM]}, "prefix"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [SYSTEM, {"role": "user", "content": "x", "name": "me"}]}, "messages[1].name"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"stream": True}, "stream"),
    ({"stream": False}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream"),
    ({"n": 2}, "n"),
    ({"n": 0}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 201}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"seed": 2**64}, "seed"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"timeout": 0}, "timeout"),
    ({"timeout": -1}, "timeout"),
    ({"timeout": 1e9}, "timeout"),
    ({"timeout": 1e300}, "timeout"),
    ({"cache_scope": "mine"}, "cache_scope"),
    ({"cache_salt": "x" * 257}, "cache_salt"),
    ({"store": True}, "store"),
    ({"tools": []}, "tools"),
    ({"messages": [SYSTEM], "tools": []}, "tools"),
]


@pytest.mark.parametrize(("body", "param"), WRONG_OPENINGS, ids=lambda each: json.dumps(each)[:40])
async def test_a_wrong_field_of_an_opening_is_named(api, http, ingestor, body, param):
    error = api.error_of(await http.post(api.url, json=body), 400)
    assert error["param"] == param
    assert param.split("[")[0] in error["message"]
    assert ingestor.sessions.live() == []


WRONG_CHANGES = [
    ("append", {}, "text"),
    ("append", {"text": 1}, "text"),
    ("append", {"text": None}, "text"),
    ("append", {"text": "x", "made_up": 1}, "made_up"),
    ("append", {"text": "x", "segment": 1}, "segment"),
    ("append", {"text": "x", "segment": "s" * 129}, "segment"),
    ("append", {"text": "x", "sequence": 0}, "sequence"),
    ("append", {"text": "x", "sequence": -1}, "sequence"),
    ("append", {"text": "x", "sequence": 2**63}, "sequence"),
    ("append", {"text": "x", "sequence": "1"}, "sequence"),
    ("append", {"text": "x", "sequence": 9}, "sequence"),
    ("update", {}, "segments"),
    ("update", {"segments": "x"}, "segments"),
    ("update", {"segments": [{"id": "a"}]}, "segments[0].text"),
    ("update", {"segments": [{"text": "a"}]}, "segments[0].id"),
    ("update", {"segments": [{"id": "a", "text": "a", "made_up": 1}]}, "segments[0].made_up"),
    ("update", {"segments": [{"id": "", "text": "a"}]}, "segments[0].id"),
    ("update", {"segments": [{"id": "a", "text": ""}, {"id": "a", "text": ""}]}, "segments[1].id"),
    ("update", {"segments": [], "from_segment": "nobody"}, "from_segment"),
    ("update", {"segments": [], "from_segment": ""}, "from_segment"),
    ("update", {"segments": [], "sequence": 0}, "sequence"),
    ("close", {"query": 1}, "query"),
    ("close", {"made_up": 1}, "made_up"),
    ("close", {"stream": "yes"}, "stream"),
    ("close", {"sequence": 0}, "sequence"),
    ("close", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("close", {"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ("close", {"stream": True, "cursor": -1}, "cursor"),
    ("close", {"stream": True, "cursor": "1"}, "cursor"),
    ("close", {"cursor": 1}, "cursor"),
]


@pytest.mark.parametrize(("verb", "body", "param"), WRONG_CHANGES, ids=lambda each: json.dumps(each)[:40])
async def test_a_wrong_field_of_a_change_is_named_and_the_context_is_as_it_was(api, http, ingestor, verb, body, param):
    path = await api.open(mode="update")
    error = api.error_of(await http.post(f"{path}/{verb}", json=body), 400)
    assert error["param"] == param
    [session] = ingestor.sessions.live()
    assert (session.state().num_segments, session.is_closed) == (0, False)


async def test_an_update_of_a_context_that_only_grows_is_refused(api, http):
    path = await api.open()
    error = api.error_of(await http.post(f"{path}/update", json={"segments": []}), 400)
    assert error["param"] == "mode"


async def test_an_empty_context_cannot_be_answered(api, http):
    path = await api.open()
    assert api.error_of(await http.post(f"{path}/close", json={}), 400)["param"] == "query"


RAW = [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"text": "\xff"}', b"[" * 9_000]


@pytest.mark.parametrize("raw", RAW, ids=repr)
@pytest.mark.parametrize("verb", ["", "/append", "/update", "/close"])
async def test_a_body_that_is_no_json_object_is_refused(api, http, verb, raw):
    path = await api.open()
    url = path + verb if verb else api.url
    response = await http.post(url, content=raw, headers={"content-type": "application/json"})
    assert api.error_of(response, 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("verb", "raw", "words"),
    [
        ("", b'{"timeout": NaN}', "timeout must be a finite number, found NaN"),
        ("", b'{"prefix": "\\ud800"}', "half of a surrogate pair"),
        ("/append", b'{"text": "\\udc00"}', "half of a surrogate pair"),
        ("/append", b'{"text": "x", "segment": "\\ud800"}', "half of a surrogate pair"),
        ("/update", b'{"segments": [{"id": "\\ud800", "text": ""}]}', "half of a surrogate pair"),
        ("/close", b'{"query": "\\ud800"}', "half of a surrogate pair"),
    ],
)
async def test_slips_of_json_writers_are_named(api, http, verb, raw, words):
    path = await api.open()
    url = path + verb if verb else api.url
    response = await http.post(url, content=raw, headers={"content-type": "application/json"})
    assert words in api.error_of(response, 400)["message"]


@pytest.mark.parametrize("header", ["soon", "nan", "0", "-1"])
async def test_a_bad_timeout_header_is_refused(api, http, header):
    error = api.error_of(await http.post(api.url, json={}, headers={"X-Request-Timeout": header}), 400)
    assert "imeout" in error["param"]


async def test_a_pair_of_surrogates_is_a_character(api, http, frontend, text):
    path = await api.open()
    raw = b'{"text": "\\ud83c\\udf0a"}'
    await http.post(f"{path}/append", content=raw, headers={"content-type": "application/json"})
    await http.post(f"{path}/close", json={})
    assert text.decode(frontend.requests[0].prompt) == "🌊"


async def test_a_body_over_the_limit_is_refused(api, http):
    path = await api.open()
    response = await http.post(f"{path}/append", json={"text": "x" * 20_000})
    assert api.error_of(response, 413)["code"] == "request_too_large"


@pytest.mark.parametrize(
    "before",
    [{"prefix": "x" * 300}, {"messages": [{"role": "system", "content": "x" * 300}]}, {"prefix": "x" * 19_000}],
    ids=["prefix", "messages", "far"],
)
async def test_what_does_not_fit_before_the_context_is_refused(api, http, ingestor, before):
    error = api.error_of(await http.post(api.url, json=before), 400)
    assert (error["code"], error["type"]) == ("context_length_exceeded", "invalid_request_error")
    assert ingestor.sessions.live() == []


async def test_a_context_that_overflowed_goes_on_once_it_is_made_shorter(api, http, frontend, text):
    path = await api.open(mode="update", max_tokens=5)
    await api.append(path, "x" * 150, segment="a")
    error = api.error_of(await http.post(f"{path}/append", json={"text": "y" * 100, "segment": "b"}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "255 tokens" in error["message"]
    shown = (await http.get(path)).json()
    assert (shown["segments"], shown["prompt_tokens"]) == (1, 150)
    body = {"segments": [{"id": "c", "text": "short "}]}
    assert (await http.post(f"{path}/update", json=body)).status_code == 200
    await http.post(f"{path}/close", json={"query": "?"})
    assert text.decode(frontend.requests[0].prompt) == "short ?"


async def test_a_query_that_does_not_fit_leaves_the_context_open(api, http):
    path = await api.open(max_tokens=5)
    await api.append(path, "x" * 150)
    for is_stream in (False, True):
        response = await http.post(f"{path}/close", json={"query": "y" * 100, "stream": is_stream})
        assert api.error_of(response, 400)["code"] == "context_length_exceeded"
    assert (await http.post(f"{path}/close", json={"query": "?"})).status_code == 200


async def test_an_unknown_model_is_404(api, http):
    assert api.error_of(await http.post(api.url, json={"model": "other"}), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("limits", [{"max_tenant_streams": 1}], ids=["1"])
async def test_a_tenant_with_too_many_contexts_is_told_when_to_come_again(api, http):
    path = await api.open(headers={"X-Tenant-Id": "a"})
    await api.open(headers={"X-Tenant-Id": "b"})
    refused = await http.post(api.url, json={}, headers={"X-Tenant-Id": "a"})
    error = api.error_of(refused, 429)
    assert (error["code"], error["type"], error["param"]) == ("overloaded", "rate_limit_error", "x-tenant-id")
    assert refused.headers["retry-after"] == "1"
    await http.delete(path, headers={"X-Tenant-Id": "a"})
    await api.open(headers={"X-Tenant-Id": "a"})


@pytest.mark.parametrize("limits", [{"max_streams": 1}], ids=["1"])
async def test_with_too_many_contexts_in_all_the_service_says_when_to_come_again(api, http):
    await api.open()
    refused = await http.post(api.url, json={})
    assert api.error_of(refused, 503)["code"] == Saturated.code
    assert refused.headers["retry-after"] == "1"


async def test_without_an_ingestor_that_is_ready_no_context_is_opened(api, http, ingestors, ingestor):
    path = await api.open()
    ingestors._table.members[ingestor.address].load.is_ready = False
    refused = await http.post(api.url, json={})
    assert api.error_of(refused, 503)["code"] == "not_ready"
    assert refused.headers["retry-after"] == "1"
    assert (await http.get(path)).status_code == 200


async def test_an_ingestor_that_cannot_be_reached_is_503(api, http, ingestors, ingestor):
    path = await api.open()
    await ingestor.server.stop()
    for response in (await http.get(path), await http.post(api.url, json={})):
        assert api.error_of(response, 503)["code"] == "peer_failed"


async def test_a_router_without_ingestors_has_no_contexts(api, frontend, settings):
    app = create_app(frontend, clock=VirtualClock(1.0), metrics=lambda: b"", settings=settings)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        for method, path in (("POST", api.url), ("GET", f"{api.url}/ingestor.x")):
            refused = await http.request(method, path, json={} if method == "POST" else None)
            assert api.error_of(refused, 503)["code"] == "not_ready"
            assert refused.headers["retry-after"] == "1"
