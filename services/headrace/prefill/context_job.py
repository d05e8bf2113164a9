"""One prompt that still arrives: computed and pushed as it comes, handed over once it is closed."""

import asyncio
import dataclasses
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TypeAlias

from headrace.core.block import BlockId
from headrace.core.request import Revision, SequenceSpec, Token
from headrace.core.wire import revision_from_proto, token_to_proto
from headrace.engine.messages import Goal, Progress, Sampled
from headrace.errors import HeadraceError, InternalError
from headrace.prefill.delivery import Delivery
from headrace.prefill.parts import PrefillParts
from headrace.prefill.policy import next_push
from headrace.v1 import decode_pb2, generate_pb2, prefill_pb2
from headrace.worker.context import ArrivingPrompt, follow_revisions, not_opened
from headrace.worker.engine import OpenSequence

logger = logging.getLogger(__name__)

GRANT_PATIENCE_S = 0.02
"""How long a close waits for blocks of the decode worker before its prompt is computed without: an answer takes 2 to
5 ms here, and a close that comes later costs a step of its own."""

Requests: TypeAlias = AsyncIterator[prefill_pb2.PrefillContextRequest]


class ContextJob:
    """Takes one sequence from its first piece to the hand-over.

    Decode workers may come and go meanwhile: what is computed stays, and is pushed anew into each reservation. Each
    hears once that nothing more is written: by the first token, or by a failure sent after every write has settled.

    Args:
        parts: What the jobs of a worker share.
        spec: The sequence as it is opened.
        num_final: Leading tokens of it that stay.
    """

    def __init__(self, parts: PrefillParts, spec: SequenceSpec, num_final: int) -> None:
        self._parts = parts
        self._spec = spec
        self._num_final = num_final
        self._prompt = ArrivingPrompt(spec)
        self._outbox: asyncio.Queue[prefill_pb2.PrefillContextResponse | HeadraceError] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._is_over = False
        self._progress: Progress | None = None
        self._num_unsettled = 0
        self._first: Token | None = None
        self._num_present = self._declined_tokens = 0
        # A close for which no decode worker has granted blocks yet.
        self._closing: Revision | None = None
        self._pushed_bytes = 0
        # The reservation that the router wants filled, and the one that this job has begun to write into.
        self._wanted: Delivery | None = None
        self._begun: Delivery | None = None
        self._num_pushed = 0
        self._num_valid = 0
        self._lost: set[str] = set()
        # Own blocks that were written from.
        self._sources: set[BlockId] = set()

    async def run(self, requests: Requests) -> AsyncGenerator[prefill_pb2.PrefillContextResponse, None]:
        """Compute and push until a decode worker has taken over; closing it stops the work within one chunk.

        Raises:
            HeadraceError: the prompt could not be computed.
        """
        opening = self._parts.engine.open(self._spec, Goal.FIRST_TOKEN, is_open=True, num_final=self._num_final)
        # From the beginning: it may be revised, and closed, while it waits for blocks.
        work = follow_revisions(self._revisions(requests, opening), opening, self._prompt, self._take)
        following = self._parts.tasks.create_task(work)
        try:
            async with opening as sequence, aclosing(self._work(sequence)) as messages:
                async for message in messages:
                    yield message
        finally:
            following.cancel()
            await asyncio.wait([following])

    async def _work(self, sequence: OpenSequence) -> AsyncGenerator[prefill_pb2.PrefillContextResponse, None]:
        computing = self._parts.tasks.create_task(self._compute(sequence))
        # A cancelled request must not abandon a posted write: the pusher ends by itself.
        pusher = self._parts.tasks.create_task(self._push_until_over(sequence))
        try:
            while True:
                message = await self._outbox.get()
                if isinstance(message, HeadraceError):
                    raise message
                yield message
                if message.HasField("done"):
                    return
        finally:
            self._is_over = True
            self._changed.set()
            computing.cancel()
            await asyncio.wait([pusher, computing])

    async def _revisions(self, requests: Requests, sequence: OpenSequence) -> AsyncIterator[Revision]:
        async for request in requests:
            match request.WhichOneof("request"):
                case "revision":
                    yield revision_from_proto(request.revision)
                case "target":
                    self._aim(request.target)
                    self._close_if_granted(sequence)
                case _:
                    raise not_opened()

    def _take(self, sequence: OpenSequence, revision: Revision) -> None:
        """Forget what was pushed behind the common prefix, and hand the revision to the engine.

        What is closed cannot give up its blocks any more once its first token is chosen, so it must not wait for a
        decode worker then: while none has blocks for it, all but its last token is computed.
        """
        num_kept = revision.num_kept // self._parts.block_tokens
        self._num_pushed, self._num_valid = min(self._num_pushed, num_kept), min(self._num_valid, num_kept)
        self._changed.set()
        if revision.is_closed and not self._is_granted():
            self._closing = revision
            asyncio.get_running_loop().call_later(GRANT_PATIENCE_S, self._compute_ahead, sequence)
        else:
            sequence.revise(revision)

    def _is_granted(self) -> bool:
        return self._wanted is not None and self._wanted.target.version == self._prompt.version

    def _compute_ahead(self, sequence: OpenSequence) -> None:
        """Hand a close that nobody has granted blocks for to the engine as one more revision."""
        closing = self._closing
        if closing is None or self._is_over:
            return
        num_tokens = len(self._prompt.tokens)
        self._closing = Revision(version=closing.version, num_kept=num_tokens, is_closed=True)
        try:
            sequence.revise(dataclasses.replace(closing, num_final=num_tokens, is_closed=False))
        except HeadraceError as error:
            sequence.fail(error)

    def _close_if_granted(self, sequence: OpenSequence) -> None:
        if self._closing is not None and self._is_granted():
            closing, self._closing = self._closing, None
            sequence.revise(closing)

    def _aim(self, named: prefill_pb2.ContextTarget) -> None:
        if not named.HasField("target") or named.writer_id in self._lost:
            self._wanted = None
        elif self._wanted is not None and self._wanted.writer_id == named.writer_id:
            self._wanted.target = named.target
        else:
            self._wanted = Delivery(self._parts, named.target, named.writer_id, self._spec.deadline_unix_ms)
        self._changed.set()

    async def _compute(self, sequence: OpenSequence) -> None:
        """Have the prompt computed, and take note of how far it is."""
        try:
            present = await self._parts.blocks.fetch(sequence) if sequence.admitted.num_tokens else 0
            sequence.begin(present)
            self._num_present, self._declined_tokens = present, sequence.declined_tokens
            while self._first is None:
                for event in await sequence.events():
                    self._hear(event)
                self._changed.set()
        except HeadraceError as error:
            self._outbox.put_nowait(error)
        except Exception:  # noqa: BLE001 a bug in one request must not end the worker's task group
            logger.exception("context not computed", extra={"sequence_id": self._spec.sequence_id})
            self._outbox.put_nowait(InternalError("the prefill worker failed on this context; its log has the cause"))

    def _hear(self, event: object) -> None:
        match event:
            case Progress(version=version, num_computed=num_computed):
                self._progress = event
                self._num_unsettled += 1
                progress = generate_pb2.ContextProgress(version=version, computed_tokens=num_computed)
                self._outbox.put_nowait(prefill_pb2.PrefillContextResponse(progress=progress))
            case Sampled(token=token):
                self._first = token
            case _:
                logger.error("unexpected event", extra={"event": type(event).__name__})

    async def _push_until_over(self, sequence: OpenSequence) -> None:
        try:
            while not self._is_over:
                self._changed.clear()
                try:
                    await self._push_some(sequence)
                except HeadraceError as error:
                    self._lose(error)
                if await self._hand_over():
                    return
                self._settle(sequence)
                await self._changed.wait()
        except HeadraceError as error:
            self._outbox.put_nowait(error)
        except Exception:  # noqa: BLE001 a bug in one request must not end the worker's task group
            logger.exception("context not pushed", extra={"sequence_id": self._spec.sequence_id})
            failure = InternalError("the prefill worker failed to push this context; its log has the cause")
            self._outbox.put_nowait(failure)
        finally:
            self._leave("the context is over")

    def _settle(self, sequence: OpenSequence) -> None:
        """Let the engine take its blocks, if nothing of them is left to push.

        A write that ran out of time may still read them, or those of an earlier version: then once it has settled.
        """
        progress, num_progress = self._progress, self._num_unsettled
        if progress is None:
            return
        is_current = progress.version == self._prompt.version
        num_full = progress.num_computed // self._parts.block_tokens
        if is_current and (self._is_whole(progress) or (self._wanted is not None and self._num_pushed < num_full)):
            return
        self._progress, self._num_unsettled = None, 0

        def settle() -> None:
            if not self._is_over:
                sequence.settle(num_progress)

        self._parts.connector.when_settled(tuple(self._sources), settle)

    def _is_whole(self, progress: Progress) -> bool:
        """Return whether the closed prompt is computed: what is left is the hand-over, which needs its last block."""
        prompt = self._prompt
        is_current = prompt.is_closed and progress.version == prompt.version
        return is_current and progress.num_computed == len(prompt.tokens)

    async def _push_some(self, sequence: OpenSequence) -> None:
        """Push what is complete, as far as the target has blocks."""
        if self._wanted is not self._begun:
            self._leave("another target")
            await self._begin()
            if self._begun is not None and self._progress is None:
                # What was told before may be anybody's by now.
                sequence.report()
        while self._begun is not None and self._begun is self._wanted and not self._is_over:
            push = self._next_push(self._begun)
            if push is None:
                return
            first, blocks = push
            self._num_valid = first + len(blocks)
            self._sources.update(blocks)
            with self._begun.peer_to_blame():
                await self._begun.write(blocks, first)
            self._pushed_bytes += len(blocks) * self._parts.block_bytes
            self._num_pushed = self._num_valid

    def _next_push(self, delivery: Delivery) -> tuple[int, tuple[BlockId, ...]] | None:
        """Return the first block to push and all that go with it, or None.

        Pieces come faster than they are computed: what was told of an earlier version is pushed too, as far as this
        one begins with it. The part of a last block goes only when nothing more will come.
        """
        progress, prompt = self._progress, self._prompt
        if progress is None or self._is_lost(delivery.target):
            return None
        is_current = progress.version == prompt.version == delivery.target.version
        num_tokens = prompt.still(progress.version, progress.num_computed)
        is_last = is_current and self._first is not None
        push = next_push(self._num_pushed, num_tokens, self._parts.block_tokens, is_last=is_last)
        if push is None:
            return None
        blocks = progress.block_ids[push.start : min(push.end, len(delivery.target.lease.block_ids))]
        return (push.start, blocks) if blocks else None

    def _is_lost(self, target: prefill_pb2.PrefillTarget) -> bool:
        """Return whether a revision reaches into blocks that the decode worker shares: it will name new ones."""
        num_cached = target.cached_tokens
        if target.version <= self._prompt.version and self._prompt.still(target.version, num_cached) < num_cached:
            return True
        return self._num_pushed < num_cached // self._parts.block_tokens

    async def _begin(self) -> None:
        delivery = self._wanted
        if delivery is None:
            return
        # From here on its owner hears of the end.
        self._begun = delivery
        with delivery.peer_to_blame():
            await delivery.connect()
            await delivery.begin()
        self._num_pushed = delivery.target.cached_tokens // self._parts.block_tokens

    def _leave(self, reason: str) -> None:
        """Tell the owner of the reservation that nothing more is written into it."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.fail_when_settled(reason)

    def _lose(self, error: HeadraceError) -> None:
        """Go on without a target that cannot be filled, and say so."""
        lost = self._begun
        if lost is None:
            raise error
        self._leave(error.code)
        self._lost.add(lost.writer_id)
        message = prefill_pb2.LostTarget(writer_id=lost.writer_id, code=error.code)
        self._outbox.put_nowait(prefill_pb2.PrefillContextResponse(lost=message))
        if self._wanted is not None and self._wanted.writer_id in self._lost:
            self._wanted = None

    async def _hand_over(self) -> bool:
        """Hand the first token over, if all KV before it has landed; return whether that is so."""
        delivery, first = self._begun, self._first
        is_whole = delivery is not None and delivery is self._wanted and delivery.target.version == self._prompt.version
        if first is None or delivery is None or not is_whole or self._is_over:
            return False
        tokens, size = self._prompt.tokens, self._parts.block_tokens
        if self._num_pushed * size < len(tokens):
            return False
        hashes = self._parts.blocks.hashes(tokens, self._spec.cache_key)
        self._parts.blocks.store_later(dataclasses.replace(self._spec, prompt=tokens), hashes)
        num_reused = min(self._num_present, self._prompt.least_kept)
        message = decode_pb2.FirstToken(
            event=token_to_proto(first), cached_tokens=num_reused, declined_tokens=self._declined_tokens
        )
        try:
            await delivery.commit(message)
        except HeadraceError as error:
            self._lose(error)
            return False
        self._begun = None
        done = prefill_pb2.PrefillResponse(
            local_cached_tokens=num_reused,
            computed_tokens=len(tokens) - num_reused,
            pushed_bytes=self._pushed_bytes,
        )
        self._outbox.put_nowait(prefill_pb2.PrefillContextResponse(done=done))
        return True
