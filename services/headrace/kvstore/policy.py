"""What the kvstore refuses, and which blocks it takes."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import takewhile

from headrace.core.block import BlockHash, KvLayout
from headrace.core.placement import Tier
from headrace.core.put_facts import PutFacts
from headrace.errors import InvalidRequest, PeerMismatch
from headrace.index.prefix_index import PrefixMatch
from headrace.kvstore.stored_block import MAX_TEXT_BYTES, StoredBlock


def check_layout(layout: KvLayout, kept: KvLayout) -> None:
    """Refuse blocks that are not laid out like those of the pool.

    Raises:
        PeerMismatch: they are not.
    """
    if layout != kept:
        raise PeerMismatch(
            f"blocks of {layout} offered, the kvstore keeps blocks of {kept}: "
            "give workers of another model or dtype a kvstore of their own",
            field="block_bytes" if layout.block_bytes != kept.block_bytes else "layout",
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


def offered_blocks(hashes: Sequence[BlockHash], facts: PutFacts, now_unix_ms: int) -> tuple[StoredBlock, ...]:
    """Return the facts of each block of a put.

    Raises:
        InvalidRequest: tenant and policy are too long.
    """
    if len((facts.tenant + facts.origin.policy_id).encode()) > MAX_TEXT_BYTES:
        raise InvalidRequest(f"tenant and policy take more than {MAX_TEXT_BYTES} bytes together", field="tenant")
    return tuple(
        StoredBlock(
            block_hash=name,
            tenant=facts.tenant,
            num_blocks_before=facts.num_blocks_before + index,
            origin=facts.origin,
            stored_unix_ms=now_unix_ms,
            parent=hashes[index - 1] if index else facts.parent,
            segment_key=facts.segment_key,
        )
        for index, name in enumerate(hashes)
    )


def own_match(
    location: str, hashes: Sequence[BlockHash], find: Callable[[BlockHash], tuple[Tier, StoredBlock] | None]
) -> PrefixMatch | None:
    """Return how much of a prefix this store holds, as the index would say it; None where it holds nothing."""
    found = takewhile(lambda place: place is not None, map(find, hashes))
    counts = Counter((place[0], place[1].origin) for place in found if place is not None)
    if not counts:
        return None
    ordered = sorted(counts.items(), key=lambda item: item[0][0])
    return PrefixMatch(
        location=location,
        num_blocks=counts.total(),
        counts=tuple((tier, origin, number) for (tier, origin), number in ordered),
    )
