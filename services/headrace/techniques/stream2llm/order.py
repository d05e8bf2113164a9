"""Who comes first where prompts still arrive: closed ones, then open ones, then those of which nothing is heard."""

from headrace.core.plan import SequenceView
from headrace.errors import ConfigError

_CLOSED, _OPEN, _STALLED = 0.0, 1.0, 2.0


class ClosedFirst:
    """Ranks by whether somebody waits for the answer, then as a subclass says; ties by arrival."""

    def key(self, sequence: SequenceView, now_s: float) -> tuple[float, ...]:
        """Return the rank: smaller is served earlier and evicted later."""
        if not sequence.is_open:
            group = _CLOSED
        else:
            group = _STALLED if sequence.is_stalled else _OPEN
        return (group, self._within(sequence), float(sequence.arrival))

    def _within(self, sequence: SequenceView) -> float:
        raise NotImplementedError


class FirstComeFirstServed(ClosedFirst):
    """By arrival of the request: `fcfs`."""

    def _within(self, sequence: SequenceView) -> float:
        return float(sequence.arrival)


class LastChunkFirstServed(ClosedFirst):
    """By arrival of the last piece of the prompt, the oldest first: `lcas`.

    For closed prompts this is the order in which the clocks of their first tokens began to run.
    """

    def _within(self, sequence: SequenceView) -> float:
        return sequence.revised_s


class MostComputedFirst(ClosedFirst):
    """By computed tokens, most first: `mcps`. What is nearly done is not thrown away for what has hardly begun."""

    def _within(self, sequence: SequenceView) -> float:
        return -float(sequence.num_computed)


_ORDERS: dict[str, type[ClosedFirst]] = {
    "fcfs": FirstComeFirstServed,
    "lcas": LastChunkFirstServed,
    "mcps": MostComputedFirst,
}


def make_order(name: str) -> ClosedFirst:
    """Return an order by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in _ORDERS:
        raise ConfigError(f"no order {name!r}; known are {', '.join(_ORDERS)}", field="stream_order")
    return _ORDERS[name]()
