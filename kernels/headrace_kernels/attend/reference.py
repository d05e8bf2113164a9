"""Attention in plain torch, one sequence after the other, all arithmetic in fp32."""

import torch

from headrace_kernels.attend.plan import AttendPlan, Scoring, visible_keys


def attend(
    q: torch.Tensor, q_positions: torch.Tensor, kv_view: torch.Tensor, plan: AttendPlan, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `headrace_kernels.attend.attend`; every other implementation is compared with this one."""
    o = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
    starts = plan.cu_seqlens.tolist()
    block_tokens = kv_view.shape[2]
    for row, length in enumerate(plan.kv_lengths.tolist()):
        queries = slice(starts[row], starts[row + 1])
        blocks = plan.block_tables[row, : -(-length // block_tokens)].long()
        keys, values = kv_view[blocks].transpose(0, 1).flatten(1, 2)[:, :length].float()
        if plan.slot_positions is None:
            key_positions = torch.arange(length, device=q.device)
        else:
            key_positions = plan.slot_positions[blocks].flatten()[:length]
        seen = visible_keys(q_positions[queries], key_positions, scoring)
        o[queries], lse[queries] = attend_dense(q[queries].float(), keys, values, seen, scoring)
    return o, lse


def attend_dense(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over gathered keys.

    Args:
        q: `[tokens, heads, dim]`, fp32.
        keys: `[entries, kv_heads, dim]`, fp32.
        values: Like `keys`.
        seen: `[tokens, entries]`, bool.
        scoring: Scale and soft cap.

    Returns:
        Output `[tokens, heads, dim]` and log-sum-exp `[tokens, heads]`; 0 and -inf where nothing is seen.
    """
    group = q.shape[1] // keys.shape[1]
    scores = torch.einsum("thd,khd->thk", q, keys.repeat_interleave(group, dim=1)) * scoring.scale
    if scoring.soft_cap is not None:
        scores = scoring.soft_cap * torch.tanh(scores / scoring.soft_cap)
    scores = scores.masked_fill(~seen.unsqueeze(1), -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.clamp_min(torch.finfo(torch.float32).min).unsqueeze(-1))
    return torch.einsum("thk,khd->thd", weights, values.repeat_interleave(group, dim=1)), lse
