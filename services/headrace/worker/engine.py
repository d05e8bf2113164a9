"""The event loop's view of the engine's thread."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from headrace.core.block import BlockHash, BlockId
from headrace.core.holder import Holder
from headrace.core.request import Revision, SequenceId, SequenceSpec, Token
from headrace.engine.messages import (
    Admitted,
    Begin,
    Close,
    EngineCommand,
    EngineEvent,
    EngineStats,
    Failed,
    Goal,
    HoldWriter,
    ListHolders,
    Open,
    Pin,
    Quarantine,
    ReleaseWriter,
    Report,
    Revise,
    Settle,
    Unpin,
)
from headrace.errors import HeadraceError, InternalError, InvalidRequest

AnswerT = TypeVar("AnswerT")


class CommandPort(Protocol):
    """Where commands go: the engine's thread, or a fake of it."""

    def send(self, command: EngineCommand) -> None:
        """Queue a command.

        Raises:
            Saturated: the mailbox is full.
        """
        ...

    def stats(self) -> EngineStats:
        """Return the last snapshot."""
        ...


class EventStream:
    """Events of one sequence, in order; one reader."""

    def __init__(self) -> None:
        self._events: deque[EngineEvent] = deque()
        self._arrived = asyncio.Event()
        self._is_woken = False

    def put(self, event: EngineEvent) -> None:
        """Add an event; called on the loop."""
        self._events.append(event)
        self._arrived.set()

    def wake(self) -> None:
        """Let the reader look at something else: its `take` returns, maybe with nothing."""
        self._is_woken = True
        self._arrived.set()

    async def take_first(self) -> EngineEvent:
        """Wait for the next event and return it alone; raises as `take`."""
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events[0]
        if isinstance(event, Failed):
            raise event.error
        return self._events.popleft()

    async def take(self) -> list[EngineEvent]:
        """Wait until something has arrived and return all of it.

        Raises:
            HeadraceError: the engine failed the sequence; what arrived before is returned first.
        """
        while not self._events and not self._is_woken:
            self._arrived.clear()
            await self._arrived.wait()
        self._is_woken = False
        taken: list[EngineEvent] = []
        while self._events:
            event = self._events[0]
            if isinstance(event, Failed):
                if taken:
                    break
                raise event.error
            taken.append(self._events.popleft())
        return taken


class OpenSequence:
    """One sequence in the engine, from admission to `close`; a context manager that closes.

    Attributes:
        spec: What was asked for.
        admitted: Its block table and what the local cache held.
        declined_tokens: That somebody holds and that are computed, for that is faster; noted by who fetches.
    """

    def __init__(self, spec: SequenceSpec, engine: "AsyncEngine", events: EventStream) -> None:
        self.spec = spec
        self.admitted: Admitted
        self.declined_tokens = 0
        self._engine = engine
        self._events = events
        self._is_closed = False

    async def __aenter__(self) -> "OpenSequence":
        try:
            first = await self._events.take_first()
            if not isinstance(first, Admitted):
                raise InternalError(f"engine answered {type(first).__name__} before admission")
        except BaseException:
            self.close()
            raise
        self.admitted = first
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def begin(self, num_present: int, first: Token | None = None) -> None:
        """Start computing; see `engine.messages.Begin`."""
        self._engine.send(Begin(sequence_id=self.spec.sequence_id, num_present=num_present, first=first))

    def revise(self, revision: Revision) -> None:
        """Give the prompt its next version; see `engine.messages.Revise`."""
        self._engine.send(Revise(sequence_id=self.spec.sequence_id, revision=revision))

    def settle(self, num_progress: int) -> None:
        """Say that nothing reads the blocks of so many more progress events; see `engine.messages.Settle`."""
        self._engine.send(Settle(sequence_id=self.spec.sequence_id, num_progress=num_progress))

    def report(self) -> None:
        """Ask for progress; see `engine.messages.Report`."""
        self._engine.send(Report(sequence_id=self.spec.sequence_id))

    async def events(self) -> list[EngineEvent]:
        """Wait for the next events; raises what the engine failed the sequence with."""
        return await self._events.take()

    def wake(self) -> None:
        """Make `events` return, maybe with nothing: what it waits for has happened outside the engine."""
        self._events.wake()

    def fail(self, error: HeadraceError) -> None:
        """Make `events` raise: something outside the engine went wrong for this sequence."""
        self._events.put(Failed(sequence_id=self.spec.sequence_id, error=error))

    def close(self) -> None:
        """End the sequence in any state and let its blocks go; once, for another may take its name."""
        if not self._is_closed:
            self._is_closed = True
            self._engine.close(self.spec.sequence_id)


