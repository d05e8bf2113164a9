"""One sequence on a decode worker: blocks first, then KV, then tokens."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

from headrace.core.request import SequenceSpec, Token
from headrace.decode.reservations import Reservation, Reservations
from headrace.engine.messages import EngineEvent, Goal, Sampled
from headrace.worker.blocks import BlockExchange
from headrace.worker.engine import AsyncEngine, OpenSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeParts:
    """What every decode job of a worker shares.

    Attributes:
        tasks: Outlives every request.
    """

    engine: AsyncEngine
    blocks: BlockExchange
    reservations: Reservations
    tasks: asyncio.TaskGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """Blocks are reserved.

    Attributes:
        cached_tokens: Leading tokens that need no push.
    """

    reservation: Reservation
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Tokens in order, and how many prompt tokens were reused from any cache or could have been.

    Attributes:
        declined_tokens: Prompt tokens that somebody held and that were computed, for that was faster.
    """

    tokens: tuple[Token, ...]
    cached_tokens: int
    declined_tokens: int


class DecodeJob:
    """Takes one sequence from its reservation to its last token; ends all of it when closed.

    Args:
        parts: What the jobs of a worker share.
        spec: The sequence.
    """

    def __init__(self, parts: DecodeParts, spec: SequenceSpec) -> None:
        self._parts = parts
        self._spec = spec

    async def run_local(self) -> AsyncGenerator[Tokens, None]:
        """Compute the prompt here, then generate."""
        async with self._parts.engine.open(self._spec, Goal.ANSWER) as sequence:
            present = await self._parts.blocks.fetch(sequence)
            sequence.begin(present)
            async with aclosing(self.generate(sequence, present)) as generated:
                async for tokens in generated:
                    yield tokens

    async def run_remote(self) -> AsyncGenerator[Granted | Tokens, None]:
        """Reserve blocks, wait for a prefill worker to fill them, then generate."""
        async with self._parts.engine.open(self._spec, Goal.ANSWER, arrives_whole=True) as sequence:
            local = sequence.admitted.num_cached_tokens
            with self._reservation(sequence) as reservation:
                yield Granted(reservation=reservation, cached_tokens=local)
                first = await self._parts.reservations.wait(reservation)
            sequence.begin(len(self._spec.tokens), first)
            sequence.declined_tokens = reservation.reused.declined_tokens
            cached = max(local, reservation.reused.cached_tokens)
            async with aclosing(self.generate(sequence, cached)) as generated:
                async for tokens in generated:
                    yield tokens

    @contextmanager
    def _reservation(self, sequence: OpenSequence) -> Iterator[Reservation]:
        reservation = self._parts.reservations.grant(sequence.admitted.block_ids, self._spec.deadline_unix_ms)
        try:
            yield reservation
        finally:
            self._parts.reservations.revoke(reservation)

    async def generate(
        self, sequence: OpenSequence, cached_tokens: int, heard: Iterable[EngineEvent] = ()
    ) -> AsyncGenerator[Tokens, None]:
        """Yield the tokens of the answer to a prompt that is complete.

        Args:
            sequence: In the engine; its prompt is the job's.
            cached_tokens: Tokens of the prompt that were reused.
            heard: Events that were taken from the sequence before.
        """
        answer: list[int] = []
        events = list(heard)
        while True:
            events = events or await sequence.events()
            tokens = tuple(event.token for event in events if isinstance(event, Sampled))
            answer.extend(token.token_id for token in tokens)
            if tokens:
                yield Tokens(tokens=tokens, cached_tokens=cached_tokens, declined_tokens=sequence.declined_tokens)
                if tokens[-1].finish is not None:
                    known = (*self._spec.tokens, *answer)
                    hashes = self._parts.blocks.hashes(known, self._spec.cache_key)
                    self._parts.blocks.store_later(self._spec, hashes)
                    return
            events = []
