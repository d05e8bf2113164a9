"""Bins for prompts: the longest first, each into the first row with room."""

from collections.abc import Sequence

from headrace.core.packing import TILE_TOKENS, Packing, row_capacity


class FirstFitDecreasing:
    """Packs chunks into as few rows as first-fit decreasing finds: at most 11/9 of the optimum and 6/9 more.

    The bound is that of Dosa, "The Tight Bound of First Fit Decreasing Bin-Packing Algorithm", ESCAPE 2007.

    Args:
        tile_tokens: Rows are as long as the longest chunk, rounded up to a multiple of this.
    """

    def __init__(self, tile_tokens: int = TILE_TOKENS) -> None:
        self._tile_tokens = tile_tokens

    def pack(self, lengths: Sequence[int]) -> Packing:
        """Return the bins; see `PackPolicy.pack`."""
        capacity = row_capacity(lengths, self._tile_tokens)
        rows: list[list[int]] = []
        free: list[int] = []
        for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
            row = next((row for row, room in enumerate(free) if room >= lengths[item]), len(rows))
            if row == len(rows):
                rows.append([])
                free.append(capacity)
            rows[row].append(item)
            free[row] -= lengths[item]
        return Packing(rows=tuple(map(tuple, rows)), capacity_tokens=capacity)
