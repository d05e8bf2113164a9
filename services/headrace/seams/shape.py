"""Choose how much of each sequence a step computes. Filled by `sarathi`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from headrace.core.cost import CostModel
from headrace.core.plan import SequenceView


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeContext:
    """What a shape is made with.

    Attributes:
        cost: What steps cost on this instance; None if that was not measured.
        tbt_target_s: Longest step that running decodes are to wait for, in seconds; None leaves it open.
        is_dynamic: Whether later chunks of a prompt shrink, so that steps take the same time.
    """

    cost: CostModel | None = None
    tbt_target_s: float | None = None
    is_dynamic: bool = False


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
