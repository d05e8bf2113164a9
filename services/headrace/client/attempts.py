"""When to try a call again; no I/O."""

from collections.abc import Callable
from dataclasses import dataclass

from headrace.clock import Clock
from headrace.errors import (
    DeadlineExceeded,
    HeadraceError,
    InvalidRequest,
    NotReady,
    Overloaded,
    PeerFailed,
    PeerMismatch,
    Saturated,
)

FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 5.0
JITTER_SHARE = 0.5
PATIENCE_SHARE = 0.1
"""Longest pause as a share of the time for which attempts are made: there shall be some in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallPolicy:
    """How patient a client is.

    Attributes:
        timeout_s: Longest time for a call that names none, retries included.
        retries: Most further attempts.
        clock: Measures times.
        jitter: Returns a number in [0, 1) per pause, so that refused clients do not come back together.
    """

    timeout_s: float
    retries: int
    clock: Clock
    jitter: Callable[[], float]


class Attempts:
    """The attempts of one call, until one of them has brought something.

    Args:
        policy: How patient to be.
        timeout_s: Longest time for this call; None takes the policy's.
        patience_s: If given, attempts are made for so long, however many they are, unless the policy allows none.

    Raises:
        InvalidRequest: `timeout_s` is not above 0.
    """

    def __init__(self, policy: CallPolicy, timeout_s: float | None, patience_s: float | None = None) -> None:
        timeout_s = policy.timeout_s if timeout_s is None else timeout_s
        if not timeout_s > 0:
            raise InvalidRequest(f"timeout_s is {timeout_s}: it must be above 0", field="timeout_s", limit="0")
        self._policy = policy
        self.begun_s = policy.clock.now()
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._num_pauses = 0

    def now_s(self) -> float:
        """Return the time on the clock of the call."""
        return self._policy.clock.now()

    def remaining_s(self) -> float:
        """Return the time left for the next attempt.

        Raises:
            DeadlineExceeded: there is none.
        """
        remaining_s = self.begun_s + self._timeout_s - self._policy.clock.now()
        if remaining_s <= 0:
            raise DeadlineExceeded(f"no answer within {self._timeout_s} s", field="timeout_s")
        return remaining_s

    def pause_s(self, error: HeadraceError) -> float:
        """Return how long to wait before the next attempt, or raise `error`.

        It is raised when its class says that a retry does not help, when attempts are used up, or
        when the wait would outlast the deadline.
        """
        if not _can_retry(error) or self._is_used_up():
            raise error
        most_s = MAX_PAUSE_S if self._patience_s is None else min(MAX_PAUSE_S, PATIENCE_SHARE * self._patience_s)
        backoff_s = min(most_s, FIRST_PAUSE_S * 2.0**self._num_pauses)
        self._num_pauses += 1
        pause_s = max(backoff_s, error.retry_after_s or 0.0) * (1 + JITTER_SHARE * self._policy.jitter())
        if pause_s >= self.begun_s + self._timeout_s - self._policy.clock.now():
            raise error
        return pause_s

    def _is_used_up(self) -> bool:
        if self._patience_s is None or not self._policy.retries:
            return self._num_pauses >= self._policy.retries
        return self._policy.clock.now() >= self.begun_s + self._patience_s


def _can_retry(error: HeadraceError) -> bool:
    if isinstance(error, Overloaded):
        return error.retry_after_s is not None
    return isinstance(error, Saturated | NotReady | PeerFailed) and not isinstance(error, PeerMismatch)
