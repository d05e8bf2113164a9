"""Which slots of the disk tier a write may take. Pure; time is passed in."""

from collections import deque
from collections.abc import Iterable

RETRY_S = 30.0
"""After the disk refused a write, how long it is asked only for slots in which a write has succeeded before."""


class FreeSlots:
    """Slots that hold no block, in two groups.

    A slot that was written before has its room on disk. One that never was may find the disk full, and one
    that failed may fail again: these are taken last, and none of them for a while after a refusal.
    """

    def __init__(self) -> None:
        self._proven: list[int] = []
        self._unproven: deque[int] = deque()
        self._retry_at_s = float("-inf")

    def num_free(self, now_s: float) -> int:
        """Return how many slots `take` would give."""
        return len(self._proven) + (len(self._unproven) if now_s >= self._retry_at_s else 0)

    def take(self, now_s: float) -> int | None:
        """Give a slot to a writer, if there is one."""
        if self._proven:
            return self._proven.pop()
        return self._unproven.popleft() if self.num_free(now_s) else None

    def give(self, slot: int) -> None:
        """Take back a slot in which a write succeeded."""
        self._proven.append(slot)

    def give_unproven(self, slots: Iterable[int]) -> None:
        """Take slots that were never written, or that lost what was written."""
        self._unproven.extend(slots)

    def refuse(self, slot: int, now_s: float) -> None:
        """Take back a slot that the disk refused to write."""
        self._unproven.append(slot)
        self._retry_at_s = now_s + RETRY_S

    def clear(self) -> None:
        """Give no slot any more."""
        self._proven.clear()
        self._unproven.clear()
