"""What one step computes, with its tokens and blocks: the engine builds it, a runner computes it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from headrace.core.block import BlockId, KvLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchItem:
    """The part of one sequence that a step computes.

    Attributes:
        token_ids: Tokens computed this step, at least one.
        positions: RoPE position of each of them; they need not follow from `kv_start`.
        kv_start: KV entries present before; token i goes to entry `kv_start + i`.
        block_table: Blocks of the sequence in order; more than are needed is allowed.
        sample: Whether the last token's logits are wanted.
        reads_slot_positions: Set if an entry before `kv_start` may have another position than its
            index; all entries must then have been written by this process. Positions of new
            tokens that differ from their entries have the same effect.
    """

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]
    kv_start: int
    block_table: tuple[BlockId, ...]
    sample: bool
    reads_slot_positions: bool = False

    @property
    def kv_length(self) -> int:
        """KV entries present after the step."""
        return self.kv_start + len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """All items of one step; logits come back in the order of the items that sample.

    Attributes:
        await_layer: Called with the number of each layer in front of it, where KV before an item still lands. What it
            raises ends the step.
    """

    items: tuple[BatchItem, ...]
    await_layer: Callable[[int], None] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens computed by the step."""
        return sum(len(item.token_ids) for item in self.items)


class Runner(Protocol):
    """Computes batches over one arena of KV blocks."""

    @property
    def layout(self) -> KvLayout:
        """How a block of the runner's arena lies in memory."""
        ...

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        ...

    @property
    def vocab_size(self) -> int:
        """Logits per sampled token."""
        ...

    @property
    def max_context_tokens(self) -> int:
        """Most tokens of one sequence."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ...

    def run(self, batch: Batch) -> torch.Tensor:
        """Compute a step; KV of its tokens is in the arena when it returns.

        Returns:
            Logits `[num_sampling_items, vocab_size]`, fp32, in item order.

        Raises:
            ValueError: An item's shape contradicts itself (see `batch_item`).
        """
        ...

    def read_blocks(self, blocks: Sequence[BlockId]) -> torch.Tensor:
        """Return a copy of blocks, `[num_blocks, block_bytes]`, uint8, in host memory."""
        ...

    def write_blocks(self, blocks: Sequence[BlockId], data: torch.Tensor) -> None:
        """Overwrite blocks with what `read_blocks` returned; entry i of their sequence has position i."""
        ...


def batch_item(
    token_ids: Sequence[int],
    kv_start: int,
    block_table: Sequence[BlockId],
    *,
    sample: bool,
    positions: Sequence[int] | None = None,
) -> BatchItem:
    """Build an item from lists.

    Args:
        token_ids: Tokens to compute, at least one.
        kv_start: KV entries present before, at least 0.
        block_table: Blocks of the sequence in order.
        sample: Whether the last token's logits are wanted.
        positions: RoPE positions; None means entry i has position i.

    Raises:
        ValueError: No tokens, a negative start, or positions of another length.
    """
    if not token_ids or kv_start < 0:
        raise ValueError(f"an item needs tokens and a start >= 0: {len(token_ids)} tokens, start {kv_start}")
    if positions is None:
        positions = range(kv_start, kv_start + len(token_ids))
    if len(positions) != len(token_ids):
        raise ValueError(f"{len(token_ids)} tokens but {len(positions)} positions")
    return BatchItem(
        token_ids=tuple(token_ids),
        positions=tuple(positions),
        kv_start=kv_start,
        block_table=tuple(block_table),
        sample=sample,
    )
