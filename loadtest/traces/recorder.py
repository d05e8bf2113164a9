"""Records contexts while a program uses them.

    with path.open("wb") as file:
        client = Recorder(AsyncClient(), writer(file), WallClock().now)
        async with client.context(mode="append") as context:
            ...

The trace holds the texts themselves: who may not keep prompts may not record them.
"""

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from itertools import count
from typing import IO, Unpack

from contexts import Abandon, Append, Bytes, Checkpoint, Close, Event, Mode, Open, Replace, Segment, Update, line_of
from sdk import AsyncContext, Client

from headrace.client.values import GenerateOptions, Message
from headrace.core.request import Piece


def writer(file: IO[bytes]) -> Callable[[Event], object]:
    """Return what writes events to an open file."""
    return lambda event: file.write(line_of(event) + b"\n")


class Recorder:
    """A client that passes everything on and tells what passed; times count from its making.

    A call is told with the time of its begin once it has succeeded, so that a refused one is not in the trace: a close
    when the first piece of the answer is there. Contexts are named 1, 2, ... in the order in which they were asked for.

    Args:
        client: Whose contexts are recorded.
        write: Takes the events; those of one context in order, one call at a time.
        now: Seconds that never go back.
    """

    def __init__(self, client: Client, write: Callable[[Event], object], now: Callable[[], float]) -> None:
        begin_s = now()
        self._client = client
        self._write = write
        self._seconds: Callable[[], float] = lambda: now() - begin_s
        self._numbers = count(1)

    @asynccontextmanager
    async def context(
        self,
        prefix: str = "",
        *,
        chat: Iterable[Message] | None = None,
        mode: Mode = "append",
        **options: Unpack[GenerateOptions],
    ) -> AsyncIterator["RecordedContext"]:
        """Open a context of the client."""
        name, at_s = str(next(self._numbers)), self._seconds()
        messages = None if chat is None else tuple(chat)
        async with self._client.context(prefix, chat=messages, mode=mode, **options) as inner:
            self._write(Open(at_s=at_s, context=name, mode=mode, prefix=prefix, chat=messages, options=options))
            recorded = RecordedContext(inner, name, self._write, self._seconds)
            try:
                yield recorded
            finally:
                recorded.leave()


class RecordedContext:
    """An open context of a Recorder.

    Args:
        inner: Where the calls go.
        name: In the trace.
        write: Takes the events.
        seconds: Time from the trace's begin.
    """

    def __init__(
        self, inner: AsyncContext, name: str, write: Callable[[Event], object], seconds: Callable[[], float]
    ) -> None:
        self._inner = inner
        self._name = name
        self._write = write
        self._seconds = seconds
        self._is_over = False

    async def append(self, text: str | bytes, segment: str | None = None) -> object:
        """Add text at the end."""
        at_s = self._seconds()
        result = await self._inner.append(text, segment)
        self._write(Append(at_s=at_s, context=self._name, text=_told(text), segment=segment))
        return result

    async def replace(self, from_segment: str, segments: Iterable[tuple[str, str | bytes]]) -> object:
        """Replace a segment and all behind it."""
        at_s, pairs = self._seconds(), tuple(segments)
        result = await self._inner.replace(from_segment, pairs)
        told = tuple(Segment(name, _told(text)) for name, text in pairs)
        self._write(Replace(at_s=at_s, context=self._name, from_segment=from_segment, segments=told))
        return result

    async def update(self, segments: Iterable[tuple[str, str | bytes]]) -> object:
        """Replace all segments."""
        at_s, pairs = self._seconds(), tuple(segments)
        result = await self._inner.update(pairs)
        told = tuple(Segment(name, _told(text)) for name, text in pairs)
        self._write(Update(at_s=at_s, context=self._name, segments=told))
        return result

    async def checkpoint(self) -> object:
        """Return once all that was sent before is computed."""
        at_s = self._seconds()
        result = await self._inner.checkpoint()
        self._write(Checkpoint(at_s=at_s, context=self._name))
        return result

    async def close(self, query: str = "") -> AsyncIterator[Piece]:
        """Yield the answer; its first step ends the context."""
        at_s = self._seconds()
        async for piece in self._inner.close(query):
            if not self._is_over:
                self._is_over = True
                self._write(Close(at_s=at_s, context=self._name, query=query))
            yield piece

    async def abandon(self) -> None:
        """Drop the context."""
        self.leave()
        await self._inner.abandon()

    def leave(self) -> None:
        """Tell that the context is abandoned, unless it has ended."""
        if not self._is_over:
            self._is_over = True
            self._write(Abandon(at_s=self._seconds(), context=self._name))


def _told(text: str | bytes) -> str | Bytes:
    return Bytes(text) if isinstance(text, bytes) else text
