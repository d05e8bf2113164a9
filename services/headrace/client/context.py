"""A prompt whose context still arrives, as the SDK shows it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import TypeAlias, cast

from headrace.client import messages
from headrace.client.attempts import Attempts
from headrace.client.context_link import ContextLink
from headrace.client.fold import AnswerFold
from headrace.client.values import Answer
from headrace.core.context import ContextState
from headrace.core.request import Piece
from headrace.errors import HeadraceError, InvalidRequest, PeerFailed
from headrace.v1 import ingestor_pb2

LEAVE_S = 2.0
"""Longest wait for an ingestor to hear that a context is abandoned; it finds out by itself later."""

LINGER_S = 0.2
"""Longest wait for a call to end by itself, which it does soon after the answer's end or the abandoning."""

RECONNECT_S = 25.0
"""How long a context is taken up again after its connection broke if its ingestor does not say how long it stays."""

MIN_RECONNECT_S = 5.0
"""At least so long: whoever comes too late is told so, and knows then that nothing was carried out any more."""

ENVELOPE_BYTES = 32
"""At most what a request has besides its operation: its number and its framing."""

Segments: TypeAlias = Iterable[tuple[str, messages.Text]]
Connect: TypeAlias = Callable[[ingestor_pb2.StreamContextRequest, float], ContextLink]
"""Returns a call that begins with a request and may take so many seconds."""