class AsyncEngine:
    """Speak to the engine from one event loop.

    Events of a step arrive in one wake-up of the loop, however many sequences ran.

    Args:
        port: The engine's mailbox.
        loop: The loop that receives events.
    """

    def __init__(self, port: CommandPort, loop: asyncio.AbstractEventLoop) -> None:
        self._port = port
        self._loop = loop
        self._arrived: deque[tuple[EventStream, EngineEvent]] = deque()
        self._open: set[SequenceId] = set()

    def stats(self) -> EngineStats:
        """Return the engine's last snapshot."""
        return self._port.stats()

    def send(self, command: EngineCommand) -> None:
        """Queue a command; raises Saturated when the mailbox is full."""
        self._port.send(command)

    def open(
        self,
        spec: SequenceSpec,
        goal: Goal,
        *,
        arrives_whole: bool = False,
        is_open: bool = False,
        num_final: int = 0,
    ) -> OpenSequence:
        """Ask for blocks; entering the returned context waits until they are there.

        Args:
            spec: The sequence.
            goal: How far the engine takes it.
            arrives_whole: Whether a peer computes its KV and sends it before `begin`.
            is_open: Whether the prompt still arrives.
            num_final: Leading tokens of such a prompt that stay as they are.

        Raises:
            InvalidRequest: a sequence of that name is open. The engine knows sequences by name: the close of a
                refused second one would end the first.
            Saturated: the mailbox is full.
        """
        if spec.sequence_id in self._open:
            raise InvalidRequest(f"sequence {spec.sequence_id} is open already", field="sequence_id")
        events = EventStream()
        sequence = OpenSequence(spec, self, events)

        def sink(event: EngineEvent) -> None:
            self._deliver(events, event)

        opening = Open(
            spec=spec, goal=goal, sink=sink, arrives_whole=arrives_whole, is_open=is_open, num_final=num_final
        )
        self.send(opening)
        self._open.add(spec.sequence_id)
        return sequence

    async def pin(
        self, lease_id: str, hashes: Sequence[BlockHash], deadline_s: float, *, reader: str = "", epoch: str = ""
    ) -> tuple[BlockId, ...]:
        """Keep cached blocks in place; returns the leading ones still present.

        Args:
            lease_id: Name of the pin.
            hashes: Names of the blocks, in order.
            deadline_s: When the pin ends by itself.
            reader: The process that reads them, when it is another one.
            epoch: Its lifetime.
        """

        def pin(answer: Callable[[tuple[BlockId, ...]], None]) -> Pin:
            return Pin(
                lease_id=lease_id,
                block_hashes=tuple(hashes),
                deadline_s=deadline_s,
                owner="read" if reader else "pin",
                reader=reader,
                epoch=epoch,
                reply=answer,
            )

        try:
            return await self._ask(pin)
        except asyncio.CancelledError:
            self.unpin(lease_id)
            raise

    def unpin(self, lease_id: str) -> None:
        """End a pin."""
        self.send(Unpin(lease_id=lease_id))

    async def quarantine(self, block_hash: BlockHash) -> bool:
        """Let nobody find a cached block any more; returns whether it was here."""
        return await self._ask(lambda answer: Quarantine(block_hash=block_hash, reply=answer))

    async def holders(self) -> tuple[Holder, ...]:
        """Return who holds blocks."""
        return await self._ask(lambda answer: ListHolders(reply=answer))

    def hold_writer(self, writer_id: str, block_ids: Sequence[BlockId]) -> None:
        """Count a transfer that writes into blocks."""
        self.send(HoldWriter(writer_id=writer_id, block_ids=tuple(block_ids)))

    def release_writer(self, writer_id: str) -> None:
        """The transfer has settled."""
        self.send(ReleaseWriter(writer_id=writer_id))

    def close(self, sequence_id: SequenceId) -> None:
        """End a sequence by id."""
        self._open.discard(sequence_id)
        self.send(Close(sequence_id=sequence_id))

    async def _ask(self, make: Callable[[Callable[[AnswerT], None]], EngineCommand]) -> AnswerT:
        """Send the command that `make` makes of an answer's way back, and wait for the answer: at most a step."""
        reply: asyncio.Future[AnswerT] = self._loop.create_future()

        def answer(value: AnswerT) -> None:
            self._loop.call_soon_threadsafe(_resolve, reply, value)

        self.send(make(answer))
        return await reply

    def _deliver(self, events: EventStream, event: EngineEvent) -> None:
        """Runs on the engine's thread: one wake-up per burst of events, not one per event."""
        self._arrived.append((events, event))
        if len(self._arrived) == 1:
            self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        while self._arrived:
            events, event = self._arrived.popleft()
            events.put(event)


def _resolve(reply: asyncio.Future[AnswerT], value: AnswerT) -> None:
    if not reply.done():
        reply.set_result(value)
