"""One sequence on a decode worker whose prompt still arrives: blocks as it grows, then tokens."""

import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

from headrace.core.request import Revision, SequenceSpec
from headrace.decode.job import DecodeJob, DecodeParts, Granted, Tokens
from headrace.decode.reservations import Reservation
from headrace.engine.messages import EngineEvent, Extended, Goal, Progress, Sampled
from headrace.errors import HeadraceError, InternalError
from headrace.worker.context import ArrivingPrompt, follow_revisions
from headrace.worker.engine import OpenSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """A chunk of a version of the prompt was computed here."""

    version: int
    num_tokens: int


class DecodeContextJob:
    """Takes one sequence from its first piece to its last token; ends all of it when closed.

    Args:
        parts: What the jobs of a worker share.
        spec: The sequence as it is opened.
        num_final: Leading tokens of it that stay.
        revisions: What becomes of its prompt.
    """

    def __init__(
        self, parts: DecodeParts, spec: SequenceSpec, num_final: int, revisions: AsyncIterator[Revision]
    ) -> None:
        self._parts = parts
        self._spec = spec
        self._num_final = num_final
        self._revisions = revisions
        self._prompt = ArrivingPrompt(spec)

    async def run_local(self) -> AsyncGenerator[Computed | Tokens, None]:
        """Compute the prompt here as it arrives, then generate."""
        parts = self._parts
        opening = parts.engine.open(self._spec, Goal.ANSWER, is_open=True, num_final=self._num_final)
        # From the beginning: it may be revised, and closed, while it waits for blocks.
        with self._following(opening):
            async with opening as sequence:
                present = await parts.blocks.fetch(sequence) if sequence.admitted.num_tokens else 0
                sequence.begin(present)
                events: list[EngineEvent] = []
                while not any(isinstance(event, Sampled) for event in events):
                    events = await sequence.events()
                    for event in events:
                        if isinstance(event, Progress):
                            yield Computed(version=event.version, num_tokens=event.num_computed)
                cached = min(present, self._prompt.least_kept)
                async with aclosing(self._answer().generate(sequence, cached, events)) as generated:
                    async for tokens in generated:
                        yield tokens

    async def run_remote(self) -> AsyncGenerator[Granted | Tokens, None]:
        """Reserve blocks as the prompt grows, wait for a prefill worker to fill them, then generate."""
        opening = self._parts.engine.open(
            self._spec, Goal.ANSWER, arrives_whole=True, is_open=True, num_final=self._num_final
        )
        with self._following(opening):
            async with opening as sequence:
                local, reservations = sequence.admitted.num_cached_tokens, self._parts.reservations
                with self._reservation(sequence) as reservation:
                    yield Granted(reservation=reservation, cached_tokens=local)
                    while reservation.first is None:
                        for event in await sequence.events():
                            if isinstance(event, Extended):
                                reservations.extend(reservation, event.block_ids, event.version)
                                yield Granted(reservation=reservation, cached_tokens=local)
                    if not self._prompt.is_closed or reservation.version != self._prompt.version:
                        raise InternalError("the prefill worker handed over a prompt that is not complete")
                    sequence.begin(len(self._prompt.tokens), reservation.first)
                sequence.declined_tokens = reservation.reused.declined_tokens
                cached = max(min(local, self._prompt.least_kept), reservation.reused.cached_tokens)
                async with aclosing(self._answer().generate(sequence, cached)) as generated:
                    async for tokens in generated:
                        yield tokens

    def _answer(self) -> DecodeJob:
        """Return the job of the prompt as it was closed."""
        return DecodeJob(self._parts, dataclasses.replace(self._spec, prompt=self._prompt.tokens))

    @contextmanager
    def _following(self, sequence: OpenSequence) -> Iterator[None]:
        following = self._parts.tasks.create_task(follow_revisions(self._revisions, sequence, self._prompt))
        try:
            yield
        finally:
            following.cancel()

    @contextmanager
    def _reservation(self, sequence: OpenSequence) -> Iterator[Reservation]:
        admitted, reservations = sequence.admitted, self._parts.reservations
        reservation = reservations.grant(admitted.block_ids, self._spec.deadline_unix_ms, admitted.version)
        landing = self._parts.tasks.create_task(self._land(sequence, reservation))
        try:
            yield reservation
        finally:
            landing.cancel()
            reservations.revoke(reservation)

    async def _land(self, sequence: OpenSequence, reservation: Reservation) -> None:
        """Wake who reads the sequence's events when all KV has landed."""
        try:
            await self._parts.reservations.wait(reservation)
        except HeadraceError as error:
            sequence.fail(error)
        else:
            sequence.wake()
