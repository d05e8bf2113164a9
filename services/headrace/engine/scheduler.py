"""Plan a step: pure, on a copy of the free blocks; what it plans, the commit can always do."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from headrace.core.block import BlockId, blocks_for
from headrace.core.plan import Phase, SchedulerView, SequenceView, StepPlan, WorkItem
from headrace.core.request import SequenceId
from headrace.seams.order import OrderPolicy
from headrace.seams.preempt import PreemptPolicy
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


class RecomputeAlways:
    """Keep no KV of preempted sequences: the baseline that copies to host memory are measured against."""

    def saves(self, victim: SequenceView, view: SchedulerView) -> bool:
        """Return False."""
        return False


RECOMPUTE_ALWAYS = RecomputeAlways()


def plan_step(
    view: SchedulerView,
    order: OrderPolicy,
    shape: ShapePolicy,
    now_s: float,
    preempt: PreemptPolicy = RECOMPUTE_ALWAYS,
) -> StepPlan:
    """Return what to compute, whom to admit and whom to evict; nothing is changed.

    Running sequences come before waiting ones; when a running one needs a block and none can be had, the
    worst-ranked evictable one gives up its blocks. Nobody is admitted in a step that evicts for that. Whoever waits
    may take the blocks and the places of open sequences that rank behind it, and of nobody else.
    """
    ranked = sorted(view.sequences, key=lambda sequence: order.key(sequence, now_s))
    kept, evicted, available = _fit(ranked, shape, view)
    if evicted:
        admission = _Admission(available=available, num_holding=0)
    else:
        admission = _admit(ranked, kept, available, view)
    gone = [*evicted, *admission.displaced]
    gone_ids = {sequence.sequence_id for sequence in gone}
    items = [_item(sequence, size, view.num_layers) for sequence, size in kept if sequence.sequence_id not in gone_ids]
    return StepPlan(
        items=tuple(items),
        admit=tuple(admission.admitted),
        extend=tuple(admission.extended),
        evict=tuple(sequence.sequence_id for sequence in gone),
        save=tuple(_saved(gone, view, preempt)),
    )


def _saved(gone: list[SequenceView], view: SchedulerView, preempt: PreemptPolicy) -> Iterator[SequenceId]:
    """Choose whose KV is kept in host memory, as far as that has room."""
    num_free = view.swap.num_free_blocks
    for sequence in gone:
        num_blocks = blocks_for(sequence.num_computed, view.block_tokens)
        if sequence.is_running and 0 < num_blocks <= num_free and preempt.saves(sequence, view):
            num_free -= num_blocks
            yield sequence.sequence_id


def _fit(
    ranked: list[SequenceView], shape: ShapePolicy, view: SchedulerView
) -> tuple[list[tuple[SequenceView, int]], list[SequenceView], int]:
    """Cut the step and take blocks for its growth; returns what fits, who is evicted, and what is left.

    The blocks of a held sequence come back when its owner has closed it: until then, what needs them waits.
    """
    remaining = [sequence for sequence in ranked if sequence.is_running or sequence.is_held]
    evicted: list[SequenceView] = []
    available, leaving = view.num_available, view.num_leaving_blocks
    while True:
        running = [sequence for sequence in remaining if sequence.is_running and sequence.num_remaining > 0]
        cuts = list(shape.cut(running, view.token_budget))
        needed = sum(_growth(sequence, size, view.block_tokens) for sequence, size in cuts)
        if needed <= available:
            return cuts, evicted, available - needed
        victim = next((sequence for sequence in reversed(remaining) if sequence.can_evict), None)
        if victim is None or needed <= available + leaving:
            return _leave_out(cuts, available, view.block_tokens), evicted, 0
        remaining.remove(victim)
        evicted.append(victim)
        if victim.is_held:
            leaving += victim.num_exclusive_blocks
        else:
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


class _Room(Enum):
    """When there is room for a sequence."""

    NOW = "now"
    SOON = "soon"
    NEVER = "never"


@dataclass(slots=True, kw_only=True)
class _Admission:
    """What an admission has decided so far.

    Attributes:
        available: Blocks that nobody has been given.
        num_holding: Sequences that hold a place.
        displaced: Open sequences that make room.
        freed: Their blocks.
        shared: Blocks that admitted sequences share.
    """

    available: int
    num_holding: int
    admitted: list[SequenceId] = field(default_factory=list)
    extended: list[SequenceId] = field(default_factory=list)
    displaced: list[SequenceView] = field(default_factory=list)
    freed: set[BlockId] = field(default_factory=set)
    shared: set[BlockId] = field(default_factory=set)

    def take(self, sequence: SequenceView, chosen: list[SequenceView], num_blocks: int) -> None:
        """Give a sequence its blocks, and a place unless it has one.

        Args:
            sequence: The sequence.
            chosen: Who makes room for it.
            num_blocks: What it takes beyond what they free.
        """
        self.displaced.extend(chosen)
        self.freed.update(*(victim.exclusive_blocks for victim in chosen))
        self.shared.update(sequence.matched_blocks)
        self.available -= num_blocks
        self.num_holding -= len(chosen)
        if sequence.is_held:
            self.extended.append(sequence.sequence_id)
        else:
            self.num_holding += 1
            self.admitted.append(sequence.sequence_id)


def _admit(
    ranked: list[SequenceView], kept: list[tuple[SequenceView, int]], available: int, view: SchedulerView
) -> _Admission:
    """Admit in rank order; the first that does not fit holds back the rest, so that nobody starves.

    Whoever can share blocks that are on their way waits for them, and holds back nobody. An open sequence that has
    stalled and lost its blocks asks for none before it hears of its prompt again: all of it was computed once. A held
    one that needs more blocks gets them or gives up those that it has: it must not wait with blocks for which others
    wait.
    """
    coming = [sequence for sequence in ranked if sequence.is_running or sequence.is_held]
    found = _Admission(available=available, num_holding=len(coming) + view.num_done)
    # What the plan has given to a sequence for this step comes back with its blocks.
    regained = {each.sequence_id: _growth(each, size, view.block_tokens) for each, size in kept}
    is_blocked = False
    for index, sequence in enumerate(ranked):
        is_placed = sequence.is_running or sequence.is_held
        if (not sequence.is_extending or sequence in found.displaced) if is_placed else sequence.is_stalled:
            continue
        if not is_placed and (is_blocked or any(_will_share(sequence, other) for other in coming)):
            continue
        behind = [each for each in ranked[index + 1 :] if _may_displace(each) and each not in found.displaced]
        may_take = not is_blocked or not sequence.num_blocks_to_admit
        room = _make_room(sequence, behind, regained, found, view) if may_take else _Room.NEVER
        if room is _Room.NOW:
            coming.append(sequence)
        elif not sequence.is_extending:
            is_blocked = True
        elif room is _Room.NEVER:
            found.displaced.append(sequence)
    return found


def _may_displace(sequence: SequenceView) -> bool:
    return sequence.is_open and sequence.can_evict and (sequence.is_running or sequence.is_held)


def _make_room(
    sequence: SequenceView,
    behind: list[SequenceView],
    regained: dict[SequenceId, int],
    found: _Admission,
    view: SchedulerView,
) -> _Room:
    """Displace as few as are needed, the worst-ranked first; nobody if that does not help."""
    num_places = 0 if sequence.is_held else found.num_holding + 1 - view.max_running
    chosen: list[SequenceView] = []
    asked: list[SequenceView] = []
    leaving, num_leaving = view.num_leaving_blocks, view.num_leaving
    while True:
        # What has to be freed: with it come blocks that are to be shared, which somebody has to take from the rest.
        num_blocks = _num_freed(chosen, regained, {*found.shared, *sequence.matched_blocks})
        cost = sequence.num_blocks_to_admit + len(sequence.matched_blocks & found.freed)
        missing = cost - found.available - num_blocks
        if missing <= 0 and len(chosen) >= num_places:
            found.take(sequence, chosen, cost - num_blocks)
            return _Room.NOW
        if missing <= leaving and len(chosen) + num_leaving >= num_places:
            found.displaced.extend(asked)
            return _Room.SOON
        if not behind:
            return _Room.NEVER
        victim = behind.pop()
        if victim.is_held:
            # Its owner is told, and closes it: then there is room.
            asked.append(victim)
            leaving, num_leaving = leaving + victim.num_exclusive_blocks, num_leaving + 1
        else:
            chosen.append(victim)


def _num_freed(chosen: list[SequenceView], regained: dict[SequenceId, int], shared: set[BlockId]) -> int:
    """Return how many blocks the eviction of `chosen` adds to those that can be had, if `shared` ones stay in use."""
    return sum(
        victim.num_exclusive_blocks - len(victim.exclusive_blocks & shared) + regained.get(victim.sequence_id, 0)
        for victim in chosen
    )


def _will_share(sequence: SequenceView, other: SequenceView) -> bool:
    """Return whether the next block that a sequence lacks is one that another one is about to have.

    Blocks that are computed can be shared one by one. Those that a peer sends come when all are there: they are
    worth waiting for if at least half of them can be shared. Only who gets its own from a peer waits for those: one
    that computes may be the very one, here or by way of other workers, that the peer's are waited for from.
    """
    if other.arrives_whole and not sequence.arrives_whole:
        return False
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
        sample=end == sequence.num_tokens and not sequence.is_open,
    )
