"""What a transfer over a lane takes, learnt from those that were measured."""

from dataclasses import dataclass, replace

from headrace.core.placement import Tier

FORGETTING = 0.8
"""What each measurement leaves of the weight of those before it: the last five decide."""

HALF_LIFE_S = 60.0
"""Time in which what was measured loses half its weight against what is measured next."""

RETRY_S = 60.0
"""Time after which a lane that was too slow to be used is tried again, by one transfer."""

LONGEST_RETRY_S = 32 * RETRY_S
"""That time doubles with every try in vain, up to this: where prompts are rare, most would try otherwise."""

SURPRISE = 3.0
"""A measurement off by more than this factor tells of an accident, or of another lane than before."""

_SHAPE_WEIGHT = 0.1
"""Of the expected ratio of latency to rate, against all measurements; it decides while those are of one size."""

_LEAST_LATENCY_S = 1e-6
_LEAST_BYTE_S = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneSpeed:
    """Seconds of a transfer, linear in its bytes.

    Attributes:
        latency_s: Seconds of any transfer, however small: leases asked for and given back, requests posted.
        byte_s: Seconds more per byte.
    """

    latency_s: float
    byte_s: float

    def seconds(self, num_bytes: float) -> float:
        """Return the seconds of a transfer; one of nothing takes none."""
        return self.latency_s + self.byte_s * num_bytes if num_bytes > 0 else 0.0


EXPECTED = {
    Tier.DEVICE: LaneSpeed(latency_s=3e-3, byte_s=0.5e-9),
    Tier.DRAM: LaneSpeed(latency_s=3e-3, byte_s=0.5e-9),
    Tier.DISK: LaneSpeed(latency_s=8e-3, byte_s=1.5e-9),
}
"""What is expected of a lane before anything is measured: two control calls, and 2 GB/s or a third of it.

Between TCP on one machine (0.4 to 1.2 GB/s) and its shared memory (9 GB/s), 2026-11: hopeful enough that every lane
is tried by prompts that gain much, and that one try tells.
"""


@dataclass(slots=True)
class _Sums:
    """Weighted sums of a straight line's least squares; a weight is 1 / expected seconds squared."""

    weight: float = 0.0
    x: float = 0.0
    xx: float = 0.0
    y: float = 0.0
    xy: float = 0.0

    def scale(self, factor: float) -> None:
        """Let all that is in it count for less."""
        self.weight *= factor
        self.x *= factor
        self.xx *= factor
        self.y *= factor
        self.xy *= factor

    def add(self, x: float, y: float, weight: float) -> None:
        """Count a point."""
        self.weight += weight
        self.x += weight * x
        self.xx += weight * x * x
        self.y += weight * y
        self.xy += weight * x * y


