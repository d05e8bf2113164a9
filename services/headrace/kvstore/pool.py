"""One arena's blocks: those of the workers, and one that belongs to the kvstore's own canary. Pure."""

from collections.abc import Sequence
from dataclasses import replace

from headrace.core.block import BlockHash, BlockId
from headrace.core.ledger import Holder, LedgerCounts
from headrace.kvstore.store import BlockStore, Put, StoreTotals, Terms

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
        num_blocks: The workers' blocks, possibly none.
        epoch: Lifetime of the process.
        settle_s: How long a silent writer is believed to write.
        canary_hash: Name of the canary's block; known to this process only.
    """

    def __init__(self, num_blocks: int, epoch: str, settle_s: float, canary_hash: BlockHash) -> None:
        self._workers = BlockStore(num_blocks, epoch, settle_s)
        self._canary = BlockStore(NUM_CANARY_BLOCKS, epoch, settle_s)
        self._canary_hashes = (canary_hash,)
        self._num_blocks = num_blocks

    @property
    def totals(self) -> StoreTotals:
        """Counters of the workers' blocks since the start."""
        return self._workers.totals

    @property
    def canary_totals(self) -> StoreTotals:
        """Counters of the canary's block since the start."""
        return self._canary.totals

    def counts(self) -> LedgerCounts:
        """Return the state of the workers' blocks."""
        return self._workers.counts()

    def canary_counts(self) -> LedgerCounts:
        """Return the state of the canary's block."""
        return self._canary.counts()

    def lease_name(self, hashes: Sequence[BlockHash], new_id: str) -> str:
        """Return the id of a lease on these blocks; those of the canary are told by their names."""
        return _CANARY_LEASE + new_id if tuple(hashes) == self._canary_hashes else new_id

    def match(self, hashes: Sequence[BlockHash]) -> int:
        """Return how many leading blocks are stored."""
        return self._workers.match(hashes)

    def reserve(self, hashes: Sequence[BlockHash], terms: Terms) -> Put:
        """Grant room for new blocks, as far as there is room."""
        if not is_canary(terms.lease_id):
            return self._workers.reserve(hashes, terms)
        # What a canary left that failed half-way would look as if it was stored already.
        self._canary.forget()
        put = self._canary.reserve(hashes, terms)
        return replace(put, blocks=self._in_arena(put.blocks))

    def commit(self, lease_id: str, epoch: str, now_s: float, *, is_complete: bool) -> int:
        """End a put; raises as `BlockStore.commit`."""
        return self._of(lease_id).commit(lease_id, epoch, now_s, is_complete=is_complete)

    def acquire(self, hashes: Sequence[BlockHash], terms: Terms) -> tuple[BlockId, ...]:
        """Lease the longest stored prefix to a reader; without blocks there is no lease."""
        if not is_canary(terms.lease_id):
            return self._workers.acquire(hashes, terms)
        return self._in_arena(self._canary.acquire(hashes, terms))

    def release(self, lease_id: str, epoch: str, now_s: float) -> None:
        """End a read; raises as `BlockStore.release`. The canary's block is forgotten with it."""
        self._of(lease_id).release(lease_id, epoch, now_s)
        if is_canary(lease_id):
            self._canary.forget()

    def quarantine(self, block_hash: BlockHash) -> bool:
        """Give a block to nobody any more; return whether it was here."""
        return self._workers.quarantine(block_hash)

    def holders(self) -> tuple[Holder, ...]:
        """Return who holds blocks of the workers."""
        return self._workers.holders()

    def drop_writer(self, writer: str) -> None:
        """End all puts of a process that is gone."""
        self._workers.drop_writer(writer)

    def expire(self, now_s: float) -> None:
        """End leases whose time is over, and writers that have been silent for long enough since."""
        self._workers.expire(now_s)
        self._canary.expire(now_s)

    def _of(self, lease_id: str) -> BlockStore:
        return self._canary if is_canary(lease_id) else self._workers

    def _in_arena(self, blocks: Sequence[BlockId]) -> tuple[BlockId, ...]:
        return tuple(BlockId(self._num_blocks + block) for block in blocks)
