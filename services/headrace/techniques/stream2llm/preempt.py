"""Recompute or copy to host memory: whichever is expected to cost less."""

from headrace.core.block import blocks_for
from headrace.core.cost import CostModel
from headrace.core.plan import SchedulerView, SequenceView


class PreemptByCost:
    """Compares the seconds of both ways for the victim's own tokens.

    Of an open prompt only the part that its next revision keeps is needed again. How much that is, its earlier
    revisions say: a stream that replaces most of its context each time is not worth a copy.

    Args:
        cost: What steps cost on this instance.
    """

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost

    def saves(self, victim: SequenceView, view: SchedulerView) -> bool:
        """Return whether copying out and back takes less time than computing again."""
        num_needed = victim.num_computed
        if victim.is_open:
            num_needed = round(num_needed * victim.kept_share)
        recompute_s = self._cost.prefill(num_needed, chunk_tokens=view.token_budget)
        num_blocks = blocks_for(victim.num_computed, view.block_tokens)
        swap_s = num_blocks * view.swap.save_s + blocks_for(num_needed, view.block_tokens) * view.swap.load_s
        return swap_s < recompute_s


class SwapAlways:
    """Copies everything that fits: a baseline, and what to do where costs are not known."""

    def saves(self, victim: SequenceView, view: SchedulerView) -> bool:
        """Return True."""
        return True
