"""One context while it arrives, and its answer."""

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, assert_never

from headrace.core.common_prefix import num_common
from headrace.core.context import (
    SEQUENCE_FIELD,
    Abandon,
    Append,
    Checkpoint,
    Close,
    ContextId,
    ContextMode,
    ContextState,
    Operation,
    Replace,
)
from headrace.core.request import Piece
from headrace.core.validate import RequestLimits, check_prompt_length, check_room
from headrace.errors import Cancelled, DeadlineExceeded, HeadraceError, InternalError, InvalidRequest
from headrace.ingestor.parts import IngestParts
from headrace.ingestor.prompt import PlainPrompt, PromptText
from headrace.ingestor.segments import SegmentedText
from headrace.runtime.off_loop import off_loop
from headrace.text.growing import GrowingTokens
from headrace.v1 import router_pb2

logger = logging.getLogger(__name__)

NUM_DIGESTS = 256
"""Operations of which it is known whether one that is sent again is the same."""

NUM_REFUSALS = 256
"""Most refusals that are kept to be told again; older operations are answered as if they had been carried out."""

_Render: TypeAlias = Callable[[], str]


class SequenceGap(InvalidRequest):
    """Operations were lost on the way, or not counted: the call is over, the context is as it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a context was opened with, checked.

    Attributes:
        context_id: Its name.
        tenant: Whose it is.
        request: For the router, without a prompt; with a seed, so that an answer can be repeated.
        mode: How it may change.
        limits: Of the model.
        deadline_unix_ms: Clock end of its answer.
        is_unattended: Whether calls come and go.
        is_chat: Whether a chat is answered.
        prompt: Puts it into its prompt.
        num_chars_around: Characters of what stands before it.
    """

    context_id: ContextId
    tenant: str
    request: router_pb2.GenerateRequest
    mode: ContextMode
    limits: RequestLimits
    deadline_unix_ms: int
    is_unattended: bool
    is_chat: bool
    prompt: PromptText
    num_chars_around: int = 0


def overdue() -> DeadlineExceeded:
    """Return why a context ends whose own deadline has passed."""
    return DeadlineExceeded("the deadline passed before the answer was complete", field="timeout")


