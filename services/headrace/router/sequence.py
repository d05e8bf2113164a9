"""One choice of one request on its way through the workers."""

import asyncio
import dataclasses
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from collections.abc import Set as AbstractSet
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from headrace.clock import Clock
from headrace.core.block import BlockHash, block_hashes, root_hash
from headrace.core.request import SequenceId, SequenceSpec, Token
from headrace.core.wire import spec_to_proto, token_from_proto
from headrace.errors import (
    BlockLost,
    Cancelled,
    DeadlineExceeded,
    HeadraceError,
    InternalError,
    NotReady,
    Overloaded,
    PeerFailed,
    PeerMismatch,
    Saturated,
)
from headrace.router.drift import HitDrift
from headrace.router.policy import Route, RouteInput, choose_prefill, choose_route
from headrace.router.prefixes import NOTHING_CACHED, Cached, Prefixes
from headrace.router.workers import Worker, WorkerTable
from headrace.runtime.channels import Channels, translate_errors
from headrace.runtime.off_loop import off_loop
from headrace.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc

logger = logging.getLogger(__name__)

CONTROL_TIMEOUT_S = 2.0
MOVE_PAUSE_S = 0.2
"""Three of these are longer than a worker is silent: one that is suspected for nothing has reported again by then."""
MOVABLE = (PeerFailed, NotReady, BlockLost)
"""Another worker may serve what failed with these."""
FULL = (Saturated, Overloaded)
"""A worker has no room: its own word for it, and that of its gRPC server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceParts:
    """What all sequences of a router share.

    Attributes:
        tasks: Outlives every request.
        prefixes: What the index says; None routes by load alone.
        drift: Hears how right it was.
        max_moves: How often a sequence may move after failures.
    """

    table: WorkerTable
    channels: Channels
    clock: Clock
    tasks: asyncio.TaskGroup
    prefixes: Prefixes | None
    drift: HitDrift
    max_moves: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Tokens in order, how many prompt tokens were reused, and how many were computed although somebody held them."""

    tokens: tuple[Token, ...]
    cached_tokens: int
    declined_tokens: int


