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
        data: `[num_blocks, block_bytes]`, uint8, in host memory; the blocks of the sequence in order.
        num_tokens: Leading tokens whose KV is in them.
    """

    data: torch.Tensor
    num_tokens: int


class HostSwap:
    """Owns a bounded amount of host memory for KV and the measured time of copies.

    Args:
        runner: Owner of the blocks.
        num_blocks: Most blocks kept; 0 keeps none.
        pool_blocks: Blocks of the pool; nobody uses them yet.
        clock: Measures copies.
    """

    def __init__(self, runner: Runner, num_blocks: int, pool_blocks: int, clock: Clock) -> None:
        self._runner = runner
        self._clock = clock
        self._num_blocks = num_blocks
        self._num_used = 0
        self._save_s = self._load_s = 0.0
        if num_blocks:
            self._measure(min(NUM_TRIAL_BLOCKS, num_blocks, pool_blocks))

    def view(self) -> SwapView:
        """Return what a policy may know."""
        return SwapView(num_free_blocks=self._num_blocks - self._num_used, save_s=self._save_s, load_s=self._load_s)

    def save(self, blocks: Sequence[BlockId], num_tokens: int) -> SavedKv:
        """Copy blocks out; there must be room for them."""
        begun_s = self._clock.now()
        data = self._runner.read_blocks(blocks)
        self._save_s = _moved(self._save_s, self._clock.now() - begun_s, len(blocks))
        self._num_used += len(blocks)
        return SavedKv(data=data, num_tokens=num_tokens)

    def load(self, saved: SavedKv, first: int, blocks: Sequence[BlockId]) -> None:
        """Copy saved blocks back, from the one with index `first` on, as many as `blocks` are given."""
        if blocks:
            begun_s = self._clock.now()
            self._runner.write_blocks(blocks, saved.data[first : first + len(blocks)])
            self._load_s = _moved(self._load_s, self._clock.now() - begun_s, len(blocks))

    def drop(self, saved: SavedKv) -> None:
        """Give the memory of saved blocks back; once."""
        self._num_used -= len(saved.data)

    def _measure(self, num_blocks: int) -> None:
        """Copy blocks that nobody uses yet out and back."""
        blocks = [BlockId(index) for index in range(num_blocks)]
        for _ in range(2):  # The first touches memory for the first time.
            begun_s = self._clock.now()
            data = self._runner.read_blocks(blocks)
            read_s = self._clock.now()
            self._runner.write_blocks(blocks, data)
            self._save_s = (read_s - begun_s) / len(blocks)
            self._load_s = (self._clock.now() - read_s) / len(blocks)


def _moved(known_s: float, seconds: float, num_blocks: int) -> float:
    return known_s + SPEED_WEIGHT * (seconds / num_blocks - known_s) if num_blocks else known_s
