"""Merge of attention over disjoint sets of keys."""

import torch


def merge_attention_states(
    o: torch.Tensor, lse: torch.Tensor, other_o: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention over the union of two disjoint sets of keys.

    The weights of the parts are `exp(lse - logaddexp(lse, other_lse))` (FlashInfer, arXiv:2501.01005,
    section 2.2).

    Args:
        o: `[tokens, heads, dim]`, output over the first set.
        lse: `[tokens, heads]`, fp32, its log-sum-exp; -inf where the set is empty.
        other_o: Like `o`, over the second set.
        other_lse: Like `lse`.

    Returns:
        Output in the dtype of `o` and log-sum-exp, fp32; 0 and -inf where both sets are empty.
    """
    total = torch.logaddexp(lse, other_lse)
    finite = total.clamp_min(torch.finfo(torch.float32).min)
    weight = torch.exp(lse - finite).unsqueeze(-1)
    other_weight = torch.exp(other_lse - finite).unsqueeze(-1)
    return (weight * o + other_weight * other_o).to(o.dtype), total
