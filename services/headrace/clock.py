"""Time as a value that is passed in, so that tests and the simulator can turn it."""

import time
from typing import Protocol


class Clock(Protocol):
    """Source of time."""

    def now(self) -> float:
        """Return seconds that never go back; only differences mean something."""
        ...

    def unix_ms(self) -> int:
        """Return milliseconds since the Unix epoch, for deadlines that cross processes."""
        ...


class WallClock:
    """The machine's clock."""

    def now(self) -> float:
        """Return monotonic seconds."""
        return time.monotonic()

    def unix_ms(self) -> int:
        """Return the wall clock in milliseconds."""
        return time.time_ns() // 1_000_000


class VirtualClock:
    """A clock that moves only when told.

    Args:
        start_s: First value of `now`; also the offset from the Unix epoch.
    """

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        """Return the virtual seconds."""
        return self._now_s

    def unix_ms(self) -> int:
        """Return the virtual time in milliseconds."""
        return int(self._now_s * 1000)

    def advance(self, seconds: float) -> None:
        """Move time forward.

        Raises:
            ValueError: `seconds` is negative.
        """
        if seconds < 0:
            raise ValueError(f"time does not go back: {seconds}")
        self._now_s += seconds
