"""Starts a sequence with the first layers of its fetched blocks, while the others land."""

import contextlib

from headrace.clock import Clock
from headrace.core.block import KvLayout, Span
from headrace.core.fetch_plan import EARLY_PATIENCE, FetchPlan
from headrace.engine.landing import Landing
from headrace.engine.messages import StartEarly
from headrace.errors import HeadraceError
from headrace.worker.engine import AsyncEngine, OpenSequence

NUM_SPANS = 4
"""READs that blocks are cut into, layer after layer: three quarters of their time are hidden behind computing."""


class EarlyStart:
    """Tells the engine how far a fetch is, from its first layers to its end.

    Args:
        engine: Computes.
        clock: Ends its patience.
        layout: Of the blocks.
        sequence: Waits for the fetch.
        plan: What is fetched.

    Attributes:
        spans: Parts of a block, of some layers each, in the order in which they are computed with.
    """

    def __init__(
        self, engine: AsyncEngine, clock: Clock, layout: KvLayout, sequence: OpenSequence, plan: FetchPlan
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._block_tokens = layout.block_tokens
        self._sequence = sequence
        self._plan = plan
        self._landing: Landing | None = None
        self._is_over = False
        self._num_blocks = 0
        self._layer_ends = _layer_ends(layout.num_layers)
        self.spans: tuple[Span, ...] = tuple(
            layout.span(range(start, end)) for start, end in zip((0, *self._layer_ends), self._layer_ends, strict=False)
        )

    def advance(self, num_spans: int, num_blocks: int) -> None:
        """Note that the first spans of the blocks have landed; nobody may be reading into blocks behind them.

        Args:
            num_spans: How many, at least one.
            num_blocks: Fetched blocks, from the first on, of which there is more to come. Only the first call's counts.
        """
        if self._is_over:
            return
        if self._landing is None:
            self._num_blocks = num_blocks
            num_present = self._sequence.admitted.num_cached_tokens + num_blocks * self._block_tokens
            end_s = self._clock.now() + EARLY_PATIENCE * self._plan.first_step_s
            self._landing = Landing(num_present, end_s, self._clock)
            with contextlib.suppress(HeadraceError):  # An engine with a full mailbox has no use for more work.
                self._engine.send(StartEarly(sequence_id=self._sequence.spec.sequence_id, landing=self._landing))
        self._landing.land(self._layer_ends[num_spans - 1])

    def end(self, num_landed: int) -> None:
        """Note that nothing lands any more, or that it is not known what does; the first call counts.

        Args:
            num_landed: Fetched blocks, from the first on, that are what they should be.
        """
        self._is_over = True
        if self._landing is not None:
            self._landing.end(is_believed=num_landed >= self._num_blocks)


def _layer_ends(num_layers: int) -> tuple[int, ...]:
    """Return the layer behind each span; a model of few layers has fewer spans."""
    num_spans = min(NUM_SPANS, num_layers)
    return tuple(num_layers * number // num_spans for number in range(1, num_spans + 1))
