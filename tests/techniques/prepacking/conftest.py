"""A tiny model on each path that computes it, and the three ways its chunks can lie in memory."""

import pytest
import torch

from headrace.engine.arena import KvArena
from headrace.engine.models.decoder import build_decoder
from headrace.engine.models.loader import Model
from headrace.engine.models.native import NativeDecoder
from headrace.engine.models.spec import Activation, LayerSpec, ModelSpec, RopeSpec, architecture
from headrace.engine.packing import PaddedRows
from headrace.engine.runner import ModelRunner
from headrace.techniques.prepacking.bins import FirstFitDecreasing

CPU = torch.device("cpu")
VOCAB = 90
BLOCK_TOKENS = 4
NUM_BLOCKS = 80
POLICIES = {"varlen": lambda: None, "bins": lambda: FirstFitDecreasing(8), "pad": lambda: PaddedRows(8)}
SPEC = ModelSpec(
    architecture=architecture("llama"),
    vocab_size=VOCAB,
    hidden_size=64,
    mlp_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    layers=(LayerSpec(rope=RopeSpec(theta=1000.0)), LayerSpec(rope=RopeSpec(theta=1000.0), window=9)),
    max_context_tokens=256,
    norm_eps=1e-5,
    attention_scale=16**-0.5,
    activation=Activation.SILU,
    eos_token_ids=frozenset({2}),
)


class RandomWeights:
    """Weights that bf16 holds exactly."""

    def __init__(self):
        self._generator = torch.Generator().manual_seed(3)

    def has(self, name, layer=None):
        return True

    def read(self, name, shape, layer=None, *, kind="weight"):
        values = torch.randn(shape, generator=self._generator) * 0.3
        return (1.0 + 0.1 * values if "norm" in name else values).bfloat16().float()


def build_plain(dtype):
    decoder = build_decoder(SPEC, RandomWeights(), dtype=dtype, device=CPU)
    return Model(spec=SPEC, decoder=decoder, contents=(), dtype=dtype, device=CPU)


def build_native():
    decoder = NativeDecoder(SPEC, RandomWeights(), quantised=False, most_threads=2)
    return Model(spec=SPEC, decoder=decoder, contents=(), dtype=torch.bfloat16, device=CPU)


@pytest.fixture(scope="session", params=["fp32", "bf16", pytest.param("native", marks=pytest.mark.cpu)])
def model(request):
    if request.param == "native":
        return build_native()
    return build_plain({"fp32": torch.float32, "bf16": torch.bfloat16}[request.param])


@pytest.fixture(scope="session")
def exact_model():
    return build_plain(torch.float32)


@pytest.fixture(scope="session")
def make_runner():
    """Makes a runner whose memory, pads' blocks included, holds NaN: what is read unwritten shows."""

    def make(model, pack, num_blocks=NUM_BLOCKS):
        arena = KvArena(model.kv_layout(BLOCK_TOKENS), num_blocks, CPU, num_pad_blocks=2)
        arena.data.fill_(torch.nan)
        return ModelRunner(model, arena, pack=POLICIES[pack]())

    return make