class LaneMeter:
    """The speed of one lane, from one source and tier to here.

    Least squares of the relative error over measurements that count less the older they are. A lane that nobody has
    used for a while because it was slow may have become better: then one transfer is told what is expected of such a
    lane, and all others go on with what is known until it is measured.

    Args:
        expected: Before anything is measured; above 0 in both parts.
    """

    def __init__(self, expected: LaneSpeed) -> None:
        self._expected = expected
        self._fitted: LaneSpeed | None = None
        self._sums = _Sums()
        self._sampled_s = 0.0
        self._tried_s = 0.0
        self._was_slow = False
        self._retry_s = RETRY_S
        self._before_guess: tuple[_Sums, LaneSpeed | None, float, bool, float] | None = None

    def note_try(self, now_s: float) -> None:
        """A transfer begins: until it is measured, nobody else tries a lane that was slow."""
        self._tried_s = now_s

    def note(self, num_bytes: int, seconds: float, now_s: float, *, is_whole: bool = True) -> None:
        """Count a transfer.

        Args:
            num_bytes: What has arrived; of a transfer of which nothing has, what had been asked for. A transfer
                without bytes tells nothing and is ignored.
            seconds: From the first call to the last; of a transfer of which nothing has arrived, those until it was
                given up, or those of doing without it if they are more.
            now_s: The time now.
            is_whole: Whether the bytes have arrived; otherwise the seconds are less than it would have taken.
        """
        if num_bytes <= 0 or seconds <= 0:
            return
        before = replace(self._sums), self._fitted, self._sampled_s, self._was_slow, self._retry_s
        self._before_guess = None if is_whole else self._before_guess or before
        if self._is_doubtful(num_bytes) and now_s - self._sampled_s >= self._retry_s:
            self._retry_s = min(LONGEST_RETRY_S, 2 * self._retry_s)
        seconds = self._without_accident(num_bytes, seconds if is_whole else self._guess(num_bytes, seconds))
        if not self._is_doubtful(num_bytes):
            self._retry_s = RETRY_S
        kept = FORGETTING * 0.5 ** (max(0.0, now_s - self._sampled_s) / HALF_LIFE_S)
        self._sums.scale(kept)
        typical_s = self._fitted.seconds(num_bytes) if self._fitted else seconds
        self._sums.add(num_bytes, seconds, 1.0 / (typical_s * typical_s))
        self._sampled_s = self._tried_s = now_s
        self._fitted = self._fit()

    def note_late(self, num_bytes: int, seconds: float, now_s: float) -> None:
        """Count a transfer that had been given up and has ended after all; guesses since the last one are forgotten."""
        if self._before_guess is not None:
            self._sums, self._fitted, self._sampled_s, self._was_slow, self._retry_s = self._before_guess
        self.note(num_bytes, seconds, now_s)

    def speed(self, now_s: float) -> LaneSpeed:
        """Return what to count on now."""
        expected, fitted = self._expected, self._fitted
        if fitted is None:
            return expected
        if now_s - self._tried_s < self._retry_s:
            return fitted
        return LaneSpeed(
            latency_s=min(fitted.latency_s, expected.latency_s), byte_s=min(fitted.byte_s, expected.byte_s)
        )

    def seconds(self, num_bytes: int, now_s: float) -> float:
        """Return the seconds that a transfer is to take."""
        return self.speed(now_s).seconds(num_bytes)

    def _is_doubtful(self, num_bytes: int) -> bool:
        """Return whether the lane is known for being slower than expected."""
        return self._fitted is not None and self._fitted.seconds(num_bytes) > self._expected.seconds(num_bytes)

    def _without_accident(self, num_bytes: int, seconds: float) -> float:
        """Return the seconds to count, and forget a lane that is no longer what it was.

        A lane is slow by accident, but never fast: one slow transfer counts for a part, a second one or a fast one
        for all that is known.
        """
        if self._fitted is None:
            return seconds
        typical_s = self._fitted.seconds(num_bytes)
        is_slow = seconds > SURPRISE * typical_s
        if seconds < typical_s / SURPRISE or (is_slow and self._was_slow):
            self._sums, self._fitted, self._was_slow = _Sums(), None, False
            return seconds
        self._was_slow = is_slow
        return min(seconds, SURPRISE * typical_s)

    def _guess(self, num_bytes: int, seconds: float) -> float:
        """Return what a transfer that was given up might have taken; too much, so that nobody repeats it soon."""
        known_s = self._fitted.seconds(num_bytes) if self._fitted else 0.0
        return max(known_s, SURPRISE * seconds)

    def _fit(self) -> LaneSpeed:
        """Return the line through what was measured.

        Two points on a line as expected, raised to what was measured, stand at no bytes and at twice the usual size:
        they settle how latency and rate share the blame until sizes that differ do.
        """
        sums = self._sums
        level = sums.y / (self._expected.latency_s * sums.weight + self._expected.byte_s * sums.x)
        usual = sums.x / sums.weight
        found = _Sums(weight=sums.weight, x=sums.x, xx=sums.xx, y=sums.y, xy=sums.xy)
        for x in (0.0, 2 * usual):
            y = level * (self._expected.latency_s + self._expected.byte_s * x)
            found.add(x, y, _SHAPE_WEIGHT * sums.weight / 2)
        spread = found.weight * found.xx - found.x * found.x
        byte_s = max(0.0, (found.weight * found.xy - found.x * found.y) / spread)
        latency_s = (found.y - byte_s * found.x) / found.weight
        if latency_s < 0:
            latency_s, byte_s = 0.0, found.xy / found.xx
        return LaneSpeed(latency_s=max(latency_s, _LEAST_LATENCY_S), byte_s=max(byte_s, _LEAST_BYTE_S))
