"""Activation of one half of a projection, times the other half (GLU variants, arXiv:2002.05202)."""

import torch

from headrace_kernels.dispatch import Implementations
from headrace_kernels.gated_activation import reference

__all__ = ["GELU", "SILU", "gelu_and_mul", "silu_and_mul"]

SILU = Implementations(reference=reference.silu_and_mul)
GELU = Implementations(reference=reference.gelu_and_mul)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Return `silu(gate) * up` of `x: [..., 2 * dim]` = gate, up; `[..., dim]` in the dtype of `x`.

    Raises:
        ValueError: The last dimension is odd.
    """
    _check_even(x)
    return SILU.choose(x.device, x.dtype)(x)


def gelu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Return `gelu_tanh(gate) * up` of `x: [..., 2 * dim]` = gate, up; `[..., dim]` in the dtype of `x`.

    Raises:
        ValueError: The last dimension is odd.
    """
    _check_even(x)
    return GELU.choose(x.device, x.dtype)(x)


def _check_even(x: torch.Tensor) -> None:
    if x.shape[-1] % 2:
        raise ValueError(f"x: wanted gate and up of one size, found a last dimension of {x.shape[-1]}")
