"""One attempt to have a context computed: a prefill worker for all of it, one decode worker after the other."""

import asyncio
import dataclasses
import itertools
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Generic, TypeAlias, TypeVar

from headrace.core.kept_since import KeptSince
from headrace.core.request import ContextProgress, Revision, SequenceId, SequenceSpec
from headrace.core.wire import revision_to_proto, spec_to_proto
from headrace.errors import (
    Cancelled,
    HeadraceError,
    InternalError,
    NotReady,
    PeerFailed,
    PeerMismatch,
)
from headrace.router.policy import Route
from headrace.router.sequence import FULL, MOVABLE, SequenceParts, TokenBatch, remaining_s, token_batch
from headrace.router.workers import Worker
from headrace.runtime.channels import translate_errors
from headrace.v1 import decode_pb2, decode_pb2_grpc, generate_pb2, prefill_pb2, prefill_pb2_grpc

logger = logging.getLogger(__name__)

REOPEN_PAUSE_S = 0.2
"""Before another decode worker is asked for blocks: they are filled while the context arrives, which has time."""

MAX_UNSENT = 16
"""Requests that wait for a worker to read; more make whoever revises the context wait."""

RequestT = TypeVar("RequestT")


ContextEvent: TypeAlias = ContextProgress | TokenBatch


class _Leg(Generic[RequestT]):
    """The stream to one worker.

    Attributes:
        version: Of the context that it was opened with.
        has_room: Set while few requests wait to be sent, and when it is over.
    """

    def __init__(self, opening: RequestT, version: int) -> None:
        self.version = version
        self.has_room = asyncio.Event()
        self._queue: asyncio.Queue[RequestT | None] = asyncio.Queue()
        self.send(opening)

    def send(self, request: RequestT) -> None:
        """Queue a request; whoever has many waits for room before each."""
        self._queue.put_nowait(request)
        self._look()

    def close(self) -> None:
        """End the requests; gRPC does not end whoever waits for the next one when the call has ended by itself."""
        self._queue.put_nowait(None)
        self.has_room.set()

    async def requests(self) -> AsyncIterator[RequestT]:
        """Yield what is to be sent until closed."""
        while (request := await self._queue.get()) is not None:
            self._look()
            yield request

    def _look(self) -> None:
        if self._queue.qsize() < MAX_UNSENT:
            self.has_room.set()
        else:
            self.has_room.clear()


