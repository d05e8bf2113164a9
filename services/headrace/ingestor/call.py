"""One client's call for a context: its operations in, what becomes of them out."""

import asyncio
import logging
import math
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import TypeAlias

from headrace.core.context import Abandon
from headrace.core.wire import context_state_to_proto, error_to_detail, piece_to_proto
from headrace.errors import HeadraceError, InvalidRequest
from headrace.ingestor.session import Session
from headrace.ingestor.wire import mode_to_proto, operation_from_proto
from headrace.v1 import ingestor_pb2

logger = logging.getLogger(__name__)

LINGER_S = 0.5
"""Longest wait for the first words of a call for a context that had ended before."""

MOST_UNREAD = 64
"""Refusals that a client may leave unread, before no further operation of it is taken."""

Requests: TypeAlias = AsyncIterator[ingestor_pb2.StreamContextRequest]


class ContextCall:
    """Stands between one call and the session that it is for.

    Args:
        session: The context.
        cursor: Pieces of the answer that the client has.
        tasks: Outlives every call.

    Raises:
        InvalidRequest: there are not so many pieces.
    """

    def __init__(self, session: Session, cursor: int, tasks: asyncio.TaskGroup) -> None:
        if cursor > len(session.pieces):
            raise InvalidRequest(
                f"{cursor} pieces of the answer are said to have arrived",
                field="resume.cursor",
                limit=f"{len(session.pieces)}",
            )
        self._session = session
        self._cursor = cursor
        self._tasks = tasks
        self._refused: deque[ingestor_pb2.OperationRefused] = deque()
        self._answered = 0
        self._error: HeadraceError | None = None
        self._has_all = False
        self._is_busy = self._has_heard = False
        self._has_abandoned = False
        self._linger = True
        self._has_room = asyncio.Event()

    async def responses(self, requests: Requests) -> AsyncGenerator[ingestor_pb2.StreamContextResponse, None]:
        """Yield what happens, until the answer is complete or the client has no more to say of an open context.

        Raises:
            HeadraceError: the context has failed, or the call makes no sense.
        """
        session = self._session
        session.attach()
        reading = self._tasks.create_task(self._read(requests))
        try:
            yield ingestor_pb2.StreamContextResponse(opened=_opened(session))
            shown: ingestor_pb2.ContextState | None = None
            while True:
                changed = session.changed
                while self._refused:
                    yield ingestor_pb2.StreamContextResponse(refused=self._refused.popleft())
                self._has_room.set()
                state = self._state()
                if state != shown:
                    yield ingestor_pb2.StreamContextResponse(state=state)
                    shown = state
                while self._cursor < len(session.pieces):
                    yield ingestor_pb2.StreamContextResponse(piece=self._next_piece())
                if self._is_over():
                    if not self._linger:
                        return
                    await self._hear_out()
                    continue
                if not (self._refused or changed.is_set()):
                    await changed.wait()
        finally:
            session.detach()
            reading.cancel()
            await asyncio.wait([reading])

    async def _hear_out(self) -> None:
        """Wait a little for the first words of a client that took up a context after its end."""
        self._linger = False
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while not (self._has_all or self._has_heard):
                    await self._session.changed.wait()

    def _state(self) -> ingestor_pb2.ContextState:
        state = context_state_to_proto(self._session.state())
        state.answered_sequence = self._answered
        return state

    def _next_piece(self) -> ingestor_pb2.ContextPiece:
        session = self._session
        piece = session.pieces[self._cursor]
        model = session.opening.limits.model if self._cursor == 0 else ""
        self._cursor += 1
        return ingestor_pb2.ContextPiece(
            cursor=self._cursor, piece=piece_to_proto(piece, session.opening.request.request_id, model)
        )

    def _is_over(self) -> bool:
        """Return whether nothing more is to be said.

        Raises:
            HeadraceError: for a reason.
        """
        session = self._session
        # An operation under way may be the one that ends the context: its outcome is told first.
        if self._is_busy or self._refused or self._cursor < len(session.pieces):
            return False
        for error in (session.failure, self._error):
            if error is not None and not self._has_abandoned:
                raise error
        return session.has_ended or (self._has_all and not session.is_closed and not session.is_awaited)

    async def _read(self, requests: Requests) -> None:
        try:
            async for request in requests:
                if not request.HasField("operation"):
                    raise InvalidRequest("the call has its context already: operations follow", field="operation")
                await self._carry_out(request.operation)
        except HeadraceError as error:
            self._error = error
        except Exception as error:  # noqa: BLE001 what gRPC raises when a call ends under its reader is not public
            logger.info("call broke off", extra={"error": repr(error)})
        self._has_all = True
        self._session.notify()

    async def _carry_out(self, message: ingestor_pb2.ContextOperation) -> None:
        operation = operation_from_proto(message, self._session.max_segments)
        if len(self._refused) >= MOST_UNREAD:
            self._has_room.clear()
            await self._has_room.wait()
        self._is_busy = True
        try:
            refusal = await self._session.apply(message.sequence, operation, refuse_repeated=message.refuse_repeated)
            if refusal is not None:
                refused = ingestor_pb2.OperationRefused(sequence=message.sequence, error=error_to_detail(refusal))
                self._refused.append(refused)
            elif isinstance(operation, Abandon):
                self._has_abandoned = True
            self._answered = max(self._answered, message.sequence)
        finally:
            self._is_busy, self._has_heard = False, True
        self._session.notify()


def _opened(session: Session) -> ingestor_pb2.ContextOpened:
    opening = session.opening
    return ingestor_pb2.ContextOpened(
        context_id=opening.context_id,
        model=opening.limits.model,
        max_context_tokens=opening.limits.max_context_tokens,
        is_chat=opening.is_chat,
        mode=mode_to_proto(opening.mode),
        request_id=opening.request.request_id,
        grace_ms=math.ceil(session.grace_s * 1000),
    )
