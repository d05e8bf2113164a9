"""Which cached block to forget first: orders that a ledger asks. Pure and deterministic; none knows a clock."""

import heapq
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

from headrace.core.block import BlockHash
from headrace.core.cost import CostModel, chunk_work

SMALL_SHARE = 0.1
"""Share of the small queue in S3-FIFO; the paper's."""

MOST_USES = 3
"""S3-FIFO counts uses in two bits."""

FADE_SHARE = 0.25
"""Share of the store that has to be replaced before a block worth e times as much as another, and last used as much
earlier, is forgotten with it. On two Mooncake traces and three sizes of the store, 0.1 to 0.5 saved 0.98 to 1.17 of
the seconds that LRU saves, 0.25 at least 0.99; more gains up to 1.5 times in one store and loses half in another."""

SPARE_ENTRIES = 64
"""Entries of an order that may hold no more, beside as many as there are blocks."""

LEAST_S = 1e-9
"""What a block is worth at least: a cost model of one machine's noise may say 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFacts:
    """What an order may know of a block.

    Attributes:
        parent: Name of the block before it in the prompt; None for the first one.
        num_tokens_before: Tokens of the prompt before it.
        tenant: Whose quota it counts against.
    """

    parent: BlockHash | None = None
    num_tokens_before: int = 0
    tenant: str = ""


NO_FACTS = BlockFacts()


class EvictionOrder(Protocol):
    """In which order a store forgets the blocks that nobody uses.

    A block is named (`add`), rests while nobody uses it (`rest`), is used again (`use`) and leaves, either by the
    order's own choice (`evict`) or otherwise (`drop`). Only resting blocks are evicted. A block is found only
    behind its parent, so no order evicts one while a block behind it is present, unless nothing else rests.
    """

    def add(self, name: BlockHash, facts: BlockFacts) -> None:
        """Take note of a block, which is in use."""

    def use(self, name: BlockHash) -> None:
        """Take note that somebody uses a known block (a hit); it does not rest any more."""

    def hold(self, name: BlockHash) -> None:
        """Take note that a known block must stay for now, though nobody asked for it: it does not rest any more."""

    def rest(self, name: BlockHash) -> None:
        """Take note that nobody uses a known block any more. Of a prompt, the last block rests first."""

    def drop(self, name: BlockHash) -> None:
        """Forget a block that left otherwise."""

    def evict(self, tenant: str | None = None) -> BlockHash | None:
        """Choose a resting block and forget it.

        Args:
            tenant: Whose blocks are to be chosen from; None chooses from all.

        Returns:
            Its name; None when nothing rests, or, of one tenant, nothing that others do not build on.
        """


class _Chains:
    """The blocks that are present, and how many of them stand directly behind each."""

    def __init__(self) -> None:
        self.facts: dict[BlockHash, BlockFacts] = {}
        self._num_behind: dict[BlockHash, int] = {}

    def add(self, name: BlockHash, facts: BlockFacts) -> None:
        self.facts[name] = facts
        if facts.parent is not None:
            self._num_behind[facts.parent] = self._num_behind.get(facts.parent, 0) + 1

    def remove(self, name: BlockHash) -> BlockHash | None:
        """Return the block before it if that is now the last of its chain."""
        parent = self.facts.pop(name).parent
        if parent is None:
            return None
        self._num_behind[parent] -= 1
        if self._num_behind[parent]:
            return None
        del self._num_behind[parent]
        return parent

    def is_last(self, name: BlockHash) -> bool:
        return name not in self._num_behind


class LeastRecentlyUsed:
    """Forgets first what has rested longest."""

    def __init__(self) -> None:
        self._chains = _Chains()
        self._num_rests = 0
        self._resting: dict[str, OrderedDict[BlockHash, int]] = {}

    def add(self, name: BlockHash, facts: BlockFacts) -> None:
        """See EvictionOrder."""
        self._chains.add(name, facts)

    def use(self, name: BlockHash) -> None:
        """See EvictionOrder."""
        tenant = self._chains.facts[name].tenant
        row = self._resting.get(tenant)
        if row is not None:
            row.pop(name, None)
            if not row:
                del self._resting[tenant]

    def hold(self, name: BlockHash) -> None:
        """See EvictionOrder."""
        self.use(name)

    def rest(self, name: BlockHash) -> None:
        """See EvictionOrder."""
        self._num_rests += 1
        self._resting.setdefault(self._chains.facts[name].tenant, OrderedDict())[name] = self._num_rests

    def drop(self, name: BlockHash) -> None:
        """See EvictionOrder."""
        self.use(name)
        self._chains.remove(name)

    def evict(self, tenant: str | None = None) -> BlockHash | None:
        """See EvictionOrder. Constant time per tenant while the blocks of a prompt rest last one first."""
        rows = self._resting.values() if tenant is None else [self._resting.get(tenant, OrderedDict())]
        lasts = (next(filter(self._chains.is_last, row), None) for row in rows)
        found = [(row[name], name) for row, name in zip(rows, lasts, strict=True) if name is not None]
        if not found and tenant is None:
            found = [(row[name], name) for row in rows for name in list(row)[:1]]
        if not found:
            return None
        _, oldest = min(found)
        self.drop(oldest)
        return oldest


class S3Fifo:
    """Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, section 4.

    New blocks enter a small queue and leave the store from there unless they were used meanwhile; used ones, and
    those that come back soon after, go through a main queue that gives each use another round. Deviation: a block
    that may not leave, in use or not the last of its chain, counts as used when its turn comes.

    Args:
        num_blocks: Size of the store.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._chains = _Chains()
        self._small: OrderedDict[BlockHash, int] = OrderedDict()
        self._main: OrderedDict[BlockHash, int] = OrderedDict()
        self._ghosts: OrderedDict[BlockHash, None] = OrderedDict()
        self._waiting: set[BlockHash] = set()
        self._resting: set[BlockHash] = set()

    def add(self, name: BlockHash, facts: BlockFacts) -> None:
        """See EvictionOrder. The block enters its queue when it rests first: the last of a prompt before the others."""
        self._chains.add(name, facts)
        self._waiting.add(name)

    def use(self, name: BlockHash) -> None:
        """See EvictionOrder."""
        self._resting.discard(name)
        for queue in (self._small, self._main):
            if name in queue:
                queue[name] = min(MOST_USES, queue[name] + 1)

    def hold(self, name: BlockHash) -> None:
        """See EvictionOrder."""
        self._resting.discard(name)

    def rest(self, name: BlockHash) -> None:
        """See EvictionOrder."""
        self._resting.add(name)
        if name in self._waiting:
            self._waiting.remove(name)
            known = name in self._ghosts
            self._ghosts.pop(name, None)
            (self._main if known else self._small)[name] = 0

    def drop(self, name: BlockHash) -> None:
        """See EvictionOrder."""
        self._resting.discard(name)
        self._waiting.discard(name)
        self._small.pop(name, None)
        self._main.pop(name, None)
        self._chains.remove(name)

    def evict(self, tenant: str | None = None) -> BlockHash | None:
        """See EvictionOrder. Linear in the store for one tenant: its blocks have no queues of their own."""
        victim = self._next() if tenant is None else self._next_of(tenant)
        if victim is None:
            return None
        if victim in self._small:
            self._ghosts[victim] = None
            if len(self._ghosts) > (1 - SMALL_SHARE) * self._num_blocks:
                self._ghosts.popitem(last=False)
        self.drop(victim)
        return victim

    def _next(self) -> BlockHash | None:
        # A block that may go does so on its last round at the latest; none may where only their ends are in use.
        for _ in range((MOST_USES + 2) * (len(self._small) + len(self._main)) if self._resting else 0):
            is_small = len(self._small) >= SMALL_SHARE * self._num_blocks or not self._main
            queue = self._small if is_small and self._small else self._main
            name, num_uses = next(iter(queue.items()))
            may_leave = self._may_leave(name)
            if may_leave and not num_uses:
                return name
            del queue[name]
            self._main[name] = 0 if queue is self._small else num_uses - (may_leave and num_uses > 0)
        return next((name for name in (*self._small, *self._main) if name in self._resting), None)

    def _next_of(self, tenant: str) -> BlockHash | None:
        own = (name for name in (*self._small, *self._main) if self._chains.facts[name].tenant == tenant)
        return next(filter(self._may_leave, own), None)

    def _may_leave(self, name: BlockHash) -> bool:
        return name in self._resting and self._chains.is_last(name)


