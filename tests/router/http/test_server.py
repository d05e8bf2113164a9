"""Connections that keep the HTTP server waiting are ended; those that wait for it are not."""

import asyncio
import contextlib
import json

import pytest

from headrace.router.http.context import HttpSettings
from headrace.router.http.server import WebServer, listen
from headrace.testing.frontend import say

PATIENCE_S = 10.0
RECEIVE_TIMEOUT_S = 0.3
TRICKLE_S = 0.05
BODY = json.dumps({"prompt": "a", "max_tokens": 2}).encode()
HEAD = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(BODY)}\r\n\r\n".encode()


@pytest.fixture
def settings(settings) -> HttpSettings:
    return HttpSettings(tenancy=settings.tenancy, receive_timeout_s=RECEIVE_TIMEOUT_S)


@pytest.fixture
async def connect(app, monkeypatch):
    """Serve; returns what opens a connection."""
    monkeypatch.setattr("headrace.router.http.server.TICK_S", 0.02)
    web, listener = WebServer(app, "127.0.0.1", 0, RECEIVE_TIMEOUT_S), listen("127.0.0.1", 0)
    serving = asyncio.create_task(web.serve([listener]))
    async with contextlib.AsyncExitStack() as stack:

        async def open_connection():
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            stack.callback(writer.close)
            return reader, writer

        yield open_connection
    web.leave(0.0)
    await serving


async def trickle(writer, raw):
    """Send byte by byte, until the other end has left."""
    with contextlib.suppress(ConnectionError):
        for byte in raw:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(TRICKLE_S)


async def to_the_end(reader):
    with contextlib.suppress(ConnectionResetError):
        async with asyncio.timeout(PATIENCE_S):
            return await reader.read()
    return b""


async def answer_of(reader):
    """Read one answer with a length; return its head and body."""
    async with asyncio.timeout(PATIENCE_S):
        head = await reader.readuntil(b"\r\n\r\n")
        [length] = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
        return head, await reader.readexactly(int(length))


@pytest.mark.parametrize("sent", [b"", b"G", HEAD[:20]])
async def test_a_connection_that_sends_no_whole_head_is_closed(connect, sent):
    reader, writer = await connect()
    writer.write(sent)
    assert await to_the_end(reader) == b""


async def test_a_head_that_trickles_in_is_not_waited_for(connect, frontend):
    reader, writer = await connect()
    sending = asyncio.create_task(trickle(writer, HEAD + BODY))
    assert await to_the_end(reader) == b""
    await sending
    assert frontend.requests == []


async def test_a_head_without_end_is_refused_before_it_takes_room(connect):
    reader, writer = await connect()
    writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-a: ")

    async def flood():
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                writer.write(b"a" * 100_000)
                await writer.drain()

    sending = asyncio.create_task(flood())
    head, body = await answer_of(reader)
    assert head.startswith(b"HTTP/1.1 431")
    assert json.loads(body)["error"]["code"] == "head_too_large"
    await to_the_end(reader)
    await sending


async def test_a_body_larger_than_a_head_may_be_is_read(connect):
    reader, writer = await connect()
    body = json.dumps({"prompt": "a", "max_tokens": 2}).encode() + b" " * 300_000
    for _ in range(2):
        writer.write(f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode())
        for start in range(0, len(body), 50_000):
            writer.write(body[start : start + 50_000])
            await writer.drain()
        assert (await answer_of(reader))[0].startswith(b"HTTP/1.1 200")


async def test_a_body_that_trickles_in_is_refused_and_its_connection_closed(connect, frontend):
    reader, writer = await connect()
    writer.write(HEAD)
    sending = asyncio.create_task(trickle(writer, BODY * 100))
    head, body = await answer_of(reader)
    assert head.startswith(b"HTTP/1.1 408")
    error = json.loads(body)["error"]
    assert (error["type"], error["code"], error["param"]) == ("timeout_error", "request_timeout", "body")
    assert f"{RECEIVE_TIMEOUT_S:g} s" in error["message"]
    await to_the_end(reader)
    await sending
    assert frontend.requests == []


async def test_a_connection_that_begins_another_request_and_stops_is_closed(connect):
    reader, writer = await connect()
    for _ in range(3):  # Longer than the time, all in all: each request begins it anew.
        writer.write(HEAD + BODY)
        assert (await answer_of(reader))[0].startswith(b"HTTP/1.1 200")
        await asyncio.sleep(RECEIVE_TIMEOUT_S / 2)
    writer.write(HEAD[:5])
    assert await to_the_end(reader) == b""


async def test_who_waits_for_an_answer_keeps_the_connection(connect, frontend):
    go_on = asyncio.Event()
    frontend.script = lambda request: [go_on, *say("ok")(request)]
    reader, writer = await connect()
    writer.write(HEAD + BODY)
    await asyncio.sleep(4 * RECEIVE_TIMEOUT_S)
    go_on.set()
    assert (await answer_of(reader))[0].startswith(b"HTTP/1.1 200")
