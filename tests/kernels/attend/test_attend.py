from dataclasses import dataclass

import pytest
import torch

from headrace_kernels.attend import IMPLEMENTATIONS, AttendPlan, Scoring, attend, cpu, merge_attention_states

BLOCK_TOKENS = 16
DTYPES = [torch.float32, torch.bfloat16]
GROUPS = [(3, 1), (9, 3), (4, 4), (8, 1), (18, 2)]
# (queries, entries) of each sequence: decode, block edges, whole prompts, prefix and chunk, one token
SHAPES = {
    "one_decode": [(1, 37)],
    "one_token": [(1, 1)],
    "ragged_decodes": [(1, 3), (1, 16), (1, 17), (1, 130), (1, 31), (1, 32)],
    "equal_decodes": [(1, 48), (1, 48), (1, 48)],
    "whole_prompts": [(5, 5), (16, 16), (33, 33)],
    "prefix_and_chunk": [(7, 40), (16, 32), (2, 200)],
    "mixed": [(1, 20), (1, 90), (12, 12), (1, 21), (9, 64), (1, 1)],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    q: torch.Tensor
    positions: torch.Tensor
    kv_view: torch.Tensor
    plan: AttendPlan


def build(shapes, heads, kv_heads, dtype, *, dim=32, moved=False, seed=0):
    """A layer of an arena whose every unused slot is NaN; `moved` gives slots positions of their own."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-entries // BLOCK_TOKENS) for _, entries in shapes]
    num_blocks = sum(needed) + 3
    shuffled = torch.randperm(num_blocks, generator=generator)
    arena = torch.full((num_blocks, 4, 2, BLOCK_TOKENS, kv_heads, dim), torch.nan, dtype=dtype)
    kv_view = arena[:, 2]
    slot_positions = torch.zeros((num_blocks, BLOCK_TOKENS), dtype=torch.int32)
    tables = shuffled[-1].repeat(len(shapes), max(needed) + 1)
    positions, used = [], 0
    for row, (queries, entries) in enumerate(shapes):
        blocks = shuffled[used : used + needed[row]]
        used += needed[row]
        tables[row, : len(blocks)] = blocks
        index = torch.arange(entries)
        where = (blocks[index // BLOCK_TOKENS], index % BLOCK_TOKENS)
        content = torch.randn(entries, 2, kv_heads, dim, generator=generator)
        kv_view[where[0], :, where[1]] = content.to(dtype)
        own = torch.randperm(entries * 2, generator=generator)[:entries] if moved else index
        slot_positions[where] = own.to(torch.int32)
        positions.append(own[entries - queries :])
    plan = AttendPlan(
        cu_seqlens=torch.tensor([0, *torch.tensor([s[0] for s in shapes]).cumsum(0).tolist()]),
        block_tables=tables,
        kv_lengths=torch.tensor([s[1] for s in shapes]),
        slot_positions=slot_positions if moved else None,
    )
    tokens = sum(s[0] for s in shapes)
    q = torch.randn(tokens, heads, dim, generator=generator).to(dtype)
    return Case(q=q, positions=torch.cat(positions), kv_view=kv_view, plan=plan)


def assert_close(found, wanted, dtype, length):
    """Rounding to `dtype` of scores, weights and output (eps each), and sums of `length` terms (a random walk)."""
    eps = torch.finfo(dtype).eps
    limit = eps * (4 + length**0.5 / 4)
    assert not found[0].isnan().any()
    torch.testing.assert_close(found[0].float(), wanted[0].float(), atol=limit, rtol=2 * eps)
    torch.testing.assert_close(found[1], wanted[1], atol=limit, rtol=2 * eps)


def check(case, scoring, dtype, implementation=attend):
    wanted = IMPLEMENTATIONS.reference(case.q, case.positions, case.kv_view, case.plan, scoring)
    found = implementation(case.q, case.positions, case.kv_view, case.plan, scoring)
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    assert_close(found, wanted, dtype, int(case.plan.kv_lengths.max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", GROUPS)
@pytest.mark.parametrize("name", SHAPES)
def test_the_cpu_path_equals_the_reference(name, heads, dtype):
    check(build(SHAPES[name], *heads, dtype), Scoring(scale=32**-0.5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_causality_follows_slot_positions_not_the_order_of_entries(name, dtype):
    check(build(SHAPES[name], 9, 3, dtype, moved=True), Scoring(scale=32**-0.5), dtype)


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (5, 0), (5, 4), (40, 2), (1000, 0)])
def test_a_window_with_sinks_hides_the_same_keys_as_in_the_reference(window, sinks, moved):
    scoring = Scoring(scale=0.2, window=window, sinks=sinks)
    check(build(SHAPES["mixed"], 6, 2, torch.float32, moved=moved), scoring, torch.float32)


def test_a_soft_cap_bounds_the_scores():
    check(build(SHAPES["mixed"], 6, 2, torch.float32), Scoring(scale=2.0, soft_cap=3.0), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["ragged_decodes", "equal_decodes", "mixed"])
def test_the_path_of_bf16_instructions_equals_the_reference_on_any_cpu(name, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "_HAS_NATIVE_BF16", True)
    check(build(SHAPES[name], 9, 3, dtype), Scoring(scale=32**-0.5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entries", [64, 65, 127, 128, 129, 400])
@pytest.mark.parametrize("queries", [2, 16, 17, 63, 64])
def test_a_chunk_after_any_number_of_entries_equals_the_reference(queries, entries, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "_HAS_NATIVE_BF16", True)
    check(build([(queries, entries)], 9, 3, dtype), Scoring(scale=32**-0.5), dtype)
    check(build([(queries, entries)], 9, 3, dtype), Scoring(scale=32**-0.5, window=50, sinks=3), dtype)


@pytest.mark.parametrize("window", [None, 100])
def test_chunks_of_any_size_reach_the_fused_kernel_in_few_sizes(window, monkeypatch):
    fused, sizes = cpu._fused, set()

    def record(q, keys, *rest, **named):
        sizes.add((q.shape[2], keys.shape[2]))
        return fused(q, keys, *rest, **named)

    monkeypatch.setattr(cpu, "_fused", record)
    generator = torch.Generator().manual_seed(0)
    for queries in torch.randint(65, 300, (40,), generator=generator).tolist():
        entries = queries + int(torch.randint(0, 600, (), generator=generator))
        check(build([(queries, entries)], 3, 1, torch.float32), Scoring(scale=0.2, window=window), torch.float32)
    assert all(rows % 16 == 0 and keys % 64 == 0 for rows, keys in sizes)


def test_layers_of_one_step_share_a_plan_but_not_their_rules():
    case = build(SHAPES["mixed"], 6, 2, torch.float32)
    for window in (None, 7, 30, None):
        check(case, Scoring(scale=0.2, window=window), torch.float32)


def test_a_query_that_sees_no_key_gives_zero_and_minus_infinity():
    case = build([(1, 20), (3, 20)], 6, 2, torch.float32, moved=True)
    positions = case.positions.clone()
    positions[[0, 2]] = -1
    for implementation in (attend, IMPLEMENTATIONS.reference):
        o, lse = implementation(case.q, positions, case.kv_view, case.plan, Scoring(scale=0.2))
        assert (o[[0, 2]] == 0).all()
        assert lse[[0, 2]].isneginf().all()
        assert lse[[1, 3]].isfinite().all()


def test_reordered_entries_with_their_positions_give_the_same_output():
    case = build([(1, 2 * BLOCK_TOKENS)], 3, 1, torch.float32, moved=True)
    swapped = AttendPlan(
        cu_seqlens=case.plan.cu_seqlens,
        block_tables=case.plan.block_tables[:, [1, 0, 2]],
        kv_lengths=case.plan.kv_lengths,
        slot_positions=case.plan.slot_positions,
    )
    scoring = Scoring(scale=0.2)
    found = attend(case.q, case.positions, case.kv_view, swapped, scoring)
    assert_close(found, attend(case.q, case.positions, case.kv_view, case.plan, scoring), torch.float32, 32)


def test_merging_the_halves_of_the_keys_gives_the_whole():
    whole = build([(1, 48)], 6, 2, torch.float32, moved=True)
    scoring = Scoring(scale=0.2)
    parts = []
    for blocks in ([0], [1, 2]):
        plan = AttendPlan(
            cu_seqlens=whole.plan.cu_seqlens,
            block_tables=whole.plan.block_tables[:, blocks],
            kv_lengths=torch.tensor([len(blocks) * BLOCK_TOKENS]),
            slot_positions=whole.plan.slot_positions,
        )
        parts.extend(attend(whole.q, whole.positions + 1000, whole.kv_view, plan, scoring))
    wanted = attend(whole.q, whole.positions + 1000, whole.kv_view, whole.plan, scoring)
    assert_close(merge_attention_states(*parts), wanted, torch.float32, 48)


def test_merging_with_an_empty_set_changes_nothing():
    o, lse = torch.randn(4, 2, 8), torch.randn(4, 2)
    nothing = torch.zeros(4, 2, 8), torch.full((4, 2), -torch.inf)
    merged, total = merge_attention_states(o, lse, *nothing)
    torch.testing.assert_close((merged, total), (o, lse))
    merged, total = merge_attention_states(*nothing, *nothing)
    assert (merged == 0).all()
    assert total.isneginf().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 5, 32)}, "no multiple"),
        ({"q": torch.zeros(1, 6, 16)}, "kv_view: wanted shape"),
        ({"q": torch.zeros(1, 6, 32, dtype=torch.bfloat16)}, "kv_view is torch.float32"),
        ({"positions": torch.zeros(2)}, "q_positions"),
        ({"kv_view": torch.zeros(4, 2, 2, BLOCK_TOKENS, 32).transpose(2, 3)}, "strides"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    case = build([(1, 20)], 6, 2, torch.float32)
    arguments = {"q": case.q, "positions": case.positions, "kv_view": case.kv_view} | change
    with pytest.raises(ValueError, match=message):
        attend(*arguments.values(), case.plan, Scoring(scale=1.0))
