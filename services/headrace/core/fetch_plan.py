"""Which cached blocks of a prompt are fetched, from whom, and which are computed again.

An engine starts a prompt at the end of what is present, so what is fetched is a range of blocks from the local hit to
a cut, and all behind the cut is computed. Several sources may fill that range at once. The cut is where the prompt is
predicted to end first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, TypeAlias

from headrace.core.bandwidth import LaneSpeed
from headrace.core.cost import CostModel
from headrace.core.placement import Tier

GROUP_BYTES = 16 << 20
"""Bytes of one READ: enough for full speed, and all that can be lost at once, for a READ cannot be aborted. What is
read layer by layer may be more: as much as the first step hides."""

LOSS_SHARE = 0.03
"""Share of a prompt's time that a fetch may waste: the bound of how much a tier may ever slow a prompt down."""

FIRST_GROUP_PATIENCE = 2.0
"""Times its prediction that the first group may take before the fetch is given up."""

LEAST_HIDDEN_S = 0.003
"""What reading layer by layer must hide of a fetch: each READ of a few layers costs 0.3 ms more than one of blocks
(2-core Zen 3, 2026-11-22)."""

EARLY_PATIENCE = 3.0
"""Times its prediction that a first step may take that is started before its KV has landed: others share the step."""

_NUM_PIECES = 64
"""Finest share of a prompt that is given to one source; keeps the plan of 8,192 blocks under a millisecond."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Somebody who holds blocks of the prompt.

    Attributes:
        name: Of the worker or kvstore.
        tier: Where it holds them; one that holds some in DRAM and some on disk is two sources.
        held: Ranges (start, end) of places in the chain; a leading count is ((0, count),).
        speed: Of the lane from there.
    """

    name: str
    tier: Tier
    held: tuple[tuple[int, int], ...]
    speed: LaneSpeed


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What is known of the prompt and of the engine that waits for it.

    Attributes:
        num_tokens: Of the prompt.
        num_local: Leading blocks that are present.
        block_tokens: Tokens of a block.
        block_bytes: Bytes of a block.
        remaining_s: Longest time that a fetch may take.
        waiting_tokens: Prompt tokens of others that the engine has to compute first; a fetch that ends before them
            costs this prompt nothing.
        chunk_tokens: Most tokens of a step; None computes a prompt in one.
        may_layer: Whether blocks may be read layer by layer.
    """

    num_tokens: int
    num_local: int
    block_tokens: int
    block_bytes: int
    remaining_s: float
    waiting_tokens: int = 0
    chunk_tokens: int | None = None
    may_layer: bool = True

    @property
    def num_usable(self) -> int:
        """Leading blocks that are of use: the last token is always computed, its logits choose the next one."""
        return max(0, self.num_tokens - 1) // self.block_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Blocks that one source delivers.

    Attributes:
        name: Of the source.
        tier: Of the source.
        start: Place in the chain of the first block.
        end: Place behind the last one.
    """

    name: str
    tier: Tier
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchPlan:
    """What is fetched; all behind it is computed.

    Sources are read side by side, each its parts in order, in READs of at most `group_blocks`; before each one
    `may_go_on` is asked. So a source that stalls has one READ in flight at most. That one is waited for until
    `lost_after_s`; only if it has not settled by then are its blocks lost, and the sequence needs others. What
    landed before it is good. The last blocks are read layer by layer if computing behind them takes longer than reading
    them: the prompt can then start with the first layers.

    Attributes:
        parts: In the order of the chain, without gaps from the local hit on; empty computes everything.
        predicted_fetch_s: Until all of them have landed.
        predicted_recompute_s: What computing them would take instead; None without a sound cost model.
        predicted_wait_s: Until the engine would have come to this prompt anyway.
        predicted_end_s: Until the whole prompt is computed; None without a sound cost model.
        num_declined: Blocks that could be fetched and are computed, for that is faster.
        patience_s: Time that may pass while nothing lands.
        limit_s: Longest time that the fetch may take in any case.
        group_blocks: Most blocks of one READ.
        layered_from: Place in the chain from which on blocks are read layer by layer; None reads all of them whole.
        first_step_s: What the step behind the blocks takes; 0 without a sound cost model.
    """

    parts: tuple[Part, ...]
    predicted_fetch_s: float
    predicted_recompute_s: float | None
    predicted_wait_s: float
    predicted_end_s: float | None
    num_declined: int
    patience_s: float
    limit_s: float
    group_blocks: int
    layered_from: int | None = None
    first_step_s: float = 0.0

    @property
    def num_blocks(self) -> int:
        """Blocks to fetch."""
        return sum(part.end - part.start for part in self.parts)

    def may_go_on(self, num_landed: int, elapsed_s: float) -> bool:
        """Return whether to post another READ.

        What has landed pays for its time with what it saves. So however slow the sources turn out to be, the prompt
        ends at most `patience_s` and one READ later than if nothing had been fetched.

        Args:
            num_landed: Blocks that have landed without a gap from the local hit on.
            elapsed_s: Since the fetch began.
        """
        return elapsed_s <= min(self.limit_s, self.patience_s + (_saved_s(self, num_landed) or 0.0))

    def lost_after_s(self, num_landed: int, elapsed_s: float, *, is_layered: bool) -> float:
        """Return when a READ that is posted now is given up if it has not ended, in seconds since the fetch began.

        As patient again as before it was posted: a late READ costs less than new blocks and all that has landed.
        READs of layers are begun as one, however long that may take.

        Args:
            num_landed: Blocks that have landed without a gap from the local hit on.
            elapsed_s: Since the fetch began.
            is_layered: Whether it is all that is read layer by layer.
        """
        lost_s = 2 * self.patience_s + (_saved_s(self, num_landed) or 0.0)
        if is_layered:
            lost_s = max(lost_s, elapsed_s + FIRST_GROUP_PATIENCE * self._layered_s)
        return min(self.limit_s, lost_s)

    @property
    def _layered_s(self) -> float:
        """Return the predicted seconds of reading what is read layer by layer."""
        if self.layered_from is None:
            return 0.0
        return self.predicted_fetch_s * (self.parts[-1].end - self.layered_from) / self.num_blocks


