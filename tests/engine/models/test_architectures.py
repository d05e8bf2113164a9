"""Tiny random models saved by transformers: its logits are the oracle."""

import json

import pytest
import torch
import transformers

from headrace.engine.arena import KvArena
from headrace.engine.batch import Batch, batch_item
from headrace.engine.models.loader import load_model
from headrace.engine.runner import ModelRunner
from headrace.errors import ConfigError
from headrace.testing.architectures import tiny_configs

pytestmark = pytest.mark.cpu

TOKENS = 45
VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = tiny_configs(SIZES) | {
    "llama3 rope": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "linear rope": transformers.LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def tiny(request, tmp_path_factory):
    """A saved model, its own logits after every token, and the tokens."""
    torch.manual_seed(0)
    config = CONFIGS[request.param]
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn_like(weight) * 0.15
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    tokens = torch.randint(0, VOCABULARY, (TOKENS,)).tolist()
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0]
    return folder, tokens, logits


def start(folder, block_tokens=16):
    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    return ModelRunner(model, KvArena(model.kv_layout(block_tokens), 12, model.device))


def run_in_chunks(runner, tokens, sizes, table):
    """Logits after each chunk."""
    found, done = [], 0
    for size in sizes:
        item = batch_item(tokens[done : done + size], done, table, sample=True)
        found.append(runner.run(Batch(items=(item,)))[0])
        done += size
    return torch.stack(found)


@pytest.mark.parametrize("sizes", [[45], [16, 16, 13], [1] * 45, [7, 1, 1, 20, 16]], ids=str)
def test_logits_equal_those_of_transformers_in_any_chunks(tiny, sizes):
    folder, tokens, logits = tiny
    ends = torch.tensor(sizes).cumsum(0) - 1
    found = run_in_chunks(start(folder), tokens, sizes, [5, 1, 8])
    torch.testing.assert_close(found, logits[ends], atol=1e-4, rtol=0)


def test_a_weight_of_another_shape_is_named(tmp_path):
    CONFIGS["llama"].save_pretrained(tmp_path)
    transformers.LlamaForCausalLM(CONFIGS["llama"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"intermediate_size": 81}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=r"model\.layers\.0\.mlp\.gate_proj\.weight to be \[81, 48\]; found \[80, 48\]"
    ):
        start(tmp_path)


def test_a_missing_weight_is_named(tmp_path):
    transformers.Qwen2ForCausalLM(CONFIGS["qwen2"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 5, "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"model\.layers\.4\..* is missing"):
        start(tmp_path)


def test_sharded_files_are_one_model(tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(CONFIGS["llama"]).eval()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = list(range(20))
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens])).logits[0, -1:]
    torch.testing.assert_close(run_in_chunks(start(tmp_path), tokens, [20], [0, 1]), wanted, atol=1e-4, rtol=0)
