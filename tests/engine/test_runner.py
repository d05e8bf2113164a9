import mmap
from pathlib import Path

import pytest
import torch

from headrace.core.block import KvLayout
from headrace.engine.arena import KvArena
from headrace.engine.batch import Batch, BatchItem, batch_item
from headrace.engine.models.decoder import build_decoder
from headrace.engine.models.loader import Model
from headrace.engine.models.spec import Activation, LayerSpec, ModelSpec, RopeSpec, architecture
from headrace.engine.packing import PaddedRows
from headrace.engine.runner import ModelRunner

CPU = torch.device("cpu")
SPEC = ModelSpec(
    architecture=architecture("llama"),
    vocab_size=50,
    hidden_size=32,
    mlp_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    layers=(LayerSpec(rope=RopeSpec(theta=100.0)),) * 2,
    max_context_tokens=64,
    norm_eps=1e-5,
    attention_scale=8**-0.5,
    activation=Activation.SILU,
    is_tied=True,
)


class RandomWeights:
    def __init__(self):
        self._generator = torch.Generator().manual_seed(0)

    def has(self, name, layer=None):
        return name != "head"

    def read(self, name, shape, layer=None, *, kind="weight"):
        return torch.randn(shape, generator=self._generator) * 0.3 + (len(shape) == 1)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def runner(request):
    decoder = build_decoder(SPEC, RandomWeights(), dtype=request.param, device=CPU)
    model = Model(spec=SPEC, decoder=decoder, contents=(), dtype=request.param, device=CPU)
    return ModelRunner(model, KvArena(model.kv_layout(4), 40, CPU))


@pytest.fixture
def limit(runner):
    return {"fp32": 1e-5, "bf16": 0.15}[runner.layout.dtype]


def alone(runner, tokens, table=range(30, 40)):
    return runner.run(Batch(items=(batch_item(tokens, 0, table, sample=True),)))[0]


def test_items_of_one_batch_do_not_see_each_other(runner, limit):
    prompts = [list(range(n, n + length)) for n, length in ((0, 9), (3, 1), (20, 4), (7, 13))]
    wanted = torch.stack([alone(runner, prompt) for prompt in prompts])
    tables = [range(i * 5, i * 5 + 5) for i in range(4)]
    items = tuple(batch_item(p, 0, t, sample=True) for p, t in zip(prompts, tables, strict=True))
    torch.testing.assert_close(runner.run(Batch(items=items)), wanted, atol=limit, rtol=0)


def test_decodes_and_a_prompt_chunk_share_a_batch(runner, limit):
    tokens = [5, 9, 11, 2, 40, 33, 7, 8, 21]
    for first, table in ((8, range(5)), (3, range(10, 15))):
        runner.run(Batch(items=(batch_item(tokens[:first], 0, table, sample=False),)))
    items = (
        batch_item(tokens[8:], 8, range(5), sample=True),
        batch_item(tokens[3:], 3, range(10, 15), sample=True),
        batch_item(tokens, 0, range(20, 25), sample=True),
    )
    logits = runner.run(Batch(items=items))
    torch.testing.assert_close(logits, alone(runner, tokens).expand(3, -1), atol=limit, rtol=0)


def test_only_items_that_sample_have_logits_in_item_order(runner, limit):
    items = tuple(
        batch_item([token, token + 1], 0, [index], sample=index != 1) for index, token in enumerate((3, 8, 30))
    )
    logits = runner.run(Batch(items=items))
    wanted = torch.stack([alone(runner, [3, 4]), alone(runner, [30, 31])])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, wanted, atol=limit, rtol=0)


def test_a_batch_without_samples_or_items_gives_no_rows(runner):
    assert runner.run(Batch(items=(batch_item([1], 0, [0], sample=False),))).shape == (0, 50)
    assert runner.run(Batch(items=())).shape == (0, 50)


def test_kv_copied_to_other_blocks_continues_the_sequence(runner, limit):
    tokens = list(range(11))
    wanted = alone(runner, tokens)
    runner.run(Batch(items=(batch_item(tokens[:10], 0, [0, 1, 2], sample=False),)))
    data = runner._arena.data
    data[[21, 9, 15]] = data[[0, 1, 2]]
    data[:3] = torch.nan
    found = runner.run(Batch(items=(batch_item(tokens[10:], 10, [21, 9, 15], sample=True),)))[0]
    torch.testing.assert_close(found, wanted, atol=limit, rtol=0)


def test_only_distances_between_positions_matter(runner, limit):
    tokens = [5, 9, 11, 2, 40]
    item = batch_item(tokens, 0, [0, 1], sample=True, positions=range(17, 22))
    found = runner.run(Batch(items=(item,)))[0]
    torch.testing.assert_close(found, alone(runner, tokens), atol=limit, rtol=0)
    assert runner._arena.slot_positions[:2].flatten()[:5].tolist() == [17, 18, 19, 20, 21]


