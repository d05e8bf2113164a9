"""Records contexts while a program uses them.

    with path.open("wb") as file:
        async with AsyncClient() as inner:
            client = Recorder(inner, writer(file), WallClock().now)
            async with client.context(mode="append") as context:
                ...

The trace holds the texts themselves: who may not keep prompts may not record them.
"""

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from itertools import count, takewhile
from typing import IO, Unpack

from contexts import Abandon, Append, Bytes, Checkpoint, Close, Event, Mode, Open, Replace, Segment, Update, line_of
from sdk import AsyncContext, Client, ContextAnswer

from headrace.client import messages
from headrace.client.values import Answer, GenerateOptions, Message
from headrace.core.context import ContextState
from headrace.core.request import Piece


def writer(file: IO[bytes]) -> Callable[[Event], object]:
    """Return what writes events to an open file."""
    return lambda event: file.write(line_of(event) + b"\n")


class Recorder:
    """A client that passes everything on and tells what its contexts did; times count from its making.

    Calls are told in the order of their begins and with those times, once it is known what became of them: a call that
    is still under way holds back those of its context that began after it. A refused call is not told; one that was
    cancelled is, since it was sent, unless it still waited for another change of its context. A close is told when the
    first piece of the answer is there. Contexts are named 1, 2, ... in the order in which they were asked for.

    A trace is a week at most (contexts.MOST_S): a recorder that is older raises ValueError at every call.

    What else the client has is the client's own, and not in the trace. The client is entered and left by its owner.

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

    def __getattr__(self, name: str) -> object:
        """Return what only the client has, such as `generate`."""
        if name.startswith("_"):
            raise AttributeError(name)
        found: object = getattr(self._client, name)
        return found

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
        told = None if chat is None else tuple(chat)
        events = _Told(self._write)
        try:
            async with self._client.context(prefix, chat=told, mode=mode, **options) as inner:
                events.add(Open(at_s=at_s, context=name, mode=mode, prefix=prefix, chat=told, options=options))
                recorded = RecordedContext(inner, name, events, self._seconds)
                try:
                    yield recorded
                finally:
                    recorded.leave()
        finally:
            events.finish()


class RecordedContext:
    """An open context of a Recorder; it has what the SDK's has.

    Args:
        inner: Where the calls go.
        name: In the trace.
        events: Takes the events.
        seconds: Time from the trace's begin.
    """

    def __init__(self, inner: AsyncContext, name: str, events: "_Told", seconds: Callable[[], float]) -> None:
        self._inner = inner
        self._name = name
        self._events = events
        self._seconds = seconds

    @property
    def context_id(self) -> str:
        """Its name in the cluster."""
        return self._inner.context_id

    @property
    def model(self) -> str:
        """Who will answer."""
        return self._inner.model

    @property
    def max_context_tokens(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._inner.max_context_tokens

    @property
    def state(self) -> ContextState:
        """How far it is, by what was heard last."""
        return self._inner.state

    def watch(self) -> AsyncIterator[ContextState]:
        """Yield how far it is; not in the trace."""
        return self._inner.watch()

    async def append(self, text: messages.Text, segment: str | None = None) -> ContextState:
        """Add text at the end."""
        told = _told(text)
        # To the SDK no name and an empty one are the same.
        with self._events.call(
            Append(at_s=self._seconds(), context=self._name, text=told, segment=segment or None),
        ):
            return await self._inner.append(text, segment)

    async def replace(self, from_segment: str, segments: Iterable[tuple[str, messages.Text]]) -> ContextState:
        """Replace a segment and all behind it."""
        pairs = tuple(segments)
        told = _told_segments(pairs)
        with self._events.call(
            Replace(at_s=self._seconds(), context=self._name, from_segment=from_segment, segments=told)
        ):
            return await self._inner.replace(from_segment, pairs)

    async def update(self, segments: Iterable[tuple[str, messages.Text]]) -> ContextState:
        """Replace all segments."""
        pairs = tuple(segments)
        told = _told_segments(pairs)
        with self._events.call(Update(at_s=self._seconds(), context=self._name, segments=told)):
            return await self._inner.update(pairs)

    async def checkpoint(self) -> ContextState:
        """Return once all that was sent before is computed."""
        with self._events.call(Checkpoint(at_s=self._seconds(), context=self._name)):
            return await self._inner.checkpoint()

    def close(self, query: str = "") -> "RecordedAnswer":
        """Return the answer, to be iterated; its first step ends the context."""
        return RecordedAnswer(
            self._inner.close(query),
            lambda: self._events.call(Close(at_s=self._seconds(), context=self._name, query=query)),
        )

    async def abandon(self) -> None:
        """Drop the context."""
        self.leave()
        await self._inner.abandon()

    def leave(self) -> None:
        """Tell that the context is abandoned, unless it has ended."""
        self._events.leave(Abandon(at_s=self._seconds(), context=self._name))


class RecordedAnswer:
    """The answer to a recorded context, to be iterated or asked for the whole `answer`, as the SDK's.

    Args:
        inner: Where the pieces are from.
        closing: Tells the close that happens within it.
    """

    def __init__(self, inner: ContextAnswer, closing: Callable[[], AbstractContextManager[None]]) -> None:
        self._inner = inner
        self._closing = closing
        self._has_begun = False

    def __aiter__(self) -> "RecordedAnswer":
        return self

    async def __anext__(self) -> Piece:
        if self._has_begun:
            return await anext(self._inner)
        with self._closing():
            piece = await anext(self._inner)
        self._has_begun = True
        return piece

    async def answer(self) -> Answer:
        """Take in the rest and return the whole answer."""
        async for _ in self:
            pass
        return await self._inner.answer()


class _Fate(Enum):
    """What became of a call; of a close that was cancelled the next change tells it."""

    UNDER_WAY = auto()
    UNCERTAIN = auto()
    SENT = auto()
    REFUSED = auto()


@dataclass(slots=True)
class _Call:
    event: Event
    fate: _Fate


class _Told:
    """The events of one context on their way to the trace.

    Invariants: they are written in the order in which they were issued, none behind the context's end.
    """

    def __init__(self, write: Callable[[Event], object]) -> None:
        self._write = write
        self._calls: deque[_Call] = deque()
        self._has_ended = False

    def add(self, event: Event) -> None:
        """Tell what has happened."""
        self._calls.append(_Call(event, _Fate.SENT))
        self._write_known()

    @contextmanager
    def call(self, event: Event) -> Iterator[None]:
        """Tell a call that is made within, unless it is refused."""
        call = _Call(event, _Fate.UNDER_WAY)
        self._calls.append(call)
        try:
            yield
        except Exception:
            call.fate = _Fate.REFUSED
            raise
        except BaseException:
            call.fate = self._fate_of_cancelled(call)
            raise
        else:
            call.fate = _Fate.SENT
            self._decide(_Fate.UNCERTAIN, lambda _: _Fate.REFUSED)
        finally:
            self._write_known()

    def leave(self, abandon: Abandon) -> None:
        """Tell the end of a context that has none."""
        self._decide(_Fate.UNCERTAIN, lambda _: _Fate.SENT)
        self.add(abandon)

    def finish(self) -> None:
        """Write what is left; of a change that is still under way nothing more will be heard."""
        self._decide(_Fate.UNDER_WAY, lambda event: _Fate.SENT if isinstance(event, Checkpoint) else _Fate.REFUSED)
        self._write_known()

    def _fate_of_cancelled(self, call: _Call) -> _Fate:
        earlier = takewhile(lambda other: other is not call, self._calls)
        if any(other.fate is _Fate.UNDER_WAY and not isinstance(other.event, Checkpoint) for other in earlier):
            return _Fate.REFUSED  # The SDK sends changes one by one: this one was never sent.
        return _Fate.UNCERTAIN if isinstance(call.event, Close) else _Fate.SENT

    def _decide(self, fate: _Fate, decided: Callable[[Event], _Fate]) -> None:
        for call in self._calls:
            if call.fate is fate:
                call.fate = decided(call.event)

    def _write_known(self) -> None:
        while self._calls and self._calls[0].fate in (_Fate.SENT, _Fate.REFUSED):
            call = self._calls.popleft()
            if call.fate is _Fate.SENT and not self._has_ended:
                self._has_ended = isinstance(call.event, Close | Abandon)
                self._write(call.event)


def _told(text: messages.Text) -> str | Bytes:
    """Return a text as the trace has it; raises InvalidRequest for one that the SDK refuses."""
    utf8 = messages.utf8(text, "text")
    return text if isinstance(text, str) else Bytes(utf8)


def _told_segments(pairs: Iterable[tuple[str, messages.Text]]) -> tuple[Segment, ...]:
    """Return segments as the trace has them; raises InvalidRequest for those that the SDK refuses."""
    messages.segments_of(pairs)
    return tuple(Segment(name, _told(text)) for name, text in pairs)
