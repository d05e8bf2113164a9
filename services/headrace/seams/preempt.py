"""Choose what becomes of the KV of a sequence that gives up its blocks. Filled by `stream2llm`."""

from dataclasses import dataclass
from typing import Protocol

from headrace.core.cost import CostModel
from headrace.core.plan import SchedulerView, SequenceView


@dataclass(frozen=True, slots=True, kw_only=True)
class PreemptContext:
    """What a preemption policy is made with.

    Attributes:
        cost: What steps cost on this instance; None if that was not measured, or too badly to go by.
        always_saves: Whether everything is kept in host memory that has room there.
    """

    cost: CostModel | None = None
    always_saves: bool = False


class PreemptPolicy(Protocol):
    """Chooses between the two ways to preempt; pure. Whom is the order policy's to say."""

    def saves(self, victim: SequenceView, view: SchedulerView) -> bool:
        """Return whether a victim's KV is copied to host memory and back, rather than computed again.

        Args:
            victim: It has KV, and the host memory has room for that.
            view: What else is known.
        """
        ...
