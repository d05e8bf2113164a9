"""Plan a step: pure, on a copy of the free blocks; what it plans, the commit can always do."""

from collections.abc import Sequence

from headrace.core.block import blocks_for
from headrace.core.plan import Phase, SchedulerView, SequenceView, StepPlan, WorkItem
from headrace.core.request import SequenceId
from headrace.seams.order import OrderPolicy
from headrace.seams.shape import ShapePolicy


class FirstComeFirstServed:
    """Rank by arrival; a preempted sequence keeps its rank."""

    def key(self, sequence: SequenceView, now_s: float) -> tuple[float, ...]:
        """Return the order of arrival."""
        return (float(sequence.arrival),)


class WholeShape:
    """Each prompt in one piece, with all decodes aboard: the baseline that chunking is measured against."""

    def cut(self, running: Sequence[SequenceView], token_budget: int) -> tuple[tuple[SequenceView, int], ...]:
        """Return everything that remains; prompts beyond the first wait while the budget is used up."""
        decodes = [(sequence, 1) for sequence in running if sequence.num_remaining == 1]
        prompts: list[tuple[SequenceView, int]] = []
        used = len(decodes)
        for sequence in running:
            # One prompt goes in any case: decodes that use up the budget must not starve it.
            if sequence.num_remaining > 1 and (not prompts or used < token_budget):
                prompts.append((sequence, sequence.num_remaining))
                used += sequence.num_remaining
        return (*decodes, *prompts)


def plan_step(view: SchedulerView, order: OrderPolicy, shape: ShapePolicy, now_s: float) -> StepPlan:
    """Return what to compute, whom to admit and whom to evict; nothing is changed.

    Running sequences come before waiting ones; when a running one needs a block and none can be had, the
    worst-ranked evictable one gives up its blocks. Nobody is admitted in a step that evicts.
    """
    ranked = sorted(view.sequences, key=lambda sequence: order.key(sequence, now_s))
    running = [sequence for sequence in ranked if sequence.is_running]
    kept, evicted, available = _fit(running, shape, view)
    admitted = () if evicted else _admit(ranked, len(running) + view.num_done, available, view.max_running)
    items = tuple(_item(sequence, size, view.num_layers) for sequence, size in kept)
    return StepPlan(items=items, admit=admitted, evict=tuple(evicted))


def _fit(
    running: list[SequenceView], shape: ShapePolicy, view: SchedulerView
) -> tuple[list[tuple[SequenceView, int]], list[SequenceId], int]:
    """Cut the step and take blocks for its growth; returns what fits, who is evicted, and what is left."""
    remaining = list(running)
    evicted: list[SequenceId] = []
    available = view.num_available
    while True:
        cuts = list(shape.cut(remaining, view.token_budget))
        needed = sum(_growth(sequence, size, view.block_tokens) for sequence, size in cuts)
        if needed <= available:
            return cuts, evicted, available - needed
        victim = next((sequence for sequence in reversed(remaining) if sequence.can_evict), None)
        if victim is None:
            return _leave_out(cuts, available, view.block_tokens), evicted, 0
        remaining.remove(victim)
        evicted.append(victim.sequence_id)
        available += victim.num_exclusive_blocks


def _leave_out(
    cuts: list[tuple[SequenceView, int]], available: int, block_tokens: int
) -> list[tuple[SequenceView, int]]:
    """Drop the worst-ranked growing items until the rest fits: they wait a step."""
    kept: list[tuple[SequenceView, int]] = []
    for sequence, size in cuts:
        growth = _growth(sequence, size, block_tokens)
        if growth <= available:
            available -= growth
            kept.append((sequence, size))
    return kept


def _admit(ranked: list[SequenceView], num_placed: int, available: int, max_running: int) -> tuple[SequenceId, ...]:
    """Admit in rank order; the first that does not fit holds back the rest, so that nobody starves.

    Whoever can share blocks that are on their way waits for them, and holds back nobody.
    """
    admitted: list[SequenceId] = []
    num_holding = num_placed + sum(sequence.is_held for sequence in ranked)
    coming = [sequence for sequence in ranked if sequence.is_running or sequence.is_held]
    for sequence in ranked:
        if sequence.is_running or sequence.is_held:
            continue
        if num_holding >= max_running:
            break
        if any(_will_share(sequence, other) for other in coming):
            continue
        if sequence.num_blocks_to_admit > available:
            break
        available -= sequence.num_blocks_to_admit
        num_holding += 1
        coming.append(sequence)
        admitted.append(sequence.sequence_id)
    return tuple(admitted)


def _will_share(sequence: SequenceView, other: SequenceView) -> bool:
    """Return whether the next block that a sequence lacks is one that another one is about to have.

    Blocks that are computed can be shared one by one. Those that a peer sends come when all are there: they are
    worth waiting for if at least half of them can be shared.
    """
    index = sequence.num_present_blocks
    if other.arrives_whole:
        index = max(index, (other.num_present_blocks + len(other.block_hashes) - 1) // 2)
    if not other.num_present_blocks <= index < min(len(sequence.block_hashes), len(other.block_hashes)):
        return False
    # The hash of a block stands for all before it.
    return sequence.block_hashes[index] == other.block_hashes[index]


def _growth(sequence: SequenceView, size: int, block_tokens: int) -> int:
    return max(0, blocks_for(sequence.num_computed + size, block_tokens) - sequence.num_blocks)


def _item(sequence: SequenceView, size: int, num_layers: int) -> WorkItem:
    end = sequence.num_computed + size
    return WorkItem(
        sequence_id=sequence.sequence_id,
        phase=Phase.DECODE if sequence.is_decoding else Phase.PREFILL,
        tokens=(sequence.num_computed, end),
        layers=(0, num_layers),
        sample=end == sequence.num_tokens,
    )
