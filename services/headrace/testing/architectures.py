"""Tiny models of every architecture that headrace runs, as Hugging Face configurations."""

from collections.abc import Mapping
from typing import Any

import transformers

_WINDOW = 9
_LOCAL_ROPE = {"rope_type": "default", "rope_theta": 100.0}


def tiny_configs(sizes: Mapping[str, Any]) -> dict[str, transformers.PretrainedConfig]:
    """Return a configuration per architecture and variant, by a name for people.

    Sliding windows are shorter than any prompt worth a test.

    Args:
        sizes: What all of them take, `head_dim` among it; `num_hidden_layers` must be 4.
    """
    without_head_dim = {name: size for name, size in sizes.items() if name != "head_dim"}
    return {
        "llama": transformers.LlamaConfig(**sizes, tie_word_embeddings=True),
        "llama with biases": transformers.LlamaConfig(**sizes, attention_bias=True, mlp_bias=True),
        "qwen2": transformers.Qwen2Config(**without_head_dim, tie_word_embeddings=True),
        "qwen3": transformers.Qwen3Config(**sizes),
        "mistral": transformers.MistralConfig(**sizes, sliding_window=_WINDOW),
        "gemma": transformers.GemmaConfig(**sizes),
        "gemma2": transformers.Gemma2Config(
            **sizes,
            sliding_window=_WINDOW,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            query_pre_attn_scalar=20,
        ),
        "gemma3": transformers.Gemma3TextConfig(
            **sizes,
            sliding_window=_WINDOW,
            layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": _LOCAL_ROPE | {"rope_theta": 5000.0},
                "sliding_attention": _LOCAL_ROPE,
            },
        ),
    }