class SequenceRun:
    """Carries one sequence over the deaths of its workers.

    The tokens received so far are all its state: the random generator is keyed by position, so
    another worker goes on with exactly the tokens the first would have produced.

    Args:
        parts: What all sequences share.
        spec: The sequence.
        fingerprint: Digest of the served model.
        block_tokens: Tokens per block.
    """

    def __init__(self, parts: SequenceParts, spec: SequenceSpec, fingerprint: str, block_tokens: int) -> None:
        self._parts = parts
        self._spec = spec
        self._output: list[int] = list(spec.output)
        self._fingerprint = fingerprint
        self._hashes: tuple[BlockHash, ...] | None = None
        self._block_tokens = block_tokens
        self._excluded: set[str] = set()
        self._full: set[str] = set()
        self._prefill_failure: HeadraceError | None = None

    async def batches(self) -> AsyncGenerator[TokenBatch, None]:
        """Yield tokens, each exactly once, until one carries a finish reason.

        Raises:
            Saturated: no worker has room.
            HeadraceError: it cannot go on; nothing of it is left on any worker.
        """
        moves = 0
        while True:
            num_full = len(self._full)
            try:
                async with aclosing(self._attempt()) as attempt:
                    async for batch in attempt:
                        fresh = tuple(token for token in batch.tokens if token.cursor >= len(self._output))
                        self._output.extend(token.token_id for token in fresh)
                        yield batch if len(fresh) == len(batch.tokens) else dataclasses.replace(batch, tokens=fresh)
                        if fresh and fresh[-1].finish is not None:
                            return
                raise PeerFailed("the worker ended its stream before the answer was complete")
            except FULL as error:
                if len(self._full) == num_full or not self._has_room():
                    raise _saturated(error) from None
                continue
            except MOVABLE as error:
                moves += 1
                if moves > self._parts.max_moves or isinstance(error, PeerMismatch):
                    raise
            self._full.clear()
            await asyncio.sleep(MOVE_PAUSE_S)

    def _has_room(self) -> bool:
        """Return whether a worker is left that has not said that it is full."""
        return not self._full.issuperset(worker.name for worker in self._parts.table.usable())

    async def _attempt(self) -> AsyncGenerator[TokenBatch, None]:
        # A name of its own per attempt: an earlier one may not have left its worker yet.
        name = SequenceId(f"{self._spec.sequence_id}.{secrets.token_hex(4)}")
        # Asked first: between the look at the loads and the reservation nobody else may choose.
        cached = await self._look_up()
        spec = dataclasses.replace(self._spec, sequence_id=name, output=tuple(self._output), sources=cached.sources)
        route = self._choose(spec, cached)
        self._prefill_failure = None
        try:
            self._reserve(route, spec)
            async with aclosing(self._decode(route, spec)) as batches:
                is_first = True
                async for batch in batches:
                    if is_first:
                        self._note_drift(cached, batch)
                        is_first = False
                    yield batch
        finally:
            self._parts.table.release(route.decode, spec.sequence_id)
            if route.prefill is not None:
                self._parts.table.release(route.prefill, spec.sequence_id)

    def _choose(self, spec: SequenceSpec, cached: Cached) -> Route:
        views = [worker.view() for worker in self._parts.table.usable()]
        if (self._excluded | self._full).issuperset(view.name for view in views):
            self._excluded.clear()
        return choose_route(views, route_input(spec, cached, self._block_tokens, self._excluded | self._full))

    async def _look_up(self) -> Cached:
        """Return who holds how much of the prompt, by the index."""
        parts = self._parts
        if parts.prefixes is None:
            return NOTHING_CACHED
        if self._hashes is None:
            root, prompt = root_hash(self._fingerprint, self._spec.cache_key), self._spec.prompt
            # Eight thousand blocks take ten milliseconds, in which no stream would go on.
            work = partial(block_hashes, root, prompt, self._block_tokens)
            self._hashes = await off_loop(len(prompt), work)
        return look_up(parts, self._hashes)

    def _note_drift(self, cached: Cached, first: TokenBatch) -> None:
        """Compare what the index promised with what was found; the last known token is never reused."""
        if self._parts.prefixes is not None and self._parts.prefixes.is_current():
            usable = (len(self._spec.tokens) - 1) // self._block_tokens
            promised = min(cached.num_reachable, usable) * self._block_tokens
            self._parts.drift.note(promised, first.cached_tokens, first.declined_tokens)

    def _reserve(self, route: Route, spec: SequenceSpec) -> None:
        num_tokens = len(spec.tokens)
        self._parts.table.reserve(route.decode, spec.sequence_id, 0 if route.prefill else num_tokens)
        if route.prefill is not None:
            self._parts.table.reserve(route.prefill, spec.sequence_id, num_tokens)

    async def _decode(self, route: Route, spec: SequenceSpec) -> AsyncGenerator[TokenBatch, None]:
        worker = self._parts.table.by_name(route.decode)
        stub = decode_pb2_grpc.DecodeServiceStub(self._parts.channels.get(worker.address))
        mode = decode_pb2.PREFILL_MODE_REMOTE if route.prefill else decode_pb2.PREFILL_MODE_LOCAL
        request = decode_pb2.DecodeRequest(sequence=spec_to_proto(spec), mode=mode)
        call = stub.Decode(request, timeout=self._remaining_s())
        prefill: asyncio.Task[None] | None = None
        try:
            async with translate_errors(worker.address):
                async for response in call:
                    if response.HasField("reservation"):
                        prefill = self._start_prefill(route, spec, response.reservation, call.cancel)
                    else:
                        yield token_batch(response.tokens)
        except HeadraceError as error:
            raise self._decode_failure(worker, error) from None
        finally:
            call.cancel()
            if prefill is not None:
                prefill.cancel()

    def _decode_failure(self, worker: Worker, error: HeadraceError) -> HeadraceError:
        """Return why a decode call failed, and take note of who is to be avoided."""
        if self._prefill_failure is not None:
            # The call was cancelled here; what its end looks like means nothing.
            return self._prefill_failure
        if isinstance(error, FULL):
            self._full.add(worker.name)
        if isinstance(error, Cancelled):
            # Nobody here cancelled it: the worker is leaving and gave its calls up.
            error = PeerFailed(f"{worker.name} left during the call", worker=worker.address)
        if isinstance(error, NotReady) or (isinstance(error, PeerFailed) and _is_dead(worker, error)):
            self._avoid(worker.name)
        return error

    def _pass_over(self, worker: Worker, route: Route, error: HeadraceError) -> str:
        """Take note of who failed when a prefill call did, and return that worker's name."""
        if isinstance(error, FULL):
            name = route.decode if error.worker == route.decode else worker.name
            self._full.add(name)
            return name
        if isinstance(error, PeerFailed) and not _is_dead(worker, error):
            # The prefill worker lives and says that it cannot reach the decode worker.
            self._excluded.add(route.decode)
            return route.decode
        self._avoid(worker.name)
        return worker.name

    def _avoid(self, name: str) -> None:
        self._excluded.add(name)
        self._parts.table.suspect(name)

    def _start_prefill(
        self,
        route: Route,
        spec: SequenceSpec,
        target: prefill_pb2.PrefillTarget,
        cancel_decode: Callable[[], object],
    ) -> "asyncio.Task[None]":
        async def prefill_or_cancel() -> None:
            try:
                await self._prefill(route, spec, target)
            except HeadraceError as error:
                self._prefill_failure = error
                cancel_decode()
            except Exception:  # noqa: BLE001 a bug in one request must not end the router's task group
                logger.exception("prefill failed", extra={"sequence_id": spec.sequence_id})
                self._prefill_failure = InternalError("the router failed on this request; its log has the cause")
                cancel_decode()

        return self._parts.tasks.create_task(prefill_or_cancel())

    async def _prefill(self, route: Route, spec: SequenceSpec, target: prefill_pb2.PrefillTarget) -> None:
        """Have the prompt computed; when a prefill worker fails before it writes, another fills the same reservation.

        One that may be writing still, for it is only known to be out of reach, keeps its blocks: the sequence
        starts anew in others.
        """
        name = route.prefill
        while name is not None:
            worker, writer_id = self._parts.table.by_name(name), secrets.token_hex(16)
            try:
                await self._prefill_once(worker, spec, target, writer_id)
                return
            except (PeerFailed, NotReady, *FULL) as error:
                if self._pass_over(worker, route, error) == route.decode:
                    raise
                name = self._successor(spec)
                if name is None or not await self._may_succeed(target, writer_id):
                    raise

    def _successor(self, spec: SequenceSpec) -> str | None:
        views = [worker.view() for worker in self._parts.table.usable()]
        excluded = frozenset(self._excluded | self._full)
        facts = RouteInput(key=spec.sequence_id, num_tokens=len(spec.tokens), excluded=excluded)
        return choose_prefill(views, facts)

    async def _prefill_once(
        self, worker: Worker, spec: SequenceSpec, target: prefill_pb2.PrefillTarget, writer_id: str
    ) -> None:
        stub = prefill_pb2_grpc.PrefillServiceStub(self._parts.channels.get(worker.address))
        request = prefill_pb2.PrefillRequest(sequence=spec_to_proto(spec), target=target, writer_id=writer_id)
        try:
            async with translate_errors(worker.address):
                await stub.Prefill(request, timeout=self._remaining_s())
        except Cancelled:
            # The worker is leaving; it reports the end of its writes itself.
            raise NotReady(f"{worker.name} left during the call") from None
        finally:
            self._parts.table.release(worker.name, spec.sequence_id)

    async def _may_succeed(self, target: prefill_pb2.PrefillTarget, writer_id: str) -> bool:
        """Tell the decode worker of a lost writer; return whether another may fill the reservation."""
        lost = decode_pb2.CommitPrefillRequest(
            lease_id=target.lease.lease_id, epoch=target.lease.epoch, writer_id=writer_id, lost="peer_failed"
        )
        stub = decode_pb2_grpc.DecodeServiceStub(self._parts.channels.get(target.address))
        try:
            async with translate_errors(target.address):
                answer = await stub.CommitPrefill(lost, timeout=CONTROL_TIMEOUT_S)
        except HeadraceError:
            return False
        return answer.is_accepted

    def _remaining_s(self) -> float:
        return remaining_s(self._parts.clock, self._spec)


