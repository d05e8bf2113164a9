"""Where the items of a step lie in rows of equal length."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

TILE_TOKENS = 128
"""Rows are a multiple of this, the usual height of a tile of a matrix product on accelerators."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Rows of items; what an item leaves free in its row is computed all the same.

    Attributes:
        rows: Indices of the items of each row, in order.
        capacity_tokens: Length of every row.
    """

    rows: tuple[tuple[int, ...], ...]
    capacity_tokens: int

    @property
    def num_tokens(self) -> int:
        """Tokens computed, those nobody asked for included."""
        return len(self.rows) * self.capacity_tokens

    def pads(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Return how many tokens of each row no item fills.

        Args:
            lengths: Tokens of each item that was packed.

        Raises:
            ValueError: an item is missing or in two places, or a row is too short for its items.
        """
        if sorted(chain.from_iterable(self.rows)) != list(range(len(lengths))):
            raise ValueError(f"rows {self.rows} do not hold each of {len(lengths)} items once")
        pads = tuple(self.capacity_tokens - sum(lengths[item] for item in row) for row in self.rows)
        if min(pads, default=0) < 0:
            raise ValueError(f"a row of {self.capacity_tokens} tokens is too short for its items by {-min(pads)}")
        return pads


def row_capacity(lengths: Sequence[int], tile_tokens: int = TILE_TOKENS) -> int:
    """Return the longest length, rounded up to whole tiles; 0 without items."""
    return -(-max(lengths, default=0) // tile_tokens) * tile_tokens
