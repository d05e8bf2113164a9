"""The answer to a context that came in parts is that of its whole prompt, in all shapes, and once more if need be."""

import asyncio
import dataclasses
import json

import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from headrace.core.request import Piece
from headrace.errors import InternalError

SYSTEM = {"role": "system", "content": "Be brief."}
PATIENCE_S = 10.0


def events(body):
    """Return the id of each event of a stream, or None, and what it holds."""
    *found, rest = body.split("\n\n")
    assert rest == ""
    return [_event(each.split("\n")) for each in found]


def _event(lines):
    *head, data = lines
    assert data.startswith("data: ")
    ids = [int(line.removeprefix("id: ")) for line in head]
    return (*ids, None)[0], data[6:] if data == "data: [DONE]" else json.loads(data[6:])


def choices_of(body):
    return [each["choices"][0] for _, each in events(body) if each != "[DONE]" and each["choices"]]


def asked(request):
    """Return a request without what differs between two requests for the same."""
    return dataclasses.replace(request, request_id="", deadline_unix_ms=0, cache_key=b"")


class Connection:
    """An HTTP client made of ASGI messages, which can leave at any time."""

    def __init__(self, app, path, body):
        self._app = app
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"content-type", b"application/json")],
            "client": ("test", 1),
            "server": ("test", 80),
        }
        self._inbox = asyncio.Queue()
        self._inbox.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        self.text = ""

    async def run(self):
        await self._app(self._scope, self._inbox.get, self._send)

    async def _send(self, message):
        self.text += message.get("body", b"").decode()

    def leave(self):
        self._inbox.put_nowait({"type": "http.disconnect"})


# -- The answer -------------------------------------------------------------------

OPTIONS = {
    "max_tokens": 20,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.1,
    "repetition_penalty": 1.5,
    "presence_penalty": 1.0,
    "frequency_penalty": -1.0,
    "logit_bias": {"5": 2.0},
    "min_tokens": 2,
    "stop": "END",
    "stop_token_ids": [9],
    "ignore_eos": True,
    "seed": -42,
}


async def whole_and_parts(api, http, frontend, *, is_chat, is_stream, logprobs):
    """Ask for the same prompt whole and as a context in parts; return both responses."""
    shape = {"stream": is_stream, "stream_options": {"include_usage": True} if is_stream else None}
    if is_chat:
        wanted = {"logprobs": True, "top_logprobs": logprobs} if logprobs is not None else {}
        prompt = [SYSTEM, {"role": "user", "content": "one two three?"}]
        body = {"messages": prompt, **OPTIONS, **shape, **wanted}
        whole = await http.post("/v1/chat/completions", json=body)
        path = await api.open(messages=[SYSTEM], **OPTIONS, logprobs=logprobs)
    else:
        body = {"prompt": "Zero: one two three?", **OPTIONS, **shape, "logprobs": logprobs}
        whole = await http.post("/v1/completions", json=body)
        path = await api.open(prefix="Zero: ", **OPTIONS, logprobs=logprobs)
    await api.append(path, "one ")
    await api.append(path, "two three")
    parts = await http.post(f"{path}/close", json={"query": "?", **shape})
    assert (whole.status_code, parts.status_code) == (200, 200)
    assert asked(frontend.requests[0]) == asked(frontend.requests[1])
    return whole, parts


@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("is_chat", [True, False], ids=["chat", "plain"])
async def test_the_whole_answer_is_that_of_the_whole_prompt(api, http, frontend, is_chat, logprobs):
    whole, parts = await whole_and_parts(api, http, frontend, is_chat=is_chat, is_stream=False, logprobs=logprobs)
    named = {"id": "", "created": 0}
    assert {**parts.json(), **named} == {**whole.json(), **named}
    assert parts.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("is_chat", [True, False], ids=["chat", "plain"])
async def test_the_streamed_answer_is_that_of_the_whole_prompt(api, http, frontend, is_chat, logprobs):
    whole, parts = await whole_and_parts(api, http, frontend, is_chat=is_chat, is_stream=True, logprobs=logprobs)
    assert parts.headers["content-type"] == whole.headers["content-type"]
    assert told(parts.text) == told(whole.text)
    assert events(parts.text)[-2][1]["usage"] == events(whole.text)[-2][1]["usage"]
    assert events(parts.text)[-1][1] == "[DONE]"


