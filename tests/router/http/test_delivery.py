import asyncio
import json
from contextlib import suppress

import pytest

from headrace.core.request import GenerationRequest, Piece, RequestId, SamplingParams
from headrace.errors import Saturated
from headrace.router.http.delivery import EventSender, run_requests, until_disconnect

HI = [{"role": "user", "content": "hi"}]


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
        self.sent = []

    async def run(self):
        await self._app(self._scope, self._inbox.get, self._send)

    async def _send(self, message):
        self.sent.append(message)

    def leave(self):
        self._inbox.put_nowait({"type": "http.disconnect"})


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("num_pieces", [0, 2])
@pytest.mark.parametrize(
    ("path", "prompt", "num_requests"),
    [
        ("/v1/chat/completions", {"messages": HI}, 1),
        ("/v1/completions", {"prompt": "a"}, 1),
        ("/v1/completions", {"prompt": ["a", "b"]}, 2),
    ],
)
async def test_a_client_that_leaves_ends_all_its_work(app, frontend, is_stream, num_pieces, path, prompt, num_requests):
    pieces = [Piece(choice=0, text="a") for _ in range(num_pieces)]
    frontend.script = lambda request: [*pieces, asyncio.Event()]
    connection = Connection(app, path, {**prompt, "stream": is_stream})
    running = asyncio.ensure_future(connection.run())
    async with asyncio.timeout(5.0):
        await frontend.until(submitted=num_requests)
    assert frontend.ended == []
    connection.leave()
    async with asyncio.timeout(1.0):
        await running
    assert len(frontend.ended) == num_requests


@pytest.mark.parametrize("is_stream", [False, True])
async def test_stopping_the_server_ends_the_work(app, frontend, is_stream):
    frontend.script = lambda request: [asyncio.Event()]
    connection = Connection(app, "/v1/chat/completions", {"messages": HI, "stream": is_stream})
    running = asyncio.ensure_future(connection.run())
    async with asyncio.timeout(5.0):
        await frontend.until(submitted=1)
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    assert len(frontend.ended) == 1


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_that_leaves_over_a_real_socket_ends_its_work(base_url, frontend, is_stream):
    frontend.script = lambda request: [Piece(choice=0, text="a"), asyncio.Event()]
    host, port = base_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps({"messages": HI, "stream": is_stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    async with asyncio.timeout(5.0):
        await frontend.until(submitted=1)
    if is_stream:
        await reader.readuntil(b'"content":"a"')
    writer.close()
    await writer.wait_closed()
    async with asyncio.timeout(1.0):
        await frontend.until(ended=1)


async def test_a_slow_reader_holds_the_frontend_back(app, frontend):
    handed_out = []

    def endless(request):
        while True:
            handed_out.append(1)
            yield Piece(choice=0, text="a")

    frontend.script = endless
    connection = Connection(app, "/v1/chat/completions", {"messages": HI, "stream": True})
    sending = asyncio.Event()

    async def blocked(message):
        sending.set()
        await asyncio.Event().wait()

    connection._send = blocked
    running = asyncio.ensure_future(connection.run())
    await sending.wait()
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(handed_out) == 1
    connection.leave()
    async with asyncio.timeout(1.0):
        await running
    assert len(frontend.ended) == 1


async def test_a_body_far_over_the_limit_still_gets_its_answer_over_a_real_socket(base_url):
    host, port = base_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    total = 20_000_000
    writer.write(f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {total}\r\n\r\n".encode())
    for _ in range(total // 1_000_000):
        writer.write(b" " * 1_000_000)
        await writer.drain()
    assert (await reader.readline()).startswith(b"HTTP/1.1 413")
    writer.close()
    await writer.wait_closed()


async def test_a_client_that_asks_before_it_sends_is_refused_at_once(base_url):
    host, port = base_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 99999999\r\n\r\n"
    )
    async with asyncio.timeout(2.0):
        assert (await reader.readline()).startswith(b"HTTP/1.1 413")
    writer.close()
    await writer.wait_closed()


async def test_events_written_at_the_same_time_keep_their_order_behind_the_head():
    sent = []

    async def slow(message):
        # The first message yields longest.
        for _ in range(3 - len(sent)):
            await asyncio.sleep(0)
        sent.append(message.get("body", message["type"]))

    sender = EventSender(slow)
    await asyncio.gather(sender.write(b"1"), sender.write(b"2"))
    assert sent == ["http.response.start", b"1", b"2"]


async def test_the_first_of_several_failures_is_the_one_raised(frontend):
    requests = [
        GenerationRequest(
            request_id=RequestId(name), model="tiny", prompt=(1,), sampling=SamplingParams(), deadline_unix_ms=1
        )
        for name in "ab"
    ]
    frontend.script = lambda request: [Saturated(request.request_id)]

    async def take(index, piece):
        raise AssertionError

    with pytest.raises(Saturated):
        await run_requests(frontend, requests, take)
    assert len(frontend.ended) == 2


async def test_work_that_is_done_is_returned_while_the_client_stays():
    async def work():
        return 3

    assert await until_disconnect(asyncio.Queue().get, work()) == 3
