"""What a decoder model is made of, as data: one row per architecture, one spec per model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch

from headrace.errors import ConfigError


class Activation(Enum):
    """Function of the gate in the MLP."""

    SILU = "silu"
    GELU = "gelu"
    """The tanh approximation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding of some layers.

    Attributes:
        theta: Base of the wavelengths.
        linear_factor: Positions are divided by it.
        llama3: Scaling by wavelength of Llama 3.1, if used.
        divisors: Divisor of each of the `head_dim / 2` frequencies (GGUF `rope_freqs`), if given.
    """

    theta: float
    linear_factor: float = 1.0
    llama3: "Llama3Scaling | None" = None
    divisors: tuple[float, ...] | None = None

    def inverse_frequencies(self, head_dim: int) -> torch.Tensor:
        """Return radians per position, `[head_dim / 2]`, fp64."""
        frequencies = 1.0 / (self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim))
        frequencies = frequencies / self.linear_factor
        if self.divisors is not None:
            frequencies = frequencies / torch.tensor(self.divisors, dtype=torch.float64)
        return frequencies if self.llama3 is None else self.llama3.scale(frequencies)


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended.

    Llama 3.1 (arXiv:2407.21783) and its published configuration; field names are those of `config.json`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def scale(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Return the scaled inverse frequencies."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = share.clamp(0.0, 1.0)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """What differs from layer to layer: positions seen (None for all) and the rotary embedding."""

    window: int | None = None
    rope: RopeSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A family of models: what its files leave unsaid.

    Attributes:
        name: Name in GGUF files.
        model_types: Names in Hugging Face files.
        activation: Gate of the MLP.
        has_qkv_bias: Whether query, key and value projections always have a bias.
        has_qk_norm: Whether queries and keys are normalised per head.
        has_post_norms: Whether outputs of attention and MLP are normalised before they are added.
        norm_offset: Added to norm weights of Hugging Face files (GGUF files have it added).
        scales_embedding: Whether embeddings are multiplied by the square root of the hidden size.
        is_tied: Whether the head shares the embedding where the file does not say.
        is_permuted_in_gguf: Whether GGUF files hold query and key rows in the order of interleaved pairs.
        window_period: Every n-th layer sees all positions, the others a window; None if all layers are equal.
        window_theta: Rotary base of the layers with a window, where the file does not say.
    """

    name: str
    model_types: tuple[str, ...]
    activation: Activation = Activation.SILU
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    has_post_norms: bool = False
    norm_offset: float = 0.0
    scales_embedding: bool = False
    is_tied: bool = False
    is_permuted_in_gguf: bool = False
    window_period: int | None = None
    window_theta: float | None = None

    def windows(self, num_layers: int, window: int | None) -> tuple[int | None, ...]:
        """Return the window of each layer."""
        period = self.window_period
        if period is None or window is None:
            return (window,) * num_layers
        return tuple(None if (layer + 1) % period == 0 else window for layer in range(num_layers))


ARCHITECTURES = (
    Architecture(name="llama", model_types=("llama", "mistral"), is_permuted_in_gguf=True),
    Architecture(name="qwen2", model_types=("qwen2",), has_qkv_bias=True),
    Architecture(name="qwen3", model_types=("qwen3",), has_qk_norm=True),
    Architecture(
        name="gemma",
        model_types=("gemma",),
        activation=Activation.GELU,
        norm_offset=1.0,
        scales_embedding=True,
        is_tied=True,
    ),
    Architecture(
        name="gemma2",
        model_types=("gemma2",),
        activation=Activation.GELU,
        norm_offset=1.0,
        scales_embedding=True,
        is_tied=True,
        has_post_norms=True,
        window_period=2,
    ),
    Architecture(
        name="gemma3",
        model_types=("gemma3_text",),
        activation=Activation.GELU,
        norm_offset=1.0,
        scales_embedding=True,
        is_tied=True,
        has_post_norms=True,
        has_qk_norm=True,
        window_period=6,
        window_theta=10_000.0,
    ),
)


def architecture(name: str) -> Architecture:
    """Find the row of a GGUF architecture or a Hugging Face model type.

    Raises:
        ConfigError: There is none.
    """
    for row in ARCHITECTURES:
        if name == row.name or name in row.model_types:
            return row
    known = sorted({row.name for row in ARCHITECTURES} | {kind for row in ARCHITECTURES for kind in row.model_types})
    raise ConfigError(f"wanted one of the architectures {', '.join(known)}; found {name!r}", field="model")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model.

    Attributes:
        architecture: Its family.
        layers: One entry per layer.
        max_context_tokens: Positions it was trained for.
        attention_scale: Factor of the dot products.
        attention_soft_cap: Bound of attention scores.
        logit_soft_cap: Bound of logits.
        is_tied: Whether the head is the embedding.
        has_qkv_bias: Whether the projections of queries, keys and values have a bias.
        has_output_bias: Whether the projection after attention has a bias.
        has_mlp_bias: Whether the MLP's projections have biases.
        norm_offset: Added to the norm weights as the file holds them.
        eos_token_ids: Tokens that end an answer.
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    max_context_tokens: int
    norm_eps: float
    attention_scale: float
    activation: Activation
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    is_tied: bool = False
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    norm_offset: float = 0.0
    eos_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        """Check what the decoder relies on.

        Raises:
            ConfigError: A size is not positive, heads do not divide, or a head cannot be halved.
        """
        sizes = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "mlp_size": self.mlp_size,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "layers": len(self.layers),
            "max_context_tokens": self.max_context_tokens,
        }
        for name, size in sizes.items():
            if size <= 0:
                raise ConfigError(f"wanted a model with {name} > 0; found {size}", field=name)
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ConfigError(
                f"wanted heads that KV heads divide and an even head size; found {self.num_heads} heads, "
                f"{self.num_kv_heads} KV heads, head size {self.head_dim}",
                field="num_kv_heads",
            )


def layer_specs(windows: tuple[int | None, ...], full: RopeSpec, windowed: RopeSpec) -> tuple[LayerSpec, ...]:
    """Return the layers: those with a window turn by `windowed`, the others by `full`."""
    return tuple(LayerSpec(window=w, rope=full if w is None else windowed) for w in windows)


def require(values: Mapping[str, object], key: str, origin: str) -> object:
    """Return a value of a model file's metadata.

    Raises:
        ConfigError: It is missing.
    """
    value = values.get(key)
    if value is None:
        raise ConfigError(f"{origin}: wanted the key {key}; it is missing", field=key)
    return value
