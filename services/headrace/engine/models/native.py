"""The decoder on a CPU, run by the C++ kernels: fp32 activations over quantised or bf16 weights, bf16 KV."""

from collections.abc import Callable, Iterable

import torch

from headrace.engine.models.decoder import StepInputs
from headrace.engine.models.packed import PackedWeights
from headrace.engine.models.spec import Activation, LayerSpec, ModelSpec
from headrace.engine.models.weights import WeightSource
from headrace_kernels import native
from headrace_kernels.native import Buffer, Grid, abi
from headrace_kernels.native.machine import Panels, buffers
from headrace_kernels.native.pack import BLOCK

_GATES = {Activation.SILU: abi.Epilogue.SILU, Activation.GELU: abi.Epilogue.GELU}

SHORT_STEP = 64
"""Tokens of a step that asks for its share of the cores a few times; a longer one asks before every operation,
because a layer of 512 tokens takes 30 ms, for which another worker of the machine would wait for its core."""

ASKS = 4
"""Times that a short step asks between its layers. Each needs the interpreter, and while the event loop has it, half a
millisecond for every token that it sends, no core computes."""


def can_run(spec: ModelSpec) -> bool:
    """Return whether the kernels have all that a model needs, on this machine."""
    sizes = (spec.hidden_size, spec.mlp_size, spec.num_heads * spec.head_dim)
    fits = all(size % BLOCK == 0 for size in sizes) and spec.head_dim % 16 == 0
    return fits and native.is_available()


