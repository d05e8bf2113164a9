"""Root mean square normalisation, with or without the residual sum before it."""

import torch

from headrace_kernels.checks import check_shape
from headrace_kernels.dispatch import Implementations
from headrace_kernels.rms_norm import cpu, reference

__all__ = ["IMPLEMENTATIONS", "rms_norm", "rms_norm_with_residual"]

IMPLEMENTATIONS = Implementations(
    reference=reference.rms_norm,
    fast={("cpu", torch.float32): cpu.rms_norm, ("cpu", torch.bfloat16): cpu.rms_norm},
)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight` (arXiv:1910.07467, equation 4).

    Args:
        x: `[..., dim]`; the arithmetic is fp32 whatever its dtype.
        weight: `[dim]`, fp32.
        eps: Greater than 0.

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError: `weight` has another length than the rows of `x`.
    """
    check_shape("weight", weight, (x.shape[-1],))
    return IMPLEMENTATIONS.choose(x.device, x.dtype)(x, weight, eps)


def rms_norm_with_residual(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add, then normalise.

    Args:
        x: `[..., dim]`.
        residual: Like `x`.
        weight: `[dim]`.
        eps: Greater than 0.

    Returns:
        The normalised sum and the sum itself, the next residual; both in the dtype of `x`.

    Raises:
        ValueError: Shapes do not fit together.
    """
    check_shape("residual", residual, x.shape)
    total = x + residual
    return rms_norm(total, weight, eps), total
