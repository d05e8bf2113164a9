"""Paged attention: queries of many sequences over block-major KV."""

import torch

from headrace_kernels.attend import cpu, reference
from headrace_kernels.attend.merge import merge_attention_states
from headrace_kernels.attend.plan import AttendPlan, Scoring
from headrace_kernels.checks import check_kv_view, check_same, check_shape
from headrace_kernels.dispatch import Implementations

__all__ = ["IMPLEMENTATIONS", "AttendPlan", "Scoring", "attend", "merge_attention_states"]

IMPLEMENTATIONS = Implementations(
    reference=reference.attend,
    fast={("cpu", torch.float32): cpu.attend, ("cpu", torch.bfloat16): cpu.attend},
)


def attend(
    q: torch.Tensor, q_positions: torch.Tensor, kv_view: torch.Tensor, plan: AttendPlan, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over the blocks that a plan names.

    Causality compares positions: `q_positions` with `plan.slot_positions`, or with the entry's
    index where the plan has none. Heads `h * heads / kv_heads` and following share KV head h.
    Products accumulate in fp32. Slots past a sequence's length may hold anything, NaN included.

    Args:
        q: `[tokens, heads, dim]`, fp32 or bf16.
        q_positions: `[tokens]` int.
        kv_view: `[blocks, 2, block_tokens, kv_heads, dim]`, one layer of the arena, dtype of `q`.
        plan: Which keys each query reads.
        scoring: Scale, window, sinks, soft cap.

    Returns:
        Output `[tokens, heads, dim]` in the dtype of `q`, and log-sum-exp `[tokens, heads]`, fp32;
        0 and -inf for a query that sees no key.

    Raises:
        ValueError: Shapes, dtypes, devices or strides do not fit together.
    """
    check_shape("q", q, (None, None, None))
    check_shape("q_positions", q_positions, (q.shape[0],))
    check_kv_view(kv_view)
    check_same("kv_view", kv_view, "q", q)
    check_shape("kv_view", kv_view, (None, 2, None, None, q.shape[2]))
    if q.shape[1] % kv_view.shape[3]:
        raise ValueError(f"q: {q.shape[1]} heads are no multiple of {kv_view.shape[3]} KV heads")
    sequences = plan.kv_lengths.shape[0]
    check_shape("cu_seqlens", plan.cu_seqlens, (sequences + 1,))
    check_shape("block_tables", plan.block_tables, (sequences, None))
    if plan.slot_positions is not None:
        check_shape("slot_positions", plan.slot_positions, (kv_view.shape[0], kv_view.shape[2]))
    return IMPLEMENTATIONS.choose(q.device, q.dtype)(q, q_positions, kv_view, plan, scoring)
