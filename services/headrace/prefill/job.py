"""One prompt: fetched or computed, pushed chunk by chunk, handed over."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from headrace.clock import Clock
from headrace.core.block import BlockId
from headrace.core.request import SequenceSpec, Token
from headrace.core.wire import token_to_proto
from headrace.engine.messages import Goal, Progress, Sampled
from headrace.errors import (
    BlockLost,
    DeadlineExceeded,
    HeadraceError,
    InternalError,
    InvalidRequest,
    PeerFailed,
)
from headrace.prefill.policy import PushRange, next_push
from headrace.runtime.channels import Channels, translate_errors
from headrace.transfer.connector import Connector
from headrace.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2
from headrace.worker.blocks import BlockExchange
from headrace.worker.engine import AsyncEngine, OpenSequence
from headrace.worker.lifetimes import Lifetimes
from headrace.worker.peers import Peers

logger = logging.getLogger(__name__)

CONTROL_TIMEOUT_S = 5.0
REPORT_PAUSES_S = (0.0, 0.5, 2.0)
"""Before each try to report a failure; while none arrives, the decode worker keeps the blocks out of use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillParts:
    """What every prefill job of a worker shares.

    Attributes:
        lifetimes: Tells whether a decode worker is gone.
        tasks: Outlives every request.
        address: host:port of this worker's own gRPC server.
        epoch: Lifetime of this process.
        transfer_deadline_s: Longest time for one push.
        push_whole: Push once after the whole prompt; the baseline of a benchmark.
        block_bytes: Size of a block.
    """

    engine: AsyncEngine
    connector: Connector
    peers: Peers
    channels: Channels
    blocks: BlockExchange
    clock: Clock
    lifetimes: Lifetimes
    tasks: asyncio.TaskGroup
    address: str
    epoch: str
    block_tokens: int
    block_bytes: int
    transfer_deadline_s: float
    push_whole: bool


