"""Choose how much of each sequence a step computes. Filled by `sarathi`."""

from collections.abc import Sequence
from typing import Protocol

from headrace.core.plan import SequenceView


class ShapePolicy(Protocol):
    """Cuts the work of a step; pure.

    The planner passes running sequences in the order of the order policy. Token ranges must start at
    `num_computed`, and a sequence gets at most one range. A step without any range must mean that there is
    no running sequence.
    """

    def cut(self, running: Sequence[SequenceView], token_budget: int) -> tuple[tuple[SequenceView, int], ...]:
        """Return pairs (sequence, number of its next tokens to compute), in the order they are packed.

        Args:
            running: Sequences that hold blocks, best rank first.
            token_budget: Most tokens of the step; a shape may exceed it only by sequences it cannot cut.
        """
        ...
