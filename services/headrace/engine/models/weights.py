"""Names of weights, and where they come from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from headrace.errors import ConfigError
from headrace_kernels.native import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class FileNames:
    """What a weight is called in a GGUF file and in Hugging Face files, without `.weight` or `.bias`."""

    gguf: str
    hugging_face: str


MODEL_WEIGHTS = {
    "embedding": FileNames(gguf="token_embd", hugging_face="model.embed_tokens"),
    "norm": FileNames(gguf="output_norm", hugging_face="model.norm"),
    "head": FileNames(gguf="output", hugging_face="lm_head"),
}
LAYER_WEIGHTS = {
    "attention_norm": FileNames(gguf="attn_norm", hugging_face="input_layernorm"),
    "q": FileNames(gguf="attn_q", hugging_face="self_attn.q_proj"),
    "k": FileNames(gguf="attn_k", hugging_face="self_attn.k_proj"),
    "v": FileNames(gguf="attn_v", hugging_face="self_attn.v_proj"),
    "q_norm": FileNames(gguf="attn_q_norm", hugging_face="self_attn.q_norm"),
    "k_norm": FileNames(gguf="attn_k_norm", hugging_face="self_attn.k_norm"),
    "output": FileNames(gguf="attn_output", hugging_face="self_attn.o_proj"),
    "mlp_norm": FileNames(gguf="ffn_norm", hugging_face="post_attention_layernorm"),
    "gate": FileNames(gguf="ffn_gate", hugging_face="mlp.gate_proj"),
    "up": FileNames(gguf="ffn_up", hugging_face="mlp.up_proj"),
    "down": FileNames(gguf="ffn_down", hugging_face="mlp.down_proj"),
}
POST_NORM_WEIGHTS = {
    "attention_post_norm": FileNames(gguf="post_attention_norm", hugging_face="post_attention_layernorm"),
    "mlp_norm": FileNames(gguf="ffn_norm", hugging_face="pre_feedforward_layernorm"),
    "mlp_post_norm": FileNames(gguf="post_ffw_norm", hugging_face="post_feedforward_layernorm"),
}


def layer_weights(*, has_post_norms: bool) -> dict[str, FileNames]:
    """Return the names of a layer's weights; models with post norms call them differently."""
    return LAYER_WEIGHTS | POST_NORM_WEIGHTS if has_post_norms else LAYER_WEIGHTS


class WeightSource(Protocol):
    """Reads weights of one model by the names above."""

    @property
    def has_grid(self) -> bool:
        """Whether any weight is in a grid that `read_grid` returns."""
        ...

    def has(self, name: str, layer: int | None = None) -> bool:
        """Return whether the files hold the weight."""
        ...

    def read(
        self, name: str, shape: tuple[int, ...], layer: int | None = None, *, kind: str = "weight"
    ) -> torch.Tensor:
        """Return a weight on the CPU, in rotate-half order.

        Args:
            name: Key of MODEL_WEIGHTS, or with `layer` of `layer_weights`.
            shape: Wanted shape.
            layer: Index of the layer.
            kind: "weight" or "bias".

        Raises:
            ConfigError: It is missing or has another shape; the message names it as the file does.
        """
        ...

    def read_grid(self, name: str, shape: tuple[int, int], layer: int | None = None) -> Grid | None:
        """Return a weight in the quantised grid that the files keep it in, rows as `read` orders them.

        Returns:
            None if the files keep it in no grid of `headrace_kernels.native`, or have it not at all.

        Raises:
            ConfigError: It has another shape.
        """
        ...


def check_weight(origin: Path, file_name: str, found: tuple[int, ...] | None, wanted: tuple[int, ...]) -> None:
    """Refuse a missing weight (`found` is None) or one of another shape.

    Raises:
        ConfigError: The weight does not fit.
    """
    if found is None:
        raise ConfigError(f"{origin}: wanted the weight {file_name} {list(wanted)}; it is missing", field="model")
    if found != wanted:
        raise ConfigError(
            f"{origin}: wanted the weight {file_name} to be {list(wanted)}; found {list(found)}", field="model"
        )