def plan_fetch(prompt: Prompt, cost: CostModel | None, sources: Sequence[Source]) -> FetchPlan:
    """Return the plan after which the prompt is predicted to end first.

    The cut follows from filling the blocks from the front, each piece by the source that has it done first: list
    scheduling, within a few percent of the best where sources overlap and exact where they do not. Later blocks cost
    more to compute and as much to fetch, so a longer hit never turns a fetch into a computation.

    Args:
        prompt: What is to be computed.
        cost: Of the engine's steps; without a sound one, everything that sources hold is fetched.
        sources: Who holds what, in any order.
    """
    model = cost if cost is not None and cost.is_sound else None
    pieces = _pieces(prompt, sources)
    given = _share_out(pieces, sources, prompt.block_bytes)
    num_given, fetch_s = _best_cut(prompt, model, pieces, given)
    # The front goes to whoever is free although the rest may have one holder only: those first is often faster.
    scarce_first = sorted(pieces[:num_given], key=lambda piece: len(piece.holders))
    other = _share_out(scarce_first, sources, prompt.block_bytes)
    chosen, chosen_pieces = given[:num_given], pieces[:num_given]
    other_s = max((share_s for _, share_s in other), default=0.0)
    if other_s < fetch_s:
        chosen, chosen_pieces, fetch_s = other, scarce_first, other_s
    parts = _parts(chosen_pieces, chosen, sources)
    return _finish(prompt, model, sources, parts, (fetch_s, _reach(prompt, pieces)))


def regret_s(plan: FetchPlan, measured_fetch_s: float, num_landed: int | None = None) -> float:
    """Return how much sooner the prompt would have ended without the fetch; 0 where the choice was right.

    Args:
        plan: What was chosen.
        measured_fetch_s: What it took.
        num_landed: Blocks that it brought from the local hit on; None is all of them.
    """
    saved_s = _saved_s(plan, plan.num_blocks if num_landed is None else num_landed)
    if saved_s is None or not plan.parts:
        return 0.0
    return max(0.0, measured_fetch_s - plan.predicted_wait_s - saved_s)


