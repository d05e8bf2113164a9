"""What the kvstore keeps in memory: a ledger of blocks, puts under way, facts. Pure; time and ids are passed in."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from headrace.core.block import BlockHash, BlockId
from headrace.core.eviction import BlockFacts, EvictionOrder
from headrace.core.holder import Holder
from headrace.core.ledger import BlockLedger, LedgerCounts
from headrace.core.placement import Tier
from headrace.errors import BlockLost, InvalidRequest
from headrace.index.events import Change, ChangeKind
from headrace.kvstore.policy import wanted_indices
from headrace.kvstore.stored_block import StoredBlock, is_visible

FOREVER_S = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """A lease as it is asked for.

    Attributes:
        lease_id: Unguessable; holding it is the right to the blocks.
        holder: Who asks.
        holder_epoch: Lifetime of its process.
        tenant: On whose behalf.
        deadline_s: When the clock ends it.
    """

    lease_id: str
    holder: str
    holder_epoch: str = ""
    tenant: str = ""
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Who ends a lease.

    Attributes:
        epoch: Lifetime of the kvstore that the caller was granted it by.
        tenant: On whose behalf it was granted.
    """

    lease_id: str
    epoch: str
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    """Room for new blocks.

    Attributes:
        indices: Which of the offered blocks to write, possibly none.
        blocks: Where, in the same order.
        facts: Of them; their names are visible after the commit.
        writer: Who writes; empty is the kvstore itself.
        tenant: On whose behalf.
        num_refused: Offered blocks for which there was no room.
    """

    indices: tuple[int, ...] = ()
    blocks: tuple[BlockId, ...] = ()
    facts: tuple[StoredBlock, ...] = ()
    writer: str = ""
    tenant: str = ""
    num_refused: int = 0


@dataclass(slots=True, kw_only=True)
class StoreTotals:
    """Counters since the start."""

    num_puts: int = 0
    num_committed_blocks: int = 0
    num_evicted_blocks: int = 0
    num_gets: int = 0
    num_asked_blocks: int = 0
    num_hit_blocks: int = 0
    num_expired_leases: int = 0
    num_quarantined_blocks: int = 0
    num_forged_blocks: int = 0
    num_over_quota_puts: int = 0