@dataclass(slots=True)
class _Worth:
    """What `ByValue` knows of a block: the higher the rank, the longer it stays; `entry` tells its last rest."""

    num_uses: int
    seconds: float
    rank: float = 0.0
    entry: int = 0


class ByValue:
    """Forgets first what saves the fewest seconds of recomputing, weighted by the chance that it is wanted again.

    The chance is taken to grow with the uses and to fade exponentially with the time since the last one, as in LRFU
    (Lee et al., IEEE Transactions on Computers 50, 2001). All values fade alike, so their order does not change
    while blocks rest: a heap over `time of the last use + fade * log(uses * seconds)` holds it, where time counts
    blocks that came. A block that continues a chain inherits its uses: the third turn of a conversation is likelier
    to have a fourth than the first to have a second. All blocks of a store have the same size, so seconds per byte
    need no division here.

    The fade is a share of the store, for how soon blocks are wanted again nobody knows: a store that trusts values for
    longer than its blocks stay ends up full of what was worth most once and is wanted by nobody.

    Args:
        cost: What recomputing costs.
        block_tokens: Tokens of a block.
        num_blocks: Size of the store.
    """

    def __init__(self, cost: CostModel, *, block_tokens: int, num_blocks: int) -> None:
        self._cost = cost
        self._block_tokens = block_tokens
        self._fade = FADE_SHARE * num_blocks
        self._chains = _Chains()
        self._worth: dict[BlockHash, _Worth] = {}
        self._resting: set[BlockHash] = set()
        self._heaps: dict[str, list[tuple[float, int, BlockHash]]] = {}
        self._num_entries = 0
        self._num_added = 0
        self._num_rests = 0

    def add(self, name: BlockHash, facts: BlockFacts) -> None:
        """See EvictionOrder."""
        continued = self._worth.get(facts.parent) if facts.parent and self._chains.is_last(facts.parent) else None
        self._worth[name] = _Worth(
            num_uses=continued.num_uses if continued else 1,
            seconds=block_seconds(self._cost, self._block_tokens, facts.num_tokens_before),
        )
        self._chains.add(name, facts)
        self._num_added += 1

    def use(self, name: BlockHash) -> None:
        """See EvictionOrder."""
        self._worth[name].num_uses += 1
        self._resting.discard(name)

    def hold(self, name: BlockHash) -> None:
        """See EvictionOrder."""
        self._resting.discard(name)

    def rest(self, name: BlockHash) -> None:
        """See EvictionOrder. Logarithmic in the store, like `evict`."""
        worth = self._worth[name]
        self._num_rests += 1
        worth.entry = self._num_rests
        worth.rank = self._num_added + self._fade * math.log(worth.num_uses * max(worth.seconds, LEAST_S))
        self._resting.add(name)
        self._offer(name)

    def drop(self, name: BlockHash) -> None:
        """See EvictionOrder."""
        self._resting.discard(name)
        del self._worth[name]
        parent = self._chains.remove(name)
        if parent in self._resting:
            self._offer(parent)

    def evict(self, tenant: str | None = None) -> BlockHash | None:
        """See EvictionOrder."""
        heaps = self._heaps.values() if tenant is None else [self._heaps.get(tenant, [])]
        found = [heap[0] for heap in heaps if self._settle(heap)]
        if not found and tenant is None:
            found = [(self._worth[name].rank, self._worth[name].entry, name) for name in self._resting]
        if not found:
            return None
        _, _, victim = min(found)
        self.drop(victim)
        return victim

    def _offer(self, name: BlockHash) -> None:
        """Enter a block that may leave; one with others behind it is entered when the last of them has left."""
        if self._chains.is_last(name):
            worth = self._worth[name]
            heap = self._heaps.setdefault(self._chains.facts[name].tenant, [])
            heapq.heappush(heap, (worth.rank, worth.entry, name))
            self._num_entries += 1
            if self._num_entries > 2 * len(self._worth) + SPARE_ENTRIES:
                self._tidy()

    def _tidy(self) -> None:
        """Take off all that does not hold any more: blocks that are used and never evicted leave an entry each time."""
        for tenant, heap in tuple(self._heaps.items()):
            heap[:] = (each for each in heap if self._holds(each[1], each[2]))
            heapq.heapify(heap)
            if not heap:
                del self._heaps[tenant]
        self._num_entries = sum(map(len, self._heaps.values()))

    def _settle(self, heap: list[tuple[float, int, BlockHash]]) -> bool:
        """Take off what does not hold any more; return whether something is left."""
        while heap and not self._holds(heap[0][1], heap[0][2]):
            heapq.heappop(heap)
            self._num_entries -= 1
        return bool(heap)

    def _holds(self, entry: int, name: BlockHash) -> bool:
        return name in self._resting and self._worth[name].entry == entry and self._chains.is_last(name)


def block_seconds(cost: CostModel, block_tokens: int, num_tokens_before: int) -> float:
    """Return what recomputing one block of many adds to a step: the step itself is paid anyway."""
    return cost.seconds(chunk_work(block_tokens, num_tokens_before)) - cost.step_s - cost.prompt_s
