"""Each layer reads KV that lands just before it, whatever computes it."""

import pytest
import torch

from headrace.core.block import blocks_for
from headrace.engine.arena import KvArena
from headrace.engine.batch import Batch, batch_item
from headrace.engine.models.decoder import build_decoder
from headrace.engine.models.loader import Model
from headrace.engine.models.native import NativeDecoder, can_run
from headrace.engine.models.row_paths import RowsDecoder
from headrace.engine.runner import ModelRunner
from headrace.testing.tiny_llama import TINY_LLAMA, RandomWeights

CPU = torch.device("cpu")
NUM_PRESENT = 40
NUM_BLOCKS = 12


def plain():
    return build_decoder(TINY_LLAMA, RandomWeights(), dtype=torch.bfloat16, device=CPU)


def native():
    if not can_run(TINY_LLAMA):
        pytest.fail("the kernels cannot run this model here")
    return NativeDecoder(TINY_LLAMA, RandomWeights(), quantised=False, most_threads=1)


def by_rows():
    return RowsDecoder(native(), plain(), torch_from=32, most_threads=1)


def computed(runner, arena, tokens, await_layer=None):
    item = batch_item(tokens[NUM_PRESENT:], NUM_PRESENT, range(NUM_BLOCKS), sample=True)
    return runner.run(Batch(items=(item,), await_layer=await_layer))


@pytest.mark.cpu
@pytest.mark.parametrize("make", [plain, native, by_rows])
@pytest.mark.parametrize("num_new", [1, 9, 70])
def test_a_layer_is_computed_with_what_landed_before_it(make, num_new):
    model = Model(spec=TINY_LLAMA, decoder=make(), contents=(), dtype=torch.bfloat16, device=CPU)
    arena = KvArena(model.kv_layout(), NUM_BLOCKS, CPU)
    runner = ModelRunner(model, arena)
    tokens = [7 + 3 * place % 50 for place in range(NUM_PRESENT + num_new)]
    whole = batch_item(tokens[:NUM_PRESENT], 0, range(NUM_BLOCKS), sample=False)
    runner.run(Batch(items=(whole,)))
    expected = computed(runner, arena, tokens)
    landed = arena.data.clone()
    num_landing = blocks_for(NUM_PRESENT, arena.layout.block_tokens)
    arena.data.fill_(float("nan"))
    seen = []

    def land(layer):
        seen.append(layer)
        arena.data[:num_landing, layer] = landed[:num_landing, layer]

    found = computed(runner, arena, tokens, land)
    assert seen == list(range(len(TINY_LLAMA.layers)))
    assert torch.equal(found, expected)


@pytest.mark.cpu
@pytest.mark.parametrize("make", [plain, native])
def test_a_step_that_was_given_up_in_the_middle_leaves_the_next_one_right(make):
    model = Model(spec=TINY_LLAMA, decoder=make(), contents=(), dtype=torch.bfloat16, device=CPU)
    arena = KvArena(model.kv_layout(), NUM_BLOCKS, CPU)
    runner = ModelRunner(model, arena)
    tokens = [5 + place % 40 for place in range(NUM_PRESENT + 9)]
    runner.run(Batch(items=(batch_item(tokens[:NUM_PRESENT], 0, range(NUM_BLOCKS), sample=False),)))
    expected = computed(runner, arena, tokens)

    def stop(layer):
        if layer == len(TINY_LLAMA.layers) - 1:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        computed(runner, arena, tokens, stop)
    assert torch.equal(computed(runner, arena, tokens), expected)