def test_entries_may_be_stored_in_another_order_than_their_positions(runner, limit):
    """One layer's keys do not depend on the order they are written in; the causal mask follows positions."""
    tokens = [5, 9, 11, 2, 40]
    order = [2, 0, 1, 4, 3]
    item = batch_item([tokens[i] for i in order], 0, [0, 1], sample=False, positions=order)
    runner.run(Batch(items=(item,)))
    last = BatchItem(
        token_ids=(7,), positions=(5,), kv_start=5, block_table=(0, 1), sample=True, reads_slot_positions=True
    )
    found = runner.run(Batch(items=(last,)))[0]
    torch.testing.assert_close(found, alone(runner, [*tokens, 7]), atol=limit, rtol=0)


def test_blocks_from_a_peer_are_ordered_also_beside_an_item_that_is_not(runner, limit):
    tokens = list(range(11))
    wanted = alone(runner, tokens)
    runner.run(Batch(items=(batch_item(tokens[:10], 0, [0, 1, 2], sample=False),)))
    runner._arena.slot_positions[:3] = 12345
    moved = batch_item([1, 2], 0, [8], sample=False, positions=[30, 31])
    arrived = batch_item(tokens[10:], 10, [0, 1, 2], sample=True)
    torch.testing.assert_close(runner.run(Batch(items=(moved, arrived)))[0], wanted, atol=limit, rtol=0)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (batch_item([1] * 5, 0, [0], sample=True), "need 2 blocks"),
        (batch_item([50], 0, [0], sample=True), "token ids"),
        (batch_item([-1], 0, [0], sample=True), "token ids"),
        (batch_item([1], 0, [40], sample=True), "block ids"),
        (batch_item([1], 0, [-1], sample=True), "block ids"),
        (BatchItem(token_ids=(), positions=(), kv_start=0, block_table=(0,), sample=True), "item of 0 tokens"),
        (BatchItem(token_ids=(1,), positions=(), kv_start=0, block_table=(0,), sample=True), "0 positions"),
    ],
)
def test_an_item_that_contradicts_itself_is_refused(runner, item, message):
    with pytest.raises(ValueError, match=message):
        runner.run(Batch(items=(item,)))


def test_building_an_item_checks_its_lists():
    with pytest.raises(ValueError, match="needs tokens"):
        batch_item([], 0, [0], sample=True)
    with pytest.raises(ValueError, match="2 tokens but 1 positions"):
        batch_item([1, 2], 0, [0], sample=True, positions=[0])


def test_an_arena_of_another_layout_is_refused(runner):
    layout = KvLayout(num_layers=3, block_tokens=4, num_kv_heads=2, head_dim=8, dtype=runner.layout.dtype)
    with pytest.raises(ValueError, match="the arena holds"):
        ModelRunner(runner._model, KvArena(layout, 4, CPU))


def test_pads_need_blocks_of_their_own(runner):
    with pytest.raises(ValueError, match="blocks for their pads"):
        ModelRunner(runner._model, KvArena(runner.layout, 4, CPU), pack=PaddedRows())


def test_an_item_may_not_name_the_blocks_of_pads(runner):
    padding = ModelRunner(runner._model, KvArena(runner.layout, 4, CPU, num_pad_blocks=2), pack=PaddedRows())
    with pytest.raises(ValueError, match=r"block ids must be in \[0, 4\)"):
        padding.run(Batch(items=(batch_item([1], 0, [4], sample=True),)))


def test_blocks_of_pads_lie_behind_those_that_transports_know(runner):
    arena = KvArena(runner.layout, 4, CPU, num_pad_blocks=2)
    assert (arena.num_blocks, arena.pad_blocks) == (4, (4, 5))
    assert (len(arena.data), len(arena.slot_positions)) == (6, 6)


def test_blocks_lie_one_after_the_other_from_a_page_on():
    layout = KvLayout(num_layers=3, block_tokens=4, num_kv_heads=2, head_dim=8, dtype="bf16")
    arena = KvArena(layout, 5, CPU)
    assert arena.base_address % mmap.PAGESIZE == 0
    assert arena.data.shape == (5, 3, 2, 4, 2, 8)
    assert arena.data[3].data_ptr() - arena.base_address == 3 * arena.block_bytes
    assert arena.data.is_contiguous()
    with pytest.raises(ValueError, match="blocks > 0"):
        KvArena(layout, 0, CPU)


def test_threads_are_asked_for_in_front_of_every_layer(runner):
    before, asked = torch.get_num_threads(), []

    def share():
        asked.append(torch.get_num_threads())
        return 1

    asking = ModelRunner(runner._model, KvArena(runner.layout, 40, CPU), share)
    assert torch.equal(alone(asking, [1, 2, 3]), alone(runner, [1, 2, 3]))
    assert len(asked) == len(SPEC.layers) + 1
    assert asked[1:] == [1] * len(SPEC.layers)
    torch.set_num_threads(before)


def test_blocks_take_memory_when_they_are_first_written():
    def resident_bytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    layout = KvLayout(num_layers=32, block_tokens=16, num_kv_heads=8, head_dim=64, dtype="bf16")
    before = resident_bytes()
    arena = KvArena(layout, (256 << 20) // layout.block_bytes, CPU)
    assert resident_bytes() - before < 32 << 20
    arena.data.fill_(1)
    assert resident_bytes() - before > 200 << 20