class AsyncContext:
    """A context that grows or changes while the model computes what is there; use it in `async with`.

    Text is exactly what is sent: prefix, context and query are joined without anything between them. Every method
    returns, or raises, when the cluster has carried the change out or refused it; one that is refused changes nothing,
    and the context goes on. A connection that breaks is made anew, for as long as the ingestor keeps the context,
    unless the client makes no retries. A change whose method is cancelled may be carried out, and is when another one
    follows. Leaving the block before the answer is complete abandons the context.

    Args:
        connect: Makes a call.
        opening: What to open it with.
        attempts: Returns the attempts of one call, for so many seconds if given, and how long all may take.
        pause: Waits between two attempts.
    """

    def __init__(
        self,
        connect: Connect,
        opening: ingestor_pb2.OpenContext,
        attempts: Callable[[float | None], Attempts],
        pause: Callable[[float], Awaitable[None]],
    ) -> None:
        self._connect = connect
        self._first = ingestor_pb2.StreamContextRequest(open=opening)
        self._new_attempts = attempts
        self._pause = pause
        self._whole = attempts(None)
        self._link: ContextLink | None = None
        self._sequence = 0
        self._unanswered: ingestor_pb2.ContextOperation | None = None
        self._turn = asyncio.Lock()
        self._mending = asyncio.Lock()
        self._cursor = 0
        self._is_over = False
        self._lost: HeadraceError | None = None

    @property
    def context_id(self) -> str:
        """Its name in the cluster."""
        return self._open_link().opened.context_id

    @property
    def model(self) -> str:
        """Who will answer."""
        return self._open_link().opened.model

    @property
    def max_context_tokens(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._open_link().opened.max_context_tokens

    @property
    def state(self) -> ContextState:
        """How far it is, by what was heard last."""
        return self._open_link().state

    async def append(self, text: messages.Text, segment: str | None = None) -> ContextState:
        """Add text at the end.

        Args:
            text: Bytes may be cut inside a character.
            segment: Name of the part that it belongs to: the last one, as by default, or a new one.

        Raises:
            ContextOverflow: it does not fit the model's context.
            HeadraceError: it was refused, or the context is lost.
        """
        operation = ingestor_pb2.ContextOperation()
        operation.append.text = messages.utf8(text, "text")
        operation.append.segment_id = _text(segment or "", "segment")
        return await self._operate(operation)

    async def replace(self, from_segment: str, segments: Segments) -> ContextState:
        """Put others in the place of one segment and all behind it; in mode "update". Raises as `append`."""
        operation = ingestor_pb2.ContextOperation()
        operation.replace.from_segment_id = _text(from_segment, "from_segment")
        operation.replace.segments.extend(messages.segments_of(segments))
        return await self._operate(operation)

    async def update(self, segments: Segments) -> ContextState:
        """Put others in the place of all segments; in mode "update". Raises as `append`."""
        operation = ingestor_pb2.ContextOperation()
        operation.update.SetInParent()
        operation.update.segments.extend(messages.segments_of(segments))
        return await self._operate(operation)

    async def checkpoint(self) -> ContextState:
        """Wait until all that was sent is computed, as far as it can be before the close. Raises as `append`."""
        operation = ingestor_pb2.ContextOperation()
        operation.checkpoint.SetInParent()
        await self._operate(operation)
        sequence = operation.sequence
        while True:
            link = self._open_link()
            try:
                await link.until(lambda state: state.checkpoint >= sequence)
                return link.state
            except HeadraceError as error:
                await self._mend(link, error)

    def close(self, query: str = "") -> "AsyncContextAnswer":
        """End the context with the text that follows it and return its answer, to be iterated.

        A close that is refused, as when the query does not fit, raises from the first step of the answer; the context
        is open still.
        """
        operation = ingestor_pb2.ContextOperation()
        operation.close.query = _text(query, "query")
        return AsyncContextAnswer(self._next_piece, lambda: self._operate(operation), self._whole)

    async def abandon(self) -> None:
        """Drop the context and its answer; quiet when it is gone already."""
        if self._link is None or self._is_over:
            return
        self._is_over = True
        if self._unanswered is not None:
            self._link.send(self._unanswered)
        self._sequence += 1
        operation = ingestor_pb2.ContextOperation(sequence=self._sequence)
        operation.abandon.SetInParent()
        with contextlib.suppress(HeadraceError, TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                await self._link.operate(operation)

    async def watch(self) -> AsyncIterator[ContextState]:
        """Yield how far it is, now and at every change, until the first token of the answer is there.

        Raises:
            HeadraceError: the context is lost.
        """
        shown: ContextState | None = None
        while not self._is_over and not self._cursor:
            link = self._open_link()
            changed = link.changed
            if link.state != shown:
                shown = link.state
                yield shown
            elif link.has_piece:
                return
            elif link.failure is not None:
                await self._mend(link, link.failure)
            else:
                await changed.wait()

    async def __aenter__(self) -> "AsyncContext":
        attempts = self._new_attempts(None)
        while True:
            try:
                await self._connect_anew()
                return self
            except HeadraceError as error:
                await self._pause(attempts.pause_s(error))

    async def __aexit__(self, *_: object) -> None:
        await self.abandon()
        if self._link is not None:
            await self._link.close(LINGER_S)

    # -- Carrying on over broken calls ---------------------------------------------

    def _open_link(self) -> ContextLink:
        if self._link is None:
            raise InvalidRequest("the context is not open: use it in `async with`", field="context")
        return self._link

    async def _connect_anew(self) -> None:
        """Open the context, or take it up again.

        Raises:
            HeadraceError: that failed.
        """
        link = self._connect(self._first, self._whole.remaining_s())
        try:
            await link.open()
        except BaseException:
            await link.close()
            raise
        before, self._link = self._link, link
        resume = ingestor_pb2.ResumeContext(context_id=link.opened.context_id)
        self._first = ingestor_pb2.StreamContextRequest(resume=resume)
        if before is not None:
            await before.close()

    async def _mend(self, link: ContextLink, error: HeadraceError) -> None:
        """Take up the context after a call has failed, unless somebody else has; raise `error` if that does not help.

        Args:
            link: The call that failed.
            error: Why.
        """
        async with self._mending:
            attempts = self._new_attempts(max(MIN_RECONNECT_S, link.opened.grace_ms / 1000 or RECONNECT_S))
            while self._link is link:
                await self._pause(attempts.pause_s(error))
                self._first.resume.cursor = self._cursor
                try:
                    await self._connect_anew()
                except HeadraceError as again:
                    error = again

    async def _operate(self, operation: ingestor_pb2.ContextOperation) -> ContextState:
        async with self._turn:
            self._open_link()
            if self._lost is not None:
                raise self._lost
            if self._is_over:
                raise InvalidRequest("the context is over: nothing can be changed any more", field="operation")
            self._refuse_large(operation)
            before, refusal = self._unanswered, None
            if before is not None:
                refusal = await self._have_carried_out(before)
            if before is not operation:
                self._sequence += 1
                operation.sequence = self._sequence
                refusal = await self._have_carried_out(operation)
            if refusal is not None:
                raise refusal
            return self._open_link().state

    def _refuse_large(self, operation: ingestor_pb2.ContextOperation) -> None:
        """Refuse what would end the call, before it takes a number."""
        size, limit = operation.ByteSize() + ENVELOPE_BYTES, self._open_link().opened.max_request_bytes
        if 0 < limit < size:
            raise InvalidRequest(
                f"the operation has {size} bytes; send it in parts", field="operation", limit=f"{limit} bytes"
            )

    async def _have_carried_out(self, operation: ingestor_pb2.ContextOperation) -> HeadraceError | None:
        """Send an operation until it is answered; return why it was refused, if it was."""
        self._unanswered = operation
        while True:
            link = self._open_link()
            try:
                refusal = await link.operate(operation)
            except HeadraceError as error:
                await self._mend_or_lose(link, error)
                continue
            self._unanswered = None
            return refusal

    async def _mend_or_lose(self, link: ContextLink, error: HeadraceError) -> None:
        try:
            await self._mend(link, error)
        except HeadraceError as lost:
            # Whether the operation was carried out is not known: after it there can be no other.
            self._lost = lost
            raise

    async def _next_piece(self) -> ingestor_pb2.ContextPiece:
        while True:
            link = self._open_link()
            try:
                piece = await link.piece()
                if piece is None:
                    raise PeerFailed("the call for the context has ended before its answer did")
            except HeadraceError as error:
                await self._mend(link, error)
                continue
            if piece.cursor <= self._cursor:
                continue  # It came by the call before, while this one was made.
            self._cursor = piece.cursor
            if piece.piece.finish_reason:
                self._is_over = True
            return piece


class AsyncContextAnswer:
    """The pieces of the answer to a context as they arrive; iterate it, ask it for the whole `answer`, or both.

    The context is closed by the first of these; times count from there.
    """

    def __init__(
        self,
        next_piece: Callable[[], Awaitable[ingestor_pb2.ContextPiece]],
        close: Callable[[], Awaitable[object]],
        clock: Attempts,
    ) -> None:
        self._next_piece = next_piece
        self._close = close
        self._clock = clock
        self._fold: AnswerFold | None = None
        self._answer: Answer | None = None

    def __aiter__(self) -> "AsyncContextAnswer":
        return self

    async def __anext__(self) -> Piece:
        if self._fold is None:
            fold = AnswerFold(1, self._clock.now_s())
            await self._close()
            self._fold = fold
        if self._fold.is_complete:
            raise StopAsyncIteration
        response = await self._next_piece()
        return self._fold.add(response.piece, self._clock.now_s())

    async def answer(self) -> Answer:
        """Take in the rest and return the whole answer."""
        async for _ in self:
            pass
        if self._answer is None:
            self._answer = cast(AnswerFold, self._fold).answer(self._clock.now_s())
        return self._answer


def _text(text: str, field: str) -> str:
    """Return a text that can be sent; raises InvalidRequest for another."""
    try:
        return messages.utf8(text, field).decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{field} cannot be sent: {error}", field=field) from None
