"""Digests of a worker's own blocks: taken when they are first lent or put, compared when they have landed."""

import asyncio
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from headrace.core.block import BlockHash, BlockId, KvLayout
from headrace.core.digest import block_digest, is_sampled


class BlockDigests:
    """Takes, keeps and compares digests.

    A block's digest is kept while the block is cached, so that a bit that flips between two loans is found. All
    blocks named to it must stay in place until it returns.

    Args:
        layout: Of a block.
        share: Of blocks that digests are taken of, from 0 to 1.
        read_block: Returns the bytes of an own block, `[block_bytes]`, uint8.

    Attributes:
        num_corrupt: Blocks that landed with other bytes than their digest says.
    """

    def __init__(self, layout: KvLayout, share: float, read_block: Callable[[BlockId], NDArray[np.uint8]]) -> None:
        self._layout = layout
        self._share = share
        self._read_block = read_block
        self._known: dict[BlockHash, int] = {}
        self.num_corrupt = 0

    async def take(self, hashes: Sequence[BlockHash], blocks: Sequence[BlockId]) -> list[int]:
        """Return the digest of each block; 0 for those of which none is taken.

        Args:
            hashes: Names of the blocks.
            blocks: As many own blocks.
        """
        sampled = {name: block for name, block in zip(hashes, blocks, strict=True) if is_sampled(name, self._share)}
        missing = {name: block for name, block in sampled.items() if name not in self._known}
        if missing:
            taken = await asyncio.to_thread(self._digest, list(missing.values()))
            self._known.update(zip(missing, taken, strict=True))
        return [self._known.get(name, 0) if name in sampled else 0 for name in hashes]

    async def num_good(self, blocks: Sequence[BlockId], digests: Sequence[int]) -> int:
        """Return how many leading blocks have the bytes that their digests say.

        Args:
            blocks: Own blocks.
            digests: Of the first so many of them; 0 is any bytes.
        """
        named = [index for index, digest in enumerate(digests) if digest]
        if not named:
            return len(blocks)
        found = await asyncio.to_thread(self._digest, [blocks[index] for index in named])
        for index, digest in zip(named, found, strict=True):
            if digest != digests[index]:
                self.num_corrupt += 1
                return index
        return len(blocks)

    def forget(self, hashes: Iterable[BlockHash]) -> None:
        """Drop the digests of blocks that have left the cache, or come to it: bytes of two lives may differ."""
        for block_hash in hashes:
            self._known.pop(block_hash, None)

    def _digest(self, blocks: Sequence[BlockId]) -> list[int]:
        return [block_digest(self._read_block(block), self._layout) for block in blocks]
