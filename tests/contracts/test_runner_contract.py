"""What the engine relies on in a runner; the fake and a real model pass the same suite."""

import pytest
import torch

from headrace.core.block import BlockId, KvLayout
from headrace.engine.arena import KvArena
from headrace.engine.batch import Batch, batch_item
from headrace.engine.models.decoder import build_decoder
from headrace.engine.models.loader import Model
from headrace.engine.packing import PaddedRows
from headrace.engine.runner import ModelRunner
from headrace.techniques.prepacking.bins import FirstFitDecreasing
from headrace.testing.runner import FakeRunner
from headrace.testing.tiny_llama import TINY_LLAMA, RandomWeights

NUM_BLOCKS = 24
VOCAB = TINY_LLAMA.vocab_size
PROMPT = tuple((7 * index + 3) % VOCAB for index in range(37))


def model_runner(pack=None):
    device = torch.device("cpu")
    decoder = build_decoder(TINY_LLAMA, RandomWeights(), dtype=torch.float32, device=device)
    model = Model(spec=TINY_LLAMA, decoder=decoder, contents=(), dtype=torch.float32, device=device)
    return ModelRunner(model, KvArena(model.kv_layout(16), NUM_BLOCKS, device, num_pad_blocks=1), pack=pack)


def padding_runner():
    return model_runner(PaddedRows(tile_tokens=16))


def packing_runner():
    return model_runner(FirstFitDecreasing(tile_tokens=16))


def fake_runner():
    return FakeRunner(NUM_BLOCKS, block_tokens=16, vocab_size=VOCAB, max_context_tokens=256)


RUNNERS = {"fake": fake_runner, "model": model_runner, "pad": padding_runner, "bins": packing_runner}


@pytest.fixture(params=RUNNERS.values(), ids=RUNNERS)
def runner(request):
    return request.param()


def table(*blocks):
    return tuple(BlockId(block) for block in blocks)


def run(runner, *items):
    return runner.run(Batch(items=tuple(items)))


def compute(runner, tokens, blocks, *, start=0, chunk=None):
    """Compute `tokens` into `blocks` by chunks; returns the logits after the last one."""
    size = chunk or len(tokens)
    for begin in range(start, start + len(tokens), size):
        part = tokens[begin - start : begin - start + size]
        logits = run(runner, batch_item(part, begin, blocks, sample=True))
    return logits