@dataclass(slots=True, kw_only=True)
class FetchTotals:
    """What the choices came to since the start.

    Attributes:
        num_fetched_blocks: That landed and were used, by where they came from.
        num_declined_blocks: That were held somewhere and computed, for that was faster.
        num_given_up: Fetches that ended before their plan did.
        num_regretted: Fetches that took longer than computing what they brought.
        regretted_s: By how much, together.
    """

    num_fetched_blocks: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    num_declined_blocks: int = 0
    num_given_up: int = 0
    num_regretted: int = 0
    regretted_s: float = 0.0

    def note(self, plan: FetchPlan, measured_fetch_s: float, num_landed: int) -> None:
        """Count a plan that was carried out, an empty one too.

        Args:
            plan: What was chosen.
            measured_fetch_s: What it took.
            num_landed: Blocks that it brought from the local hit on.
        """
        self.num_declined_blocks += plan.num_declined
        self.num_given_up += num_landed < plan.num_blocks
        left = num_landed
        for part in plan.parts:
            num_used = min(left, part.end - part.start)
            self.num_fetched_blocks[part.tier] += num_used
            left -= num_used
        regretted_s = regret_s(plan, measured_fetch_s, num_landed)
        self.num_regretted += regretted_s > 0
        self.regretted_s += regretted_s


class _Piece(NamedTuple):
    """Blocks that the same sources hold, by their indices."""

    start: int
    end: int
    holders: list[int]


_Share: TypeAlias = tuple[int, float]
"""Which source delivers a piece and when the last of it lands."""


def _pieces(prompt: Prompt, sources: Sequence[Source]) -> list[_Piece]:
    """Cut what is held without a gap from the local hit on into pieces."""
    first, last = prompt.num_local, prompt.num_usable
    held = [_joined(source.held, first, last) for source in sources]
    step = max(1, math.ceil((last - first) / _NUM_PIECES))
    cuts = {*range(first, last, step), last}
    for runs in held:
        cuts.update(*runs)
    places = sorted(cuts)
    number = {place: index for index, place in enumerate(places)}
    holders: list[list[int]] = [[] for _ in places[1:]]
    for index, runs in enumerate(held):
        for start, end in runs:
            for holding in holders[number[start] : number[end]]:
                holding.append(index)
    num_held = next((place for place, holding in enumerate(holders) if not holding), len(holders))
    return [_Piece(*piece) for piece in zip(places[:num_held], places[1:], holders, strict=False)]


def _joined(held: Sequence[tuple[int, int]], first: int, last: int) -> list[tuple[int, int]]:
    """Return what ranges have of [first, last), neighbours in one."""
    runs: list[tuple[int, int]] = []
    for start, end in sorted(held):
        begin, stop = max(start, first), min(end, last)
        if runs and begin <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(runs[-1][1], stop))
        elif begin < stop:
            runs.append((begin, stop))
    return runs


def _reach(prompt: Prompt, pieces: Sequence[_Piece]) -> int:
    return pieces[-1].end if pieces else prompt.num_local


def _share_out(pieces: Sequence[_Piece], sources: Sequence[Source], block_bytes: int) -> list[_Share]:
    """Give each piece in turn to the source that has it done first."""
    free_s = [source.speed.latency_s for source in sources]
    block_s = [source.speed.byte_s * block_bytes for source in sources]
    shares: list[_Share] = []
    for start, end, holders in pieces:
        size, chosen, least_s = end - start, holders[0], math.inf
        for index in holders:
            ends_s = free_s[index] + size * block_s[index]
            if ends_s < least_s:
                chosen, least_s = index, ends_s
        free_s[chosen] = least_s
        shares.append((chosen, least_s))
    return shares


def _best_cut(
    prompt: Prompt, cost: CostModel | None, pieces: Sequence[_Piece], shares: Sequence[_Share]
) -> tuple[int, float]:
    """Return how many leading pieces to fetch and when they have landed."""
    wait_s = _wait_s(prompt, cost)
    best, best_fetch_s, landed_s = 0, 0.0, 0.0
    least_s = wait_s + _compute_s(prompt, cost, prompt.num_local) if cost else math.inf
    for num_pieces, (piece, (_, share_s)) in enumerate(zip(pieces, shares, strict=True), start=1):
        landed_s = max(landed_s, share_s)
        if landed_s > prompt.remaining_s:
            break
        ends_s = max(landed_s, wait_s) + _compute_s(prompt, cost, piece.end)
        if cost is None or ends_s < least_s:
            best, best_fetch_s, least_s = num_pieces, landed_s, ends_s
    return best, best_fetch_s


def _compute_s(prompt: Prompt, cost: CostModel | None, num_present: int) -> float:
    """Return the seconds of the prompt behind its present blocks, alone in the engine."""
    if cost is None:
        return 0.0
    num_done = num_present * prompt.block_tokens
    num_left = prompt.num_tokens - num_done
    return cost.prefill(num_left, num_done, chunk_tokens=prompt.chunk_tokens)