class ContextAttempt:
    """Owns the streams to the workers that have a context.

    A decode worker may lose its blocks, or die, while the context is open: another of that role is asked, and the
    prefill worker pushes what it has there. Whatever else goes wrong ends the attempt.

    Args:
        parts: What all sequences share.
        spec: The sequence with what is known of its prompt.
        num_final: Leading tokens of it that stay.
        version: Of the context.
        choose: Returns a route without a worker that has failed.
    """

    def __init__(
        self,
        parts: SequenceParts,
        spec: SequenceSpec,
        num_final: int,
        version: int,
        choose: Callable[[SequenceSpec, str], Route],
    ) -> None:
        self._parts = parts
        self._spec = spec
        self._choose = choose
        self._tokens = list(spec.prompt)
        self._num_final = num_final
        self._kept = KeptSince(version)
        self._closed = asyncio.Event()
        self._names = itertools.count()
        self._events: asyncio.Queue[ContextEvent | HeadraceError] = asyncio.Queue()
        self._prefill: _Leg[prefill_pb2.PrefillContextRequest] | None = None
        self._decode: _Leg[decode_pb2.DecodeContextRequest] | None = None
        self._writer_id = ""
        self._lost_writers: set[str] = set()
        self._cancel_decode: Callable[[], object] = lambda: None

    def revise(self, num_kept: int, tokens: tuple[int, ...], num_final: int, *, is_closed: bool) -> None:
        """Keep the first tokens and put others behind them, at all workers."""
        del self._tokens[num_kept:]
        self._tokens.extend(tokens)
        self._kept.revise(num_kept)
        self._num_final = num_final
        revision = Revision(
            version=self._kept.version, num_kept=num_kept, tokens=tokens, num_final=num_final, is_closed=is_closed
        )
        if self._prefill is not None:
            self._prefill.send(prefill_pb2.PrefillContextRequest(revision=_at(revision, self._prefill.version)))
        if self._decode is not None:
            self._decode.send(decode_pb2.DecodeContextRequest(revision=_at(revision, self._decode.version)))
        if is_closed:
            self._closed.set()

    async def room(self) -> None:
        """Wait until the workers have read most of what was sent to them."""
        for leg in (self._prefill, self._decode):
            if leg is not None:
                await leg.has_room.wait()

    async def run(self, route: Route) -> AsyncGenerator[ContextEvent, None]:
        """Yield progress and tokens until closed.

        Raises:
            HeadraceError: it cannot go on.
        """
        tasks = [self._parts.tasks.create_task(self._lead(self._run_decode(route), "decode"))]
        if route.prefill is not None:
            prefill = self._lead(self._run_prefill(route.prefill), "prefill")
            tasks.append(self._parts.tasks.create_task(prefill))
        try:
            while True:
                event = await self._events.get()
                if isinstance(event, HeadraceError):
                    raise event
                yield event
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _lead(self, leg: Awaitable[None], what: str) -> None:
        """Carry one leg out; what it fails with ends the attempt."""
        try:
            await leg
        except HeadraceError as error:
            self._events.put_nowait(error)
        except Exception:  # noqa: BLE001 a bug in one request must not end the router's task group
            logger.exception("context failed", extra={"sequence_id": self._spec.sequence_id, "leg": what})
            self._events.put_nowait(InternalError("the router failed on this context; its log has the cause"))

    # -- The prefill worker ------------------------------------------------------

    async def _run_prefill(self, name: str) -> None:
        worker, spec = self._parts.table.by_name(name), self._known(self._spec.sequence_id)
        opening = prefill_pb2.PrefillContextRequest(open=spec_to_proto(spec), final_tokens=self._num_final)
        leg = self._prefill = _Leg(opening, self._opened_version())
        if self._closed.is_set():
            leg.send(prefill_pb2.PrefillContextRequest(revision=_at(self._closing(), leg.version)))
        stub = prefill_pb2_grpc.PrefillServiceStub(self._parts.channels.get(worker.address))
        call = stub.PrefillContext(leg.requests(), timeout=remaining_s(self._parts.clock, self._spec))
        try:
            self._parts.table.reserve(name, spec.sequence_id, len(spec.tokens))
            async with translate_errors(worker.address):
                async for response in call:
                    match response.WhichOneof("event"):
                        case "progress":
                            self._note(response.progress, leg.version)
                        case "lost" if response.lost.writer_id == self._writer_id:
                            # Whether its decode worker knows or not: it gets nothing more, so it is left.
                            self._lost_writers.add(self._writer_id)
                            self._cancel_decode()
                        case "done":
                            return
            raise PeerFailed(f"{name} ended its stream before the hand-over", worker=worker.address)
        except HeadraceError as error:
            raise self._failure(worker, error) from None
        finally:
            call.cancel()
            leg.close()
            self._prefill = None
            self._parts.table.release(name, spec.sequence_id)

    def _aim(self, target: prefill_pb2.PrefillTarget | None, writer_id: str = "") -> None:
        """Tell the prefill worker where its KV goes."""
        self._writer_id = writer_id
        if self._prefill is not None:
            if target is not None and target.version < self._prefill.version:
                return  # Blocks for a version that it never had: those for the next one follow.
            named = prefill_pb2.ContextTarget(target=target, writer_id=writer_id)
            if target is not None:
                named.target.version -= self._prefill.version
            self._prefill.send(prefill_pb2.PrefillContextRequest(target=named))

    # -- Decode workers ----------------------------------------------------------

    async def _run_decode(self, route: Route) -> None:
        name, is_local = route.decode, route.prefill is None
        while True:
            worker = self._parts.table.by_name(name)
            try:
                if await self._decode_at(worker, is_local=is_local):
                    return
            except HeadraceError as error:
                failure = self._failure(worker, error)
                is_movable = isinstance(failure, (*MOVABLE, *FULL)) and not isinstance(failure, PeerMismatch)
                if is_local or not is_movable or self._closed.is_set():
                    raise failure from None
                logger.info("context changes its decode worker", extra={"worker": name, "error": failure.code})
            self._aim(None)
            await self._pause()
            if self._closed.is_set():
                raise PeerFailed(f"the decode worker {name} was lost", worker=worker.address)
            successor = self._choose(self._spec, name)
            if successor.prefill is None:
                # Nobody is left whose role is to decode. Were a prefill worker to keep blocks for it meanwhile, they
                # could be the ones that it, or another one, needs to compute it.
                raise PeerFailed(f"the decode worker {name} was lost", worker=worker.address)
            name = successor.decode

    async def _decode_at(self, worker: Worker, *, is_local: bool) -> bool:
        """Have one decode worker keep blocks and generate; return whether the answer is complete.

        It is not if the prefill worker cannot fill its blocks.
        """
        spec = self._known(SequenceId(f"{self._spec.sequence_id}.{next(self._names)}"))
        mode = decode_pb2.PREFILL_MODE_LOCAL if is_local else decode_pb2.PREFILL_MODE_REMOTE
        request = decode_pb2.DecodeRequest(sequence=spec_to_proto(spec), mode=mode)
        opening = decode_pb2.DecodeContextRequest(open=request, final_tokens=self._num_final)
        leg = self._decode = _Leg(opening, self._opened_version())
        if self._closed.is_set():
            leg.send(decode_pb2.DecodeContextRequest(revision=_at(self._closing(), leg.version)))
        writer_id = secrets.token_hex(16)
        stub = decode_pb2_grpc.DecodeServiceStub(self._parts.channels.get(worker.address))
        call = stub.DecodeContext(leg.requests(), timeout=remaining_s(self._parts.clock, self._spec))
        self._cancel_decode = call.cancel
        try:
            self._parts.table.reserve(worker.name, spec.sequence_id, len(spec.tokens) if is_local else 0)
            async with translate_errors(worker.address):
                async for response in call:
                    match response.WhichOneof("event"):
                        case "reservation":
                            response.reservation.version += leg.version
                            self._aim(response.reservation, writer_id)
                        case "progress":
                            self._note(response.progress, leg.version)
                        case "tokens":
                            batch = token_batch(response.tokens)
                            self._events.put_nowait(batch)
                            if batch.tokens and batch.tokens[-1].finish is not None:
                                return True
            raise PeerFailed(f"{worker.name} ended its stream before the answer was complete", worker=worker.address)
        except Cancelled:
            if writer_id not in self._lost_writers:
                raise
            return False
        finally:
            call.cancel()
            leg.close()
            self._decode = None
            self._parts.table.release(worker.name, spec.sequence_id)

    async def _pause(self) -> None:
        """Wait a little, but not once the context is closed: its answer is waited for."""
        try:
            async with asyncio.timeout(REOPEN_PAUSE_S):
                await self._closed.wait()
        except TimeoutError:
            pass

    # -- Both --------------------------------------------------------------------

    def _known(self, name: SequenceId) -> SequenceSpec:
        return dataclasses.replace(self._spec, sequence_id=name, prompt=tuple(self._tokens))

    def _opened_version(self) -> int:
        """Return the version that a stream is opened with: a close is a revision of its own."""
        return self._kept.version - self._closed.is_set()

    def _closing(self) -> Revision:
        """Return the revision that closes what a stream was opened with."""
        return Revision(version=self._kept.version, num_kept=len(self._tokens), is_closed=True)

    def _note(self, progress: generate_pb2.ContextProgress, version: int) -> None:
        num_computed = self._kept.still(progress.version + version, progress.computed_tokens)
        if num_computed:
            self._events.put_nowait(
                ContextProgress(version=self._kept.version, num_computed=num_computed, num_tokens=len(self._tokens))
            )

    def _failure(self, worker: Worker, error: HeadraceError) -> HeadraceError:
        """Return why a stream failed, and take note of a worker that is to be avoided."""
        if isinstance(error, Cancelled):
            # Nobody here cancelled it: the worker has left.
            error = PeerFailed(f"{worker.name} left during the call", worker=worker.address)
        if isinstance(error, NotReady) or (isinstance(error, PeerFailed) and error.worker == worker.address):
            self._parts.table.suspect(worker.name)
        return error


def _at(revision: Revision, version: int) -> generate_pb2.ContextRevision:
    """Write a revision for a worker that was told of the context at a later version."""
    return revision_to_proto(dataclasses.replace(revision, version=revision.version - version))
