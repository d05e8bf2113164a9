"""KV of preempted sequences in host memory, and what copying it costs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headrace.clock import Clock
from headrace.core.block import BlockId
from headrace.core.plan import SwapView
from headrace.engine.batch import Runner

NUM_TRIAL_BLOCKS = 8
"""Blocks copied to measure at the start: enough to see a rate, few enough to take no time."""

SPEED_WEIGHT = 0.25
"""Weight of the last copy in the measured speed: one that met a busy machine moves it by a quarter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedKv:
    """KV that was copied out of the pool.

    Attributes:
        places: Where it is in host memory; the blocks of the sequence in order.
        num_tokens: Leading tokens whose KV is in them.
    """

    places: tuple[int, ...]
    num_tokens: int


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
        self._save_s = self._load_s = 0.0
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
        return SwapView(num_free_blocks=len(self._free), save_s=self._save_s, load_s=self._load_s)

    def save(self, blocks: Sequence[BlockId], num_tokens: int) -> SavedKv:
        """Copy blocks out; there must be room for them."""
        begun_s = self._clock.now()
        saved = SavedKv(places=self._put(blocks), num_tokens=num_tokens)
        self._save_s = _moved(self._save_s, self._clock.now() - begun_s, len(blocks))
        return saved

    def load(self, saved: SavedKv, first: int, blocks: Sequence[BlockId]) -> None:
        """Copy saved blocks back, from the one with index `first` on, as many as `blocks` are given."""
        if blocks:
            begun_s = self._clock.now()
            self._get(saved.places[first : first + len(blocks)], blocks)
            self._load_s = _moved(self._load_s, self._clock.now() - begun_s, len(blocks))

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
        for _ in range(2):  # The first touches memory for the first time.
            begun_s = self._clock.now()
            places = self._put(blocks)
            put_s = self._clock.now()
            self._get(places, blocks)
            self._save_s = (put_s - begun_s) / len(blocks)
            self._load_s = (self._clock.now() - put_s) / len(blocks)
            self._free.extend(places)


def _moved(known_s: float, seconds: float, num_blocks: int) -> float:
    return known_s + SPEED_WEIGHT * (seconds / num_blocks - known_s) if num_blocks else known_s