def _wait_s(prompt: Prompt, cost: CostModel | None) -> float:
    """Return the seconds of what the engine has to compute first, without what its tokens attend to: a bound."""
    num_waiting = prompt.waiting_tokens
    return cost.prefill_token_s(prompt.chunk_tokens or num_waiting) * num_waiting if cost else 0.0


def _parts(pieces: Sequence[_Piece], shares: Sequence[_Share], sources: Sequence[Source]) -> tuple[Part, ...]:
    """Join neighbouring pieces of one source."""
    given = sorted((start, end, index) for (start, end, _), (index, _) in zip(pieces, shares, strict=True))
    joins = [place for place in range(1, len(given)) if given[place][2] != given[place - 1][2]]
    return tuple(
        Part(
            name=sources[given[low][2]].name,
            tier=sources[given[low][2]].tier,
            start=given[low][0],
            end=given[high - 1][1],
        )
        for low, high in pairwise((0, *joins, len(given)))
        if low < high
    )


def _finish(
    prompt: Prompt,
    cost: CostModel | None,
    sources: Sequence[Source],
    parts: tuple[Part, ...],
    ends: tuple[float, int],
) -> FetchPlan:
    """Add to the parts what they are predicted to come to, and for how long to believe in it."""
    fetch_s, reach = ends
    cut = parts[-1].end if parts else prompt.num_local
    wait_s, group_blocks = _wait_s(prompt, cost), max(1, GROUP_BYTES // prompt.block_bytes)
    patience_s = prompt.remaining_s
    recompute_s = ends_s = layered_from = None
    step_s = 0.0
    if cost is not None:
        all_s, rest_s = _compute_s(prompt, cost, prompt.num_local), _compute_s(prompt, cost, cut)
        recompute_s, ends_s = all_s - rest_s, max(fetch_s, wait_s) + rest_s
        step_s = _first_step_s(prompt, cost, cut)
        layered_from = _layered_from(parts, fetch_s, wait_s, step_s) if prompt.may_layer else None
        first_s = _first_group_s(sources, parts, group_blocks * prompt.block_bytes, fetch_s)
        if layered_from == prompt.num_local:
            first_s = fetch_s
        patience_s = min(patience_s, wait_s + FIRST_GROUP_PATIENCE * first_s + LOSS_SHARE * all_s)
    return FetchPlan(
        parts=parts,
        predicted_fetch_s=fetch_s,
        predicted_recompute_s=recompute_s,
        predicted_wait_s=wait_s,
        predicted_end_s=ends_s,
        num_declined=reach - cut,
        patience_s=patience_s,
        limit_s=prompt.remaining_s,
        group_blocks=group_blocks,
        layered_from=layered_from,
        first_step_s=step_s,
    )


def _first_step_s(prompt: Prompt, cost: CostModel, num_present: int) -> float:
    num_done = num_present * prompt.block_tokens
    num_tokens = min(prompt.num_tokens - num_done, prompt.chunk_tokens or prompt.num_tokens)
    return cost.prefill(num_tokens, num_done)


def _layered_from(parts: Sequence[Part], fetch_s: float, wait_s: float, step_s: float) -> int | None:
    """Return from which block on reading takes no longer than the step that it hides behind; None if it hides little.

    Layers are computed and read in one order and both at a steady rate, so the step never waits then.
    """
    if not parts or fetch_s <= wait_s or min(fetch_s, step_s) < LEAST_HIDDEN_S:
        return None
    first, end = parts[0].start, parts[-1].end
    num_blocks = min(end - first, int((end - first) * step_s / fetch_s))
    return end - num_blocks if num_blocks else None


def _first_group_s(sources: Sequence[Source], parts: Sequence[Part], group_bytes: int, fetch_s: float) -> float:
    """Return when every source in use is to have delivered something."""
    used = {(part.name, part.tier) for part in parts}
    speeds = [source.speed for source in sources if (source.name, source.tier) in used]
    return min(fetch_s, max((speed.seconds(group_bytes) for speed in speeds), default=0.0))


def _saved_s(plan: FetchPlan, num_landed: int) -> float | None:
    """Return what landed blocks save, each taken for an equal share of what all do."""
    if plan.predicted_recompute_s is None or not plan.parts:
        return None
    return plan.predicted_recompute_s * num_landed / plan.num_blocks