def route_input(spec: SequenceSpec, cached: Cached, block_tokens: int, excluded: AbstractSet[str]) -> RouteInput:
    """Return the facts of one decision.

    Args:
        spec: What is to be routed.
        cached: Who holds how much of it.
        block_tokens: Tokens per block.
        excluded: Workers that have failed it, or have no room.
    """
    return RouteInput(
        key=spec.sequence_id,
        num_tokens=len(spec.tokens),
        cached_tokens={name: count * block_tokens for name, count in cached.by_worker.items()},
        reachable_tokens=cached.num_reachable * block_tokens,
        excluded=frozenset(excluded),
    )


def look_up(parts: SequenceParts, hashes: tuple[BlockHash, ...]) -> Cached:
    """Return who of those that answer now holds how much of a prompt, by the index."""
    if parts.prefixes is None:
        return NOTHING_CACHED
    workers = {worker.name: worker.address for worker in parts.table.usable()}
    stores = {store.name: store.address for store in parts.table.stores()}
    return parts.prefixes.look_up(hashes, workers, stores)


def remaining_s(clock: Clock, spec: SequenceSpec) -> float:
    """Return how long a request has left.

    Raises:
        DeadlineExceeded: nothing.
    """
    left_s = (spec.deadline_unix_ms - clock.unix_ms()) / 1000
    if left_s <= 0:
        raise DeadlineExceeded("the request's deadline passed before it could be sent on")
    return left_s


def _is_dead(worker: Worker, error: HeadraceError) -> bool:
    """Return whether the connection to a worker failed; errors that it sends name it, or whom it could not reach."""
    return error.worker == worker.address


def _saturated(error: HeadraceError) -> Saturated:
    """Return what a client is told when nobody has room, whoever found the words."""
    if isinstance(error, Saturated):
        return error
    return Saturated(error.message, limit=error.limit, retry_after_s=error.retry_after_s or 1.0, worker=error.worker)


def token_batch(message: decode_pb2.TokenEvents) -> TokenBatch:
    """Read tokens."""
    return TokenBatch(
        tokens=tuple(token_from_proto(event) for event in message.events),
        cached_tokens=message.cached_tokens,
        declined_tokens=message.declined_tokens,
    )
