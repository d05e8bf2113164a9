"""Rotation and scatter in plain torch; about six operations, so also what a CPU runs."""

import torch

from headrace_kernels.write_kv.plan import Rotation, WritePlan


def write_kv(qkv: torch.Tensor, rotation: Rotation, kv_view: torch.Tensor, plan: WritePlan) -> torch.Tensor:
    """Compute `headrace_kernels.write_kv.write_kv`."""
    kv_heads = kv_view.shape[3]
    turned_heads = qkv.shape[1] - kv_heads
    heads = qkv[:, :turned_heads].float()
    swapped = heads.roll(heads.shape[2] // 2, dims=2).mul_(rotation.sin)
    qkv[:, :turned_heads] = torch.addcmul(swapped, heads, rotation.cos)
    kv_view[plan.blocks, :, plan.slots] = qkv[:, turned_heads - kv_heads :].view(qkv.shape[0], 2, kv_heads, -1)
    return qkv[:, : turned_heads - kv_heads]
