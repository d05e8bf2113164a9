"""What lies on disk, and what has to leave it for something else. Pure: `disk.py` moves the bytes."""

from collections import Counter
from collections.abc import Callable, Sequence

from headrace.core.block import BlockHash
from headrace.core.eviction import BlockFacts, EvictionOrder
from headrace.core.placement import Tier
from headrace.index.events import Change, ChangeKind
from headrace.kvstore.stored_block import StoredBlock, is_visible


class Shelf:
    """Facts and order of the blocks on disk.

    Args:
        order: Which block is forgotten first; owned by the shelf.
        facts_of: Returns what the order may know of a block.
        quota_of: Returns how many blocks a tenant may have; None is no limit.

    Attributes:
        num_evicted: Blocks forgotten for want of room since the start.
        num_forged: Blocks asked for by another tenant than theirs.
    """

    def __init__(
        self,
        order: EvictionOrder,
        facts_of: Callable[[StoredBlock], BlockFacts],
        quota_of: Callable[[str], int | None],
    ) -> None:
        self._order = order
        self._facts_of = facts_of
        self._quota_of = quota_of
        self._facts: dict[BlockHash, StoredBlock] = {}
        self._num_of: Counter[str] = Counter()
        self._changes: list[Change] = []
        self.num_evicted = 0
        self.num_forged = 0

    @property
    def num_blocks(self) -> int:
        """Blocks on the shelf."""
        return len(self._facts)

    def names(self) -> tuple[BlockHash, ...]:
        """Return all blocks, those put last first."""
        return tuple(reversed(self._facts))

    def find(self, block_hash: BlockHash) -> StoredBlock | None:
        """Return the facts of a block that is here."""
        return self._facts.get(block_hash)

    def has_for(self, block_hash: BlockHash, tenant: str) -> bool:
        """Return whether a block is here that this tenant may be given; one of another tenant is counted."""
        block = self._facts.get(block_hash)
        if block is None:
            return False
        self.num_forged += not is_visible(block.tenant, tenant)
        return is_visible(block.tenant, tenant)

    def put(self, blocks: Sequence[StoredBlock]) -> None:
        """Take note of blocks of one prompt, in its order."""
        for block in blocks:
            self._facts[block.block_hash] = block
            self._num_of[block.tenant] += 1
            self._order.add(block.block_hash, self._facts_of(block))
            self._note(ChangeKind.STORED, block)
        for block in reversed(blocks):
            self._order.rest(block.block_hash)

    def use(self, hashes: Sequence[BlockHash]) -> None:
        """Take note that blocks were asked for; unknown ones are ignored."""
        known = [name for name in hashes if name in self._facts]
        for name in known:
            self._order.use(name)
        for name in reversed(known):
            self._order.rest(name)

    def drop(self, block_hash: BlockHash) -> bool:
        """Forget a block; return whether it was here."""
        if block_hash not in self._facts:
            return False
        self._order.drop(block_hash)
        self._gone(block_hash)
        return True

    def is_full_for(self, tenant: str, num_coming: int) -> bool:
        """Return whether a tenant has all that it may have, with `num_coming` blocks on their way."""
        quota = self._quota_of(tenant)
        return quota is not None and self._num_of[tenant] + num_coming >= quota

    def victim(self, tenant: str, num_coming: int) -> BlockHash | None:
        """Forget and return a block for one of this tenant: its own, when it has all that it may have."""
        name = self._order.evict(tenant if self.is_full_for(tenant, num_coming) else None)
        if name is not None:
            self.num_evicted += 1
            self._gone(name)
        return name

    def take_changes(self) -> tuple[Change, ...]:
        """Return what came and went since the last call, in order."""
        changes, self._changes = tuple(self._changes), []
        return changes

    def _gone(self, name: BlockHash) -> None:
        block = self._facts.pop(name)
        self._num_of[block.tenant] -= 1
        self._note(ChangeKind.REMOVED, block)

    def _note(self, kind: ChangeKind, block: StoredBlock) -> None:
        self._changes.append(Change(kind=kind, tier=Tier.DISK, origin=block.origin, hashes=(block.block_hash,)))
