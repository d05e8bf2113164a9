"""What the kvstore refuses, and which blocks it takes."""

from collections.abc import Callable, Sequence

from headrace.core.block import HASH_BYTES, BlockHash, KvLayout
from headrace.errors import DeadlineExceeded, InvalidRequest, PeerMismatch


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


def check_layout(layout: KvLayout, block_bytes: int) -> None:
    """Refuse blocks that do not fit the pool.

    Raises:
        PeerMismatch: they have another size.
    """
    if layout.block_bytes != block_bytes:
        raise PeerMismatch(
            f"blocks of {layout.block_bytes} bytes offered, the kvstore keeps blocks of {block_bytes}: "
            "give workers of another model or dtype a kvstore of their own",
            field="block_bytes",
        )


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


def wanted_indices(hashes: Sequence[BlockHash], is_known: Callable[[BlockHash], bool]) -> list[int]:
    """Return which blocks a put should write: each new one once, none that is stored or being written."""
    seen: set[BlockHash] = set()
    wanted: list[int] = []
    for index, block_hash in enumerate(hashes):
        if block_hash not in seen and not is_known(block_hash):
            wanted.append(index)
        seen.add(block_hash)
    return wanted
