"""What the kvstore refuses, and which blocks it takes."""

from collections.abc import Callable, Sequence

from headrace.core.block import BlockHash, KvLayout
from headrace.errors import PeerMismatch


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


def wanted_indices(hashes: Sequence[BlockHash], is_known: Callable[[BlockHash], bool]) -> list[int]:
    """Return which blocks a put should write: each new one once, none that is stored or being written."""
    seen: set[BlockHash] = set()
    wanted: list[int] = []
    for index, block_hash in enumerate(hashes):
        if block_hash not in seen and not is_known(block_hash):
            wanted.append(index)
        seen.add(block_hash)
    return wanted