def told(body):
    """Return what all chunks of a stream say together: texts, entries of logprobs, the reasons for the end."""
    choices = choices_of(body)
    texts = [each["text"] if "text" in each else each["delta"].get("content", "") for each in choices]
    roles = [each["delta"]["role"] for each in choices if "role" in each.get("delta", {})]
    logprobs = [each["logprobs"] for each in choices if each["logprobs"]]
    reasons = [each["finish_reason"] for each in choices if each["finish_reason"]]
    return "".join(texts), roles, logprobs, reasons


async def test_without_being_asked_a_stream_says_nothing_of_usage(api, http):
    path = await api.open()
    body = (await http.post(f"{path}/close", json={"query": "?", "stream": True})).text
    assert "usage" not in body
    assert {each["object"] for _, each in events(body) if each != "[DONE]"} == {"text_completion"}


async def test_an_answer_may_fill_what_is_left_of_the_context(api, http, frontend):
    path = await api.open()
    await api.append(path, "x" * 100)
    await http.post(f"{path}/close", json={})
    [request] = frontend.requests
    assert (len(request.prompt), request.sampling.max_tokens) == (100, 100)


async def test_a_chat_may_have_nothing_before_the_context(api, http, frontend, text):
    path = await api.open(messages=[])
    await api.append(path, "Hi ")
    answer = (await http.post(f"{path}/close", json={"query": "you"})).json()
    assert answer["object"] == "chat.completion"
    whole = text.chat_tokens([{"role": "user", "content": "Hi you"}])
    assert list(frontend.requests[0].prompt) == whole


async def test_segments_are_updated_as_a_whole_and_from_one_on(api, http, frontend, text):
    path = await api.open(mode="update")

    async def update(segments, **fields):
        body = {"segments": [{"id": name, "text": words} for name, words in segments], **fields}
        response = await http.post(f"{path}/update", json=body)
        assert response.status_code == 200, response.text
        return response.json()["segments"]

    assert await update([("a", "one "), ("b", "two "), ("c", "three ")]) == 3
    assert await update([("d", "four ")], from_segment="b") == 2
    await api.append(path, "more ")
    assert await update([("a", "one "), ("e", "five ")]) == 2
    assert await update([], from_segment="e") == 1
    assert await update([]) == 0
    assert await update([("z", "last ")]) == 1
    await http.post(f"{path}/close", json={"query": "?"})
    assert text.decode(frontend.requests[0].prompt) == "last ?"


@pytest.mark.parametrize("is_stream", [False, True])
async def test_an_answer_that_cannot_begin_keeps_its_status(api, http, frontend, is_stream):
    frontend.script = lambda request: [InternalError("a bug")]
    path = await api.open()
    response = await http.post(f"{path}/close", json={"query": "?", "stream": is_stream})
    assert api.error_of(response, 500)["code"] == "internal"


async def test_an_answer_that_fails_on_its_way_says_so_in_an_event(api, http, frontend):
    frontend.script = lambda request: [Piece(choice=0, text="a"), InternalError("a bug")]
    path = await api.open()
    body = (await http.post(f"{path}/close", json={"query": "?", "stream": True})).text
    (number, first), (_, failure), (_, done) = events(body)
    assert (number, first["choices"][0]["text"], first["choices"][0]["finish_reason"]) == (1, "a", None)
    assert (failure["error"]["code"], done) == ("internal", "[DONE]")


# -- Answers taken up again -------------------------------------------------------


