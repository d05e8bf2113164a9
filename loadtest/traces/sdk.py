"""What of the SDK a trace is recorded from and played to; headrace.AsyncClient has it, and so may a fake."""

from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Protocol, Unpack

from contexts import Mode

from headrace.client.values import GenerateOptions, Message
from headrace.core.request import Piece


class AsyncContext(Protocol):
    """An open context. All methods raise HeadraceError."""

    async def append(self, text: str | bytes, segment: str | None = None) -> object:
        """Add text at the end."""
        ...

    async def replace(self, from_segment: str, segments: Iterable[tuple[str, str | bytes]]) -> object:
        """Replace a segment and all behind it."""
        ...

    async def update(self, segments: Iterable[tuple[str, str | bytes]]) -> object:
        """Replace all segments."""
        ...

    async def checkpoint(self) -> object:
        """Return once all that was sent before is computed."""
        ...

    def close(self, query: str = "") -> AsyncIterator[Piece]:
        """Return the answer, piece by piece; its first step ends the context, or raises and leaves it open."""
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
