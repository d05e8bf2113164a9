"""What the kvstore knows of a block besides its bytes: in memory, on disk, and on its way to a sibling."""

from dataclasses import dataclass

from headrace.core.block import HASH_BYTES, BlockHash
from headrace.core.placement import EXACT, Origin

MAX_TEXT_BYTES = 384
"""Of tenant and policy together, in UTF-8: with the other facts they fit a sector of a disk."""


def is_visible(owner: str, tenant: str) -> bool:
    """Return whether a tenant finds the blocks of an owner; those of the owner "" are public."""
    return owner in ("", tenant)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBlock:
    """The facts of a block.

    Attributes:
        block_hash: 16 bytes; names the content.
        tenant: To whom it is given back, and whose quota it counts against; empty is everybody.
        digest: Of its canonical form; 0 where none was taken.
        num_blocks_before: In its prompt; what a block is worth depends on it.
        origin: How its KV came to be.
        stored_unix_ms: When the kvstore got it.
        parent: The block before it in its prompt; None for the first block of a put.
        segment_key: Hash of the first block of its segment, which chooses its store; None if its writer did not say.

    Raises:
        ValueError: a hash has another size, tenant and policy are longer than `MAX_TEXT_BYTES`, or a number
            does not fit (64 bits; 32 for `num_blocks_before`).
    """

    block_hash: BlockHash
    tenant: str
    digest: int = 0
    num_blocks_before: int = 0
    origin: Origin = EXACT
    stored_unix_ms: int = 0
    parent: BlockHash | None = None
    segment_key: BlockHash | None = None

    def __post_init__(self) -> None:
        if self.digest >> 64 or self.stored_unix_ms >> 64 or self.num_blocks_before >> 32:
            raise ValueError("a number is negative or too large for a header")
        for name in (self.block_hash, self.parent, self.segment_key):
            if name is not None and len(name) != HASH_BYTES:
                raise ValueError(f"a block hash has {HASH_BYTES} bytes, found {len(name)}")
        if len((self.tenant + self.origin.policy_id).encode()) > MAX_TEXT_BYTES:
            raise ValueError(f"tenant and policy are longer than {MAX_TEXT_BYTES} bytes together")