def assert_same(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def differs(found, wanted):
    return (found - wanted).abs().max() > 1e-2


def test_blocks_that_were_copied_out_can_be_read_elsewhere(runner):
    whole = compute(runner, PROMPT, table(0, 1, 2))
    compute(runner, PROMPT[:36], table(3, 4, 5))
    saved = runner.read_blocks(table(3, 4, 5))
    assert (saved.shape[0], saved.dtype, saved.device.type) == (3, torch.uint8, "cpu")
    compute(runner, PROMPT[::-1], table(3, 4, 5))
    runner.write_blocks(table(9, 7, 4), saved)
    assert_same(compute(runner, PROMPT[36:], table(9, 7, 4), start=36), whole)


def test_some_of_the_blocks_that_were_copied_out_can_be_read_back(runner):
    whole = compute(runner, PROMPT, table(0, 1, 2))
    compute(runner, PROMPT[:36], table(3, 4, 5))
    saved = runner.read_blocks(table(3, 4, 5))
    runner.write_blocks(table(8, 9), saved[1:])
    assert_same(compute(runner, PROMPT[36:], table(0, 8, 9), start=36), whole)


def test_it_describes_itself(runner):
    assert isinstance(runner.layout, KvLayout)
    assert runner.layout.num_layers == runner.num_layers
    assert runner.max_context_tokens == 256
    assert runner.eos_token_ids == {2}


def test_only_items_that_sample_have_logits_in_their_order(runner):
    first = compute(runner, PROMPT, table(0, 1, 2))
    other = compute(runner, PROMPT[:9], table(3))
    found = run(
        runner,
        batch_item(PROMPT[:9], 0, table(4), sample=True),
        batch_item(PROMPT[:20], 0, table(5, 6), sample=False),
        batch_item(PROMPT, 0, table(7, 8, 9), sample=True),
    )
    assert found.dtype == torch.float32
    assert_same(found, torch.cat([other, first]))


def test_a_step_without_sampling_items_has_no_rows(runner):
    assert run(runner, batch_item(PROMPT, 0, table(0, 1, 2), sample=False)).shape == (0, VOCAB)


@pytest.mark.parametrize("chunk", [1, 5, 16, 36])
def test_a_prompt_in_chunks_gives_the_logits_of_the_whole(runner, chunk):
    whole = compute(runner, PROMPT, table(0, 1, 2))
    assert_same(compute(runner, PROMPT, table(3, 4, 5), chunk=chunk), whole)


def test_blocks_may_lie_anywhere(runner):
    assert_same(compute(runner, PROMPT, table(20, 3, 11)), compute(runner, PROMPT, table(0, 1, 2)))


def test_a_shared_prefix_is_read_and_not_computed(runner):
    whole = compute(runner, PROMPT, table(0, 1, 2))
    assert_same(compute(runner, PROMPT[16:], table(0, 8, 9), start=16), whole)


def test_the_prefix_matters(runner):
    whole = compute(runner, PROMPT, table(0, 1, 2))
    compute(runner, PROMPT[::-1], table(5, 6, 7))
    assert differs(compute(runner, PROMPT[16:], table(5, 8, 9), start=16), whole)


def test_swapped_blocks_are_noticed(runner):
    compute(runner, PROMPT, table(0, 1, 2))
    right = compute(runner, PROMPT[-1:], table(0, 1, 2), start=len(PROMPT) - 1)
    compute(runner, (5,) * 16, table(9))
    assert differs(compute(runner, PROMPT[-1:], table(0, 9, 2), start=len(PROMPT) - 1), right)


def test_positions_are_those_given_and_not_those_of_the_entries(runner):
    compute(runner, PROMPT, table(0, 1, 2))
    near, far = (
        run(runner, batch_item((4,), len(PROMPT), table(0, 1, 2), sample=True, positions=[position]))
        for position in (len(PROMPT), len(PROMPT) + 20)
    )
    assert differs(near, far)


def test_what_lies_after_the_last_entry_does_not_matter(runner):
    clean = compute(runner, PROMPT, table(0, 1, 2))
    compute(runner, (9,) * 48, table(3, 4, 5))
    assert_same(compute(runner, PROMPT, table(3, 4, 5)), clean)


def test_more_blocks_than_needed_are_allowed(runner):
    assert_same(compute(runner, PROMPT, table(3, 4, 5, 6, 7)), compute(runner, PROMPT, table(0, 1, 2)))


def test_a_decode_beside_a_prompt_gives_what_it_gives_alone(runner):
    compute(runner, PROMPT, table(0, 1, 2))
    alone = compute(runner, (4,), table(0, 1, 2), start=len(PROMPT))
    compute(runner, PROMPT, table(3, 4, 5))
    beside = run(
        runner,
        batch_item((4,), len(PROMPT), table(3, 4, 5), sample=True),
        batch_item(PROMPT[:30], 0, table(6, 7), sample=False),
    )
    assert_same(beside, alone)


@pytest.mark.parametrize(
    ("tokens", "start", "blocks"),
    [(PROMPT, 0, (0, 1)), ((VOCAB,), 0, (0,)), ((-1,), 0, (0,)), ((1,), 0, (NUM_BLOCKS,)), ((1,), 16, (0,))],
    ids=["short table", "token too large", "negative token", "unknown block", "start past the table"],
)
def test_an_item_that_contradicts_itself_is_refused(runner, tokens, start, blocks):
    with pytest.raises(ValueError, match=r"blocks|token ids|block ids"):
        run(runner, batch_item(tokens, start, table(*blocks), sample=True))
