"""How fast work in the background may go."""


class Pace:
    """A token bucket that owes: whoever takes more than there is waits until the debt is paid.

    Until any time t after its start no more than `burst_bytes + bytes_per_s * t` may have begun, however large the
    pieces are. Nobody is refused, so a piece larger than the burst goes too, late.

    Args:
        bytes_per_s: Rate in the long run, above 0.
        burst_bytes: What may go at once after a rest, at least 0.
        now_s: The time now.
    """

    def __init__(self, bytes_per_s: float, burst_bytes: float, now_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._burst_bytes = burst_bytes
        self._saved_bytes = burst_bytes
        self._counted_s = now_s

    def delay_s(self, num_bytes: int, now_s: float) -> float:
        """Take the bytes now and return how long to wait before they are sent.

        Args:
            num_bytes: Size of what is to be sent.
            now_s: The time now; one before that of the last call counts as that.
        """
        self._refill(now_s)
        self._saved_bytes -= num_bytes
        return max(0.0, -self._saved_bytes / self._bytes_per_s)

    def set_rate(self, bytes_per_s: float, now_s: float) -> None:
        """Go at another rate from now on; what was saved or is owed stays."""
        self._refill(now_s)
        self._bytes_per_s = bytes_per_s

    def _refill(self, now_s: float) -> None:
        passed_s = max(0.0, now_s - self._counted_s)
        self._counted_s += passed_s
        self._saved_bytes = min(self._burst_bytes, self._saved_bytes + passed_s * self._bytes_per_s)
