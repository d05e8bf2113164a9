"""Blocks of contexts that were given up and are about to come back."""

from collections import deque
from dataclasses import dataclass

from headrace.clock import Clock
from headrace.core.block import BlockId
from headrace.engine.cache import BlockCache
from headrace.engine.sequence import Sequence

LEAVING_S = 1.0
"""How long such blocks are waited for, before another context is given up: an owner has to close it, and its writer to
settle, which takes milliseconds unless somebody is dead."""

MAX_LEAVING = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class _Leaver:
    lease_id: str
    blocks: frozenset[BlockId]
    until_s: float


class Leaving:
    """Counts them, so that one given up makes room once.

    Args:
        cache: Owner of the blocks.
        clock: Ends the patience.
    """

    def __init__(self, cache: BlockCache, clock: Clock) -> None:
        self._cache = cache
        self._clock = clock
        self._leavers: deque[_Leaver] = deque(maxlen=MAX_LEAVING)

    def note(self, sequence: Sequence) -> None:
        """Take note of a held sequence that has to leave."""
        blocks = self._cache.exclusive(sequence, after_writers=True)
        until_s = self._clock.now() + LEAVING_S
        self._leavers.append(_Leaver(lease_id=sequence.lease_id, blocks=blocks, until_s=until_s))

    def num_blocks(self) -> int:
        """Return how many blocks are about to come back."""
        now_s, ledger = self._clock.now(), self._cache.ledger
        while self._leavers and self._leavers[0].until_s <= now_s:
            self._leavers.popleft()
        count = 0
        for leaver in self._leavers:
            if ledger.find(leaver.lease_id) is not None:
                count += len(ledger.exclusive(leaver.lease_id, after_writers=True))
            else:
                count += ledger.num_left_to_writers(leaver.blocks)
        return count

    def next_end_s(self) -> float:
        """Return when the first of them is not waited for any more; infinity when there is none."""
        return self._leavers[0].until_s if self._leavers else float("inf")