class NativeDecoder:
    """The same computation as `headrace.engine.models.decoder.Decoder`, a few library calls per step."""

    def __init__(
        self,
        spec: ModelSpec,
        source: WeightSource,
        packed: PackedWeights | None = None,
        *,
        quantised: bool,
        most_threads: int,
        input_bits: int = 16,
    ) -> None:
        """Read and pack all weights.

        Args:
            spec: A model that `can_run` accepts.
            source: Its weights.
            packed: Where packed ones are taken from and left; None packs all.
            quantised: Whether weights stay in the grid of the file where it has one; else they become bf16.
            most_threads: Threads to start.
            input_bits: What the inputs of int4 weights are rounded to, 16 or 8. Queries, keys and values always get
                16: more than half of what 8 would add to the error comes from them.

        Raises:
            ConfigError: A weight is missing or has another shape.
            NativeUnavailable: This machine cannot run the kernels.
        """
        self._spec = spec
        self._machine = native.Machine(most_threads)
        self._all_threads = lambda: most_threads
        builder = _Builder(spec, source, packed or PackedWeights(), quantised=quantised, input_bits=input_bits)
        self._program = builder.build()
        self._operations = self._program.operations()
        layers_at_once = -(-len(spec.layers) // ASKS)
        self._layer_ends = builder.layer_ends
        self._layer_of_start = {start: layer for layer, start in enumerate([0, *builder.layer_ends[:-2]])}
        self._part_ends = [*builder.layer_ends[layers_at_once - 1 : -1 : layers_at_once], len(self._program)]
        ropes = builder.ropes
        self._frequencies = torch.stack([rope.inverse_frequencies(spec.head_dim) for rope in ropes])
        qkv = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        attended = spec.num_heads * spec.head_dim
        self._widths = [spec.hidden_size, qkv, attended, spec.mlp_size, spec.hidden_size]
        self._buffers: list[torch.Tensor] = []

    def __call__(self, step: StepInputs, arena: torch.Tensor, threads: Callable[[], int] | None = None) -> torch.Tensor:
        """Compute a step; see `Decoder.__call__`."""
        if torch.get_num_threads() != 1:
            torch.set_num_threads(1)  # torch's helpers would spin on the cores that the kernels' team computes on
        share = threads or self._all_threads
        logits = torch.empty((step.sample_rows.shape[0], self._spec.vocab_size))
        described = self._describe(step, arena, logits)
        self._machine.begin(described, share(), self._spec.num_heads, self._spec.num_kv_heads)
        begin = 0
        for end in self._ends(step):
            if step.await_layer is not None and begin in self._layer_of_start:
                step.await_layer(self._layer_of_start[begin])
            self._machine.run(self._operations, begin, end - begin, described, share())
            begin = end
        cap = self._spec.logit_soft_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _ends(self, step: StepInputs) -> Iterable[int]:
        """Return behind which operations a step stops to ask."""
        if step.token_ids.shape[0] > SHORT_STEP:
            return range(1, len(self._program) + 1)
        return self._part_ends if step.await_layer is None else self._layer_ends

    def _describe(self, step: StepInputs, arena: torch.Tensor, logits: torch.Tensor) -> abi.Step:
        rows = step.token_ids.shape[0]
        if not self._buffers or self._buffers[0].shape[0] < rows:
            self._buffers = [torch.empty((rows, width)) for width in self._widths]
        plan = step.attend
        slots = plan.slot_positions
        return abi.Step(
            num_rows=rows,
            num_sequences=plan.kv_lengths.shape[0],
            num_samples=step.sample_rows.shape[0],
            table_width=plan.block_tables.shape[1],
            token_ids=step.token_ids.data_ptr(),
            positions=step.positions.data_ptr(),
            write_blocks=step.write.blocks.data_ptr(),
            write_slots=step.write.slots.data_ptr(),
            cu_seqlens=plan.cu_seqlens.data_ptr(),
            block_tables=plan.block_tables.data_ptr(),
            kv_lengths=plan.kv_lengths.data_ptr(),
            sample_rows=step.sample_rows.data_ptr(),
            slot_positions=None if slots is None else slots.data_ptr(),
            arena=arena.data_ptr(),
            num_layers=arena.shape[1],
            block_tokens=arena.shape[3],
            buffers=buffers(*self._buffers, logits),
            num_ropes=self._frequencies.shape[0],
            frequencies=self._frequencies.data_ptr(),
            rope_size=self._frequencies.shape[1],
        )


class _Builder:
    """Writes the program of a model, layer by layer, in the order of `decoder.py`."""

    def __init__(
        self, spec: ModelSpec, source: WeightSource, packed: PackedWeights, *, quantised: bool, input_bits: int
    ) -> None:
        self._spec = spec
        self._input_bits = input_bits
        self._source = source
        self._packed = packed
        self._quantised = quantised
        self._program = native.Program()
        self.ropes = list(dict.fromkeys(layer.rope for layer in spec.layers))
        self.layer_ends: list[int] = []

    def build(self) -> native.Program:
        """Return the program; `layer_ends` then tells where each layer ends."""
        spec = self._spec
        table_shape = (spec.vocab_size, spec.hidden_size)
        table = Panels(self._packed.get("embedding", lambda: self._weight("embedding", table_shape)))
        scale = spec.hidden_size**0.5 if spec.architecture.scales_embedding else 1.0
        self._program.embed(table, Buffer.HIDDEN, scale)
        for index, layer in enumerate(spec.layers):
            self._attention(index, layer)
            self._mlp(index)
            self.layer_ends.append(len(self._program))
        head = table
        if not spec.is_tied:
            head = Panels(self._packed.get("head", lambda: self._weight("head", table_shape)))
        self._program.linear(head, Buffer.HIDDEN, Buffer.LOGITS, norm=self._norm("norm"))
        self.layer_ends.append(len(self._program))
        return self._program

    def _attention(self, index: int, layer: LayerSpec) -> None:
        spec = self._spec
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        sizes = {"q": q_size, "k": kv_size, "v": kv_size}
        qkv = self._packed.get(f"{index}.qkv", lambda: self._weights(sizes, spec.hidden_size, index))
        bias = self._biases(sizes, index) if spec.has_qkv_bias else None
        self._program.linear(
            Panels(qkv), Buffer.HIDDEN, Buffer.QKV, norm=self._norm("attention_norm", index), bias=bias
        )
        has_head_norms = spec.architecture.has_qk_norm
        self._program.attend(
            abi.Attend(
                heads=spec.num_heads,
                kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
                layer=index,
                rope=self.ropes.index(layer.rope),
                window=layer.window or 0,
                source=Buffer.QKV,
                target=Buffer.ATTENDED,
                scale=spec.attention_scale,
                soft_cap=spec.attention_soft_cap or 0.0,
                norm_eps=spec.norm_eps,
            ),
            self._norm("q_norm", index, spec.head_dim)[0] if has_head_norms else None,
            self._norm("k_norm", index, spec.head_dim)[0] if has_head_norms else None,
        )
        output = self._packed.get(f"{index}.output", lambda: self._weight("output", (spec.hidden_size, q_size), index))
        bias = self._biases({"output": spec.hidden_size}, index) if spec.has_output_bias else None
        self._add(Panels(output, self._input_bits), Buffer.ATTENDED, bias, "attention_post_norm", index)

    def _mlp(self, index: int) -> None:
        spec = self._spec
        gated = self._packed.get(f"{index}.gated", lambda: self._gated(index))
        bias = None
        if spec.has_mlp_bias:
            bias = native.interleave(self._bias("gate", spec.mlp_size, index), self._bias("up", spec.mlp_size, index))
        self._program.linear(
            Panels(gated, self._input_bits),
            Buffer.HIDDEN,
            Buffer.GATED,
            epilogue=_GATES[spec.activation],
            norm=self._norm("mlp_norm", index),
            bias=bias,
        )
        shape = (spec.hidden_size, spec.mlp_size)
        down = self._packed.get(f"{index}.down", lambda: self._weight("down", shape, index))
        bias = self._bias("down", spec.hidden_size, index) if spec.has_mlp_bias else None
        self._add(Panels(down, self._input_bits), Buffer.GATED, bias, "mlp_post_norm", index)

    def _add(self, panels: Panels, source: Buffer, bias: torch.Tensor | None, post_norm: str, index: int) -> None:
        """Project and add to the residual, through a norm in models with post norms."""
        if not self._spec.architecture.has_post_norms:
            self._program.linear(panels, source, Buffer.HIDDEN, epilogue=abi.Epilogue.ADD, bias=bias)
            return
        self._program.linear(panels, source, Buffer.PROJECTED, bias=bias)
        self._program.norm_add(Buffer.PROJECTED, Buffer.HIDDEN, *self._norm(post_norm, index))

    def _norm(self, name: str, layer: int | None = None, size: int | None = None) -> tuple[torch.Tensor, float]:
        shape = (self._spec.hidden_size if size is None else size,)
        return self._source.read(name, shape, layer).float() + self._spec.norm_offset, self._spec.norm_eps

    def _gated(self, layer: int) -> Grid | torch.Tensor:
        """Return gate and up in the order of gated epilogues."""
        shape = (self._spec.mlp_size, self._spec.hidden_size)
        gate, up = (self._weight(name, shape, layer) for name in ("gate", "up"))
        if isinstance(gate, Grid) and isinstance(up, Grid):
            joined = native.join([gate, up])
            if joined is not None:
                index = torch.arange(shape[0])
                return joined.rows(native.interleave(index, index + shape[0]))
        return native.interleave(_dense(gate), _dense(up))

    def _weights(self, sizes: dict[str, int], in_size: int, layer: int) -> Grid | torch.Tensor:
        """Return weights below each other, in their grid if all have the same."""
        parts = [self._weight(name, (size, in_size), layer) for name, size in sizes.items()]
        grids = [part for part in parts if isinstance(part, Grid)]
        joined = native.join(grids) if len(grids) == len(parts) else None
        return torch.cat([_dense(part) for part in parts]) if joined is None else joined

    def _weight(self, name: str, shape: tuple[int, int], layer: int | None = None) -> Grid | torch.Tensor:
        grid = self._source.read_grid(name, shape, layer) if self._quantised else None
        return self._source.read(name, shape, layer) if grid is None else grid

    def _biases(self, sizes: dict[str, int], layer: int) -> torch.Tensor:
        return torch.cat([self._bias(name, size, layer) for name, size in sizes.items()])

    def _bias(self, name: str, size: int, layer: int) -> torch.Tensor:
        return self._source.read(name, (size,), layer, kind="bias").float()


def _dense(weight: Grid | torch.Tensor) -> torch.Tensor:
    return weight.dequantise() if isinstance(weight, Grid) else weight
