"""One arena's blocks: those of the workers, and one that belongs to the kvstore's own canary. Pure."""

from collections.abc import Sequence
from dataclasses import replace

from headrace.core.block import BlockHash, BlockId
from headrace.core.ledger import LedgerCounts
from headrace.index.events import Change
from headrace.kvstore.store import BlockStore, Claim, Put, StoreTotals, Terms
from headrace.kvstore.stored_block import StoredBlock

NUM_CANARY_BLOCKS = 1

_CANARY_LEASE = "canary "


def is_canary(lease_id: str) -> bool:
    """Return whether a lease is one of the canary's."""
    return lease_id.startswith(_CANARY_LEASE)


class BlockPool:
    """A store for workers beside a store of one block for the canary, behind the verbs of `BlockStore`.

    The canary's block follows the workers' blocks in the arena. It has a ledger and counters of its own, so
    that proving the path neither forgets a worker's block nor shows in what is reported of the workers' blocks.

    Args:
        workers: Of the workers' blocks, possibly none.
        canary: Of `NUM_CANARY_BLOCKS`.
        canary_hash: Name of the canary's block; known to this process only.

    Attributes:
        workers: See above.
    """

    def __init__(self, workers: BlockStore, canary: BlockStore, canary_hash: BlockHash) -> None:
        self.workers = workers
        self._canary = canary
        self._canary_hashes = (canary_hash,)

    @property
    def totals(self) -> StoreTotals:
        """Counters of the workers' blocks since the start."""
        return self.workers.totals

    @property
    def canary_totals(self) -> StoreTotals:
        """Counters of the canary's block since the start."""
        return self._canary.totals

    def counts(self) -> LedgerCounts:
        """Return the state of the workers' blocks."""
        return self.workers.counts()

    def canary_counts(self) -> LedgerCounts:
        """Return the state of the canary's block."""
        return self._canary.counts()

    def lease_name(self, hashes: Sequence[BlockHash], new_id: str) -> str:
        """Return the id of a lease on these blocks; those of the canary are told by their names."""
        return _CANARY_LEASE + new_id if tuple(hashes) == self._canary_hashes else new_id

    def reserve(self, offered: Sequence[StoredBlock], terms: Terms) -> Put:
        """Grant room for new blocks, as far as there is room."""
        if not is_canary(terms.lease_id):
            return self.workers.reserve(offered, terms)
        # What a canary left that failed half-way would look as if it was stored already.
        self._canary.forget()
        put = self._canary.reserve(offered, terms)
        return replace(put, blocks=self._in_arena(put.blocks))

    def commit(
        self, claim: Claim, now_s: float, *, is_complete: bool, digests: Sequence[int] = ()
    ) -> tuple[StoredBlock, ...]:
        """End a put; raises as `BlockStore.commit`."""
        return self._of(claim.lease_id).commit(claim, now_s, is_complete=is_complete, digests=digests)

    def acquire(self, hashes: Sequence[BlockHash], terms: Terms) -> tuple[BlockId, ...]:
        """Lease the longest stored prefix to a reader; without blocks there is no lease."""
        if not is_canary(terms.lease_id):
            return self.workers.acquire(hashes, terms)
        return self._in_arena(self._canary.acquire(hashes, terms))

    def release(self, claim: Claim, now_s: float) -> None:
        """End a read; raises as `BlockStore.release`. The canary's block is forgotten with it."""
        self._of(claim.lease_id).release(claim, now_s)
        if is_canary(claim.lease_id):
            self._canary.forget()

    def expire(self, now_s: float) -> None:
        """End leases whose time is over, and writers that have been silent for long enough since."""
        self.workers.expire(now_s)
        self._canary.expire(now_s)

    def take_changes(self) -> tuple[Change, ...]:
        """Return what came and went since the last call, in order."""
        return self.workers.take_changes() + self._canary.take_changes()

    def _of(self, lease_id: str) -> BlockStore:
        return self._canary if is_canary(lease_id) else self.workers

    def _in_arena(self, blocks: Sequence[BlockId]) -> tuple[BlockId, ...]:
        num_blocks = self.workers.counts().total
        return tuple(BlockId(num_blocks + block) for block in blocks)
