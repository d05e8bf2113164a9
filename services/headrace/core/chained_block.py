"""A full block together with what its hash was made of, for those who must tell it to others."""

from dataclasses import dataclass

from headrace.core.block import BlockHash


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainedBlock:
    """A full block, its place in its chain and its tokens.

    Attributes:
        parent: Hash of the block before it, or `root`.
        root: Where its chain begins; tells whose it is.
        tokens: As many as a block holds.
    """

    block_hash: BlockHash
    parent: BlockHash
    root: BlockHash
    tokens: tuple[int, ...]
