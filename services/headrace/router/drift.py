"""How far the index's word is from what was found: predicted against actual hit tokens. Pure."""

from dataclasses import dataclass

KEPT_SHARE = 0.98
"""What a request leaves of those before it: the drift is that of the last fifty or so."""

LEAST_TOKENS = 1024.0
"""Recent hit tokens below which drift is no alarm: a block more or less means nothing then."""


@dataclass(slots=True, kw_only=True)
class HitDrift:
    """Compares the tokens that the index said are cached with those that a request reused.

    Attributes:
        predicted_tokens: Sum of predictions since the start, but for what was declined.
        actual_tokens: Sum of what was found for the same requests.
        alarm_at: Share from which on the difference is an alarm, 0 to 1.
    """

    alarm_at: float
    predicted_tokens: int = 0
    actual_tokens: int = 0
    _recent_difference: float = 0.0
    _recent_tokens: float = 0.0

    def note(self, predicted: int, actual: int, declined: int = 0) -> None:
        """Take in one request.

        Args:
            predicted: Tokens that the index promised.
            actual: Tokens that were reused.
            declined: Tokens that were left where they are, for computing them was faster: no mistake of the index,
                as far as it promised them.
        """
        predicted -= min(declined, max(0, predicted - actual))
        self.predicted_tokens += predicted
        self.actual_tokens += actual
        self._recent_difference = self._recent_difference * KEPT_SHARE + abs(predicted - actual)
        self._recent_tokens = self._recent_tokens * KEPT_SHARE + max(predicted, actual)

    @property
    def share(self) -> float:
        """Difference as a share of the larger of both, over recent requests: 0 is a perfect index, 1 a useless one."""
        return self._recent_difference / self._recent_tokens if self._recent_tokens else 0.0

    @property
    def is_alarming(self) -> bool:
        """Whether the index is wrong often enough that somebody should look."""
        return self._recent_tokens >= LEAST_TOKENS and self.share >= self.alarm_at
