"""Items of a batch in rows of equal length, and the pads that fill them up."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headrace.core.block import BlockId
from headrace.core.packing import TILE_TOKENS, Packing, row_capacity
from headrace.engine.batch import BatchItem, batch_item
from headrace.seams.pack import PackPolicy

PAD_TOKENS = 128
"""Slots that a runner keeps for the KV of pads; a longer run of pads is cut into sequences of this length."""

PAD_TOKEN_ID = 0


class PaddedRows:
    """A row per chunk, all as long as the longest: the baseline that packing is measured against.

    Args:
        tile_tokens: Rows are as long as the longest chunk, rounded up to a multiple of this.
    """

    def __init__(self, tile_tokens: int = TILE_TOKENS) -> None:
        self._tile_tokens = tile_tokens

    def pack(self, lengths: Sequence[int]) -> Packing:
        """Return the rectangle; see `PackPolicy.pack`."""
        rows = tuple((item,) for item in range(len(lengths)))
        return Packing(rows=rows, capacity_tokens=row_capacity(lengths, self._tile_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A batch in the order in which its tokens lie in memory.

    Attributes:
        items: Items of the batch and pads.
        places: Index in `items` of each item of the batch, in the batch's order.
    """

    items: tuple[BatchItem, ...]
    places: tuple[int, ...]


def lay_out(items: Sequence[BatchItem], policy: PackPolicy, pad_table: Sequence[BlockId], num_slots: int) -> Layout:
    """Lay single tokens side by side, and chunks in rows as the policy says.

    Pads are sequences of their own over `pad_table`: they pass through every linear layer as in a rectangle, see
    nothing but each other and are never sampled. Several of them overwrite each other, which nobody reads.

    Args:
        items: Items of a batch.
        policy: Packs chunks, the items of more than one token.
        pad_table: Blocks that no sequence has.
        num_slots: Tokens that these blocks hold.

    Raises:
        ValueError: the policy's rows do not hold each chunk once, or are too short for them.
    """
    chunks = [index for index, item in enumerate(items) if len(item.token_ids) > 1]
    lengths = [len(items[index].token_ids) for index in chunks]
    packing = policy.pack(lengths)
    order = [index for index, item in enumerate(items) if len(item.token_ids) == 1]
    laid = [items[index] for index in order]
    places = {index: place for place, index in enumerate(order)}
    for row, num_pads in zip(packing.rows, packing.pads(lengths), strict=True):
        for member in row:
            places[chunks[member]] = len(laid)
            laid.append(items[chunks[member]])
        laid.extend(_pads(num_pads, pad_table, num_slots))
    return Layout(items=tuple(laid), places=tuple(places[index] for index in range(len(items))))


def _pads(count: int, table: Sequence[BlockId], num_slots: int) -> Iterator[BatchItem]:
    for begin in range(0, count, num_slots):
        size = min(num_slots, count - begin)
        yield batch_item((PAD_TOKEN_ID,) * size, 0, table, sample=False)
