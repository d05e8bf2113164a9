"""What of the SDK a trace is recorded from and played to; headrace.AsyncClient has it, and so may a fake."""

from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Protocol, Unpack

from contexts import Mode

from headrace.client.messages import Text
from headrace.client.values import Answer, GenerateOptions, Message
from headrace.core.context import ContextState
from headrace.core.request import Piece


class ContextAnswer(Protocol):
    """The answer, piece by piece; its first step ends the context, or raises and leaves it open."""

    def __aiter__(self) -> AsyncIterator[Piece]: ...

    async def __anext__(self) -> Piece: ...

    async def answer(self) -> Answer:
        """Take in the rest and return the whole answer."""
        ...


class AsyncContext(Protocol):
    """An open context. All methods raise HeadraceError."""

    @property
    def context_id(self) -> str:
        """Its name in the cluster."""
        ...

    @property
    def model(self) -> str:
        """Who will answer."""
        ...

    @property
    def max_context_tokens(self) -> int:
        """Most tokens of prompt and answer together."""
        ...

    @property
    def state(self) -> ContextState:
        """How far it is, by what was heard last."""
        ...

    async def append(self, text: Text, segment: str | None = None) -> ContextState:
        """Add text at the end."""
        ...

    async def replace(self, from_segment: str, segments: Iterable[tuple[str, Text]]) -> ContextState:
        """Replace a segment and all behind it."""
        ...

    async def update(self, segments: Iterable[tuple[str, Text]]) -> ContextState:
        """Replace all segments."""
        ...

    async def checkpoint(self) -> ContextState:
        """Return once all that was sent before is computed."""
        ...

    def close(self, query: str = "") -> ContextAnswer:
        """Return the answer, to be iterated."""
        ...

    def watch(self) -> AsyncIterator[ContextState]:
        """Yield how far it is, now and at every change, until the answer begins."""
        ...

    async def abandon(self) -> None:
        """Drop the context."""
        ...


class Client(Protocol):
    """Opens contexts; one that is left open on leaving its `async with` is abandoned."""

    def context(
        self,
        prefix: str = "",
        *,
        chat: Iterable[Message] | None = None,
        mode: Mode = "append",
        **options: Unpack[GenerateOptions],
    ) -> AbstractAsyncContextManager[AsyncContext]:
        """Return a context to enter."""
        ...
