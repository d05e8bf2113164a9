"""A client of `StreamContext` that sends and reads exactly what a test says."""

import asyncio
from collections.abc import Callable

import grpc.aio

from headrace.core.tenancy import TENANT_HEADER
from headrace.core.wire import error_from_detail
from headrace.errors import HeadraceError
from headrace.runtime.channels import translate_errors
from headrace.v1 import ingestor_pb2, ingestor_pb2_grpc

PATIENCE_S = 10.0


class ContextCaller:
    """One call.

    Args:
        channel: To an ingestor, or a router.
        tenant: Who asks.
        timeout_s: Longest time for the call.

    Attributes:
        opened: What was said first.
        state: The last state that came; `states` are all.
        refusals: Sequence and reason of each refusal.
        pieces: Of the answer.
        events: Kinds of all that came, in order.
    """

    def __init__(self, channel: grpc.aio.Channel, tenant: str | None = None, timeout_s: float | None = None) -> None:
        metadata = () if tenant is None else ((TENANT_HEADER, tenant),)
        stub: ingestor_pb2_grpc.IngestorServiceAsyncStub = ingestor_pb2_grpc.IngestorServiceStub(channel)
        self.call = stub.StreamContext(metadata=metadata, timeout=timeout_s)
        self.opened = ingestor_pb2.ContextOpened()
        self.states: list[ingestor_pb2.ContextState] = []
        self.refusals: list[tuple[int, HeadraceError]] = []
        self.pieces: list[ingestor_pb2.ContextPiece] = []
        self.events: list[str] = []

    @property
    def state(self) -> ingestor_pb2.ContextState:
        """The last that came."""
        return self.states[-1]

    @property
    def text(self) -> str:
        """Of the answer."""
        return "".join(each.piece.text for each in self.pieces)

    async def send(self, **request: object) -> None:
        """Send one request as it is."""
        await self.call.write(ingestor_pb2.StreamContextRequest(**request))  # type: ignore[arg-type]

    async def open(self, **opening: object) -> "ContextCaller":
        """Open a context and wait for its first state."""
        await self.send(open=ingestor_pb2.OpenContext(**opening))  # type: ignore[arg-type]
        return await self.until(lambda: bool(self.states))

    async def resume(self, context_id: str, cursor: int = 0) -> "ContextCaller":
        """Take up a context and wait for its first state."""
        await self.send(resume=ingestor_pb2.ResumeContext(context_id=context_id, cursor=cursor))
        return await self.until(lambda: bool(self.states))

    async def operate(self, sequence: int, **operation: object) -> "ContextCaller":
        """Send an operation and wait until it is answered."""
        await self.put(sequence, **operation)
        return await self.until(lambda: self.state.answered_sequence >= sequence)

    async def put(self, sequence: int, **operation: object) -> None:
        """Send an operation."""
        message = ingestor_pb2.ContextOperation(sequence=sequence, **operation)  # type: ignore[arg-type]
        await self.send(operation=message)

    async def append(self, sequence: int, text: str | bytes, segment: str = "") -> "ContextCaller":
        """Append and wait until it is answered."""
        return await self.operate(sequence, append=appended(text, segment))

    async def close(self, sequence: int, query: str = "") -> "ContextCaller":
        """Close and wait until it is answered."""
        return await self.operate(sequence, close=ingestor_pb2.CloseContext(query=query))

    async def abandon(self, sequence: int) -> None:
        """Abandon and read to the end of the call."""
        await self.put(sequence, abandon=ingestor_pb2.AbandonContext())
        await self.finish()

    async def until(self, is_so: Callable[[], bool]) -> "ContextCaller":
        """Read until something is so.

        Raises:
            AssertionError: the call ended before.
            HeadraceError: it failed.
        """
        while not is_so():
            assert await self.read(), f"the call has ended after {self.events}"
        return self

    async def finish(self) -> "ContextCaller":
        """Read to the end.

        Raises:
            HeadraceError: the call failed.
        """
        while await self.read():
            pass
        return self

    async def read(self) -> bool:
        """Read one event; return whether there was one."""
        async with asyncio.timeout(PATIENCE_S), translate_errors("ingestor"):
            response = await self.call.read()
        if not isinstance(response, ingestor_pb2.StreamContextResponse):
            return False
        kind = response.WhichOneof("event")
        self.events.append(kind or "")
        match kind:
            case "opened":
                self.opened = response.opened
            case "state":
                self.states.append(response.state)
            case "refused":
                self.refusals.append((response.refused.sequence, error_from_detail(response.refused.error)))
            case "piece":
                self.pieces.append(response.piece)
        return True

    def leave(self) -> None:
        """Break the call off."""
        self.call.cancel()


def appended(text: str | bytes, segment: str = "") -> ingestor_pb2.AppendText:
    """Return an appending."""
    return ingestor_pb2.AppendText(text=text.encode() if isinstance(text, str) else text, segment_id=segment)


def replaced(start: str, *segments: tuple[str, str]) -> ingestor_pb2.ReplaceSegments:
    """Return a replacing from a segment on."""
    return ingestor_pb2.ReplaceSegments(from_segment_id=start, segments=map(_segment, segments))


def updated(*segments: tuple[str, str]) -> ingestor_pb2.UpdateSegments:
    """Return a replacing of all segments."""
    return ingestor_pb2.UpdateSegments(segments=map(_segment, segments))


def _segment(segment: tuple[str, str]) -> ingestor_pb2.ContextSegment:
    return ingestor_pb2.ContextSegment(id=segment[0], text=segment[1].encode())
