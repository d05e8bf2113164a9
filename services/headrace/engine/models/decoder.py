"""The one decoder: a stack of equal blocks whose differences come from a ModelSpec.

Functions are chosen once, when a model is built; the step has no branch on the architecture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch.nn import functional

from headrace.engine.models.linear import Linear, build_linear
from headrace.engine.models.spec import Activation, LayerSpec, ModelSpec
from headrace.engine.models.weights import WeightSource
from headrace_kernels import attend, gated_activation, rms_norm, write_kv

Norm: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
Junction: TypeAlias = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(output of attention or MLP, residual) -> (normalised input of what follows, residual)."""

FEW_ROWS = 64
"""Steps of at most as many tokens are computed as they are."""

_ACTIVATIONS = {Activation.SILU: gated_activation.SILU, Activation.GELU: gated_activation.GELU}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepInputs:
    """Tensors of one step, on the model's device, and whether they are there yet.

    Attributes:
        token_ids: `[tokens]`, long.
        positions: `[tokens]`, long.
        write: Where the KV of each token goes.
        attend: Which KV each token reads.
        sample_rows: `[samples]`, long, rows whose logits are wanted.
        await_layer: Called with the number of each layer in front of it, if KV that it reads still lands.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    write: write_kv.WritePlan
    attend: attend.AttendPlan
    sample_rows: torch.Tensor
    await_layer: Callable[[int], None] | None = None


class Decoder:
    """Weights of a model and the computation over them; build it with `build_decoder`."""

    def __init__(self, builder: "_Builder") -> None:
        spec = builder.spec
        self._embed = builder.embedding()
        self._ropes = list(dict.fromkeys(layer.rope for layer in spec.layers))
        self._frequencies = [r.inverse_frequencies(spec.head_dim).to(builder.device) for r in self._ropes]
        self._rope_of_layer = [self._ropes.index(layer.rope) for layer in spec.layers]
        self._first_norm = builder.norm("attention_norm", 0)
        self._blocks = [_Block(builder, index, layer) for index, layer in enumerate(spec.layers)]
        self._head = builder.head()
        self._spare_rows = spare_rows if builder.device.type == "cpu" else lambda num_tokens: 0

    def __call__(self, step: StepInputs, arena: torch.Tensor, threads: Callable[[], int] | None = None) -> torch.Tensor:
        """Compute a step and write its KV into the arena.

        Args:
            step: What to compute.
            arena: `[num_blocks, layers, 2, block_tokens, kv_heads, head_dim]`; written.
            threads: Asked in front of every layer and the head how many threads to use; None leaves it to torch.

        Returns:
            Logits `[samples, vocab]`, fp32.
        """
        rotations = [write_kv.rotation_at(step.positions, frequencies) for frequencies in self._frequencies]
        spare_rows = self._spare_rows(step.token_ids.shape[0])
        residual = self._embed(functional.pad(step.token_ids, (0, spare_rows)))
        normed = self._first_norm(residual)
        layers = zip(self._blocks, arena.unbind(1), self._rope_of_layer, strict=True)
        for layer, (block, kv_view, rope) in enumerate(layers):
            if step.await_layer is not None:
                step.await_layer(layer)
            use_threads(threads)
            normed, residual = block(normed, residual, step, rotations[rope], kv_view)
        use_threads(threads)
        return self._head(normed[step.sample_rows])


def spare_rows(num_tokens: int) -> int:
    """Return how many rows a step on a CPU computes besides its tokens, so that steps come in few sizes.

    oneDNN compiles a product for each number of rows and keeps 1,024 of them: of SmolLM2 the first step of a size takes
    15 ms more than the second, 100 instead of 85 for 231 tokens, and 1 MB for each of its four products (bf16, 2-core
    Xeon, 2026-11-22). A multiple of 16 is also faster than what lies below it.
    """
    if num_tokens <= FEW_ROWS:
        return 0
    return -num_tokens % max(16, 1 << (num_tokens - 1).bit_length() - 5)


def use_threads(threads: Callable[[], int] | None) -> None:
    """Set torch's threads of the calling thread to what is asked for."""
    if threads is not None and (count := threads()) != torch.get_num_threads():
        torch.set_num_threads(count)