class BlockStore:
    """Blocks of one pool by hash; immutable once committed, invisible before, and to other tenants always.

    A put holds its blocks twice: by its lease, which ends by the clock, and as a writer, who ends by its own
    word or `settle_s` after the lease. So a block is not given to somebody else while a slow writer may still
    write into it.

    Args:
        num_blocks: Size of the pool.
        epoch: Lifetime of the process; fences leases of earlier ones.
        settle_s: How long a silent writer is believed to write.
        order: Which block is forgotten first; None forgets the longest unused.
        facts_of: Returns what the order may know of a block.
        quota_of: Returns how many blocks a tenant may have; None is no limit.
    """

    def __init__(
        self,
        num_blocks: int,
        epoch: str,
        settle_s: float,
        order: EvictionOrder | None = None,
        *,
        facts_of: Callable[[StoredBlock], BlockFacts] = lambda block: BlockFacts(tenant=block.tenant),
        quota_of: Callable[[str], int | None] = lambda _: None,
    ) -> None:
        self._ledger = BlockLedger(num_blocks, order)
        self._epoch = epoch
        self._settle_s = settle_s
        self._facts_of = facts_of
        self._quota_of = quota_of
        self._facts: dict[BlockHash, StoredBlock] = {}
        self._num_of: Counter[str] = Counter()
        self._puts: dict[str, Put] = {}
        self._being_written: set[BlockHash] = set()
        self._settling: dict[str, tuple[float, Put]] = {}
        self._changes: list[Change] = []
        self.totals = StoreTotals()

    @property
    def num_named(self) -> int:
        """Blocks that can be found."""
        return len(self._facts)

    def counts(self) -> LedgerCounts:
        """Return the state of the pool."""
        return self._ledger.counts()

    def verify(self) -> None:
        """Recount the ledger and the tenants' blocks: slow, for tests.

        Raises:
            InternalError: they do not add up.
            AssertionError: a fact belongs to no block, or a tenant's blocks are miscounted.
        """
        self._ledger.verify()
        assert self._facts.keys() == set(self._ledger.names())
        puts = [*self._puts.values(), *(put for _, put in self._settling.values())]
        written = Counter(block.tenant for put in puts for block in put.facts)
        assert +self._num_of == Counter(block.tenant for block in self._facts.values()) + written

    def find(self, block_hash: BlockHash) -> StoredBlock | None:
        """Return the facts of a stored block."""
        return self._facts.get(block_hash)

    def names(self) -> tuple[BlockHash, ...]:
        """Return the stored blocks, those most worth keeping first; those in use before all others."""
        cached = self._ledger.by_worth()
        return (*(self._facts.keys() - set(cached)), *cached)

    def match(self, hashes: Sequence[BlockHash]) -> int:
        """Return how many leading blocks are stored, whoever they belong to; does not count as use."""
        return len(self._ledger.match(hashes))

    def visible(self, hashes: Sequence[BlockHash], tenant: str) -> tuple[BlockId, ...]:
        """Return the blocks of the longest stored prefix that this tenant may be given."""
        blocks = self._ledger.match(hashes)
        num = next((i for i, name in enumerate(hashes[: len(blocks)]) if not self._is_visible(name, tenant)), None)
        return blocks[:num]

    def reserve(self, offered: Sequence[StoredBlock], terms: Terms) -> Put:
        """Grant room for those blocks that are neither stored nor being written, as far as there is room.

        Blocks nobody uses are forgotten for it, by the order, but none of the same prefix; of a tenant that has all
        it may have, only its own.

        Returns:
            The put; without blocks there is no lease.
        """
        self.totals.num_forged_blocks += sum(not self._is_visible(block.block_hash, terms.tenant) for block in offered)
        put = self._grant(offered, terms)
        if put.blocks:
            self._ledger.hold(terms.lease_id, put.blocks)
            self.totals.num_puts += 1
        return put

    def reserve_own(self, offered: Sequence[StoredBlock], lease_id: str, beside: Sequence[BlockHash]) -> Put:
        """Grant room to the kvstore itself, without an end by the clock; ended by `commit_own`.

        Args:
            offered: Blocks to be brought in.
            lease_id: Of the put.
            beside: Stored blocks that must not be forgotten for it.
        """
        return self._grant(offered, Terms(lease_id=lease_id, holder="", deadline_s=FOREVER_S), beside)

    def commit(
        self, claim: Claim, now_s: float, *, is_complete: bool, digests: Sequence[int] = ()
    ) -> tuple[StoredBlock, ...]:
        """End a put: make its blocks visible, or let them go.

        Args:
            claim: Who ends it.
            now_s: On the clock of the leases.
            is_complete: Whether all was written.
            digests: Of its blocks, in its order; none where none were taken.

        Returns:
            The blocks made visible.

        Raises:
            BlockLost: the lease is unknown, another tenant's, of another epoch, or over.
            InvalidRequest: there are digests of some blocks only; the put goes on.
        """
        self.expire(now_s)
        self._check_epoch(claim.epoch)
        if claim.lease_id in self._settling:
            self._settle(claim.lease_id)
            raise BlockLost("the put had ended by the clock: its blocks were let go")
        put = self._puts.get(claim.lease_id)
        if put is None or put.tenant != claim.tenant:
            raise BlockLost("there is no such put: reserve again")
        if len(digests) not in (0, len(put.blocks)):
            raise InvalidRequest(f"{len(digests)} digests for {len(put.blocks)} blocks", field="digests")
        if digests:
            facts = zip(put.facts, digests, strict=True)
            put = replace(put, facts=tuple(replace(block, digest=digest) for block, digest in facts))
        named = self._end(claim.lease_id, put, {block.block_hash for block in put.facts} if is_complete else set())
        self.totals.num_committed_blocks += len(named)
        return named

    def commit_own(self, lease_id: str, landed: set[BlockHash]) -> tuple[StoredBlock, ...]:
        """End a put of `reserve_own`; returns the blocks made visible: those that landed."""
        return self._end(lease_id, self._puts[lease_id], landed)

    def acquire(self, hashes: Sequence[BlockHash], terms: Terms) -> tuple[BlockId, ...]:
        """Lease the longest stored prefix to a reader; without blocks there is no lease.

        Blocks of other tenants are misses, and counted.
        """
        blocks = self.visible(hashes, terms.tenant)
        num_found = len(blocks)
        self.totals.num_gets += 1
        self.totals.num_asked_blocks += len(hashes)
        self.totals.num_hit_blocks += num_found
        if num_found < len(hashes):
            self.totals.num_forged_blocks += not self._is_visible(hashes[num_found], terms.tenant)
        if blocks:
            self._ledger.lease(
                terms.lease_id,
                0,
                shared=blocks,
                owner=terms.tenant,
                reader=terms.holder,
                epoch=terms.holder_epoch,
                deadline_s=terms.deadline_s,
            )
        return blocks

    def release(self, claim: Claim, now_s: float) -> None:
        """End a read. Success says that the blocks were the reader's all the time.

        Raises:
            BlockLost: the lease is unknown, another tenant's, of another epoch, or over: what was read may be of
                other blocks.
        """
        self.expire(now_s)
        self._check_epoch(claim.epoch)
        lease = None if claim.lease_id in self._puts else self._ledger.find(claim.lease_id)
        if lease is None or lease.owner != claim.tenant:
            raise BlockLost("the read had ended by the clock: do not use what was read")
        self._ledger.release(claim.lease_id)

    def hold(self, hold_id: str, hashes: Sequence[BlockHash]) -> tuple[tuple[StoredBlock, BlockId], ...]:
        """Keep those of these blocks that are stored until `let_go`, without counting it as use; return them."""
        found = [(self._facts[name], self._ledger.lookup(name)) for name in hashes if name in self._facts]
        held = tuple((block, place) for block, place in found if place is not None)
        if held:
            self._ledger.hold(hold_id, [place for _, place in held])
        return held

    def hold_next(self, hold_id: str) -> tuple[StoredBlock, BlockId] | None:
        """Keep the block that would be forgotten next until `let_go`, and return it."""
        name = self._ledger.hold_next(hold_id, lambda name: self._facts_of(self._facts[name]))
        place = None if name is None else self._ledger.lookup(name)
        return None if name is None or place is None else (self._facts[name], place)

    def let_go(self, hold_id: str) -> None:
        """End a hold; an unknown one is ignored."""
        self._ledger.release_writer(hold_id)

    def drop_unused(self, block_hash: BlockHash) -> bool:
        """Forget a block unless somebody uses it; return whether it was forgotten."""
        place = self._ledger.lookup(block_hash)
        if place is None or not self._ledger.is_cached(place):
            return False
        self._ledger.unname(block_hash)
        self._note_gone()
        return True

    def quarantine(self, block_hash: BlockHash) -> bool:
        """Give a block to nobody any more; return whether it was here. Who reads it now will see for himself."""
        is_here = self._ledger.unname(block_hash)
        self.totals.num_quarantined_blocks += is_here
        self._note_gone()
        return is_here

    def holders(self) -> tuple[Holder, ...]:
        """Return who holds blocks."""
        return self._ledger.holders()

    def drop_writer(self, writer: str) -> None:
        """End all puts of a process that is gone: it writes no more."""
        for lease_id in [lease_id for lease_id, put in self._puts.items() if put.writer == writer]:
            self._end(lease_id, self._puts[lease_id], set())

    def forget(self) -> None:
        """Forget every block that nobody uses."""
        self._ledger.forget_cached()
        self._note_gone()

    def expire(self, now_s: float) -> None:
        """End leases whose time is over, and writers that have been silent for long enough since."""
        for lease_id in self._ledger.expire(now_s):
            self.totals.num_expired_leases += 1
            put = self._puts.pop(lease_id, None)
            if put is not None:
                self._being_written.difference_update(block.block_hash for block in put.facts)
                # Counted from now and not from the lease's end: a process that was stopped itself wakes up
                # with both times past, before it has seen what arrived meanwhile.
                self._settling[lease_id] = now_s + self._settle_s, put
        for lease_id in [lease_id for lease_id, (end_s, _) in self._settling.items() if end_s <= now_s]:
            self._settle(lease_id)

    def take_changes(self) -> tuple[Change, ...]:
        """Return what came and went since the last call, in order."""
        changes, self._changes = tuple(self._changes), []
        return changes

    def _grant(self, offered: Sequence[StoredBlock], terms: Terms, beside: Sequence[BlockHash] = ()) -> Put:
        hashes = [block.block_hash for block in offered]
        protected = tuple(
            dict.fromkeys(block for block in map(self._ledger.lookup, (*beside, *hashes)) if block is not None)
        )
        wanted = wanted_indices(hashes, self._is_known)
        if not wanted:
            return Put()
        lease_id = terms.lease_id
        self._ledger.lease(lease_id, 0, shared=protected, owner=terms.holder, deadline_s=terms.deadline_s)
        indices = wanted[: min(self._room_of(offered[0].tenant, len(wanted)), self._ledger.num_available)]
        put = Put(
            indices=tuple(indices),
            blocks=self._ledger.extend(lease_id, len(indices)),
            facts=tuple(offered[index] for index in indices),
            writer=terms.holder,
            tenant=terms.tenant,
            num_refused=len(wanted) - len(indices),
        )
        self.totals.num_evicted_blocks += self._note_gone()
        if not put.blocks:
            self._ledger.release(lease_id)
            return Put(num_refused=put.num_refused)
        self._puts[lease_id] = put
        self._being_written.update(block.block_hash for block in put.facts)
        self._num_of.update(block.tenant for block in put.facts)
        return put

    def _room_of(self, tenant: str, num_wanted: int) -> int:
        """Return how many blocks a tenant may get of those it wants, after some of its own were forgotten."""
        quota = self._quota_of(tenant)
        if quota is None or self._num_of[tenant] + num_wanted <= quota:
            return num_wanted
        self.totals.num_over_quota_puts += 1
        # Counted on: the names are gone at once, the tenant's count follows in `_note_gone`.
        room = quota - self._num_of[tenant]
        while room < min(num_wanted, quota) and self._ledger.forget_of(tenant):
            room += 1
        return max(0, room)

    def _end(self, lease_id: str, put: Put, landed: set[BlockHash]) -> tuple[StoredBlock, ...]:
        del self._puts[lease_id]
        self._being_written.difference_update(block.block_hash for block in put.facts)
        named: list[StoredBlock] = []
        for block, place in zip(put.facts, put.blocks, strict=True):
            if block.block_hash in landed and self._ledger.name(place, block.block_hash, self._facts_of(block)):
                self._facts[block.block_hash] = block
                named.append(block)
                self._note(ChangeKind.STORED, block)
            else:
                self._num_of[block.tenant] -= 1
        self._ledger.release_writer(lease_id)
        self._ledger.release(lease_id)
        return tuple(named)

    def _settle(self, lease_id: str) -> None:
        _, put = self._settling.pop(lease_id)
        self._num_of.subtract(block.tenant for block in put.facts)
        self._ledger.release_writer(lease_id)

    def _note_gone(self) -> int:
        gone = self._ledger.take_evicted()
        for name in gone:
            block = self._facts.pop(name)
            self._num_of[block.tenant] -= 1
            self._note(ChangeKind.REMOVED, block)
        return len(gone)

    def _note(self, kind: ChangeKind, block: StoredBlock) -> None:
        self._changes.append(Change(kind=kind, tier=Tier.DRAM, origin=block.origin, hashes=(block.block_hash,)))

    def _is_known(self, block_hash: BlockHash) -> bool:
        return block_hash in self._being_written or block_hash in self._facts

    def _is_visible(self, block_hash: BlockHash, tenant: str) -> bool:
        """Return whether it is not stored, or for this tenant."""
        block = self._facts.get(block_hash)
        return block is None or is_visible(block.tenant, tenant)

    def _check_epoch(self, epoch: str) -> None:
        if epoch != self._epoch:
            raise BlockLost(f"the kvstore was restarted: lease of epoch {epoch}, this is {self._epoch}")
