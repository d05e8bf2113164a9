"""Which kvstore keeps which part of a chain of blocks.

Rendezvous hashing after Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit Rates" (1998): whoever
knows the names of the stores finds the same owner without asking, and a store that comes or goes moves only what it
gets or had.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import xxhash

from headrace.core.block import BlockHash
from headrace.errors import NotReady

SEGMENT_BLOCKS = 16
"""Blocks of a chain that lie together: 1,024 tokens of the default block, so a short prompt asks one store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Neighbours in a chain that one store keeps.

    Attributes:
        start: Place in the chain of the first wanted block.
        end: Place behind the last one.
        key: Hash of the first block of the whole segment, wanted or not; it chooses the store.
    """

    start: int
    end: int
    key: BlockHash


def segments(
    chain: Sequence[BlockHash], first_index: int = 0, size: int = SEGMENT_BLOCKS, *, end_index: int | None = None
) -> tuple[Segment, ...]:
    """Return the segments of a range of a chain, cut at multiples of `size` from the start of the chain.

    Args:
        chain: Hashes of the chain from its very first block, for a range that starts amid a segment needs the key
            of blocks before it.
        first_index: First wanted block.
        size: Blocks of a whole segment, at least 1.
        end_index: Behind the last wanted block; None is the end of the chain.
    """
    end = len(chain) if end_index is None else min(end_index, len(chain))
    aligned = range(first_index - first_index % size, end, size) if first_index < end else ()
    return tuple(
        Segment(start=max(start, first_index), end=min(start + size, end), key=chain[start]) for start in aligned
    )


def store_of(key: BlockHash, stores: Iterable[str]) -> str:
    """Return the store that keeps a segment.

    Args:
        key: Of the segment.
        stores: Names, in any order.

    Raises:
        NotReady: there is no store.
    """
    chosen = max(stores, key=lambda name: _score(key, name), default=None)
    if chosen is None:
        raise NotReady("no kvstore is known, so no block can be placed in one")
    return chosen


def stores_by_preference(key: BlockHash, stores: Iterable[str]) -> tuple[str, ...]:
    """Return all stores, the one that keeps the segment first; each keeps it should all before it be gone."""
    return tuple(sorted(stores, key=lambda name: _score(key, name), reverse=True))


def _score(key: BlockHash, name: str) -> tuple[int, str]:
    # Keys have one length, so no pair of key and name reads like another; the name decides between equal scores.
    return xxhash.xxh3_64_intdigest(key + name.encode()), name