class Session:
    """Owns the text and the tokens of one context, and the pieces of its answer.

    Operations are carried out one after the other; one that is refused changes nothing. Whoever waits for changes
    takes `changed` first, then looks, then waits for it.

    Args:
        opening: What it was opened with.
        parts: What all contexts share.

    Attributes:
        opening: What it was opened with.
        changed: Set, and replaced, at every change.
        known: Tokens that the router may have: those that are stable, or all once it is closed. Never changed in
            place.
        is_closed: Whether no text follows.
        pieces: Of the answer.
        failure: Why it has ended before its answer was complete.
        is_abandoned: Whether nobody may take it up any more.
        num_calls: Calls that are there for it.
        left_s: When the last call left.
        active_s: When the last operation came.
        ended_s: When it ended; None before.
        on_end: Called then, once.
    """

    def __init__(self, opening: Opening, parts: IngestParts) -> None:
        self.opening = opening
        self.changed = asyncio.Event()
        self.known: list[int] = []
        self.is_closed = False
        self.pieces: list[Piece] = []
        self.failure: HeadraceError | None = None
        self.is_abandoned = False
        self.num_calls = 0
        self.left_s = self.active_s = parts.clock.now()
        self.ended_s: float | None = None
        self.on_end: Callable[[], object] = lambda: None
        self._parts = parts
        self._growing = GrowingTokens(parts.model, parts.cuts)
        self._turn = asyncio.Lock()
        self._segments = SegmentedText()
        self._num_segments = 0
        self._applied = 0
        self._refusals: dict[int, HeadraceError] = {}
        self._digests: dict[int, int] = {}
        self._num_tokens = self._num_fixed = 0
        self._num_computed = 0
        self._checkpoints: list[tuple[int, int]] = []
        self._reached = 0

    async def begin(self) -> None:
        """Take what stands before the context.

        Raises:
            InvalidRequest: it is too long.
        """
        await self._take(self._segments)
        self._num_fixed = len(self.known)

    @property
    def num_final(self) -> int:
        """Leading tokens of `known` that no later change touches."""
        is_append = self.opening.mode is ContextMode.APPEND
        return len(self.known) if is_append else min(self._num_fixed, len(self.known))

    @property
    def has_ended(self) -> bool:
        """Whether nothing becomes of it any more."""
        return self.ended_s is not None

    @property
    def max_segments(self) -> int:
        """Most segments that it may have."""
        return self._parts.config.max_segments

    @property
    def grace_s(self) -> float:
        """How long it stays when nobody is there for it."""
        return self._parts.config.grace_s

    @property
    def is_awaited(self) -> bool:
        """Whether a checkpoint is waited for."""
        return bool(self._checkpoints)

    def state(self) -> ContextState:
        """Return how far it is."""
        return ContextState(
            applied=self._applied,
            checkpoint=self._reached,
            num_tokens=self._num_tokens,
            num_computed=self._num_computed,
            is_closed=self.is_closed,
            num_segments=self._num_segments,
        )

    def notify(self) -> None:
        """Wake whoever waits for a change."""
        self.changed.set()
        self.changed = asyncio.Event()

    # -- Operations --------------------------------------------------------------

    async def apply(
        self, sequence: int, operation: Operation, *, refuse_repeated: bool = False
    ) -> HeadraceError | None:
        """Carry an operation out; return why it was refused, if it was.

        Args:
            sequence: Its number.
            operation: What to do.
            refuse_repeated: Refuse it if one of this number was carried out before, rather than answer it again.

        Raises:
            SequenceGap: operations before it are missing.
        """
        # A task of its own: a call that ends in the midst must not leave half an operation behind.
        outcome = await asyncio.shield(
            self._parts.tasks.create_task(self._in_turn(sequence, operation, refuse_repeated=refuse_repeated))
        )
        if isinstance(outcome, SequenceGap):
            raise outcome
        return outcome

    async def _in_turn(self, sequence: int, operation: Operation, *, refuse_repeated: bool) -> HeadraceError | None:
        async with self._turn:
            if not 1 <= sequence <= self._applied + 1:
                return SequenceGap(
                    f"operation {sequence} came after {self._applied}",
                    field=SEQUENCE_FIELD,
                    limit=f"{self._applied + 1}",
                )
            if sequence <= self._applied:
                if refuse_repeated:
                    return InvalidRequest(
                        f"operation {sequence} was carried out before",
                        field=SEQUENCE_FIELD,
                        limit=f"{self._applied + 1}",
                    )
                return self._again(sequence, operation)
            outcome = await self._carry_out(sequence, operation)
            self._applied = sequence
            self._remember(sequence, operation, outcome)
            self.active_s = self._parts.clock.now()
            self._parts.counts.operations += 1
            self._parts.counts.refused += outcome is not None
            self._look_at_checkpoints()
            self.notify()
            return outcome

    def _again(self, sequence: int, operation: Operation) -> HeadraceError | None:
        """Return what became of an operation that is sent again."""
        if self._digests.get(sequence, hash(operation)) != hash(operation):
            return InvalidRequest(
                f"operation {sequence} was another one", field=SEQUENCE_FIELD, limit=f"{self._applied + 1}"
            )
        return self._refusals.get(sequence)

    def _remember(self, sequence: int, operation: Operation, outcome: HeadraceError | None) -> None:
        """Keep what an operation was, and what it was refused with: a client that has not heard of it asks again."""
        self._digests[sequence] = hash(operation)
        self._digests.pop(sequence - NUM_DIGESTS, None)
        if outcome is not None:
            # A copy: an error that was raised keeps the texts of whoever raised it.
            self._refusals[sequence] = dataclasses.replace(outcome)
        if len(self._refusals) > NUM_REFUSALS:
            del self._refusals[min(self._refusals)]

    async def _carry_out(self, sequence: int, operation: Operation) -> HeadraceError | None:
        try:
            match operation:
                case Append():
                    self._refuse_late()
                    self._refuse_large(len(operation.text))
                    await self._take(self._segments.append(operation))
                case Replace():
                    self._refuse_late()
                    if self.opening.mode is not ContextMode.UPDATE:
                        raise InvalidRequest("the context was opened to append only", field="mode", limit="update")
                    self._refuse_large(sum(len(segment.text) for segment in operation.segments))
                    await self._take(self._segments.replace(operation))
                case Checkpoint():
                    self._await(sequence, len(self.known))
                case Close():
                    self._refuse_late()
                    self._refuse_large(len(operation.query.encode()))
                    await self._close(operation.query)
                case Abandon():
                    self.is_abandoned = True
                    self.end(Cancelled("the context was abandoned"))
                case _:
                    assert_never(operation)
        except HeadraceError as error:
            return error
        except Exception:  # noqa: BLE001 a bug in one context must not end the ingestor's task group
            logger.exception("operation failed", extra={"context_id": self.opening.context_id[:16]})
            self.end(InternalError("the ingestor failed on this context; its log has the cause"))
            return self.failure
        return None

    def _await(self, sequence: int, goal: int) -> None:
        """Take note of a checkpoint; those that it is reached with are one."""
        while self._checkpoints and self._checkpoints[-1][1] >= goal:
            self._checkpoints.pop()
        self._checkpoints.append((sequence, goal))

    def _refuse_late(self) -> None:
        if self.failure is not None:
            raise dataclasses.replace(self.failure)
        if self.is_closed:
            raise InvalidRequest("the context is closed: nothing can be changed any more", field="operation")

    def _refuse_large(self, size: int) -> None:
        limit = self._parts.config.max_chunk_bytes
        if size > limit:
            raise InvalidRequest(
                f"the operation has {size} bytes of text; send it in parts of at most {limit}",
                field="operation",
                limit=f"{limit} bytes",
            )

    async def _take(self, segments: SegmentedText) -> None:
        """Make these the context."""
        if len(segments.ids) > self._parts.config.max_segments:
            limit = str(self._parts.config.max_segments)
            raise InvalidRequest(f"a context has at most {limit} segments", field="segments", limit=limit)
        text = await self._fitting(lambda: self.opening.prompt.begun(segments.text), segments.text)
        growing, before, most = self._growing, self._growing.text, self._most_tokens
        num_tokens = await off_loop(growing.num_unsettled(text), lambda: _grow(growing, text, most))
        try:
            self._refuse_late()
            self._check_room(num_tokens)
            self._parts.room.resize(self.opening.context_id, len(text))
        except HeadraceError:
            await off_loop(growing.num_unsettled(before), lambda: growing.replace(before))
            raise
        self._segments, self._num_segments, self._num_tokens = segments, len(segments.ids), num_tokens
        self._know(list(growing.stable))

    async def _close(self, query: str) -> None:
        context = self._segments.whole()
        text = await self._fitting(lambda: self.opening.prompt.whole(context, query), context)
        growing, before = self._growing, self._growing.text
        tokens = await off_loop(growing.num_unsettled(text), lambda: _complete(growing, text))
        try:
            self._refuse_late()
            if not tokens:
                raise InvalidRequest("a closed context needs at least 1 token", field="close.query")
            self._check_room(len(tokens))
        except HeadraceError:
            await off_loop(growing.num_unsettled(before), lambda: growing.replace(before))
            raise
        self._know(tokens)
        self._num_tokens, self.is_closed = len(tokens), True
        self._forget_text()

    async def _fitting(self, render: _Render, context: str) -> str:
        """Return the prompt of a context, refused before time goes into tokens if it cannot fit."""
        limit = self._parts.config.max_context_chars
        if len(context) > limit:
            raise InvalidRequest(
                f"the context has {len(context)} characters", field="operation", limit=f"{limit} characters"
            )
        text = await off_loop(len(context) + self.opening.num_chars_around, render)
        check_prompt_length(self._parts.model.min_num_tokens(text), self.opening.limits, name="the context")
        return text

    def _forget_text(self) -> None:
        """Take note that nothing is asked of the text any more."""
        self._segments = SegmentedText()
        # Another one: an operation may be at work on it, in a thread.
        self._growing = GrowingTokens(self._parts.model, self._parts.cuts)
        self._parts.room.forget(self.opening.context_id)

    @property
    def _most_tokens(self) -> int:
        """Most tokens of a prompt that leaves room for an answer."""
        limits = self.opening.limits
        return limits.max_context_tokens - max(1, self.opening.request.sampling.max_tokens)

    def _check_room(self, num_tokens: int) -> None:
        check_room(num_tokens, max(1, self.opening.request.sampling.max_tokens), self.opening.limits)

    def _know(self, tokens: list[int]) -> None:
        if tokens != self.known:
            self._num_computed = min(self._num_computed, num_common(self.known, tokens))
            self.known = tokens

    # -- What the router brings ----------------------------------------------------

    def note_computed(self, known: list[int], num_computed: int) -> None:
        """Take note that so many leading tokens of what was known are computed."""
        if known is not self.known:
            num_computed = min(num_computed, num_common(known, self.known))
        self._num_computed = num_computed
        self._look_at_checkpoints()
        self.notify()

    def note_lost(self) -> None:
        """Take note that whoever had computed it is gone."""
        if not self.pieces:
            self.note_computed(self.known, 0)

    def add(self, piece: Piece) -> None:
        """Take the next piece of the answer; the last one ends the context."""
        self.pieces.append(piece)
        self._num_computed = len(self.known)
        self._look_at_checkpoints()
        if piece.finish is not None:
            self.end(None)
        else:
            self.notify()

    def _look_at_checkpoints(self) -> None:
        """Note those that are reached: of an open prompt the last known token is never computed."""
        while self._checkpoints:
            sequence, goal = self._checkpoints[0]
            if self._num_computed < min(goal, len(self.known)) - 1:
                return
            self._reached = sequence
            self.active_s = self._parts.clock.now()
            del self._checkpoints[0]

    # -- Calls and the end ---------------------------------------------------------

    def attach(self) -> None:
        """Take note of a call."""
        self.num_calls += 1

    def detach(self) -> None:
        """Take note that a call has left."""
        self.num_calls -= 1
        self.left_s = self._parts.clock.now()

    def end(self, failure: HeadraceError | None) -> None:
        """End it: with its answer complete, or for a reason."""
        if self.ended_s is None:
            self.ended_s = self._parts.clock.now()
            self.failure = failure
            self._forget_text()
            self._checkpoints.clear()
            # What is kept for a grace time is the answer.
            self.known = []
            self.opening = dataclasses.replace(self.opening, prompt=PlainPrompt(""))
            self.on_end()
            self.notify()


def _grow(growing: GrowingTokens, text: str, most_tokens: int) -> int:
    growing.replace(text)
    return growing.num_tokens(most_tokens)


def _complete(growing: GrowingTokens, text: str) -> list[int]:
    growing.replace(text)
    return growing.complete()
