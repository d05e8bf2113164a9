"""Carry the pieces of an answer to a client, for as long as the client is there."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeAlias, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from headrace.core.request import GenerationRequest, Piece
from headrace.errors import Cancelled, HeadraceError
from headrace.router.frontend import Frontend
from headrace.router.http.errors import error_response

Result = TypeVar("Result")
Take: TypeAlias = Callable[[int, Piece], Awaitable[None]]
"""Takes a piece and the index of the request it belongs to."""


class ClientLeft(Cancelled):
    """Nobody reads the answer any more."""


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Return what `work` returns; cancel it as soon as the client leaves.

    The request's body must have been read. Cancelling this call cancels `work` too.

    Raises:
        ClientLeft: the client left; `work` has ended.
        HeadraceError: from `work`.
    """
    async with asyncio.TaskGroup() as group:
        working = group.create_task(_settle(work))
        watching = group.create_task(_client_left(receive))
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        working.cancel()
        watching.cancel()
    if working.cancelled():
        raise ClientLeft("the client left")
    outcome = working.result()
    if isinstance(outcome, HeadraceError):
        raise outcome
    return outcome


async def _settle(work: Coroutine[Any, Any, Result]) -> Result | HeadraceError:
    """Return the error as a value: raised, the task group would wrap it."""
    try:
        return await work
    except HeadraceError as error:
        return error


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def run_requests(frontend: Frontend, requests: Sequence[GenerationRequest], take: Take) -> None:
    """Run requests side by side and hand over every piece; the first failure stops all.

    Cancelling this call closes the iterators of all requests.

    Raises:
        HeadraceError: the first failure.
    """
    if len(requests) == 1:
        await _forward(frontend.submit(requests[0]), 0, take)
        return
    try:
        async with asyncio.TaskGroup() as group:
            for index, request in enumerate(requests):
                group.create_task(_forward(frontend.submit(request), index, take))
    except ExceptionGroup as failures:
        own, _ = failures.split(HeadraceError)
        if own is None:
            raise
        raise _first(own) from failures


def _first(failures: ExceptionGroup[HeadraceError]) -> HeadraceError:
    found = failures.exceptions[0]
    return _first(found) if isinstance(found, ExceptionGroup) else found


async def _forward(pieces: AsyncIterator[Piece], index: int, take: Take) -> None:
    try:
        async for piece in pieces:
            await take(index, piece)
    finally:
        # A failing `take` leaves the iterator suspended; only closing it stops the work behind it.
        if isinstance(pieces, AsyncGenerator):
            await pieces.aclose()


class EventSender:
    """Writes server-sent events to one client; owns whether the answer's head is out."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._lock = asyncio.Lock()
        self.is_started = False

    async def write(self, events: bytes) -> None:
        """Send events in the order of the calls; the first call sends the head, with status 200.

        Waits while the client reads slowly.
        """
        async with self._lock:
            if not self.is_started:
                self.is_started = True
                await self._send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
            await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def close(self) -> None:
        """End the answer."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Proxies that buffer would hold tokens back.
    (b"x-accel-buffering", b"no"),
]


class EventStream(Response):
    """A streamed answer: an error before the first event keeps its status, later ones become events.

    Args:
        produce: Writes all events; cancelled when the client leaves.
        error_event: Builds the event of a late error.
    """

    def __init__(
        self,
        produce: Callable[[EventSender], Coroutine[Any, Any, None]],
        error_event: Callable[[HeadraceError], bytes],
    ) -> None:
        super().__init__()
        self._produce = produce
        self._error_event = error_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the stream to its end; returns quietly when the client leaves."""
        sender = EventSender(send)
        try:
            await until_disconnect(receive, self._produce(sender))
        except ClientLeft:
            return
        except HeadraceError as error:
            if not sender.is_started:
                await error_response(error)(scope, receive, send)
                return
            await sender.write(self._error_event(error))
        await sender.close()
