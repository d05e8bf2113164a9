"""One context on its way through the workers while it still arrives."""

import asyncio
import dataclasses
import logging
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing

from headrace.core.block import block_hashes, root_hash
from headrace.core.request import ContextProgress, SequenceId, SequenceSpec
from headrace.errors import DeadlineExceeded, InvalidRequest, NotReady, PeerMismatch
from headrace.router.context_attempt import ContextAttempt, ContextEvent
from headrace.router.policy import Route, choose_route
from headrace.router.prefixes import NOTHING_CACHED, Cached
from headrace.router.sequence import (
    FULL,
    MOVABLE,
    SequenceParts,
    SequenceRun,
    TokenBatch,
    look_up,
    route_input,
)
from headrace.runtime.off_loop import off_loop

logger = logging.getLogger(__name__)

PAUSE_S = 0.2
MOST_PAUSE_S = 5.0
"""Pauses between attempts while a context is open double up to this: it may wait for workers as long as it likes."""


class ContextRun:
    """Carries one context, and then its answer, over the deaths of its workers.

    The tokens known so far are all its state. While it is open, workers compute what is known ahead of time, and
    nothing is lost with them but time: when none can take it, it waits, and is tried again. Once it is closed and its
    workers fail, it goes on as any other sequence.

    Args:
        parts: What all sequences share.
        spec: The sequence as it is opened; its prompt may be empty.
        fingerprint: Digest of the served model.
        block_tokens: Tokens per block.
        num_final: Leading tokens of the prompt that stay.
    """

    def __init__(
        self, parts: SequenceParts, spec: SequenceSpec, fingerprint: str, block_tokens: int, num_final: int = 0
    ) -> None:
        self._parts = parts
        self._spec = spec
        self._fingerprint = fingerprint
        self._block_tokens = block_tokens
        self._tokens = list(spec.prompt)
        self._output: list[int] = []
        self._num_final = num_final
        self._version = 0
        self._is_closed = False
        self._changed = asyncio.Event()
        self._excluded: set[str] = set()
        self._attempt: ContextAttempt | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens known."""
        return len(self._tokens)

    def revise(self, num_kept: int, tokens: tuple[int, ...], *, num_final: int = 0, is_closed: bool = False) -> None:
        """Keep the first tokens and put others behind them.

        Args:
            num_kept: Leading tokens that stay.
            tokens: Those that follow them.
            num_final: Leading tokens that no later revision changes.
            is_closed: Whether the prompt is complete: its answer follows.

        Raises:
            InvalidRequest: it is closed, fewer tokens are known, or a closed prompt would be empty.
        """
        if self._is_closed or num_kept > len(self._tokens) or (is_closed and not num_kept + len(tokens)):
            raise InvalidRequest(
                f"{num_kept} of {len(self._tokens)} tokens kept, {len(tokens)} added to a prompt that is "
                f"{'closed' if self._is_closed else 'open'}",
                field="revision",
            )
        del self._tokens[num_kept:]
        self._tokens.extend(tokens)
        self._version += 1
        self._num_final, self._is_closed = num_final, is_closed
        if self._attempt is not None:
            self._attempt.revise(num_kept, tokens, num_final, is_closed=is_closed)
        self._changed.set()

    async def room(self) -> None:
        """Wait until workers have read most revisions: one that is slow must not make them pile up here."""
        if self._attempt is not None:
            await self._attempt.room()

    async def events(self) -> AsyncGenerator[ContextEvent, None]:
        """Yield how far the prompt is computed, and the answer's tokens once it is closed, each exactly once.

        Raises:
            HeadraceError: it cannot go on; nothing of it is left on any worker.
        """
        pause_s = PAUSE_S
        while not self._is_closed:
            self._changed.clear()
            try:
                async with aclosing(self._run_attempt()) as events:
                    async for event in events:
                        pause_s = PAUSE_S
                        if isinstance(event, ContextProgress):
                            yield event
                        elif (batch := self._fresh(event)).tokens:
                            yield batch
                            if batch.tokens[-1].finish is not None:
                                return
            except (*MOVABLE, *FULL) as error:
                if isinstance(error, PeerMismatch):
                    raise
                logger.info("context moves", extra={"sequence_id": self._spec.sequence_id, "error": error.code})
            if not self._is_closed:
                await self._pause(pause_s)
                pause_s = min(2 * pause_s, MOST_PAUSE_S)
        async with aclosing(self._rest().batches()) as batches:
            async for batch in batches:
                yield batch

    def _fresh(self, batch: TokenBatch) -> TokenBatch:
        fresh = tuple(token for token in batch.tokens if token.cursor >= len(self._output))
        self._output.extend(token.token_id for token in fresh)
        return dataclasses.replace(batch, tokens=fresh)

    def _rest(self) -> SequenceRun:
        """Return the run of what is left once the prompt is closed."""
        spec = dataclasses.replace(self._spec, prompt=tuple(self._tokens), output=tuple(self._output))
        return SequenceRun(self._parts, spec, self._fingerprint, self._block_tokens)

    async def _pause(self, seconds: float) -> None:
        """Wait before the next attempt; a close ends it, for its answer is waited for.

        Raises:
            DeadlineExceeded: there is no time left for one.
        """
        left_s = (self._spec.deadline_unix_ms - self._parts.clock.unix_ms()) / 1000
        try:
            async with asyncio.timeout(max(0.0, min(seconds, left_s))):
                while not self._is_closed:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            if left_s <= seconds:
                raise DeadlineExceeded("the request's deadline passed before its context was complete") from None

    async def _run_attempt(self) -> AsyncGenerator[ContextEvent, None]:
        # Asked first: between the snapshot of the tokens and the openings nothing may change.
        cached = await self._look_up()
        if self._is_closed:
            raise NotReady("it was closed before anybody had it")
        name = SequenceId(f"{self._spec.sequence_id}.{secrets.token_hex(4)}")
        spec = dataclasses.replace(self._spec, sequence_id=name, prompt=tuple(self._tokens), sources=cached.sources)
        attempt = ContextAttempt(self._parts, spec, self._num_final, self._version, self._choose_without)
        self._attempt = attempt
        try:
            async with aclosing(attempt.run(self._choose(spec, cached))) as events:
                async for event in events:
                    yield event
        finally:
            self._attempt = None

    def _choose_without(self, spec: SequenceSpec, failed: str) -> Route:
        self._excluded.add(failed)
        return self._choose(spec, NOTHING_CACHED)

    def _choose(self, spec: SequenceSpec, cached: Cached) -> Route:
        """Choose workers, without those that have failed this context."""
        views = [worker.view() for worker in self._parts.table.usable()]
        if self._excluded.issuperset(view.name for view in views if view.prefers_decode):
            self._excluded.clear()
        return choose_route(views, route_input(spec, cached, self._block_tokens, self._excluded))

    async def _look_up(self) -> Cached:
        if self._parts.prefixes is None:
            return NOTHING_CACHED
        root, prompt = root_hash(self._fingerprint, self._spec.cache_key), tuple(self._tokens)
        hashes = await off_loop(len(prompt), lambda: block_hashes(root, prompt, self._block_tokens))
        return look_up(self._parts, hashes)
