"""Blocks and their holders, in pages of blocks that were announced together, within a budget of bytes."""

import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import eq

from headrace.core.block import BlockHash
from headrace.index.slots import Holders, HolderSets

PAGE_BLOCKS = 64
"""Long enough that a prompt of 128k tokens is 128 look-ups, short enough to search from end to end."""
FRESH_SHARE = 4
"""One part in that many is kept for pages that no match has reached yet, as 2Q proposes."""
SWEPT_PAGES = 4
"""Pages that each event rids of blocks without holders."""

BLOCK_BYTES = 80
"""Of a block beside the table: its hash as an object of 64 bytes, and a pointer to each of hash and holders."""
PAGE_BYTES = 400
"""Of a page beside its blocks: three objects and an entry of a queue."""
HOLDERS_BYTES = 320
"""Of a set of holders."""
_TABLE_GROWTH = 3
"""CPython gives a full dict the next power of two that is this many times what it holds."""
_TABLE_SLACK = 4
"""A table is made anew when it takes that many times what it needs: a dict does not shrink by itself."""


class Page:
    """Up to `PAGE_BLOCKS` blocks in the order of their announcement, most often that of a chain.

    Nothing relies on that order but speed. A page without blocks is none any more.
    """

    __slots__ = ("holders", "is_proven", "names")

    def __init__(self, names: tuple[BlockHash, ...], holders: list[Holders]) -> None:
        self.names = names
        self.holders = holders
        self.is_proven = False


