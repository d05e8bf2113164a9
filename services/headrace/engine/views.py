"""What the plan of a step may know of the engine, as values."""

import dataclasses
from collections.abc import Iterable

from headrace.core.block import blocks_for
from headrace.core.plan import SchedulerView, SequenceView
from headrace.engine.batch import Runner
from headrace.engine.cache import BlockCache
from headrace.engine.config import EngineConfig
from headrace.engine.messages import Goal
from headrace.engine.sequence import Sequence, State


def scheduler_view(
    sequences: Iterable[Sequence], cache: BlockCache, runner: Runner, config: EngineConfig, now_s: float
) -> SchedulerView:
    """Return what the plan may know; counts that cannot matter in this step are bounds and cost nothing."""
    everyone = list(sequences)
    live = [sequence for sequence in everyone if sequence.state is not State.DONE]
    done = [sequence for sequence in everyone if sequence.state is State.DONE]
    leaving = [sequence for sequence in done if sequence.has_failed and sequence.is_streamed]
    views = _Views(live, len(done), cache, config, now_s)
    return SchedulerView(
        sequences=views.all(),
        num_available=cache.ledger.num_available,
        block_tokens=cache.block_tokens,
        num_layers=runner.num_layers,
        token_budget=config.token_budget,
        max_running=config.max_running,
        num_done=len(done),
        num_leaving=len(leaving),
    )


class _Views:
    """Views of the sequences of one step."""

    def __init__(
        self, live: list[Sequence], num_done: int, cache: BlockCache, config: EngineConfig, now_s: float
    ) -> None:
        self._live = live
        self._cache = cache
        self._config = config
        self._now_s = now_s
        # A step adds at most one block to a sequence, but to prompts that came in pieces those of its chunk: only
        # where that may not fit is anyone evicted for it.
        chunks = (each.num_computable - each.num_present for each in live if each.is_streamed)
        most = len(live) + sum(blocks_for(max(0, size), cache.block_tokens) for size in chunks)
        self._is_tight = cache.ledger.num_available < most
        self._has_waiting = any(each.state is not State.RUNNING for each in live)
        # No more can be admitted than this, so the prefixes of later arrivals need not be looked up.
        self._num_places = config.max_running - num_done - sum(_may_keep(each) for each in live)

    def all(self) -> tuple[SequenceView, ...]:
        """Return all views."""
        views: list[SequenceView] = []
        for sequence in self._live:
            if sequence.state is State.WAITING:
                views.append(self._waiting(sequence, is_exact=self._num_places > 0))
                self._num_places -= 1
            else:
                views.append(self._placed(sequence))
        return tuple(views)

    def _waiting(self, sequence: Sequence, *, is_exact: bool) -> SequenceView:
        view = SequenceView(
            sequence_id=sequence.spec.sequence_id,
            arrival=sequence.arrival,
            num_tokens=sequence.num_computable,
            num_computed=0,
            num_blocks=0,
            num_blocks_to_admit=blocks_for(len(sequence.tokens), self._cache.block_tokens),
            is_running=False,
            is_open=sequence.is_open,
            is_stalled=self._is_stalled(sequence),
            revised_s=sequence.revised_s,
            kept_share=sequence.kept_share,
            arrives_whole=sequence.arrives_whole,
            deadline_s=sequence.deadline_s,
        )
        if not is_exact:
            return view
        matched = self._cache.match(sequence)
        return dataclasses.replace(
            view,
            num_blocks_to_admit=self._cache.admission_cost(sequence, matched),
            block_hashes=self._cache.usable_hashes(sequence),
            num_present_blocks=len(matched),
            matched_blocks=frozenset(matched),
        )

    def _placed(self, sequence: Sequence) -> SequenceView:
        is_running = sequence.state is State.RUNNING or sequence.landing is not None
        can_evict = _can_evict(sequence)
        is_asked = can_evict and (self._is_tight or (sequence.is_open and self._has_waiting))
        # A peer writes into the blocks of a held one: it is told to stop when they are given up.
        is_held = sequence.state is State.HELD
        exclusive = self._cache.exclusive(sequence, after_writers=is_held) if is_asked else frozenset()
        size = self._cache.block_tokens
        missing = blocks_for(len(sequence.tokens), size) - len(sequence.blocks)
        # Blocks that may still change, or that nobody computes before the close, are nobody's to wait for.
        num_certain = min(sequence.num_final, sequence.num_computable) if not sequence.arrives_whole else 0
        hashes = sequence.hashes[: num_certain // size] if sequence.is_open else sequence.hashes
        return SequenceView(
            sequence_id=sequence.spec.sequence_id,
            arrival=sequence.arrival,
            num_tokens=sequence.num_computable,
            num_computed=sequence.num_present,
            num_blocks=len(sequence.blocks),
            num_blocks_to_admit=max(0, missing) if sequence.is_extending else 0,
            num_exclusive_blocks=len(exclusive),
            exclusive_blocks=exclusive,
            is_running=is_running,
            is_held=not is_running and sequence.state is State.HELD,
            is_decoding=sequence.is_decoding,
            is_extending=sequence.is_extending,
            is_open=sequence.is_open,
            is_stalled=self._is_stalled(sequence),
            revised_s=sequence.revised_s,
            kept_share=sequence.kept_share,
            can_evict=can_evict,
            block_hashes=hashes,
            num_present_blocks=sequence.num_named,
            arrives_whole=sequence.arrives_whole and not is_running,
            deadline_s=sequence.deadline_s,
        )

    def _is_stalled(self, sequence: Sequence) -> bool:
        match sequence.state:
            case State.WAITING:
                # Who lost its blocks before all was computed, or has heard of its prompt since, still needs them.
                is_quiet = sequence.resting_version == sequence.version
            case State.HELD:
                is_quiet = sequence.arrives_whole
            case _:
                is_quiet = sequence.is_idle
        return sequence.is_open and is_quiet and self._now_s - sequence.revised_s >= self._config.stall_s


def _can_evict(sequence: Sequence) -> bool:
    if sequence.state is State.HELD:
        return sequence.is_open and sequence.arrives_whole and sequence.landing is None
    if sequence.goal is Goal.ANSWER:
        return True
    # Prompts that came whole were given all their blocks; these wait for more while they are computed.
    return sequence.is_streamed and not sequence.num_unsettled


def _may_keep(sequence: Sequence) -> bool:
    """Return whether a sequence has a place that a waiting one cannot take."""
    return bool(sequence.blocks) and not (sequence.is_open and _can_evict(sequence))
