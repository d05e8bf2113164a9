"""KV that still lands, layer by layer, while a step computes with it."""

import threading
from collections.abc import Callable

from headrace.clock import Clock


class NotLanded(Exception):  # noqa: N818 an event, not an error: the step is computed again later
    """A layer did not land in time, or what landed is not to be believed."""


class Landing:
    """How far the fetched blocks of one sequence have landed: told by the event loop, awaited by the engine's thread.

    Args:
        num_present: Leading tokens whose KV is in the blocks once all layers have landed.
        deadline_s: Until when a step waits, on the clock: it computes for other sequences too.
        clock: Ends waits.
    """

    def __init__(self, num_present: int, deadline_s: float, clock: Clock) -> None:
        self.num_present = num_present
        self._deadline_s = deadline_s
        self._clock = clock
        self._changed = threading.Condition()
        self._num_landed = 0
        self._is_believed = False
        self._is_over = False

    def land(self, num_layers: int) -> None:
        """Say that the first `num_layers` layers of all blocks have landed."""
        with self._changed:
            self._num_landed = max(self._num_landed, num_layers)
            self._changed.notify_all()

    def end(self, *, is_believed: bool) -> None:
        """Say that nothing lands any more; once.

        Args:
            is_believed: Whether all layers have landed and are what they should be.
        """
        with self._changed:
            if not self._is_over:
                self._is_over, self._is_believed = True, is_believed
                self._changed.notify_all()

    def wait_layer(self, layer: int) -> None:
        """Wait until a layer can be computed with.

        Raises:
            NotLanded: it did not land in time, or never will.
        """
        self._wait(lambda: self._num_landed > layer)

    def wait_end(self) -> None:
        """Wait until it is certain that all layers were what they should be; raises as `wait_layer`."""
        self._wait(lambda: self._is_believed)

    def _wait(self, is_true: Callable[[], bool]) -> None:
        with self._changed:
            left_s = max(0.0, self._deadline_s - self._clock.now())
            self._changed.wait_for(lambda: self._is_over or is_true(), left_s)
            if not (self._is_believed or (is_true() and not self._is_over)):
                raise NotLanded