@pytest.mark.parametrize("is_chat", [True, False], ids=["chat", "plain"])
async def test_a_stream_goes_on_behind_the_event_that_arrived_last(api, http, is_chat):
    before = {"messages": [SYSTEM]} if is_chat else {}
    path = await api.open(**before, logprobs=1)
    close = {"query": "?", "stream": True, "sequence": 1, "stream_options": {"include_usage": True}}
    complete = events((await http.post(f"{path}/close", json=close)).text)
    ids = [number for number, _ in complete if number is not None]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids) >= 3
    for cursor in ids:
        place = [number for number, _ in complete].index(cursor) + 1
        again = events((await http.post(f"{path}/close", json={**close, "cursor": cursor})).text)
        assert [_untimed(each) for each in again] == [_untimed(each) for each in complete[place:]]


async def test_a_stream_is_taken_up_again_by_whoever_gave_its_close_no_number(api, http):
    path = await api.open()
    complete = events((await http.post(f"{path}/close", json={"query": "?", "stream": True})).text)
    cursor = next(number for number, _ in complete if number is not None)
    again = events((await http.post(f"{path}/close", json={"stream": True, "cursor": cursor})).text)
    place = [number for number, _ in complete].index(cursor) + 1
    assert [_untimed(each) for each in again] == [_untimed(each) for each in complete[place:]]


async def test_a_client_of_events_that_asks_again_by_itself_gets_what_it_lacks(api, http):
    path = await api.open()
    close = {"query": "?", "stream": True}
    complete = events((await http.post(f"{path}/close", json=close)).text)
    cursor = next(number for number, _ in complete if number is not None)
    again = events((await http.post(f"{path}/close", json=close, headers={"Last-Event-ID": str(cursor)})).text)
    place = [number for number, _ in complete].index(cursor) + 1
    assert [_untimed(each) for each in again] == [_untimed(each) for each in complete[place:]]


@pytest.mark.parametrize("last", ["", "-1", "x", "1" * 40, "²"])
async def test_the_last_event_of_something_else_is_no_cursor(api, http, last):
    path = await api.open()
    answer = await http.post(
        f"{path}/close", json={"query": "?", "stream": True}, headers={"Last-Event-ID": last.encode()}
    )
    assert events(answer.text)[-1] == (None, "[DONE]")


async def test_an_open_context_has_no_answer_to_go_on_with(api, http):
    path = await api.open()
    refused = await http.post(f"{path}/close", json={"stream": True, "cursor": 1})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "cursor"
    assert (await http.get(path)).json()["status"] == "open"
    assert (await http.delete(path)).status_code == 200


@pytest.mark.parametrize("beyond", [1, 1000])
async def test_a_stream_cannot_go_on_behind_an_event_that_never_was(api, http, beyond):
    path = await api.open()
    close = {"query": "?", "stream": True, "sequence": 1}
    last = max(number for number, _ in events((await http.post(f"{path}/close", json=close)).text) if number)
    response = await http.post(f"{path}/close", json={**close, "cursor": last + beyond})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "cursor"
    assert str(last) in response.json()["error"]["message"]


def _untimed(event):
    number, chunk = event
    return number, chunk if chunk == "[DONE]" else {**chunk, "created": 0}


async def test_a_close_whose_connection_broke_is_sent_again_and_answered_once(
    api, http, app, frontend, ingestor, may_go_on
):
    path = await api.open()
    close = {"query": "?", "stream": True, "sequence": 1}
    connection = Connection(app, f"{path}/close", close)
    running = asyncio.ensure_future(connection.run())
    await api.until(lambda: "id: 1" in connection.text, "the first piece does not come")
    connection.leave()
    async with asyncio.timeout(PATIENCE_S):
        await running
    [session] = ingestor.sessions.live()
    await api.until(lambda: session.num_calls == 0, "the ingestor's call goes on")
    may_go_on.set()
    again = (await http.post(f"{path}/close", json={**close, "cursor": 1})).text
    whole = (await http.post(f"{path}/close", json={"query": "?", "sequence": 1})).json()
    assert "".join(each["text"] for each in choices_of(connection.text + again)) == whole["choices"][0]["text"]
    assert len(frontend.requests) == 1


