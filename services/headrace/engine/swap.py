"""KV of preempted sequences in host memory, and what copying it costs."""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headrace.clock import Clock
from headrace.core.block import BlockId
from headrace.core.plan import SwapView
from headrace.engine.batch import Runner

NUM_TRIAL_BLOCKS = 8
"""Blocks copied to measure at the start: enough to see a rate, few enough to take no time."""

NUM_TRIALS = 5
"""Copies at the start, of which the fastest counts: whatever else starts on this machine only makes them slower."""

NUM_LAST = 7
"""Copies whose median is the speed: a few that met a busy machine change nothing."""

FORGOTTEN_S = 10.0
"""From when on the speed of the last copies counts no more. Who finds copies too slow makes none, and would never learn
that they are fast again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedKv:
    """KV that was copied out of the pool.

    Attributes:
        places: Where it is in host memory; the blocks of the sequence in order.
        num_tokens: Leading tokens whose KV is in them.
    """

    places: tuple[int, ...]
    num_tokens: int


class _Speed:
    """Seconds that copying a block takes in one direction.

    Args:
        first_s: What is known before any copy, and when those there were are forgotten.
    """

    def __init__(self, first_s: float) -> None:
        self._first_s = first_s
        self._last: deque[float] = deque(maxlen=NUM_LAST)
        self._noted_s = 0.0

    def at(self, now_s: float) -> float:
        """Return the seconds a block takes now."""
        if now_s - self._noted_s >= FORGOTTEN_S:
            self._last.clear()
        return statistics.median_low((self._first_s, *self._last))

    def note(self, seconds: float, num_blocks: int, now_s: float) -> None:
        """Take a copy into account that ended now."""
        self.at(now_s)
        self._last.append(seconds / num_blocks)
        self._noted_s = now_s


class HostSwap:
    """Owns a bounded amount of host memory for KV and the measured time of copies.

    The memory is reserved as a whole, and taken from the machine as it is used for the first time: pieces of any size
    that come and go would leave a heap full of holes.

    Args:
        runner: Owner of the blocks.
        num_blocks: Most blocks kept; 0 keeps none.
        pool_blocks: Blocks of the pool; nobody uses them yet.
        clock: Measures copies.
    """

    def __init__(self, runner: Runner, num_blocks: int, pool_blocks: int, clock: Clock) -> None:
        self._runner = runner
        self._clock = clock
        self._free = list(range(num_blocks))
        self._save, self._load = _Speed(0.0), _Speed(0.0)
        self._memory = torch.empty((0, 0), dtype=torch.uint8)
        if num_blocks:
            trial = [BlockId(index) for index in range(min(NUM_TRIAL_BLOCKS, num_blocks, pool_blocks))]
            size = runner.read_blocks(trial).shape[1]
            # Another thread will write into it; made in a caller's inference mode it could not.
            with torch.inference_mode(mode=False):
                self._memory = torch.empty((num_blocks, size), dtype=torch.uint8)
            self._measure(trial)

    def view(self) -> SwapView:
        """Return what a policy may know."""
        now_s = self._clock.now()
        return SwapView(num_free_blocks=len(self._free), save_s=self._save.at(now_s), load_s=self._load.at(now_s))

    def save(self, blocks: Sequence[BlockId], num_tokens: int) -> SavedKv:
        """Copy blocks out; there must be room for them."""
        begun_s = self._clock.now()
        saved = SavedKv(places=self._put(blocks), num_tokens=num_tokens)
        self._note(self._save, begun_s, len(blocks))
        return saved

    def load(self, saved: SavedKv, first: int, blocks: Sequence[BlockId]) -> None:
        """Copy saved blocks back, from the one with index `first` on, as many as `blocks` are given."""
        if not blocks:
            return
        begun_s = self._clock.now()
        self._get(saved.places[first : first + len(blocks)], blocks)
        self._note(self._load, begun_s, len(blocks))

    def drop(self, saved: SavedKv) -> None:
        """Give the memory of saved blocks back; once."""
        self._free.extend(saved.places)

    def _put(self, blocks: Sequence[BlockId]) -> tuple[int, ...]:
        places = tuple(self._free.pop() for _ in blocks)
        self._memory[list(places)] = self._runner.read_blocks(blocks)
        return places

    def _get(self, places: Sequence[int], blocks: Sequence[BlockId]) -> None:
        self._runner.write_blocks(blocks, self._memory[list(places)])

    def _measure(self, blocks: Sequence[BlockId]) -> None:
        """Copy blocks that nobody uses yet out and back."""
        save_s, load_s = [], []
        for _ in range(NUM_TRIALS):
            begun_s = self._clock.now()
            places = self._put(blocks)
            put_s = self._clock.now()
            self._get(places, blocks)
            save_s.append((put_s - begun_s) / len(blocks))
            load_s.append((self._clock.now() - put_s) / len(blocks))
            self._free.extend(places)
        self._save, self._load = _Speed(min(save_s)), _Speed(min(load_s))

    def _note(self, speed: _Speed, begun_s: float, num_blocks: int) -> None:
        now_s = self._clock.now()
        speed.note(now_s - begun_s, num_blocks, now_s)
