"""What the owner of a pool accepts of those who ask for its blocks, and for how long it lends them."""

from collections.abc import Sequence

from headrace.core.block import HASH_BYTES, BlockHash
from headrace.errors import DeadlineExceeded, InvalidRequest


def checked_hashes(hashes: Sequence[bytes], max_hashes: int) -> tuple[BlockHash, ...]:
    """Return the hashes of a call.

    Raises:
        InvalidRequest: there are too many, or one is not of 16 bytes.
    """
    if len(hashes) > max_hashes:
        raise InvalidRequest(
            f"{len(hashes)} block hashes in one call; at most {max_hashes} are taken: send them in parts",
            field="block_hashes",
            limit=str(max_hashes),
        )
    for block_hash in hashes:
        if len(block_hash) != HASH_BYTES:
            raise InvalidRequest(
                f"a block hash has {HASH_BYTES} bytes, found {len(block_hash)}",
                field="block_hashes",
                limit=f"{HASH_BYTES} bytes",
            )
    return tuple(BlockHash(block_hash) for block_hash in hashes)


def lease_end_s(deadline_in_s: float, max_lease_s: float) -> float:
    """Return for how many seconds a lease is granted.

    Args:
        deadline_in_s: Seconds until the end that the caller asked for.
        max_lease_s: Longest lease.

    Raises:
        DeadlineExceeded: that end has passed.
    """
    if deadline_in_s <= 0:
        raise DeadlineExceeded("the lease would have ended before it was granted")
    return min(deadline_in_s, max_lease_s)
