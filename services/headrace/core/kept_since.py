"""What becomes of a statement about an earlier version of a prompt."""

from collections import deque

NUM_REMEMBERED = 256
"""Versions back that a statement may be; about older ones nothing is known any more."""


class KeptSince:
    """Remembers how many leading tokens each of the last versions kept of the one before.

    Attributes:
        version: The last.
    """

    def __init__(self, version: int = 0) -> None:
        self.version = version
        self._kept: deque[int] = deque(maxlen=NUM_REMEMBERED)

    def revise(self, num_kept: int) -> None:
        """Take note of the next version."""
        self.version += 1
        self._kept.append(num_kept)

    def still(self, version: int, num_tokens: int) -> int:
        """Return of how many leading tokens of a version what was said is still true; 0 of an unknown version."""
        num_later = self.version - version
        if not 0 <= num_later <= len(self._kept):
            return 0
        return min((num_tokens, *(self._kept[-back] for back in range(1, num_later + 1))))
