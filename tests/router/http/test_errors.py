import json

import httpx
import pytest

from headrace.clock import VirtualClock
from headrace.errors import DeadlineExceeded, NotReady, Overloaded, Saturated
from headrace.router.http.app import create_app
from headrace.testing.frontend import ScriptedFrontend

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def error_of(response):
    """Return the error of a response, after checking that it has OpenAI's form."""
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


BAD_FIELDS = [
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": [1]}, "temperature"),
    ({"n": True}, "n"),
    ({"n": 1.5}, "n"),
    ({"n": 0}, "n"),
    ({"n": 10**30}, "n"),
    ({"stream": 1}, "stream"),
    ({"stream": "true"}, "stream"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": ""}, "stop"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"x": True}}, "stream_options.x"),
    ({"timeout": 0}, "timeout"),
    ({"model": 3}, "model"),
    ({"metadata": {"a": 1}}, "metadata[...]"),
    ({"made_up": 1}, "made_up"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"functions": [{}]}, "functions"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {}}, "audio"),
    ({"store": True}, "store"),
    ({"store": 0}, "store"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 19_000}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"content": "a"}]}, "messages[0].role"),
    ({"messages": [*HI, {"role": "tool", "content": "a"}]}, "messages[1].role"),
    ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "messages[0].x"),
    ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS)
async def test_a_bad_field_is_named(http, frontend, fields, param):
    response = await http.post(CHAT, json={"messages": HI, **fields})
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.split("[")[0] in error["message"]
    assert frontend.requests == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "x" * 300}]}),
        (CHAT, {"messages": HI, "max_tokens": 199}),
        ("/v1/completions", {"prompt": "x" * 300}),
        ("/v1/completions", {"prompt": "x" * 19_000}),
        ("/v1/completions", {"prompt": [5] * 200}),
    ],
    ids=["chat", "answer", "text", "far", "tokens"],
)
async def test_what_does_not_fit_the_context_has_openais_code(http, path, body):
    response = await http.post(path, json=body)
    assert response.status_code == 400
    assert error_of(response)["code"] == "context_length_exceeded"


async def test_options_that_ask_for_nothing_are_accepted(http):
    body = {"tools": [], "tool_choice": "none", "n": None, "store": False, "modalities": ["text"], "stop": None}
    assert (await http.post(CHAT, json={"messages": HI, **body})).status_code == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"messages": NaN}',
        b'{"temperature": NaN, "messages": []}',
        b'{"temperature": 1e999, "messages": []}',
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b'{"tools": ' + b"[" * 9_000 + b"]" * 9_000 + b"}",
        b'{"seed": ' + b"9" * 10_000 + b"}",
        b"\x1f\x8b\x08",
    ],
)
async def test_a_body_that_is_not_json_is_refused(http, raw):
    response = await http.post(CHAT, content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


async def test_another_content_type_is_refused(http):
    response = await http.post(CHAT, content=b"{}", headers={"content-type": "application/x-www-form-urlencoded"})
    assert response.status_code == 415
    assert error_of(response)["code"] == "unsupported_media_type"


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nope", 404), ("GET", CHAT, 405), ("POST", "/v1/models", 405)]
)
async def test_unknown_paths_and_methods_have_error_bodies(http, method, path, status):
    response = await http.request(method, path)
    assert response.status_code == status
    error_of(response)


async def test_an_unknown_model_is_404(http):
    response = await http.post(CHAT, json={"messages": HI, "model": "other"})
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (Saturated("full", retry_after_s=0.2), 503, "1"),
        (Saturated("full", retry_after_s=2.1), 503, "3"),
        (Saturated("full"), 503, "1"),
        (NotReady("starting"), 503, "1"),
        (Overloaded("quota", retry_after_s=7.0), 429, "7"),
        (DeadlineExceeded("late"), 504, None),
    ],
)
async def test_errors_before_the_first_token_keep_their_status(http, frontend, is_stream, error, status, retry_after):
    frontend.script = lambda request: [error]
    response = await http.post(CHAT, json={"messages": HI, "stream": is_stream})
    assert response.status_code == status
    assert response.headers.get("retry-after") == retry_after
    assert error_of(response)["code"] == error.code


async def test_a_bug_answers_500_without_its_text(http, frontend):
    def broken(request):
        raise RuntimeError("secret prompt")

    frontend.script = broken
    response = await http.post(CHAT, json={"messages": HI})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert error_of(response)["type"] == "server_error"


async def test_what_a_path_names_is_in_no_log(frontend, settings, app, caplog):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as http:
        answer = await http.post("/v1/contexts/ingestor.secret/append", json={"text": "x"})
    assert answer.status_code == 503
    assert [record.path for record in caplog.records if hasattr(record, "path")] == ["/v1/contexts/{context_id}/append"]


async def test_a_request_id_is_echoed_and_made_unique_inside(http, frontend):
    for _ in range(2):
        response = await http.post(CHAT, json={"messages": HI}, headers={"X-Request-Id": "mine"})
        assert response.headers["x-request-id"] == "mine"
    ids = [request.request_id for request in frontend.requests]
    assert all(name.startswith("mine-") for name in ids)
    assert ids[0] != ids[1]


async def test_errors_carry_a_request_id_too(http):
    assert (await http.get("/nope")).headers["x-request-id"]


@pytest.mark.parametrize("name", ["a b", "x" * 97, "a\tb"])
async def test_a_request_id_that_could_forge_logs_is_refused(http, name):
    response = await http.get("/health", headers={"X-Request-Id": name})
    assert response.status_code == 400
    assert error_of(response)["param"] == "X-Request-Id"


@pytest.mark.parametrize("header", ["soon", "nan", "-1", "1e9"])
async def test_a_bad_timeout_header_is_refused(http, header):
    response = await http.post(CHAT, json={"messages": HI}, headers={"X-Request-Timeout": header})
    assert response.status_code == 400
    assert "imeout" in error_of(response)["param"]


async def chunked(total, sent):
    for _ in range(total // 1000):
        sent.append(1000)
        yield b" " * 1000


async def test_a_large_body_without_a_length_is_refused_while_it_is_read(http, frontend):
    sent = []
    response = await http.post(CHAT, content=chunked(300_000, sent), headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"
    assert "20000" in error_of(response)["message"]
    assert frontend.requests == []


async def test_a_body_at_the_limit_is_read(http):
    body = json.dumps({"messages": HI}).encode()
    padded = body + b" " * (20_000 - len(body))
    assert (await http.post(CHAT, content=padded, headers={"content-type": "application/json"})).status_code == 200
    assert (
        await http.post(CHAT, content=padded + b" ", headers={"content-type": "application/json"})
    ).status_code == 413


async def test_without_workers_requests_get_503(settings):
    app = create_app(
        ScriptedFrontend([], lambda request: []), clock=VirtualClock(1.0), metrics=lambda: b"", settings=settings
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        assert (await client.post(CHAT, json={"messages": HI})).status_code == 503
        assert (await client.get("/v1/models")).json() == {"object": "list", "data": []}


@pytest.mark.parametrize(
    ("raw", "param", "words"),
    [
        (b'{"messages": [], "temperature": NaN}', "temperature", "must be a finite number, found NaN"),
        (b'{"top_p":-Infinity, "messages": []}', "top_p", "must be a finite number, found -Infinity"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "body", "half of a surrogate pair"),
    ],
)
async def test_slips_of_json_writers_are_named(http, raw, param, words):
    error = error_of(await http.post(CHAT, content=raw, headers={"content-type": "application/json"}))
    assert error["param"] == param
    assert words in error["message"]
