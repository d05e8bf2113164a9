"""A runner without a model: its logits say what was really in the blocks it was given."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from headrace.core.block import BlockId, KvLayout, blocks_for
from headrace.engine.batch import Batch, BatchItem

Words = npt.NDArray[np.uint64]

_LOGIT_RANGE = 8.0
_NOTHING = np.uint64(2**64 - 1)
_ODD = np.uint64(0x9E3779B97F4A7C15)


class FakeRunner:
    """Fulfils `headrace.engine.batch.Runner`; wrong blocks, entries or positions show as wrong tokens.

    "KV" is the token and its position, kept per slot of a small arena. Logits are a hash of everything that an
    item's block table makes visible, so they equal those of a fresh computation only if the plumbing is right.

    Args:
        num_blocks: Size of the arena.
        block_tokens: Tokens per block.
        vocab_size: Logits per token.
        max_context_tokens: Most tokens of one sequence.
        eos_token_ids: Tokens that end an answer.

    Attributes:
        failure: Raised by the next `run`, once.
        batches: Every batch that was run, oldest first.
    """

    def __init__(
        self,
        num_blocks: int = 64,
        *,
        block_tokens: int = 16,
        vocab_size: int = 96,
        max_context_tokens: int = 4096,
        eos_token_ids: frozenset[int] = frozenset({2}),
    ) -> None:
        self._vocab_size = vocab_size
        self._max_context_tokens = max_context_tokens
        self._eos_token_ids = eos_token_ids
        self._layout = KvLayout(num_layers=2, block_tokens=block_tokens, num_kv_heads=1, head_dim=8, dtype="fp32")
        self._tokens = np.full((num_blocks, block_tokens), _NOTHING, dtype=np.uint64)
        self._positions = np.full((num_blocks, block_tokens), _NOTHING, dtype=np.uint64)
        self.failure: Exception | None = None
        self.batches: list[Batch] = []

    @property
    def layout(self) -> KvLayout:
        """How a block of a real arena of this shape would lie in memory."""
        return self._layout

    @property
    def num_layers(self) -> int:
        """Layers of the pretended model."""
        return self._layout.num_layers

    @property
    def vocab_size(self) -> int:
        """Logits per sampled token."""
        return self._vocab_size

    @property
    def max_context_tokens(self) -> int:
        """Most tokens of one sequence."""
        return self._max_context_tokens

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self._eos_token_ids

    def run(self, batch: Batch) -> torch.Tensor:
        """Compute a step; see `headrace.engine.batch.Runner.run`."""
        self.batches.append(batch)
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        for item in batch.items:
            self._check(item)
        if batch.await_layer is not None:
            for layer in range(self.num_layers):
                batch.await_layer(layer)
        for item in batch.items:
            self.write(item.block_table, item.token_ids, item.kv_start, item.positions)
        rows = [self._logits(item) for item in batch.items if item.sample]
        return torch.from_numpy(np.array(rows, dtype=np.float32).reshape(-1, self._vocab_size))

    def read_blocks(self, blocks: Sequence[BlockId]) -> torch.Tensor:
        """Return a copy of blocks; see `headrace.engine.batch.Runner.read_blocks`."""
        index = np.array(blocks, dtype=np.int64)
        words = np.concatenate([self._tokens[index], self._positions[index]], axis=1)
        return torch.from_numpy(words.view(np.uint8))

    def write_blocks(self, blocks: Sequence[BlockId], data: torch.Tensor) -> None:
        """Overwrite blocks; see `headrace.engine.batch.Runner.write_blocks`."""
        index, words = np.array(blocks, dtype=np.int64), np.ascontiguousarray(data.numpy()).view(np.uint64)
        self._tokens[index], self._positions[index] = np.split(words, 2, axis=1)

    def write(
        self,
        block_table: tuple[BlockId, ...],
        token_ids: tuple[int, ...],
        start: int = 0,
        positions: tuple[int, ...] | None = None,
    ) -> None:
        """Put KV into blocks as a peer's push does, or as a step does for its own tokens.

        Args:
            block_table: Blocks of the sequence in order.
            token_ids: Tokens of the entries.
            start: First entry written.
            positions: RoPE positions; None means entry i has position i.
        """
        entries = np.arange(start, start + len(token_ids))
        blocks, slots = self._slots(block_table, entries)
        self._tokens[blocks, slots] = np.array(token_ids, dtype=np.uint64)
        self._positions[blocks, slots] = np.array(entries if positions is None else positions, dtype=np.uint64)

    def _slots(
        self, block_table: tuple[BlockId, ...], entries: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        size = self._layout.block_tokens
        return np.array(block_table, dtype=np.int64)[entries // size], entries % size

    def _logits(self, item: BatchItem) -> npt.NDArray[np.float32]:
        entries = np.arange(item.kv_length)
        blocks, slots = self._slots(item.block_table, entries)
        seen = _mix(self._tokens[blocks, slots] * _ODD + _mix(self._positions[blocks, slots]))
        # Keys turn with their positions, so a model sees order only through them; the hash does the same.
        context = _mix(np.array([seen.sum()]) + np.uint64(item.positions[-1]))
        words = _mix(np.arange(self._vocab_size, dtype=np.uint64) * _ODD ^ context)
        return ((words >> np.uint64(40)).astype(np.float32) * (_LOGIT_RANGE / 2**24)).astype(np.float32)

    def _check(self, item: BatchItem) -> None:
        count, needed = len(item.token_ids), blocks_for(item.kv_length, self._layout.block_tokens)
        if not count or len(item.positions) != count or item.kv_start < 0:
            raise ValueError(f"item of {count} tokens, {len(item.positions)} positions, start {item.kv_start}")
        if len(item.block_table) < needed:
            raise ValueError(f"{item.kv_length} entries need {needed} blocks; the table has {len(item.block_table)}")
        if not all(0 <= token < self._vocab_size for token in item.token_ids):
            raise ValueError(f"token ids must be in [0, {self._vocab_size})")
        if not all(0 <= block < len(self._tokens) for block in item.block_table[:needed]):
            raise ValueError(f"block ids must be in [0, {len(self._tokens)})")


def _mix(values: Words) -> Words:
    """Scatter 64-bit words (the finalizer of SplitMix64; Steele, Lea and Flood, OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
