"""A tiny model on each path that computes it, and the three ways its chunks can lie in memory."""

import pytest
import torch

from headrace.engine.arena import KvArena
from headrace.engine.models.decoder import build_decoder
from headrace.engine.models.loader import Model
from headrace.engine.models.native import NativeDecoder
from headrace.engine.packing import PaddedRows
from headrace.engine.runner import ModelRunner
from headrace.techniques.prepacking.bins import FirstFitDecreasing
from headrace.testing.tiny_llama import TINY_LLAMA, RandomWeights

CPU = torch.device("cpu")
BLOCK_TOKENS = 4
NUM_BLOCKS = 80
POLICIES = {"varlen": lambda: None, "bins": lambda: FirstFitDecreasing(8), "pad": lambda: PaddedRows(8)}


def build_plain(dtype):
    decoder = build_decoder(TINY_LLAMA, RandomWeights(), dtype=dtype, device=CPU)
    return Model(spec=TINY_LLAMA, decoder=decoder, contents=(), dtype=dtype, device=CPU)


def build_native():
    decoder = NativeDecoder(TINY_LLAMA, RandomWeights(), quantised=False, most_threads=2)
    return Model(spec=TINY_LLAMA, decoder=decoder, contents=(), dtype=torch.bfloat16, device=CPU)


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
