"""Lay the prompt chunks of a step out in rows of equal length. Filled by `prepacking`."""

from collections.abc import Sequence
from typing import Protocol

from headrace.core.packing import Packing


class PackPolicy(Protocol):
    """Packs a step for kernels that compute rectangles; pure.

    Without a policy all tokens of a step lie on one axis and nothing is padded.
    """

    def pack(self, lengths: Sequence[int]) -> Packing:
        """Return rows that hold each item exactly once, none over its capacity.

        Args:
            lengths: Tokens of each chunk, at least 2: single tokens are a rectangle as they are.
        """
        ...
