"""Checks of tensor arguments, with messages that name the argument."""

from collections.abc import Sequence

import torch


def check_shape(name: str, tensor: torch.Tensor, expected: Sequence[int | None]) -> None:
    """Require a shape; None matches any size.

    Raises:
        ValueError: The number of dimensions or a size differs.
    """
    found = tuple(tensor.shape)
    matches = len(found) == len(expected) and all(e is None or e == f for e, f in zip(expected, found, strict=True))
    if not matches:
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{name}: wanted shape [{wanted}], found {list(found)}")


def check_same(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Require that two tensors share dtype and device.

    Raises:
        ValueError: They do not.
    """
    if tensor.dtype != other.dtype or tensor.device != other.device:
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device} but {other_name} is {other.dtype} on {other.device}"
        )


def check_kv_view(kv_view: torch.Tensor) -> None:
    """Require one layer of a block-major arena, `[blocks, 2, block_tokens, kv_heads, head_dim]`.

    Raises:
        ValueError: Another rank, or strides that such an arena does not give.
    """
    check_shape("kv_view", kv_view, (None, 2, None, None, None))
    _, _, tokens, heads, dim = kv_view.shape
    inner = (tokens * heads * dim, heads * dim, dim, 1)
    if kv_view.stride()[1:] != inner or kv_view.stride(0) % inner[0]:
        raise ValueError(f"kv_view: wanted a layer of a contiguous arena, found strides {kv_view.stride()}")
