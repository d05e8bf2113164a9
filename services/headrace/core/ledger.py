"""The account of one pool of blocks: who holds what, until when, and what may be reused."""

import copy
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from headrace.core.block import BlockHash, BlockId
from headrace.core.eviction import NO_FACTS, BlockFacts, EvictionOrder, LeastRecentlyUsed
from headrace.core.holder import Holder
from headrace.errors import InternalError, Saturated


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerCounts:
    """How many blocks are in which state; `free + cached + leased == total` always."""

    total: int
    free: int
    cached: int
    leased: int
    num_leases: int


@dataclass(slots=True, kw_only=True)
class Lease:
    """A right to blocks, for a time.

    Attributes:
        owner: Whose work it is: a sequence, a put.
        reader: Who else reads or writes the blocks: a peer; empty when nobody does.
        epoch: Lifetime of the reader's process.
        deadline_s: When the clock ends it.
        blocks: In the order of the sequence.
    """

    lease_id: str
    owner: str
    reader: str
    epoch: str
    deadline_s: float
    blocks: list[BlockId]


class BlockLedger:
    """Bookkeeping of one pool; knows neither tokens nor memory.

    Every block is free (nothing in it), cached (named by a hash, used by nobody, found again by its name)
    or leased. A block may be in several leases: prefixes are shared. Writers in flight are counted apart
    from leases; a block is reused only when it is in no lease and no writer is on it.

    Args:
        num_blocks: Size of the pool.
        order: Which cached block is forgotten first; owned by the ledger. None forgets the longest unused.
    """

    def __init__(self, num_blocks: int, order: EvictionOrder | None = None) -> None:
        self._total = num_blocks
        self._order = LeastRecentlyUsed() if order is None else order
        self._free: deque[BlockId] = deque(BlockId(index) for index in range(num_blocks))
        self._cached: set[BlockId] = set()
        self._users = [0] * num_blocks
        self._num_used = 0
        self._leases: dict[str, Lease] = {}
        self._writers: dict[str, tuple[BlockId, ...]] = {}
        self._hash_of: dict[BlockId, BlockHash] = {}
        self._block_of: dict[BlockHash, BlockId] = {}
        self._evicted: list[BlockHash] = []

    def counts(self) -> LedgerCounts:
        """Return the state of the pool."""
        return LedgerCounts(
            total=self._total,
            free=len(self._free),
            cached=len(self._cached),
            leased=self._num_used,
            num_leases=len(self._leases) + len(self._writers),
        )

    def check(self) -> None:
        """Check that every block is in exactly one state; constant time.

        Raises:
            InternalError: blocks were lost or counted twice.
        """
        counts = self.counts()
        if counts.free + counts.cached + counts.leased != counts.total:
            raise InternalError(f"the ledger does not add up: {counts}")

    def verify(self) -> None:
        """Recount everything from the leases and writers: slow, for tests.

        Raises:
            InternalError: some count, state or name disagrees with the leases.
        """
        self.check()
        holders = [*(lease.blocks for lease in self._leases.values()), *self._writers.values()]
        users = Counter(block for blocks in holders for block in blocks)
        unused = {block for block in range(self._total) if not users[BlockId(block)]}
        if any(users[BlockId(block)] != count for block, count in enumerate(self._users)):
            raise InternalError("a block's number of users differs from its leases and writers")
        if len(self._free) != len(set(self._free)) or unused != {*self._free, *self._cached}:
            raise InternalError("an unused block is neither free nor cached, or is so twice")
        if {block: name for name, block in self._block_of.items()} != self._hash_of:
            raise InternalError("names and blocks disagree")
        if unused & self._hash_of.keys() != self._cached:
            raise InternalError("a free block has a name, or a cached one has none")

    @property
    def num_available(self) -> int:
        """Blocks that a lease could get now: free ones, and cached ones that would be forgotten."""
        return len(self._free) + len(self._cached)

    def lease(  # noqa: PLR0913 the terms of a lease
        self,
        lease_id: str,
        num_new: int,
        *,
        shared: Sequence[BlockId] = (),
        owner: str = "",
        reader: str = "",
        epoch: str = "",
        deadline_s: float = float("inf"),
    ) -> tuple[BlockId, ...]:
        """Grant `shared` blocks, which must be cached or leased, followed by new ones.

        Returns:
            All blocks of the lease.

        Raises:
            Saturated: not enough blocks; nothing has changed.
            ValueError: the lease exists already, or a shared block is free.
        """
        if lease_id in self._leases:
            raise ValueError(f"lease {lease_id} exists")
        if not all(self._users[block] or block in self._cached for block in shared):
            raise ValueError("a shared block must be cached or leased: it may hold anything")
        self._require(num_new + sum(block in self._cached for block in set(shared)))
        for block in shared:
            self._hit(block)
        blocks = [*shared, *self._take(num_new)]
        self._leases[lease_id] = Lease(
            lease_id=lease_id, owner=owner, reader=reader, epoch=epoch, deadline_s=deadline_s, blocks=blocks
        )
        return tuple(blocks)

    def extend(self, lease_id: str, num_new: int) -> tuple[BlockId, ...]:
        """Add new blocks to a lease and return them.

        Raises:
            Saturated: not enough blocks; nothing has changed.
            KeyError: no such lease.
        """
        lease = self._leases[lease_id]
        self._require(num_new)
        added = self._take(num_new)
        lease.blocks.extend(added)
        return tuple(added)

    def share(self, lease_id: str, blocks: Sequence[BlockId]) -> None:
        """Add blocks that must be cached or leased to a lease.

        Raises:
            ValueError: a block is free.
            KeyError: no such lease.
        """
        lease = self._leases[lease_id]
        if not all(self._users[block] or block in self._cached for block in blocks):
            raise ValueError("a shared block must be cached or leased: it may hold anything")
        for block in blocks:
            self._hit(block)
        lease.blocks.extend(blocks)

    def shrink(self, lease_id: str, num_kept: int) -> None:
        """Let all blocks of a lease but the first `num_kept` go.

        Raises:
            KeyError: no such lease.
        """
        lease = self._leases[lease_id]
        dropped = lease.blocks[num_kept:]
        del lease.blocks[num_kept:]
        for block in reversed(dropped):
            self._unuse(block)

    def find(self, lease_id: str) -> Lease | None:
        """Return a live lease; it must not be changed."""
        return self._leases.get(lease_id)

    def release(self, lease_id: str) -> bool:
        """End a lease; False when there is none. Its last blocks become the first to be forgotten."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return False
        for block in reversed(lease.blocks):
            self._unuse(block)
        return True

    def expire(self, now_s: float) -> tuple[str, ...]:
        """End the leases whose deadline has passed and return their ids."""
        expired = tuple(lease.lease_id for lease in self._leases.values() if lease.deadline_s <= now_s)
        for lease_id in expired:
            self.release(lease_id)
        return expired

    def hold(self, writer_id: str, blocks: Sequence[BlockId]) -> None:
        """Count a writer, or one who copies without asking, on leased or cached blocks.

        They are not reused before `release_writer`; the eviction order does not take it for a use.

        Raises:
            ValueError: the writer exists, or a block is free.
        """
        if writer_id in self._writers:
            raise ValueError(f"writer {writer_id} exists")
        if not all(self._users[block] or block in self._cached for block in blocks):
            raise ValueError("a writer needs cached or leased blocks")
        for block in blocks:
            if block in self._cached:
                self._cached.remove(block)
                self._order.hold(self._hash_of[block])
            self._use(block)
        self._writers[writer_id] = tuple(blocks)

    def hold_next(self, writer_id: str, facts_of: Callable[[BlockHash], BlockFacts]) -> BlockHash | None:
        """Count a writer on the cached block that would be forgotten next, and return its name; None without one.

        Args:
            writer_id: A new one.
            facts_of: Returns what the eviction order may know of a block; it takes the block for a new one.
        """
        block_hash = self._order.evict()
        if block_hash is None:
            return None
        self._order.add(block_hash, facts_of(block_hash))
        block = self._block_of[block_hash]
        self._cached.remove(block)
        self._use(block)
        self._writers[writer_id] = (block,)
        return block_hash

    def by_worth(self) -> tuple[BlockHash, ...]:
        """Return the names of all cached blocks, the first to be forgotten last. Slow: for the end of a process."""
        order, names = copy.deepcopy(self._order), []
        while (name := order.evict()) is not None:
            names.append(name)
        return tuple(reversed(names))

    def release_writer(self, writer_id: str) -> bool:
        """The writer has settled; False when it is unknown."""
        blocks = self._writers.pop(writer_id, None)
        if blocks is None:
            return False
        for block in reversed(blocks):
            self._unuse(block)
        return True

    def holders(self) -> tuple[Holder, ...]:
        """Return every lease and writer."""
        leases = [
            Holder(
                lease_id=lease.lease_id,
                owner=lease.owner,
                reader=lease.reader,
                epoch=lease.epoch,
                deadline_s=lease.deadline_s,
                num_blocks=len(lease.blocks),
            )
            for lease in self._leases.values()
        ]
        writers = [Holder(lease_id=name, num_blocks=len(blocks)) for name, blocks in self._writers.items()]
        return (*leases, *writers)

    def next_deadline_s(self) -> float:
        """Return when the first lease ends by the clock; infinity when none does."""
        return min((lease.deadline_s for lease in self._leases.values()), default=float("inf"))

    def name(self, block: BlockId, block_hash: BlockHash, facts: BlockFacts = NO_FACTS) -> bool:
        """Give a leased block its content's name, under which it can be found.

        Args:
            block: The block.
            block_hash: Its name.
            facts: What the eviction order may know of it.

        Returns:
            False when another block has that name; this one then stays nameless.

        Raises:
            ValueError: the block is not leased, or has another name.
        """
        if not self._users[block]:
            raise ValueError(f"block {block} must be leased to be named")
        if block_hash in self._block_of:
            return self._block_of[block_hash] == block
        if block in self._hash_of:
            raise ValueError(f"block {block} has another name: committed blocks do not change")
        self._hash_of[block] = block_hash
        self._block_of[block_hash] = block
        self._order.add(block_hash, facts)
        return True

    def unname(self, block_hash: BlockHash) -> bool:
        """Take a name away, so that its block is not found any more; False when nobody has it.

        A cached block becomes free; a leased one does when its last holder leaves.
        """
        block = self._block_of.pop(block_hash, None)
        if block is None:
            return False
        del self._hash_of[block]
        self._order.drop(block_hash)
        self._evicted.append(block_hash)
        if block in self._cached:
            self._cached.remove(block)
            self._free.append(block)
        return True

    def lookup(self, block_hash: BlockHash) -> BlockId | None:
        """Return the block of that name, or None."""
        return self._block_of.get(block_hash)

    def match(self, hashes: Sequence[BlockHash]) -> tuple[BlockId, ...]:
        """Return the blocks of the longest prefix of `hashes` that is named."""
        found: list[BlockId] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return tuple(found)

    def exclusive(self, lease_id: str, *, after_writers: bool = False) -> frozenset[BlockId]:
        """Return the blocks that the end of a lease makes available.

        Args:
            lease_id: A lease that lives, or not.
            after_writers: Whether blocks count that writers are on besides: they come when these have settled.
        """
        lease = self._leases.get(lease_id)
        if lease is None:
            return frozenset()
        writers = Counter(chain.from_iterable(self._writers.values())) if after_writers else Counter()
        return frozenset(block for block in lease.blocks if self._users[block] - writers[block] == 1)

    def may_change(self, block: BlockId) -> bool:
        """Return whether a block's content is its only lease's own: it has no name, and nobody shares it."""
        num_writers = sum(block in blocks for blocks in self._writers.values())
        return block not in self._hash_of and self._users[block] - num_writers == 1

    def num_left_to_writers(self, blocks: Iterable[BlockId]) -> int:
        """Return how many of the blocks nobody leases any more, while writers are still on them."""
        writers = Counter(chain.from_iterable(self._writers.values()))
        return sum(0 < self._users[block] == writers[block] for block in blocks)

    def is_cached(self, block: BlockId) -> bool:
        """Return whether a block is named and used by nobody."""
        return block in self._cached

    def forget_cached(self) -> None:
        """Drop the names of all cached blocks; they become free."""
        while self._cached:
            self._free.append(self._evict())

    def forget_of(self, tenant: str) -> bool:
        """Free one cached block of a tenant that others do not build on; False when there is none."""
        block_hash = self._order.evict(tenant)
        if block_hash is None:
            return False
        self._free.append(self._forget(block_hash))
        return True

    def names(self) -> tuple[BlockHash, ...]:
        """Return all names, for a snapshot to the global index."""
        return tuple(self._block_of)

    def take_evicted(self) -> tuple[BlockHash, ...]:
        """Return the names forgotten since the last call."""
        evicted, self._evicted = tuple(self._evicted), []
        return evicted

    def _require(self, num_blocks: int) -> None:
        if num_blocks > self.num_available:
            raise Saturated(
                f"{num_blocks} blocks wanted, {self.num_available} of {self._total} can be had",
                limit=str(self._total),
                retry_after_s=1.0,
            )

    def _take(self, num_blocks: int) -> list[BlockId]:
        taken = [self._free.popleft() if self._free else self._evict() for _ in range(num_blocks)]
        for block in taken:
            self._users[block] = 1
        self._num_used += num_blocks
        return taken

    def _evict(self) -> BlockId:
        block_hash = self._order.evict()
        if block_hash is None:
            raise InternalError("the eviction order knows of no block that rests, the ledger does")
        return self._forget(block_hash)

    def _forget(self, block_hash: BlockHash) -> BlockId:
        block = self._block_of.pop(block_hash)
        del self._hash_of[block]
        self._cached.remove(block)
        self._evicted.append(block_hash)
        return block

    def _hit(self, block: BlockId) -> None:
        self._cached.discard(block)
        if block in self._hash_of:
            self._order.use(self._hash_of[block])
        self._use(block)

    def _use(self, block: BlockId) -> None:
        self._num_used += not self._users[block]
        self._users[block] += 1

    def _unuse(self, block: BlockId) -> None:
        self._users[block] -= 1
        if self._users[block]:
            return
        self._num_used -= 1
        if block in self._hash_of:
            self._cached.add(block)
            self._order.rest(self._hash_of[block])
        else:
            self._free.append(block)
