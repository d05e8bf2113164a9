"""Programs of native operations, and the team of threads that runs them."""

import ctypes
from enum import IntEnum

import torch

from headrace_kernels.native import abi
from headrace_kernels.native.abi import Epilogue
from headrace_kernels.native.build import library
from headrace_kernels.native.pack import Grid, Packed

MOST_THREADS = 255


class Buffer(IntEnum):
    """Activations of a step, fp32, a dense row per token (logits: per sample)."""

    HIDDEN = 0
    QKV = 1
    ATTENDED = 2
    GATED = 3
    PROJECTED = 4
    LOGITS = 5


class Panels:
    """A packed weight.

    Attributes:
        format: Code of its panels.
        out_size: Outputs.
        in_size: Inputs.
        data: The panels, bytes.
        input_bits: What the inputs of int4 weights are rounded to, 16 or 8; other formats take no notice.
    """

    def __init__(self, weight: Packed | Grid | torch.Tensor, input_bits: int = 16) -> None:
        packed = weight if isinstance(weight, Packed) else Packed.of(weight)
        self.input_bits = input_bits
        self.format = packed.format
        self.out_size, self.in_size = packed.out_size, packed.in_size
        self.data = packed.data


class Program:
    """Operations in order; holds what they point to.

    Every method appends one operation. Buffers are named by `Buffer`.
    """

    def __init__(self) -> None:
        self._kinds: list[abi.Kind] = []
        self._structures: list[ctypes.Structure] = []
        self._tensors: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self._structures)

    def linear(
        self,
        panels: Panels,
        source: Buffer,
        target: Buffer,
        *,
        epilogue: Epilogue = Epilogue.STORE,
        norm: tuple[torch.Tensor, float] | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        """Multiply: `target = epilogue(norm(source) @ weight.T + bias)`.

        Args:
            panels: The weight; for gated epilogues its outputs are interleaved.
            source: Input rows.
            target: Output rows; for LOGITS only the rows that are sampled are multiplied.
            epilogue: Store, add, or gate.
            norm: Weight `[in]`, fp32, and epsilon of the normalisation of the input.
            bias: `[out]`, fp32, in the order of the panels.
        """
        self._append(
            abi.Kind.LINEAR,
            abi.Linear(
                format=panels.format,
                in_size=panels.in_size,
                out_size=panels.out_size,
                epilogue=epilogue,
                source=source,
                target=target,
                on_samples=target is Buffer.LOGITS,
                norm_eps=norm[1] if norm else 0.0,
                input_bits=panels.input_bits,
                norm_weight=self._keep(norm[0]) if norm else None,
                bias=self._keep(bias),
                panels=self._keep(panels.data),
            ),
        )

    def embed(self, panels: Panels, target: Buffer, scale: float) -> None:
        """Look tokens up: `target = scale * table[token]`."""
        what = abi.Embed(
            format=panels.format, size=panels.in_size, target=target, scale=scale, panels=self._keep(panels.data)
        )
        self._append(abi.Kind.EMBED, what)

    def norm_add(self, source: Buffer, target: Buffer, weight: torch.Tensor, eps: float) -> None:
        """Add: `target += norm(source) * weight`; `source` is normalised in place."""
        what = abi.NormAdd(
            size=weight.shape[0], source=source, target=target, norm_eps=eps, norm_weight=self._keep(weight)
        )
        self._append(abi.Kind.NORM_ADD, what)

    def attend(
        self, attend: abi.Attend, q_norm: torch.Tensor | None = None, k_norm: torch.Tensor | None = None
    ) -> None:
        """Turn, store and attend; `attend` has all fields but the weights of the head norms."""
        attend.q_norm, attend.k_norm = self._keep(q_norm), self._keep(k_norm)
        self._append(abi.Kind.ATTEND, attend)

    def operations(self) -> ctypes.Array[abi.Op]:
        """Return the operations as the library reads them; valid while the program lives."""
        pairs = zip(self._kinds, self._structures, strict=True)
        return (abi.Op * len(self))(*[abi.Op(kind=kind, what=ctypes.addressof(what)) for kind, what in pairs])

    def _append(self, kind: abi.Kind, what: ctypes.Structure) -> None:
        self._kinds.append(kind)
        self._structures.append(what)

    def _keep(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        kept = tensor.contiguous()
        self._tensors.append(kept)
        return kept.data_ptr()


def buffers(*tensors: torch.Tensor) -> ctypes.Array[ctypes.c_void_p]:
    """Return the addresses of all buffers, in the order of `Buffer`."""
    return (ctypes.c_void_p * abi.NUM_BUFFERS)(*[tensor.data_ptr() for tensor in tensors])


class Machine:
    """A team of threads and its scratch memory; one step at a time."""

    def __init__(self, most_threads: int) -> None:
        """Start the threads; they sleep between steps.

        Raises:
            NativeUnavailable: This machine cannot run the kernels.
            MemoryError: No memory for the threads.
        """
        self._library = library()
        self._handle = self._library.headrace_open(max(1, min(most_threads, MOST_THREADS)))
        if not self._handle:
            raise MemoryError("no memory for the kernels' threads")

    def begin(self, step: abi.Step, threads: int, heads: int, kv_heads: int) -> None:
        """Prepare what all layers of a step share."""
        self._library.headrace_begin(self._handle, step, threads, heads // kv_heads, kv_heads)

    def run(self, operations: ctypes.Array[abi.Op], first: int, count: int, step: abi.Step, threads: int) -> None:
        """Run `count` operations from `first` on, on at most `threads` threads."""
        start = ctypes.cast(ctypes.byref(operations, first * ctypes.sizeof(abi.Op)), ctypes.POINTER(abi.Op))
        self._library.headrace_run(self._handle, start, count, step, threads)

    def close(self) -> None:
        """End the threads."""
        if self._handle:
            self._library.headrace_close(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.close()
