"""A prompt's KV and logits are its own, whoever shares its row."""

import dataclasses

import pytest
import torch

from headrace.engine.batch import Batch, batch_item

VOCAB = 90
ENTRIES = {0: (0, 19), 1: (0, 2), 2: (4, 7), 5: (9, 10), 3: (0, 13), 4: (11, 24)}
"""Entries that the shared step computes, by sequence in the step's order; sequence 5 decodes."""
BLOCKS_EACH = 7
"""Blocks per sequence, of 4 tokens each; no sequence fills its own."""

packs = pytest.mark.parametrize("pack", ["varlen", "bins", "pad"])


def tokens_of(changed=None):
    """Tokens by sequence; one of them may have others than usual in the shared step."""
    tokens = {}
    for sequence, (begin, end) in ENTRIES.items():
        known = [(sequence * 31 + 7 * index) % VOCAB for index in range(end)]
        if sequence == changed:
            known[begin:] = [(token + 41) % VOCAB for token in known[begin:]]
        tokens[sequence] = known
    return tokens


def table_of(sequence):
    """Blocks in no order, none of two sequences."""
    return tuple((17 * (sequence * BLOCKS_EACH + index) + 5) % 80 for index in range(BLOCKS_EACH))


def item_of(tokens, sequence, begin, end):
    return batch_item(tokens[sequence][begin:end], begin, table_of(sequence), sample=True)


def step_items(tokens):
    return [item_of(tokens, sequence, begin, end) for sequence, (begin, end) in ENTRIES.items()]


def prepare(runner, tokens):
    """Compute what lies before the shared step."""
    for sequence, (begin, _) in ENTRIES.items():
        if begin:
            runner.run(Batch(items=(item_of(tokens, sequence, 0, begin),)))


def kv_of(runner, sequence):
    length = ENTRIES[sequence][1]
    entries = runner._arena.data[list(table_of(sequence))].movedim(3, 1).flatten(0, 1)
    assert entries[length:].isnan().all()
    return entries[:length].clone()


def compute(runner, tokens, *, together=True):
    """Return logits and KV by sequence after one shared step, or after one step for each."""
    prepare(runner, tokens)
    items = step_items(tokens)
    steps = [items] if together else [[item] for item in items]
    logits = torch.cat([runner.run(Batch(items=tuple(step))) for step in steps])
    return dict(zip(ENTRIES, logits, strict=True)), {sequence: kv_of(runner, sequence) for sequence in ENTRIES}


def limit_of(model):
    return 1e-4 if model.dtype == torch.float32 else 0.06


@packs
def test_kv_and_logits_are_those_of_a_step_alone(model, make_runner, pack):
    tokens = tokens_of()
    wanted = compute(make_runner(model, "varlen"), tokens, together=False)
    found = compute(make_runner(model, pack), tokens)
    torch.testing.assert_close(found, wanted, atol=limit_of(model), rtol=0)


@packs
@pytest.mark.parametrize("changed", list(ENTRIES))
def test_other_tokens_in_one_prompt_change_no_bit_of_its_neighbours(model, make_runner, pack, changed):
    logits, kv = compute(make_runner(model, pack), tokens_of())
    other_logits, other_kv = compute(make_runner(model, pack), tokens_of(changed))
    assert not other_logits[changed].equal(logits[changed])
    assert not other_kv[changed].equal(kv[changed])
    for sequence in kv.keys() - {changed}:
        assert other_kv[sequence].equal(kv[sequence])
        assert other_logits[sequence].equal(logits[sequence])


@packs
def test_a_step_writes_its_own_entries_and_no_others(model, make_runner, pack):
    tokens = tokens_of()
    runner = make_runner(model, pack)
    compute(runner, tokens)
    arena, block_tokens = runner._arena, runner.layout.block_tokens
    is_written = torch.zeros(arena.num_blocks, block_tokens, dtype=torch.bool)
    for sequence, known in tokens.items():
        for entry in range(len(known)):
            is_written[table_of(sequence)[entry // block_tokens], entry % block_tokens] = True
    holds = ~arena.data[: arena.num_blocks].isnan().movedim(3, 1)
    assert holds.flatten(2).all(dim=2).equal(is_written)
    assert holds.flatten(2).any(dim=2).equal(is_written)
    assert (~arena.data[arena.num_blocks :].isnan()).any() == (pack != "varlen")


@packs
def test_chunks_whose_positions_differ_from_their_entries_keep_to_themselves_too(model, make_runner, pack):
    tokens = tokens_of()
    found = []
    for chosen in ("varlen", pack):
        runner = make_runner(model, chosen)
        prepare(runner, tokens)
        moved = batch_item(tokens[0], 0, table_of(0), sample=True, positions=range(30, 30 + len(tokens[0])))
        found.append(runner.run(Batch(items=(moved, *step_items(tokens)[1:]))))
    torch.testing.assert_close(found[1], found[0], atol=limit_of(model), rtol=0)


@packs
def test_pads_pass_through_the_linear_layers(exact_model, make_runner, pack):
    """Chunks of 19, 2, 3, 13 and 13 tokens and a decode; rows are 24 tokens long."""
    rows = []

    def counting(step, arena, threads):
        rows.append(step.token_ids.shape[0])
        return exact_model.decoder(step, arena, threads)

    runner = make_runner(dataclasses.replace(exact_model, decoder=counting), pack)
    compute(runner, tokens_of())
    assert rows[-1] == {"varlen": 51, "bins": 1 + 3 * 24, "pad": 1 + 5 * 24}[pack]