class Pages:
    """Owns the table of all blocks: hash -> page.

    Pages leave in the order of 2Q (Johnson and Shasha, VLDB 1994): what no match ever reached first, oldest first, and
    then what was matched longest ago. A match makes the end of its chain older than its beginning, so that chains are
    dropped from their end.

    Args:
        budget_bytes: Not exceeded after `shed`, but by `reserved_bytes` alone; while CPython copies the table to a
            larger one, both are there.
        sets: Sets of holders.

    Attributes:
        reserved_bytes: Of the budget, what others take.
        num_evicted: Blocks that were dropped, or not taken in, for want of room.
    """

    def __init__(self, budget_bytes: int, sets: HolderSets) -> None:
        self.budget_bytes = budget_bytes
        self.reserved_bytes = 0
        self.num_evicted = 0
        self._sets = sets
        self._blocks: dict[BlockHash, Page] = {}
        self._fresh: OrderedDict[Page, None] = OrderedDict()
        self._proven: OrderedDict[Page, None] = OrderedDict()
        self._unswept: list[Page] = []

    @property
    def num_blocks(self) -> int:
        """Blocks that someone holds."""
        return len(self._blocks) - sum(holders.num_blocks for holders in self._sets if not holders.mask)

    @property
    def memory_bytes(self) -> int:
        """Bytes that all of it takes."""
        return self._bytes_beside_table(len(self._blocks), self._num_pages) + sys.getsizeof(self._blocks)

    @property
    def _num_pages(self) -> int:
        return len(self._fresh) + len(self._proven)

    def runs(self, hashes: tuple[BlockHash, ...]) -> Iterator[tuple[Page, Holders, int]]:
        """Yield the leading blocks that are known: page, holders, and how many blocks in a row have them."""
        position = 0
        while position < len(hashes) and (found := self._locate(hashes, position)) is not None:
            page, start, length = found
            for holders, count in _groups(page.holders[start : start + length]):
                yield page, holders, count
            position += length

    def touch(self, pages: Sequence[Page]) -> None:
        """Say that a match reached these pages, in the order of the chain."""
        for page in reversed(pages):
            if page.is_proven:
                self._proven.move_to_end(page)
            else:
                del self._fresh[page]
                self._proven[page] = None
                page.is_proven = True

    def store(self, hashes: tuple[BlockHash, ...], bit: int, clear: int, open_page: Page | None) -> Page | None:
        """Add a holder to blocks, also to unknown ones.

        Args:
            hashes: The blocks.
            bit: The holder.
            clear: Holders whose place it takes.
            open_page: Where a few unknown ones may go, if it has room.

        Returns:
            The page that the next ones may go to.
        """
        if not self._blocks.keys().isdisjoint(hashes):
            self.rewrite(hashes, bit, clear)
            hashes = tuple(name for name in hashes if name not in self._blocks)
        if len(hashes) > PAGE_BLOCKS:
            hashes = tuple(dict.fromkeys(hashes))
        if open_page is not None and 0 < len(open_page.names) <= PAGE_BLOCKS - len(hashes):
            self._extend(open_page, hashes, bit)
            return open_page
        last = open_page
        # From the end, so that the beginning of a chain is its youngest page.
        for start in reversed(range(0, len(hashes), PAGE_BLOCKS)):
            page = self._put(hashes[start : start + PAGE_BLOCKS], bit)
            last = page if start + PAGE_BLOCKS >= len(hashes) else last
        return last

    def rewrite(self, hashes: tuple[BlockHash, ...], bit: int, clear: int) -> None:
        """Take the holders `clear` from the blocks among these that are known, and give them `bit`."""
        position = 0
        while position < len(hashes):
            found = self._locate(hashes, position)
            if found is None:
                position += 1
                continue
            page, start, length = found
            position += length
            for holders, count in _groups(page.holders[start : start + length]):
                mask = holders.mask & ~clear | bit
                if mask != holders.mask:
                    page.holders[start : start + count] = [self._sets.acquire(mask, count)] * count
                    self._sets.release(holders, count)
                start += count
            if not bit:
                self._bury(page)
        self.shed()

    def retire(self, mask: int) -> None:
        """Take these holders from all blocks; what nobody holds any more leaves the memory bit by bit."""
        self._sets.retire(mask)
        self._unswept = [*self._proven, *self._fresh]

    def sweep(self) -> None:
        """Remove blocks without holders from a few pages."""
        if self._unswept:
            for page in self._unswept[-SWEPT_PAGES:]:
                self._bury(page)
            del self._unswept[-SWEPT_PAGES:]
            self.shed()

    def shed(self) -> None:
        """Come back under the budget after something else than blocks was added."""
        if sys.getsizeof(self._blocks) > _TABLE_SLACK * _table_bytes(len(self._blocks)):
            self._blocks = dict(self._blocks)
        self._make_room(0, 0)

    def verify(self) -> None:
        """Count everything anew; slow, for tests.

        Raises:
            AssertionError: something does not add up.
        """
        counts: dict[Holders, int] = {}
        for queue, is_proven in ((self._fresh, False), (self._proven, True)):
            for page in queue:
                assert 0 < len(page.names) == len(page.holders) <= PAGE_BLOCKS
                assert page.is_proven is is_proven
                for name, holders in zip(page.names, page.holders, strict=True):
                    assert self._blocks[name] is page
                    counts[holders] = counts.get(holders, 0) + 1
        assert sum(counts.values()) == len(self._blocks)
        assert counts == {holders: holders.num_blocks for holders in self._sets}
        assert not self._blocks or self.memory_bytes <= self.budget_bytes
        assert all(
            not page.names or page in (self._proven if page.is_proven else self._fresh) for page in self._unswept
        )

    def _locate(self, hashes: tuple[BlockHash, ...], position: int) -> tuple[Page, int, int] | None:
        """Return the page of a block, its place there, and how many blocks from there on are those of `hashes`."""
        page = self._blocks.get(hashes[position])
        if page is None:
            return None
        names = page.names
        start = 0 if names[0] == hashes[position] else names.index(hashes[position])
        known = names[start:]
        wanted = hashes[position : position + len(known)]
        if wanted == known:
            return page, start, len(known)
        are_equal = list(map(eq, wanted, known))
        return page, start, are_equal.index(False) if False in are_equal else len(are_equal)

    def _put(self, hashes: tuple[BlockHash, ...], mask: int) -> Page | None:
        if not self._make_room(len(hashes), 1):
            self.num_evicted += len(hashes)
            return None
        page = Page(hashes, [])
        self._fresh[page] = None
        self._append(page, (), hashes, mask)
        return page

    def _extend(self, page: Page, hashes: tuple[BlockHash, ...], mask: int) -> None:
        if not hashes:
            return
        self._make_room(len(hashes), 0)
        if page.names:
            self._append(page, page.names, hashes, mask)
        else:
            self.num_evicted += len(hashes)

    def _append(self, page: Page, before: tuple[BlockHash, ...], hashes: tuple[BlockHash, ...], mask: int) -> None:
        entries = dict.fromkeys(hashes, page)
        if len(entries) < len(hashes):
            hashes = tuple(entries)
        page.names = before + hashes
        page.holders += [self._sets.acquire(mask, len(hashes))] * len(hashes)
        self._blocks.update(entries)

    def _bury(self, page: Page) -> None:
        """Remove the blocks without holders from a page, and the page if none remain."""
        dead = [name for name, holders in zip(page.names, page.holders, strict=True) if not holders.mask]
        if not dead:
            return
        for name in dead:
            del self._blocks[name]
        living = [(name, holders) for name, holders in zip(page.names, page.holders, strict=True) if holders.mask]
        for holders, count in _groups(page.holders):
            if not holders.mask:
                self._sets.release(holders, count)
        page.names = tuple(name for name, _ in living)
        page.holders = [holders for _, holders in living]
        if not living:
            del (self._proven if page.is_proven else self._fresh)[page]

    def _make_room(self, num_blocks: int, num_pages: int) -> bool:
        while self._bytes_with(num_blocks, num_pages) > self.budget_bytes:
            if not self._blocks:
                return False
            self._evict()
        return True

    def _evict(self) -> None:
        is_fresh = len(self._fresh) * FRESH_SHARE >= self._num_pages
        page, _ = (self._fresh if is_fresh else self._proven).popitem(last=False)
        for name in page.names:
            del self._blocks[name]
        for holders, count in _groups(page.holders):
            self._sets.release(holders, count)
            self.num_evicted += count if holders.mask else 0
        page.names, page.holders = (), []

    def _bytes_with(self, num_blocks: int, num_pages: int) -> int:
        """Return the bytes after adding so much and a set, with the largest table that CPython might make of it."""
        num_blocks += len(self._blocks)
        table = max(sys.getsizeof(self._blocks), _table_bytes(num_blocks))
        return self._bytes_beside_table(num_blocks, self._num_pages + num_pages) + table + HOLDERS_BYTES

    def _bytes_beside_table(self, num_blocks: int, num_pages: int) -> int:
        holders_bytes = len(self._sets) * HOLDERS_BYTES
        return num_blocks * BLOCK_BYTES + num_pages * PAGE_BYTES + holders_bytes + self.reserved_bytes


def _groups(holders: list[Holders]) -> Iterable[tuple[Holders, int]]:
    """Return the runs of the same set of holders, with their lengths."""
    if holders.count(holders[0]) == len(holders):
        return ((holders[0], len(holders)),)
    return [(first, sum(1 for _ in group)) for first, group in groupby(holders)]


def _table_bytes(num_entries: int) -> int:
    """Return the bytes of a dict that was just enlarged or cleaned with so many entries in it."""
    size = 1 << max(3, (num_entries * _TABLE_GROWTH - 1).bit_length())
    index_bytes = 1 if size <= 1 << 7 else 2 if size <= 1 << 15 else 4
    return 64 + size * index_bytes + size * 2 // 3 * 24
