"""What a call of attend reads, and by which rule: values shared by its implementations."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """How a query scores a key, and which keys it sees; the same for all tokens of a layer.

    A query at position p sees a key at position k if `k <= p` and (no window, or
    `p - k < window`, or `k < sinks`).

    Attributes:
        scale: Factor of the dot product.
        window: Number of positions seen, the own one included; None sees all.
        sinks: First positions that a window does not hide (StreamingLLM, arXiv:2309.17453, section 3.2).
        soft_cap: Scores become `soft_cap * tanh(score / soft_cap)` (Gemma 2, arXiv:2408.00118, section 2).
    """

    scale: float
    window: int | None = None
    sinks: int = 0
    soft_cap: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttendPlan:
    """Which keys each query reads; made once per step, used by every layer.

    Attributes:
        cu_seqlens: `[B + 1]` int, queries of sequence b are rows `cu_seqlens[b]:cu_seqlens[b + 1]`.
        block_tables: `[B, max_blocks]` int, padded with any valid block.
        kv_lengths: `[B]` int, entries of each sequence, those of this step included.
        slot_positions: `[num_blocks, block_tokens]` int32, position of each slot of the arena.
            None promises that entry i of each sequence has position i and that its queries
            are its last entries, in order: the fast path.
        scratch: What an implementation derives from the plan, kept for the next layer.
    """

    cu_seqlens: torch.Tensor
    block_tables: torch.Tensor
    kv_lengths: torch.Tensor
    slot_positions: torch.Tensor | None = None
    scratch: dict[object, object] = field(default_factory=dict, repr=False)


def visible_keys(q_positions: torch.Tensor, key_positions: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """Return which keys each query sees, bool.

    Args:
        q_positions: `[...]` int.
        key_positions: `[keys]` or `[..., keys]` int.
        scoring: The rule.

    Returns:
        `[..., keys]`.
    """
    distance = q_positions.unsqueeze(-1) - key_positions
    seen = distance >= 0
    if scoring.window is not None:
        seen &= (distance < scoring.window) | (key_positions < scoring.sinks)
    return seen
