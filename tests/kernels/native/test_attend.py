"""Rotary embedding, KV write and attention against the plain kernels, in fp32 over the same bf16 KV."""

import pytest
import torch

from headrace_kernels import attend as plain_attend
from headrace_kernels import write_kv as plain_write
from headrace_kernels.native import Buffer, abi
from headrace_kernels.native.machine import Program

LAYERS, LAYER = 3, 1
# (queries, entries) of each sequence
SHAPES = {
    "one_decode": [(1, 37)],
    "one_token": [(1, 1)],
    "ragged_decodes": [(1, 3), (1, 16), (1, 17), (1, 130), (1, 64), (1, 65)],
    "long_decodes": [(1, 1025), (1, 2600)],
    "whole_prompts": [(5, 5), (16, 16), (33, 33), (100, 100)],
    "prefix_and_chunk": [(7, 40), (16, 32), (2, 200), (64, 300)],
    "mixed": [(1, 20), (1, 90), (12, 12), (1, 21), (9, 64), (1, 1)],
}


class Case:
    """A batch over an arena whose every unused slot is NaN."""

    def __init__(self, shapes, heads, kv_heads, dim, *, block_tokens=16, moved=False):
        generator = torch.Generator().manual_seed(0)
        needed = [-(-entries // block_tokens) for _, entries in shapes]
        num_blocks = sum(needed) + 3
        shuffled = torch.randperm(num_blocks, generator=generator)
        self.arena = torch.full((num_blocks, LAYERS, 2, block_tokens, kv_heads, dim), torch.nan, dtype=torch.bfloat16)
        self.tables = shuffled[-1].repeat(len(shapes), max(needed) + 1)
        self.slot_positions = torch.zeros((num_blocks, block_tokens), dtype=torch.int32)
        positions, blocks, slots, used = [], [], [], 0
        for row, (queries, entries) in enumerate(shapes):
            own = shuffled[used : used + needed[row]]
            used += needed[row]
            self.tables[row, : len(own)] = own
            index = torch.arange(entries)
            where = (own[index // block_tokens], index % block_tokens)
            position = torch.randperm(entries * 2, generator=generator)[:entries] if moved else index
            self.slot_positions[where] = position.to(torch.int32)
            old = index < entries - queries
            content = torch.randn(int(old.sum()), 2, kv_heads, dim, generator=generator)
            self.arena[where[0][old], LAYER, :, where[1][old]] = content.to(torch.bfloat16)
            positions.append(position[~old])
            blocks.append(where[0][~old])
            slots.append(where[1][~old])
        self.positions, self.blocks, self.slots = torch.cat(positions), torch.cat(blocks), torch.cat(slots)
        self.cu_seqlens = torch.tensor([0, *torch.tensor([s[0] for s in shapes]).cumsum(0).tolist()])
        self.kv_lengths = torch.tensor([s[1] for s in shapes])
        self.moved = moved
        self.qkv = torch.randn(len(self.positions), heads + 2 * kv_heads, dim, generator=generator)
        self.frequencies = 1.0 / 100.0 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim

    def wanted(self, scoring, arena, norms=None):
        qkv = self.qkv.clone()
        if norms is not None:
            for begin, end, norm in ((0, self.heads, norms[0]), (self.heads, self.heads + self.kv_heads, norms[1])):
                x = qkv[:, begin:end]
                qkv[:, begin:end] = x / (x.pow(2).mean(2, keepdim=True) + 1e-6).sqrt() * norm
        rotation = plain_write.rotation_at(self.positions, self.frequencies)
        wide = arena[:, LAYER].float()
        plan = plain_write.WritePlan(blocks=self.blocks, slots=self.slots)
        q = plain_write.IMPLEMENTATIONS.reference(qkv, rotation, wide, plan)
        arena[self.blocks, LAYER, :, self.slots] = wide[self.blocks, :, self.slots].to(torch.bfloat16)
        plan = plain_attend.AttendPlan(
            cu_seqlens=self.cu_seqlens,
            block_tables=self.tables,
            kv_lengths=self.kv_lengths,
            slot_positions=self.slot_positions if self.moved else None,
        )
        kv_view = arena[:, LAYER].float()
        return plain_attend.IMPLEMENTATIONS.reference(q, self.positions, kv_view, plan, scoring)[0]

    def found(self, run, scoring, arena, norms=(None, None), threads=3):
        program = Program()
        described = abi.Attend(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.dim,
            layer=LAYER,
            window=scoring.window or 0,
            source=Buffer.QKV,
            target=Buffer.ATTENDED,
            scale=scoring.scale,
            soft_cap=scoring.soft_cap or 0.0,
            norm_eps=1e-6,
        )
        program.attend(described, *norms)
        rows = len(self.positions)
        out = torch.full((rows, self.heads, self.dim), torch.nan)
        run(
            program,
            {Buffer.QKV: self.qkv.clone(), Buffer.ATTENDED: out},
            threads=threads,
            heads=(self.heads, self.kv_heads),
            num_rows=rows,
            num_sequences=len(self.kv_lengths),
            table_width=self.tables.shape[1],
            positions=self.positions,
            write_blocks=self.blocks,
            write_slots=self.slots,
            cu_seqlens=self.cu_seqlens,
            block_tables=self.tables,
            kv_lengths=self.kv_lengths,
            arena=arena,
            num_layers=LAYERS,
            block_tokens=arena.shape[3],
            num_ropes=1,
            frequencies=self.frequencies,
            rope_size=self.dim // 2,
            **({"slot_positions": self.slot_positions} if self.moved else {}),
        )
        return out


def check(case, run, scoring, norms=None, threads=3):
    ours, theirs = case.arena.clone(), case.arena.clone()
    wanted = case.wanted(scoring, theirs, norms)
    found = case.found(run, scoring, ours, norms or (None, None), threads)
    # A rotated key may round to the other of two bf16 neighbours; nothing else may differ.
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-7, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)
    assert (found - wanted).abs().mean() < 2e-5


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("heads", [(3, 1), (9, 3), (4, 4), (14, 2), (8, 1)])
@pytest.mark.parametrize("name", SHAPES)
def test_attention_equals_the_reference(name, heads, threads, run):
    check(Case(SHAPES[name], *heads, 32), run, plain_attend.Scoring(scale=32**-0.5), threads=threads)


@pytest.mark.parametrize("block_tokens", [16, 32, 64])
@pytest.mark.parametrize("dim", [16, 64, 96, 128, 256])
def test_head_and_block_sizes(dim, block_tokens, run):
    case = Case(SHAPES["mixed"], 6, 2, dim, block_tokens=block_tokens)
    check(case, run, plain_attend.Scoring(scale=dim**-0.5))


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("window", [1, 5, 40, 64, 65, 200, 5000])
@pytest.mark.parametrize("name", ["mixed", "long_decodes", "prefix_and_chunk", "whole_prompts"])
def test_a_window_hides_the_same_keys(name, window, moved, run):
    check(Case(SHAPES[name], 6, 2, 32, moved=moved), run, plain_attend.Scoring(scale=0.2, window=window))


@pytest.mark.parametrize("name", SHAPES)
def test_causality_follows_slot_positions_not_the_order_of_entries(name, run):
    check(Case(SHAPES[name], 9, 3, 32, moved=True), run, plain_attend.Scoring(scale=32**-0.5))


def test_a_soft_cap_bounds_the_scores(run):
    check(Case(SHAPES["mixed"], 6, 2, 32), run, plain_attend.Scoring(scale=2.0, soft_cap=3.0))


def test_queries_and_keys_are_normalised_by_head(run):
    norms = (torch.rand(32) + 0.5, torch.rand(32) + 0.5)
    check(Case(SHAPES["mixed"], 6, 2, 32), run, plain_attend.Scoring(scale=0.2), norms)


def test_large_scores_do_not_overflow(run):
    check(Case(SHAPES["mixed"], 6, 2, 32), run, plain_attend.Scoring(scale=200.0))


@pytest.mark.parametrize("scale", [1e8, 1e12])
def test_with_huge_scores_the_best_key_takes_all(scale, run):
    case = Case([(150, 150)], 2, 1, 64)
    found = case.found(run, plain_attend.Scoring(scale=scale), case.arena.clone())
    wanted = case.wanted(plain_attend.Scoring(scale=scale), case.arena.clone())
    is_same = ((found - wanted).abs() < 2e-3).all(2).all(1)
    assert found.isfinite().all()
    assert is_same.float().mean() > 0.97  # two best keys nearer to each other than codes tell may change places


@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("shape", [(70, 70), (1, 70)], ids=["prompt", "decode"])
def test_a_fault_in_the_cache_is_not_hidden(shape, which, run):
    case = Case([shape], 6, 2, 32)
    begin = 6 if which == "key" else 8
    case.qkv[-1, begin : begin + 2, 3] = torch.nan
    found = case.found(run, plain_attend.Scoring(scale=0.2), case.arena.clone())
    assert found[-1].isnan().any()


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("chunk", [6, 17, 64, 150])
def test_a_query_gets_the_same_bits_whatever_is_computed_with_it(chunk, window, run):
    scoring = plain_attend.Scoring(scale=32**-0.5, window=window)
    whole = Case([(200, 200)], 6, 2, 32)
    arena = whole.arena.clone()
    expected = whole.found(run, scoring, arena)
    other = Case([(9, 90), (chunk, 200), (1, 30)], 6, 2, 32)
    rows = slice(9, 9 + chunk)
    other.qkv[rows] = whole.qkv[-chunk:]
    # The same keys and values before the chunk, under the other block table.
    index = torch.arange(200 - chunk)
    mine, theirs = other.tables[1][index // 16], whole.tables[0][index // 16]
    other.arena[mine, LAYER, :, index % 16] = arena[theirs, LAYER, :, index % 16]
    found = other.found(run, scoring, other.arena.clone())
    assert torch.equal(found[rows], expected[-chunk:])


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_keys_that_a_query_does_not_see_do_not_change_its_bits(size, run):
    scoring = plain_attend.Scoring(scale=32**-0.5)
    case = Case([(100, 100)], 6, 2, 32)
    before = case.found(run, scoring, case.arena.clone())
    case.qkv[60:, 6:] *= size
    after = case.found(run, scoring, case.arena.clone())
    assert torch.equal(before[:60], after[:60])
    assert not torch.equal(before[60:], after[60:])


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("shape", ["equal", "one element", "opposite", "zero"])
@pytest.mark.parametrize("dim", [16, 64, 256])
def test_sums_of_products_stay_within_their_range(dim, shape, size, run):
    """All vectors point the same way: the largest product that their lengths allow."""
    case = Case([(80, 80)], 4, 2, dim)
    direction = torch.ones(dim) if shape != "one element" else torch.eye(dim)[3]
    case.qkv[:, :4] = direction
    case.qkv[:, 4:6] = -direction if shape == "opposite" else direction * (shape != "zero")
    case.qkv[:, :6] *= size
    case.qkv[:, 6:] = size * (shape != "zero")
    case.frequencies = torch.zeros_like(case.frequencies)
    scoring = plain_attend.Scoring(scale=1 / (dim * size**2))
    found = case.found(run, scoring, case.arena.clone())
    wanted = case.wanted(scoring, case.arena.clone())
    # Sixty-four equal weights have codes of 131000 / 64: half of one is this share of it.
    torch.testing.assert_close(found / size, wanted / size, rtol=2.5e-4, atol=0)