async def test_an_answer_that_ends_before_its_close_was_heard_again_is_given_all_the_same(
    api, http, app, ingestors, may_go_on
):
    path = await api.open()
    close = {"query": "?", "sequence": 1}
    first = Connection(app, f"{path}/close", {**close, "stream": True})
    running = asyncio.ensure_future(first.run())
    await api.until(lambda: "id: 1" in first.text, "the first piece does not come")
    first.leave()
    async with asyncio.timeout(PATIENCE_S):
        await running

    async def hold(request):
        """Let the answer end before the close is sent again."""
        if request.operation.HasField("close"):
            may_go_on.set()
            await ingestors.until(lambda heard: any(each.piece.piece.finish_reason for each in heard))

    ingestors.gate = hold
    again = await http.post(f"{path}/close", json=close)
    assert again.status_code == 200, again.text
    assert again.json()["choices"][0]["finish_reason"] == "stop"


async def test_a_whole_answer_is_given_again(api, http, frontend):
    path = await api.open()
    close = {"query": "?", "sequence": 1}
    first, again = [(await http.post(f"{path}/close", json=close)).json() for _ in range(2)]
    assert first["choices"] == again["choices"]
    assert first["usage"] == again["usage"]
    assert first["id"] == again["id"]
    assert len(frontend.requests) == 1


async def test_a_close_without_its_number_is_another_close(api, http):
    path = await api.open()
    await http.post(f"{path}/close", json={"query": "?"})
    error = api.error_of(await http.post(f"{path}/close", json={"query": "?"}), 400)
    assert "closed" in error["message"]


async def test_nothing_can_be_changed_behind_the_close(api, http):
    path = await api.open(mode="update")
    await http.post(f"{path}/close", json={"query": "?"})
    for verb, body in (("append", {"text": "x"}), ("update", {"segments": []})):
        assert "closed" in api.error_of(await http.post(f"{path}/{verb}", json=body), 400)["message"]


async def test_a_client_that_leaves_in_the_midst_of_a_stream_ends_the_call_but_not_the_answer(
    api, app, frontend, ingestor, may_go_on
):
    path = await api.open()
    connection = Connection(app, f"{path}/close", {"query": "?", "stream": True})
    running = asyncio.ensure_future(connection.run())
    await api.until(lambda: "id: 1" in connection.text, "the first piece does not come")
    [session] = ingestor.sessions.live()
    connection.leave()
    async with asyncio.timeout(PATIENCE_S):
        await running
    await api.until(lambda: session.num_calls == 0, "the ingestor's call goes on")
    assert frontend.ended == []
    may_go_on.set()
    await api.until(lambda: session.has_ended, "the answer does not end")
    assert session.failure is None


async def test_a_client_that_leaves_over_a_real_socket_ends_the_call(api, base_url, ingestor, may_go_on):
    path = await api.open()
    host, port = base_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps({"query": "?", "stream": True}).encode()
    head = f"POST {path}/close HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await reader.readuntil(b"id: 1\n")
    [session] = ingestor.sessions.live()
    assert session.num_calls == 1
    writer.close()
    await writer.wait_closed()
    await api.until(lambda: session.num_calls == 0, "the ingestor's call goes on")


async def test_a_client_that_waits_for_a_whole_answer_and_leaves_ends_the_call(api, app, http, frontend, ingestor):
    frontend.script = lambda request: [asyncio.Event()]
    path = await api.open()
    connection = Connection(app, f"{path}/close", {"query": "?"})
    running = asyncio.ensure_future(connection.run())
    async with asyncio.timeout(PATIENCE_S):
        await frontend.until(submitted=1)
    [session] = ingestor.sessions.live()
    connection.leave()
    async with asyncio.timeout(PATIENCE_S):
        await running
    await api.until(lambda: session.num_calls == 0, "the ingestor's call goes on")


async def test_openais_client_reads_the_stream_as_one_of_a_chat(api, base_url, http):
    path = await api.open(messages=[SYSTEM])
    whole = (await http.post(f"{await api.open(messages=[SYSTEM])}/close", json={"query": "?"})).json()
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        stream = await client.post(
            f"{path}/close",
            cast_to=ChatCompletionChunk,
            body={"query": "?", "stream": True},
            stream=True,
            stream_cls=openai.AsyncStream[ChatCompletionChunk],
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1].choices[0].finish_reason == "stop"
