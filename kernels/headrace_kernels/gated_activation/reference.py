"""Gated activations in plain torch."""

import torch
from torch.nn import functional


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Compute `headrace_kernels.gated_activation.silu_and_mul`."""
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def gelu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Compute `headrace_kernels.gated_activation.gelu_and_mul`."""
    gate, up = x.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh").mul_(up)
