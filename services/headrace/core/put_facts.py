"""What a kvstore is told of blocks that are put into it."""

from dataclasses import dataclass

from headrace.core.block import BlockHash
from headrace.core.placement import EXACT, Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class PutFacts:
    """What a writer says of the blocks of a put, which are neighbours in one segment of one chain.

    Attributes:
        tenant: Whose they are; empty for public ones.
        num_blocks_before: Blocks before the first one in its chain.
        origin: How their KV came to be.
        segment_key: Hash of the first block of the segment; None if the writer does not say.
        parent: Hash of the block before the first one; None if there is none.
    """

    tenant: str = ""
    num_blocks_before: int = 0
    origin: Origin = EXACT
    segment_key: BlockHash | None = None
    parent: BlockHash | None = None
