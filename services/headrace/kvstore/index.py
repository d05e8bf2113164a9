"""Which worker's own cache holds which blocks: a pure index, fed by numbered reports."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from headrace.core.block import BlockHash
from headrace.errors import Saturated


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a worker says of its cache.

    Attributes:
        worker: Its name.
        epoch: Lifetime of its process.
        sequence: Number of the report within the epoch, from 0.
        stored: Blocks that came.
        removed: Blocks that left.
        is_snapshot: Whether `stored` is all there is.
    """

    worker: str
    epoch: str
    sequence: int
    stored: tuple[BlockHash, ...] = ()
    removed: tuple[BlockHash, ...] = ()
    is_snapshot: bool = False


@dataclass(slots=True, kw_only=True)
class _Cache:
    epoch: str
    next_sequence: int = 0
    hashes: set[BlockHash] = field(default_factory=set)


class PrefixIndex:
    """Sets of blocks by worker; holders of a block are found by its hash.

    What it says of a worker may be out of date but is never of an earlier epoch than the worker's last report.

    Args:
        max_workers: Most workers.
    """

    def __init__(self, max_workers: int) -> None:
        self._max_workers = max_workers
        self._caches: dict[str, _Cache] = {}
        self._holders: dict[BlockHash, set[str]] = {}

    @property
    def num_hashes(self) -> int:
        """Different blocks known."""
        return len(self._holders)

    def apply(self, report: Report) -> bool:
        """Take a report in; return whether the worker must send a snapshot because one before it was missed.

        Reports after a gap are not applied: they may name blocks whose removal was in the gap. A report that
        was applied before is ignored, so that a caller may repeat one whose answer it lost.

        Raises:
            Saturated: too many workers.
        """
        cache = self._cache(report)
        if report.sequence < cache.next_sequence:
            return False
        if report.is_snapshot:
            self._drop(report.worker, tuple(cache.hashes))
        elif report.sequence > cache.next_sequence:
            return True
        cache.next_sequence = report.sequence + 1
        self._drop(report.worker, report.removed)
        for block_hash in report.stored:
            cache.hashes.add(block_hash)
            self._holders.setdefault(block_hash, set()).add(report.worker)
        return False

    def forget(self, worker: str) -> None:
        """Drop a worker and all it holds; unknown ones are ignored."""
        cache = self._caches.get(worker)
        if cache is not None:
            self._drop(worker, tuple(cache.hashes))
            del self._caches[worker]

    def match(self, hashes: Sequence[BlockHash]) -> dict[str, int]:
        """Return how many leading blocks each worker holds, where it is at least one."""
        lengths: dict[str, int] = {}
        holders: set[str] = set(self._caches)
        for index, block_hash in enumerate(hashes):
            having = holders & self._holders.get(block_hash, set())
            lengths.update((worker, index) for worker in holders - having)
            holders = having
            if not holders:
                break
        lengths.update((worker, len(hashes)) for worker in holders)
        return {worker: length for worker, length in lengths.items() if length}

    def _cache(self, report: Report) -> _Cache:
        cache = self._caches.get(report.worker)
        if cache is not None and cache.epoch == report.epoch:
            return cache
        if cache is None and len(self._caches) >= self._max_workers:
            raise Saturated(f"the index holds {self._max_workers} workers", limit=str(self._max_workers))
        self.forget(report.worker)
        self._caches[report.worker] = _Cache(epoch=report.epoch)
        return self._caches[report.worker]

    def _drop(self, worker: str, hashes: Sequence[BlockHash]) -> None:
        held = self._caches[worker].hashes
        for block_hash in hashes:
            if block_hash not in held:
                continue
            held.discard(block_hash)
            holders = self._holders[block_hash]
            holders.discard(worker)
            if not holders:
                del self._holders[block_hash]