class PrefillJob:
    """Takes one sequence from its prompt to the hand-over.

    Whatever happens, the decode worker hears once that this job writes no more: by the first
    token, or by a failure sent after every posted write has settled.

    Args:
        parts: What the jobs of a worker share.
        spec: The sequence.
        target: The decode worker's reservation.
        writer_id: Name of this attempt to fill it.
    """

    def __init__(
        self, parts: PrefillParts, spec: SequenceSpec, target: prefill_pb2.PrefillTarget, writer_id: str
    ) -> None:
        self._parts = parts
        self._spec = spec
        self._target = target
        self._writer_id = writer_id
        self._agent = ""
        self._local: tuple[BlockId, ...] = ()
        self._first: Token | None = None
        self._chunks: asyncio.Queue[PushRange | None] = asyncio.Queue()
        self._pusher: asyncio.Task[HeadraceError | None] | None = None
        self._has_failed = False
        self._pushed_blocks = 0
        self._declined_tokens = 0
        self._arrived_s = parts.clock.now()
        self._begun_s = self._arrived_s
        self.response = prefill_pb2.PrefillResponse()

    async def run(self) -> prefill_pb2.PrefillResponse:
        """Compute, push and hand over; cancelling it stops the work within one chunk.

        Raises:
            HeadraceError: the prompt could not be computed or its KV not delivered.
        """
        try:
            peer = await self._parts.peers.ensure(self._target.address, self._target.lease.epoch)
            self._agent = peer.pool.agent_name
            self._parts.lifetimes.note(self._target.address, peer.epoch)
            async with self._parts.engine.open(self._spec, Goal.FIRST_TOKEN) as sequence:
                self._local = sequence.admitted.block_ids
                self._check_lease()
                await self._compute_and_push(sequence)
        except BaseException as error:
            self._report_when_settled(error.code if isinstance(error, HeadraceError) else "cancelled")
            raise
        return self.response

    def _check_lease(self) -> None:
        num_blocks = len(self._target.lease.block_ids)
        if num_blocks != len(self._local):
            raise InvalidRequest(
                f"the lease has {num_blocks} blocks, the sequence {len(self._local)}", field="target.lease.block_ids"
            )

    async def _compute_and_push(self, sequence: OpenSequence) -> None:
        # The pusher belongs to the worker: a cancelled request must not abandon a posted write.
        self._pusher = self._parts.tasks.create_task(self._push_chunks(sequence))
        try:
            await self._compute(sequence)
            self._chunks.put_nowait(None)
            failure = await asyncio.shield(self._pusher)
        except BaseException:
            # The write in flight ends by its own deadline; its source must stay until then.
            self._has_failed = True
            self._chunks.put_nowait(None)
            await asyncio.wait([self._pusher])
            raise
        if failure is not None:
            raise failure
        # Before the hand-over: an answer of a few tokens may end, and this call with it, before the commit returns.
        self._parts.blocks.store_later(self._spec, sequence.admitted.block_hashes)
        await self._commit()

    async def _compute(self, sequence: OpenSequence) -> None:
        admitted, block_tokens = sequence.admitted, self._parts.block_tokens
        present = await self._parts.blocks.fetch(sequence)
        self._begun_s = self._parts.clock.now()
        sequence.begin(present)
        self._declined_tokens = sequence.declined_tokens
        self._fill_response(admitted.num_cached_tokens, present)
        done = self._target.cached_tokens // block_tokens
        done = self._offer(next_push(done, present, block_tokens, is_last=False), done)
        while self._first is None:
            for event in await sequence.events():
                match event:
                    case Progress(num_computed=computed):
                        is_last = computed == len(self._spec.tokens)
                        push = next_push(done, computed, block_tokens, is_last=is_last)
                        done = self._offer(push, done, is_last=is_last)
                    case Sampled(token=token):
                        self._first = token
                    case _:
                        logger.error("unexpected event", extra={"event": type(event).__name__})

    def _offer(self, push: PushRange | None, done: int, *, is_last: bool = False) -> int:
        """Queue a push unless whole-prompt pushing waits for the last chunk; return blocks queued so far."""
        if push is None or (self._parts.push_whole and not is_last):
            return done
        self._chunks.put_nowait(push)
        return push.end

    async def _push_chunks(self, sequence: OpenSequence) -> HeadraceError | None:
        """Write queued ranges until told to stop; a failure fails the sequence and is returned."""
        error: HeadraceError
        try:
            with self._peer_to_blame():
                await self._begin_write()
                await self._push_queued(sequence)
        except HeadraceError as failure:
            error = failure
        except Exception:  # noqa: BLE001 a bug in one request must not end the worker's task group
            logger.exception("push failed", extra={"sequence_id": self._spec.sequence_id})
            error = InternalError("the prefill worker failed to push this prompt; its log has the cause")
        else:
            return None
        sequence.fail(error)
        return error

    async def _push_queued(self, sequence: OpenSequence) -> None:
        while (push := await self._chunks.get()) is not None:
            if self._has_failed:
                return
            await self._push(push, sequence.admitted.block_ids)

    async def _begin_write(self) -> None:
        lease = self._target.lease
        begin = decode_pb2.BeginWriteRequest(
            lease_id=lease.lease_id,
            epoch=lease.epoch,
            writer_id=self._writer_id,
            writer_address=self._parts.address,
            writer_epoch=self._parts.epoch,
        )
        async with translate_errors(self._target.address):
            answer = await self._decode_stub().BeginWrite(begin, timeout=CONTROL_TIMEOUT_S)
        if not answer.is_accepted:
            raise BlockLost("the decode worker no longer holds the reservation: open a new one")

    async def _push(self, push: PushRange, local: tuple[BlockId, ...]) -> None:
        blocks = local[push.start : push.end]
        remote = self._target.lease.block_ids[push.start : push.end]
        deadline_s = self._deadline_s()
        if deadline_s <= self._parts.clock.now():
            # The decode worker counts on it when it takes blocks back from a writer that it hears nothing of.
            raise DeadlineExceeded("the lease has ended: nothing may be written into its blocks any more")
        try:
            await self._parts.connector.write(self._agent, blocks, remote, deadline_s)
        except PeerFailed:
            await self._parts.peers.forget(self._target.address, self._target.lease.epoch)
            raise
        self._pushed_blocks += len(blocks)

    async def _commit(self) -> None:
        """Hand over the first token; the KV before it has landed."""
        if self._first is None:
            return
        parts, now_s = self._parts, self._parts.clock.now()
        self.response.compute_us = int((now_s - self._begun_s) * 1e6)
        self.response.pushed_bytes = self._pushed_blocks * parts.block_bytes
        cached = self.response.local_cached_tokens + self.response.fetched_tokens
        first = decode_pb2.FirstToken(
            event=token_to_proto(self._first), cached_tokens=cached, declined_tokens=self._declined_tokens
        )
        with self._peer_to_blame():
            await self._send_commit(decode_pb2.CommitPrefillRequest(first_token=first))

    @contextmanager
    def _peer_to_blame(self) -> Iterator[None]:
        """Turn an end of our patience into the peer's failure: while the request has time, another can serve it."""
        try:
            yield
        except DeadlineExceeded as error:
            if self._remaining_s() <= 0:
                raise
            address = self._target.address
            raise PeerFailed(f"the decode worker at {address} did not answer in time", worker=address) from error

    def _report_when_settled(self, reason: str) -> None:
        """Report once this job writes no more: a write that ran out of time may still land."""

        def report_when_landed(_: object = None) -> None:
            self._parts.connector.when_settled(self._local, lambda: self._report_later(reason))

        if self._pusher is None or self._pusher.done():
            report_when_landed()
        else:
            self._pusher.add_done_callback(report_when_landed)

    def _report_later(self, reason: str) -> None:
        self._parts.tasks.create_task(self._report_failure(reason))

    async def _report_failure(self, reason: str) -> None:
        parts, target = self._parts, self._target
        for pause_s in REPORT_PAUSES_S:
            await asyncio.sleep(pause_s)
            try:
                await self._send_commit(decode_pb2.CommitPrefillRequest(failure=reason))
            except HeadraceError as error:
                logger.info("decode worker not told of a failed prefill", extra={"error": error.code})
            else:
                return
            if parts.channels.is_closed or await parts.lifetimes.is_over(target.address, target.lease.epoch):
                return

    async def _send_commit(self, commit: decode_pb2.CommitPrefillRequest) -> None:
        commit.lease_id = self._target.lease.lease_id
        commit.epoch = self._target.lease.epoch
        commit.writer_id = self._writer_id
        async with translate_errors(self._target.address):
            await self._decode_stub().CommitPrefill(commit, timeout=CONTROL_TIMEOUT_S)

    def _decode_stub(self) -> "decode_pb2_grpc.DecodeServiceAsyncStub":
        return decode_pb2_grpc.DecodeServiceStub(self._parts.channels.get(self._target.address))

    def _fill_response(self, local_tokens: int, present: int) -> None:
        self.response.local_cached_tokens = local_tokens
        self.response.fetched_tokens = present - local_tokens
        self.response.computed_tokens = len(self._spec.tokens) - present
        self.response.queue_us = int((self._begun_s - self._arrived_s) * 1e6)

    def _deadline_s(self) -> float:
        """Return when a push that begins now is given up: nothing of it is posted later."""
        lease_s = self._left_s(self._target.lease.deadline_unix_ms)
        return self._parts.clock.now() + min(self._remaining_s(), lease_s, self._parts.transfer_deadline_s)

    def _remaining_s(self) -> float:
        return self._left_s(self._spec.deadline_unix_ms)

    def _left_s(self, deadline_unix_ms: int) -> float:
        return (deadline_unix_ms - self._parts.clock.unix_ms()) / 1000
