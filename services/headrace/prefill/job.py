"""One prompt: fetched or computed, pushed chunk by chunk, handed over."""

import asyncio
import logging

from headrace.core.block import BlockId
from headrace.core.request import SequenceSpec, Token
from headrace.core.wire import token_to_proto
from headrace.engine.messages import Goal, Progress, Sampled
from headrace.errors import HeadraceError, InternalError, InvalidRequest
from headrace.prefill.delivery import Delivery
from headrace.prefill.parts import PrefillParts
from headrace.prefill.policy import PushRange, next_push
from headrace.v1 import decode_pb2, prefill_pb2
from headrace.worker.engine import OpenSequence

logger = logging.getLogger(__name__)


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
        self._delivery = Delivery(parts, target, writer_id, spec.deadline_unix_ms)
        self._local: tuple[BlockId, ...] = ()
        self._first: Token | None = None
        self._chunks: asyncio.Queue[PushRange | None] = asyncio.Queue()
        self._pusher: asyncio.Task[HeadraceError | None] | None = None
        self._has_failed = False
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
            await self._delivery.connect()
            async with self._parts.engine.open(self._spec, Goal.FIRST_TOKEN) as sequence:
                self._local = sequence.admitted.block_ids
                self._check_lease()
                await self._compute_and_push(sequence)
        except BaseException as error:
            self._report_when_settled(error.code if isinstance(error, HeadraceError) else "cancelled")
            raise
        return self.response

    def _check_lease(self) -> None:
        num_blocks = len(self._delivery.target.lease.block_ids)
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
        done = self._delivery.target.cached_tokens // block_tokens
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
            with self._delivery.peer_to_blame():
                await self._delivery.begin()
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
            await self._delivery.write(sequence.admitted.block_ids[push.start : push.end], push.start)

    async def _commit(self) -> None:
        """Hand over the first token; the KV before it has landed."""
        if self._first is None:
            return
        parts, now_s = self._parts, self._parts.clock.now()
        self.response.compute_us = int((now_s - self._begun_s) * 1e6)
        self.response.pushed_bytes = self._delivery.num_pushed_blocks * parts.block_bytes
        cached = self.response.local_cached_tokens + self.response.fetched_tokens
        first = decode_pb2.FirstToken(
            event=token_to_proto(self._first), cached_tokens=cached, declined_tokens=self._declined_tokens
        )
        await self._delivery.commit(first)

    def _report_when_settled(self, reason: str) -> None:
        """Report once this job writes no more: a write that ran out of time may still land."""

        def report_when_landed(_: object = None) -> None:
            self._delivery.fail_when_settled(reason)

        if self._pusher is None or self._pusher.done():
            report_when_landed()
        else:
            self._pusher.add_done_callback(report_when_landed)

    def _fill_response(self, local_tokens: int, present: int) -> None:
        self.response.local_cached_tokens = local_tokens
        self.response.fetched_tokens = present - local_tokens
        self.response.computed_tokens = len(self._spec.tokens) - present
        self.response.queue_us = int((self._begun_s - self._arrived_s) * 1e6)
