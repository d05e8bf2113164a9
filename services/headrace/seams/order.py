"""Choose who comes first in a step. Filled by `stream2llm`; the baseline goes by arrival."""

from typing import Protocol

from headrace.core.plan import SequenceView


class OrderPolicy(Protocol):
    """Ranks sequences; pure."""

    def key(self, sequence: SequenceView, now_s: float) -> tuple[float, ...]:
        """Return the rank: smaller is served earlier and evicted later."""
        ...
