"""What the kvstore keeps: a ledger of blocks, puts under way and their order. Pure; time and ids are passed in."""

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.core.block import BlockHash, BlockId
from headrace.core.ledger import BlockLedger, Holder, LedgerCounts
from headrace.errors import BlockLost
from headrace.kvstore.policy import wanted_indices


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """A lease as it is asked for.

    Attributes:
        lease_id: Unguessable; holding it is the right to the blocks.
        holder: Who asks.
        deadline_s: When the clock ends it.
    """

    lease_id: str
    holder: str
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    """Room for new blocks.

    Attributes:
        indices: Which of the offered blocks to write, possibly none.
        blocks: Where, in the same order.
        hashes: Their names after the commit.
        writer: Who writes.
    """

    indices: tuple[int, ...] = ()
    blocks: tuple[BlockId, ...] = ()
    hashes: tuple[BlockHash, ...] = ()
    writer: str = ""


@dataclass(slots=True, kw_only=True)
class StoreTotals:
    """Counters since the start."""

    num_puts: int = 0
    num_committed_blocks: int = 0
    num_evicted_blocks: int = 0
    num_gets: int = 0
    num_hit_blocks: int = 0
    num_expired_leases: int = 0
    num_quarantined_blocks: int = 0


class BlockStore:
    """Blocks of one pool by hash; immutable once committed, invisible before.

    A put holds its blocks twice: by its lease, which ends by the clock, and as a writer, who ends by its own
    word or `settle_s` after the lease. So a block is not given to somebody else while a slow writer may still
    write into it.

    Args:
        num_blocks: Size of the pool.
        epoch: Lifetime of the process; fences leases of earlier ones.
        settle_s: How long a silent writer is believed to write.
    """

    def __init__(self, num_blocks: int, epoch: str, settle_s: float) -> None:
        self._ledger = BlockLedger(num_blocks)
        self._epoch = epoch
        self._settle_s = settle_s
        self._puts: dict[str, Put] = {}
        self._being_written: set[BlockHash] = set()
        self._settling: dict[str, float] = {}
        self.totals = StoreTotals()

    def counts(self) -> LedgerCounts:
        """Return the state of the pool."""
        return self._ledger.counts()

    def match(self, hashes: Sequence[BlockHash]) -> int:
        """Return how many leading blocks are stored; does not count as use."""
        return len(self._ledger.match(hashes))

    def reserve(self, hashes: Sequence[BlockHash], terms: Terms) -> Put:
        """Grant room for those blocks that are neither stored nor being written, as far as there is room.

        Blocks nobody uses are forgotten for it, the longest unused first, but none of the same prefix.

        Returns:
            The put; without blocks there is no lease.
        """
        stored = [block for block in map(self._ledger.lookup, hashes) if block is not None]
        protected = tuple(dict.fromkeys(stored))
        wanted = wanted_indices(hashes, self._is_known)
        room = self._ledger.num_available - sum(self._ledger.is_cached(block) for block in protected)
        indices = tuple(wanted[: max(0, room)])
        if not indices:
            return Put()
        granted = self._ledger.lease(
            terms.lease_id, len(indices), shared=protected, owner=terms.holder, deadline_s=terms.deadline_s
        )
        put = Put(
            indices=indices,
            blocks=granted[len(protected) :],
            hashes=tuple(hashes[index] for index in indices),
            writer=terms.holder,
        )
        self._ledger.hold(terms.lease_id, put.blocks)
        self._puts[terms.lease_id] = put
        self._being_written.update(put.hashes)
        self.totals.num_evicted_blocks += len(self._ledger.take_evicted())
        self.totals.num_puts += 1
        return put

    def commit(self, lease_id: str, epoch: str, now_s: float, *, is_complete: bool) -> int:
        """End a put: make its blocks visible, or let them go.

        Returns:
            Blocks made visible.

        Raises:
            BlockLost: the lease is unknown, of another epoch, or over.
        """
        self.expire(now_s)
        self._check_epoch(epoch)
        if lease_id in self._settling:
            self._settle(lease_id)
            raise BlockLost("the put had ended by the clock: its blocks were let go")
        put = self._puts.get(lease_id)
        if put is None:
            raise BlockLost("there is no such put: reserve again")
        self._forget_put(lease_id)
        num_committed = 0
        if is_complete:
            named = [self._ledger.name(block, name) for block, name in zip(put.blocks, put.hashes, strict=True)]
            num_committed = sum(named)
        self._ledger.release_writer(lease_id)
        self._ledger.release(lease_id)
        self.totals.num_committed_blocks += num_committed
        return num_committed

    def acquire(self, hashes: Sequence[BlockHash], terms: Terms) -> tuple[BlockId, ...]:
        """Lease the longest stored prefix to a reader; without blocks there is no lease."""
        blocks = self._ledger.match(hashes)
        self.totals.num_gets += 1
        if blocks:
            self._ledger.lease(terms.lease_id, 0, shared=blocks, reader=terms.holder, deadline_s=terms.deadline_s)
            self.totals.num_hit_blocks += len(blocks)
        return blocks

    def release(self, lease_id: str, epoch: str, now_s: float) -> None:
        """End a read. Success says that the blocks were the reader's all the time.

        Raises:
            BlockLost: the lease is unknown, of another epoch, or over: what was read may be of other blocks.
        """
        self.expire(now_s)
        self._check_epoch(epoch)
        if lease_id in self._puts or not self._ledger.release(lease_id):
            raise BlockLost("the read had ended by the clock: do not use what was read")

    def quarantine(self, block_hash: BlockHash) -> bool:
        """Give a block to nobody any more; return whether it was here. Who reads it now will see for himself."""
        is_here = self._ledger.unname(block_hash)
        self.totals.num_quarantined_blocks += is_here
        return is_here

    def holders(self) -> tuple[Holder, ...]:
        """Return who holds blocks."""
        return self._ledger.holders()

    def drop_writer(self, writer: str) -> None:
        """End all puts of a process that is gone: it writes no more."""
        for lease_id in [lease_id for lease_id, put in self._puts.items() if put.writer == writer]:
            self._forget_put(lease_id)
            self._ledger.release_writer(lease_id)
            self._ledger.release(lease_id)

    def forget(self) -> None:
        """Forget every block that nobody uses."""
        self._ledger.forget_cached()
        self._ledger.take_evicted()

    def expire(self, now_s: float) -> None:
        """End leases whose time is over, and writers that have been silent for long enough since."""
        for lease_id in self._ledger.expire(now_s):
            self.totals.num_expired_leases += 1
            if lease_id in self._puts:
                self._forget_put(lease_id)
                # Counted from now and not from the lease's end: a process that was stopped itself wakes up
                # with both times past, before it has seen what arrived meanwhile.
                self._settling[lease_id] = now_s + self._settle_s
        for lease_id in [lease_id for lease_id, end_s in self._settling.items() if end_s <= now_s]:
            self._settle(lease_id)

    def _settle(self, lease_id: str) -> None:
        del self._settling[lease_id]
        self._ledger.release_writer(lease_id)

    def _forget_put(self, lease_id: str) -> None:
        self._being_written.difference_update(self._puts.pop(lease_id).hashes)

    def _is_known(self, block_hash: BlockHash) -> bool:
        return block_hash in self._being_written or self._ledger.lookup(block_hash) is not None

    def _check_epoch(self, epoch: str) -> None:
        if epoch != self._epoch:
            raise BlockLost(f"the kvstore was restarted: lease of epoch {epoch}, this is {self._epoch}")
