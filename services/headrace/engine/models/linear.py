"""Linear layers: the fastest exact product that the device and dtype allow."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch.nn import functional

Linear: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""`[rows, in] -> [rows, out]`, same dtype; sums are fp32."""


def build_linear(weight: torch.Tensor, bias: torch.Tensor | None = None, *, is_sensitive: bool = False) -> Linear:
    """Return `x @ weight.T + bias` for inference.

    Args:
        weight: `[out, in]`, fp32 or bf16, on the device to compute on.
        bias: `[out]`, same dtype and device.
        is_sensitive: Whether rounding here shows most in the logits (queries and keys, the head).
    """
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if weight.dtype == torch.float32 and is_sensitive:
        return _Double(weight, bias)
    if weight.dtype == torch.float32 or weight.device.type != "cpu" or not has_onednn:
        return _Plain(weight, bias)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return _Packed(weight, bias)
    return _Widened(weight, bias)


class _Plain:
    """torch's own product."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight, self._bias)


class _Double:
    """fp64 inside: fp32 is chosen for exactness, and two places decide how exact it is.

    Largest difference of SmolLM2's logits from fp64 over 192 positions, 2026-11-21: 1.5e-4 with all
    products packed by oneDNN, 1.0e-4 with torch's own, 0.65e-4 with queries, keys, values and head
    in fp64 (a fifth more time per decode step), 0.40e-4 with all in fp64 (half more).
    """

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight.double(), None if bias is None else bias.double()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x.double(), self._weight, self._bias).to(x.dtype)


class _Packed:
    """oneDNN with the weight packed once: `linear` packs it in every call.

    All products of SmolLM2 for one row, bf16, Zen 5, 2 threads, 2026-11-21: 9.5 instead of 11.3 ms.
    Sums run over the whole row in sequence, which is why fp32 does not use it for its own sake.
    """

    __slots__ = ("_bias", "_run", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self._bias = bias
        self._run = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self._run(x, self._weight, self._bias, "none", [], "")
        return result


class _Widened:
    """bf16 weights on a CPU without bf16 instructions.

    One row reads the bf16 weight (half the memory traffic); more rows multiply in fp32, because
    torch's bf16 product is emulated there: 88 instead of 28 ms for 8 rows of a whole model and 2780
    instead of 375 for 256 (Zen 3, 2 threads, 2026-11-21). The price is memory for both copies.
    """

    __slots__ = ("_bias", "_many_rows", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias
        self._many_rows = _Packed(weight.float(), None if bias is None else bias.float())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 1:
            return functional.linear(x, self._weight, self._bias)
        return self._many_rows(x.float()).to(x.dtype)
