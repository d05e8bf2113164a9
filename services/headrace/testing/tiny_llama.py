"""A Llama of two layers with random weights: small enough to compare paths bit by bit."""

import zlib

import torch

from headrace.engine.models.spec import Activation, LayerSpec, ModelSpec, RopeSpec, architecture

_ROPE = RopeSpec(theta=1000.0)
TINY_LLAMA = ModelSpec(
    architecture=architecture("llama"),
    vocab_size=90,
    hidden_size=64,
    mlp_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    layers=(LayerSpec(rope=_ROPE), LayerSpec(rope=_ROPE, window=9)),
    max_context_tokens=256,
    norm_eps=1e-5,
    attention_scale=16**-0.5,
    activation=Activation.SILU,
    eos_token_ids=frozenset({2}),
)
"""One layer sees everything before a token, the other nine tokens."""


class RandomWeights:
    """Weights that bf16 holds exactly, drawn from their names."""

    has_grid = False

    def has(self, name: str, layer: int | None = None) -> bool:
        """Return that every weight there is can be read."""
        del name, layer
        return True

    def read(
        self, name: str, shape: tuple[int, ...], layer: int | None = None, *, kind: str = "weight"
    ) -> torch.Tensor:
        """Return a weight of a shape in fp32, near one for norms and around zero for all others."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{kind} {name} {layer}".encode()))
        values = torch.randn(shape, generator=generator) * 0.3
        return (1.0 + 0.1 * values if "norm" in name else values).bfloat16().float()