class _Block:
    """Attention and MLP of one layer, each followed by its junction."""

    def __init__(self, builder: "_Builder", index: int, layer: LayerSpec) -> None:
        spec = builder.spec
        self._head_dim = spec.head_dim
        self._scoring = attend.Scoring(
            scale=spec.attention_scale, window=layer.window, soft_cap=spec.attention_soft_cap
        )
        self._normalise_heads = builder.head_norms(index)
        self._qkv = builder.qkv(index)
        self._output = builder.attention_output(index)
        self._gate_up, self._down = builder.mlp(index)
        self._after_attention = builder.junction("attention_post_norm", index, "mlp_norm", index)
        self._after_mlp = builder.after_mlp(index)
        device, dtype = builder.device, builder.dtype
        self._activate = _ACTIVATIONS[spec.activation].choose(device, dtype)
        self._attend = attend.IMPLEMENTATIONS.choose(device, dtype)
        self._write_kv = write_kv.IMPLEMENTATIONS.choose(device, dtype)

    def __call__(
        self,
        normed: torch.Tensor,
        residual: torch.Tensor,
        step: StepInputs,
        rotation: write_kv.Rotation,
        kv_view: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens, num_rows = step.token_ids.shape[0], normed.shape[0]
        qkv = self._qkv(normed)[:num_tokens].view(num_tokens, -1, self._head_dim)
        self._normalise_heads(qkv)
        q = self._write_kv(qkv, rotation, kv_view, step.write)
        o, _ = self._attend(q, step.positions, kv_view, step.attend, self._scoring)
        attended = functional.pad(o.flatten(1), (0, 0, 0, num_rows - num_tokens))
        normed, residual = self._after_attention(self._output(attended), residual)
        return self._after_mlp(self._down(self._activate(self._gate_up(normed))), residual)


def build_decoder(spec: ModelSpec, source: WeightSource, *, dtype: torch.dtype, device: torch.device) -> Decoder:
    """Read all weights and choose all functions.

    Raises:
        ConfigError: A weight is missing or has another shape.
    """
    return Decoder(_Builder(spec, source, dtype, device))


class _Builder:
    """Turns weights into functions."""

    def __init__(self, spec: ModelSpec, source: WeightSource, dtype: torch.dtype, device: torch.device) -> None:
        self.spec = spec
        self.dtype = dtype
        self.device = device
        self._source = source
        self._rms_norm = rms_norm.IMPLEMENTATIONS.choose(device, dtype)
        self._table = self._weight("embedding", (spec.vocab_size, spec.hidden_size))

    def embedding(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return token ids -> hidden states."""
        table = self._table
        if not self.spec.architecture.scales_embedding:
            return lambda token_ids: functional.embedding(token_ids, table)
        scale = torch.tensor(self.spec.hidden_size**0.5, dtype=self.dtype, device=self.device)
        return lambda token_ids: functional.embedding(token_ids, table) * scale

    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return hidden states -> logits in fp32."""
        spec = self.spec
        shape = (spec.vocab_size, spec.hidden_size)
        weight = self._table if spec.is_tied else self._weight("head", shape)
        project = build_linear(weight, is_sensitive=True)
        cap = spec.logit_soft_cap
        if cap is None:
            return lambda hidden: project(hidden).float()
        return lambda hidden: torch.tanh(project(hidden).float() / cap) * cap

    def norm(self, name: str, layer: int | None = None, size: int | None = None) -> Norm:
        """Return a normalisation; its weight stays in fp32, where an offset is exact."""
        shape = (self.spec.hidden_size if size is None else size,)
        weight = self._source.read(name, shape, layer).to(self.device, torch.float32) + self.spec.norm_offset
        run, eps = self._rms_norm, self.spec.norm_eps
        return lambda x: run(x, weight, eps)

    def head_norms(self, layer: int) -> Callable[[torch.Tensor], None]:
        """Return what normalises queries and keys of `qkv` in place; nothing for most models."""
        if not self.spec.architecture.has_qk_norm:
            return lambda qkv: None
        heads, keys_end = self.spec.num_heads, self.spec.num_heads + self.spec.num_kv_heads
        q_norm = self.norm("q_norm", layer, self.spec.head_dim)
        k_norm = self.norm("k_norm", layer, self.spec.head_dim)

        def normalise(qkv: torch.Tensor) -> None:
            qkv[:, :heads] = q_norm(qkv[:, :heads])
            qkv[:, heads:keys_end] = k_norm(qkv[:, heads:keys_end])

        return normalise

    def qkv(self, layer: int) -> Linear:
        """Return the merged projection of queries, keys and values."""
        q_size, kv_size = (heads * self.spec.head_dim for heads in (self.spec.num_heads, self.spec.num_kv_heads))
        sizes = {"q": q_size, "k": kv_size, "v": kv_size}
        return self._linear(layer, sizes, self.spec.hidden_size, has_bias=self.spec.has_qkv_bias)

    def attention_output(self, layer: int) -> Linear:
        """Return the projection after attention."""
        in_size = self.spec.num_heads * self.spec.head_dim
        return self._linear(layer, {"output": self.spec.hidden_size}, in_size, has_bias=self.spec.has_output_bias)

    def mlp(self, layer: int) -> tuple[Linear, Linear]:
        """Return the merged projection of gate and up, and the projection down."""
        size, has_bias = self.spec.mlp_size, self.spec.has_mlp_bias
        gate_up = self._linear(layer, {"gate": size, "up": size}, self.spec.hidden_size, has_bias=has_bias)
        return gate_up, self._linear(layer, {"down": self.spec.hidden_size}, size, has_bias=has_bias)

    def after_mlp(self, layer: int) -> Junction:
        """Return the junction to the next layer, or to the head."""
        if layer + 1 < len(self.spec.layers):
            return self.junction("mlp_post_norm", layer, "attention_norm", layer + 1)
        return self.junction("mlp_post_norm", layer, "norm", None)

    def junction(self, post_name: str, layer: int, next_name: str, next_layer: int | None) -> Junction:
        """Return the sum with the residual, then the norm of what follows."""
        following = self.norm(next_name, next_layer)

        def join(out: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            total = out + residual
            return following(total), total

        if not self.spec.architecture.has_post_norms:
            return join
        post = self.norm(post_name, layer)
        return lambda out, residual: join(post(out), residual)

    def _linear(self, layer: int, sizes: dict[str, int], in_size: int, *, has_bias: bool) -> Linear:
        weight = torch.cat([self._weight(name, (size, in_size), layer) for name, size in sizes.items()])
        is_sensitive = "q" in sizes
        if not has_bias:
            return build_linear(weight, is_sensitive=is_sensitive)
        biases = [self._weight(name, (size,), layer, kind="bias") for name, size in sizes.items()]
        return build_linear(weight, torch.cat(biases), is_sensitive=is_sensitive)

    def _weight(
        self, name: str, shape: Sequence[int], layer: int | None = None, *, kind: str = "weight"
    ) -> torch.Tensor:
        return self._source.read(name, tuple(shape), layer, kind=kind).to(self.device, self.dtype)
