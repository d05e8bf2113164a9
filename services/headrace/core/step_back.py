"""How long somebody who does not answer is left alone."""

from headrace.clock import Clock


class StepBack:
    """Decides when to ask somebody again who has failed.

    While all is well everybody may ask. After a failure nobody does for a pause; then one asks for all, and with
    every further failure the pause doubles. So a peer that stalls costs one caller its patience per pause.

    Args:
        clock: Measures the pauses.
        first_s: Pause after a first failure.
        longest_s: Bound of the pauses.
    """

    def __init__(self, clock: Clock, first_s: float, longest_s: float) -> None:
        self._clock = clock
        self._first_s = first_s
        self._longest_s = longest_s
        self._pause_s = 0.0
        self._next_s = 0.0
        self._is_asked = False

    @property
    def is_resting(self) -> bool:
        """Whether nobody may ask now; unlike `may_ask` it changes nothing."""
        return bool(self._pause_s) and self._clock.now() < self._next_s

    def may_ask(self) -> bool:
        """Return whether to ask now; whoever gets True in doubt asks for all others."""
        if not self._pause_s:
            return True
        now_s = self._clock.now()
        if now_s < self._next_s:
            return False
        # Should the answer never be noted, for its caller has left, the next one asks after another pause.
        self._next_s = now_s + self._pause_s
        self._is_asked = True
        return True

    def note_answer(self) -> None:
        """It answers: everybody may ask again."""
        self._pause_s = 0.0
        self._is_asked = False

    def note_failure(self) -> None:
        """It has failed. Calls that were under way when a pause began tell nothing new and do not lengthen it."""
        if self._pause_s and not self._is_asked:
            return
        self._pause_s = min(self._longest_s, 2 * self._pause_s) if self._pause_s else self._first_s
        self._next_s = self._clock.now() + self._pause_s
        self._is_asked = False
