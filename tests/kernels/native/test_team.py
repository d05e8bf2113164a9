"""Programs of several operations, whose buffers pass from thread to thread, against one thread."""

import pytest
import torch

from headrace_kernels import native
from headrace_kernels.native import Buffer, abi
from headrace_kernels.native.abi import Epilogue
from headrace_kernels.native.machine import Panels, Program, buffers

MOST_THREADS = 4
VOCAB, HIDDEN, MLP, HEADS, KV_HEADS, DIM, LAYERS, BLOCK_TOKENS = 100, 64, 96, 6, 2, 32, 2, 16
# (queries, entries) of each sequence; of those that follow "cut" the keys are cut into parts
STEPS = {
    "few_rows": [(1, 40), (1, 3)],
    "cut": [(1, 700)],
    "some_rows": [(1, 20), (1, 90), (3, 12)],
    "many_rows": [(37, 37), (1, 100), (64, 80), (1, 1), (29, 200)],
}


def whole_model(random_weight):
    """A model of two layers with every kind of operation and weight; each step passes barriers of every kind."""
    program = Program()
    norm = (torch.rand(HIDDEN) + 0.5, 1e-5)
    table = Panels(random_weight("int4", VOCAB, HIDDEN))
    program.embed(table, Buffer.HIDDEN, 1.0)
    for layer in range(LAYERS):
        form = ("int4", "bf16")[layer]
        qkv = random_weight("int8", (HEADS + 2 * KV_HEADS) * DIM, HIDDEN, seed=layer)
        program.linear(Panels(qkv), Buffer.HIDDEN, Buffer.QKV, norm=norm)
        what = abi.Attend(heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, layer=layer, scale=DIM**-0.5)
        what.source, what.target = Buffer.QKV, Buffer.ATTENDED
        program.attend(what)
        output = random_weight(form, HIDDEN, HEADS * DIM, seed=layer)
        program.linear(Panels(output), Buffer.ATTENDED, Buffer.PROJECTED)
        program.norm_add(Buffer.PROJECTED, Buffer.HIDDEN, *norm)
        gate_up, down = random_weight(form, 2 * MLP, HIDDEN, seed=layer), random_weight(form, HIDDEN, MLP, seed=layer)
        program.linear(Panels(gate_up, 8), Buffer.HIDDEN, Buffer.GATED, norm=norm, epilogue=Epilogue.SILU)
        program.linear(Panels(down, 8), Buffer.GATED, Buffer.HIDDEN, epilogue=Epilogue.ADD)
    program.linear(table, Buffer.HIDDEN, Buffer.LOGITS, norm=norm)
    return program


class Model:
    """Runs the program over steps on one team."""

    def __init__(self, random_weight, most_threads=MOST_THREADS):
        torch.manual_seed(0)
        self.program = whole_model(random_weight)
        self.operations = self.program.operations()
        self.machine = native.Machine(most_threads)

    def logits(self, shapes, threads, *, calls=1):
        """Logits of the last row of each sequence and the arena; the program is cut into that many calls."""
        generator = torch.Generator().manual_seed(len(shapes))
        rows, blocks = sum(queries for queries, _ in shapes), [-(-entries // BLOCK_TOKENS) for _, entries in shapes]
        tables = torch.zeros(len(shapes), max(blocks), dtype=torch.long)
        for index, count in enumerate(blocks):
            tables[index, :count] = torch.arange(count) + sum(blocks[:index])
        spans = [torch.arange(entries - queries, entries) for queries, entries in shapes]
        positions = torch.cat(spans)
        cu_seqlens = torch.tensor([0, *[queries for queries, _ in shapes]]).cumsum(0)
        arena = torch.randn(sum(blocks), LAYERS, 2, BLOCK_TOKENS, KV_HEADS, DIM, generator=generator).bfloat16()
        tensors = {
            "token_ids": torch.randint(VOCAB, (rows,), generator=generator),
            "positions": positions,
            "write_blocks": torch.cat([tables[i, span // BLOCK_TOKENS] for i, span in enumerate(spans)]),
            "write_slots": positions % BLOCK_TOKENS,
            "cu_seqlens": cu_seqlens,
            "block_tables": tables,
            "kv_lengths": torch.tensor([entries for _, entries in shapes]),
            "sample_rows": cu_seqlens[1:] - 1,
            "arena": arena,
            "frequencies": 1.0 / 100.0 ** (torch.arange(0, DIM, 2, dtype=torch.float64) / DIM),
        }
        widths = (HIDDEN, (HEADS + 2 * KV_HEADS) * DIM, HEADS * DIM, MLP, HIDDEN)
        held = [torch.full((rows, width), torch.nan) for width in widths]
        held.append(torch.full((len(shapes), VOCAB), torch.nan))
        step = abi.Step(
            num_rows=rows,
            num_sequences=len(shapes),
            num_samples=len(shapes),
            table_width=tables.shape[1],
            num_layers=LAYERS,
            block_tokens=BLOCK_TOKENS,
            num_ropes=1,
            rope_size=DIM // 2,
            buffers=buffers(*held),
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        )
        self.machine.begin(step, threads, HEADS, KV_HEADS)
        ends = [len(self.program) * (index + 1) // calls for index in range(calls)]
        for begin, end in zip([0, *ends], ends, strict=False):
            self.machine.run(self.operations, begin, end - begin, step, threads)
        return held[-1], arena


@pytest.fixture(scope="module")
def model(random_weight):
    made = Model(random_weight)
    yield made
    made.machine.close()


@pytest.mark.parametrize("calls", [1, 5])
@pytest.mark.parametrize("threads", [2, 3, 4])
@pytest.mark.parametrize("name", STEPS)
def test_threads_hand_whole_steps_over_without_loss(name, threads, calls, model):
    wanted, wanted_arena = model.logits(STEPS[name], 1)
    assert wanted.isfinite().all()
    for _ in range(5):
        found, arena = model.logits(STEPS[name], threads, calls=calls)
        if name != "cut":  # where the keys are cut depends on the number of threads, and so does the rounding
            assert found.equal(wanted)
            assert arena.view(torch.int16).equal(wanted_arena.view(torch.int16))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_a_team_may_change_its_size_and_its_rows_from_run_to_run(model):
    names = ["some_rows", "many_rows", "few_rows"]
    wanted = {name: model.logits(STEPS[name], 1)[0] for name in names}
    for turn in range(60):
        name = names[turn % 3]
        assert model.logits(STEPS[name], turn * 7 % 4 + 1)[0].equal(wanted[name])


def test_a_team_ends_at_once_after_its_last_run(random_weight):
    for threads in (1, 2, 4, 4, 3):
        short = Model(random_weight, threads)
        logits, _ = short.logits(STEPS["some_rows"], threads)
        short.machine.close()
        assert logits.isfinite().all()
