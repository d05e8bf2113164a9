"""Rotary embedding of queries and keys, and the write of keys and values into their blocks."""

import torch

from headrace_kernels.checks import check_kv_view, check_same, check_shape
from headrace_kernels.dispatch import Implementations
from headrace_kernels.write_kv import reference
from headrace_kernels.write_kv.plan import Rotation, WritePlan, rotation_at

__all__ = ["IMPLEMENTATIONS", "Rotation", "WritePlan", "rotation_at", "write_kv", "write_positions"]

IMPLEMENTATIONS = Implementations(reference=reference.write_kv)


def write_kv(qkv: torch.Tensor, rotation: Rotation, kv_view: torch.Tensor, plan: WritePlan) -> torch.Tensor:
    """Turn queries and keys to their positions and store keys and values.

    The product with cos and sin is computed in fp32 and rounded once.

    Args:
        qkv: `[tokens, heads + 2 * kv_heads, dim]`, queries, keys, values; changed in place.
        rotation: Cos and sin of each token.
        kv_view: `[blocks, 2, block_tokens, kv_heads, dim]`, dtype of `qkv`; written.
        plan: Block and slot of each token, no place twice.

    Returns:
        The turned queries, a view of `qkv`, `[tokens, heads, dim]`.

    Raises:
        ValueError: Shapes, dtypes, devices or strides do not fit together.
    """
    check_shape("qkv", qkv, (None, None, None))
    check_kv_view(kv_view)
    check_same("kv_view", kv_view, "qkv", qkv)
    tokens, heads, dim = qkv.shape
    check_shape("kv_view", kv_view, (None, 2, None, None, dim))
    if heads <= 2 * kv_view.shape[3]:
        raise ValueError(f"qkv: {heads} heads leave no query beside {kv_view.shape[3]} keys and values")
    check_shape("rotation.cos", rotation.cos, (tokens, 1, dim))
    check_shape("rotation.sin", rotation.sin, (tokens, 1, dim))
    check_shape("plan.blocks", plan.blocks, (tokens,))
    check_shape("plan.slots", plan.slots, (tokens,))
    return IMPLEMENTATIONS.choose(qkv.device, qkv.dtype)(qkv, rotation, kv_view, plan)


def write_positions(slot_positions: torch.Tensor, positions: torch.Tensor, plan: WritePlan) -> None:
    """Note the position of each stored token; once per step, since all layers share it.

    Args:
        slot_positions: `[num_blocks, block_tokens]`, int32; written.
        positions: `[tokens]` int.
        plan: Block and slot of each token.
    """
    slot_positions[plan.blocks, plan.slots] = positions.to(slot_positions.dtype)
