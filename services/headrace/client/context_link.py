"""One call for a context: operations out, states and pieces in."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias

import grpc.aio

from headrace.client.rpc import typed_errors
from headrace.core.context import ContextState
from headrace.core.wire import context_state_from_proto, error_from_detail
from headrace.errors import Cancelled, HeadraceError, PeerFailed
from headrace.v1 import ingestor_pb2

if TYPE_CHECKING:
    ContextCall: TypeAlias = grpc.aio.StreamStreamCall[
        ingestor_pb2.StreamContextRequest, ingestor_pb2.StreamContextResponse
    ]


class ContextLink:
    """Owns one call, which may break off; the context is still there then.

    Args:
        address: Whom the call goes to.
        begin: Begins it.
        first: Opens a context or takes one up again.

    Attributes:
        opened: What the ingestor said of the context; after `open`.
        state: The last that was heard.
        changed: Set, and replaced, whenever something was heard.
        has_piece: Whether a piece of the answer has arrived.
    """

    def __init__(
        self, address: str, begin: "Callable[[], ContextCall]", first: ingestor_pb2.StreamContextRequest
    ) -> None:
        self.opened = ingestor_pb2.ContextOpened()
        self.state = ContextState()
        self.changed = asyncio.Event()
        self.has_piece = False
        self._address = address
        self._begin = begin
        self._first = first
        self._call: ContextCall | None = None
        self._tasks: tuple[asyncio.Task[None], ...] = ()
        self._unsent: asyncio.Queue[ingestor_pb2.StreamContextRequest] = asyncio.Queue()
        self._answered = 0
        self._refusals: dict[int, HeadraceError] = {}
        self._pieces: list[ingestor_pb2.ContextPiece] = []
        self._end: HeadraceError | None = None
        self._has_ended = False
        self._has_state = False

    async def open(self) -> None:
        """Make the call and wait until it has said what the context is and how far.

        Raises:
            HeadraceError: it was refused, or failed.
        """
        with typed_errors(self._address):
            self._call = self._begin()
        self._unsent.put_nowait(self._first)
        self._tasks = (asyncio.create_task(self._read(self._call)), asyncio.create_task(self._write(self._call)))
        await self._until(lambda: self._has_state)

    def send(self, operation: ingestor_pb2.ContextOperation) -> None:
        """Send an operation without waiting for what becomes of it."""
        self._unsent.put_nowait(ingestor_pb2.StreamContextRequest(operation=operation))

    async def operate(self, operation: ingestor_pb2.ContextOperation) -> HeadraceError | None:
        """Have an operation carried out; return why it was refused, if it was.

        Raises:
            HeadraceError: the call has failed.
        """
        self.send(operation)
        sequence = operation.sequence
        await self._until(lambda: self._answered >= sequence)
        return self._refusals.pop(sequence, None)

    @property
    def failure(self) -> HeadraceError | None:
        """Why the call has ended; None while it goes on."""
        if not self._has_ended:
            return None
        return self._end or PeerFailed("the call for the context has ended", worker=self._address)

    async def until(self, is_reached: Callable[[ContextState], bool]) -> None:
        """Wait for a state.

        Raises:
            HeadraceError: the call has failed, or ended before.
        """
        await self._until(lambda: is_reached(self.state))

    async def piece(self) -> ingestor_pb2.ContextPiece | None:
        """Return the next piece of the answer; None when the call has ended.

        Raises:
            HeadraceError: the call has failed.
        """
        while not self._pieces:
            if self._has_ended:
                if self._end is not None:
                    raise self._end
                return None
            await self.changed.wait()
        return self._pieces.pop(0)

    async def close(self, linger_s: float = 0.0) -> None:
        """End the call, whatever is under way.

        Args:
            linger_s: How long it may take to end by itself.
        """
        reading = self._tasks[:1]
        if reading and linger_s:
            await asyncio.wait(reading, timeout=linger_s)
        if self._call is not None:
            self._call.cancel()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _write(self, call: "ContextCall") -> None:
        # A task of its own: to cancel a write is to cancel its call. One that has ended refuses writes in several
        # ways; whoever reads it learns why.
        with suppress(grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
            while True:
                await call.write(await self._unsent.get())

    async def _until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            if self.failure is not None:
                raise self.failure
            await self.changed.wait()

    async def _read(self, call: "ContextCall") -> None:
        try:
            with typed_errors(self._address):
                async for response in call:
                    self._take(response)
                    self._notify()
        except HeadraceError as error:
            is_bare = isinstance(error, Cancelled) and error.worker == self._address
            # Nobody cancelled it, or the error would say who and why: the server has left.
            self._end = PeerFailed(f"{self._address} left during the call", worker=self._address) if is_bare else error
        finally:
            self._has_ended = True
            self._notify()

    def _take(self, response: ingestor_pb2.StreamContextResponse) -> None:
        match response.WhichOneof("event"):
            case "opened":
                self.opened = response.opened
            case "state":
                self.state, self._has_state = context_state_from_proto(response.state), True
                self._answered = response.state.answered_sequence
            case "refused":
                self._refusals[response.refused.sequence] = error_from_detail(response.refused.error)
            case "piece":
                self._pieces.append(response.piece)
                self.has_piece = True

    def _notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()
