"""Steps of the torch decoder come in few sizes, and what is computed besides their tokens is nobody's."""

import pytest
import torch

from headrace.engine.arena import KvArena
from headrace.engine.batch import Batch, batch_item
from headrace.engine.models import decoder as decoders
from headrace.engine.models.decoder import FEW_ROWS, build_decoder, spare_rows
from headrace.engine.models.loader import Model
from headrace.engine.runner import ModelRunner
from headrace.testing.tiny_llama import TINY_LLAMA, RandomWeights

CPU = torch.device("cpu")
ITEMS = ((1, 90), (70, 0), (33, 50))
"""New tokens and tokens that are there, of each sequence of a step."""


def test_rows_are_few_sizes_and_few_more_than_the_tokens():
    sizes = {tokens + spare_rows(tokens) for tokens in range(FEW_ROWS + 1, 2049)}
    assert len(sizes) <= 64
    assert all(spare_rows(tokens) == 0 for tokens in range(1, FEW_ROWS + 1))
    assert all(0 <= spare_rows(tokens) < max(16, tokens / 8) for tokens in range(1, 2049))


def _computed(dtype):
    """Logits and arena of a step of 104 tokens after what its sequences hold."""
    decoder = build_decoder(TINY_LLAMA, RandomWeights(), dtype=dtype, device=CPU)
    model = Model(spec=TINY_LLAMA, decoder=decoder, contents=(), dtype=dtype, device=CPU)
    arena = KvArena(model.kv_layout(), len(ITEMS) * 8, CPU)
    runner = ModelRunner(model, arena)
    tables = [range(8 * place, 8 * place + 8) for place in range(len(ITEMS))]
    tokens = [[(7 * place + 3 * i) % 50 for i in range(120)] for place in range(len(ITEMS))]
    for present in (True, False):
        items = [
            batch_item(ids[:held] if present else ids[held : held + new], 0 if present else held, table, sample=True)
            for ids, table, (new, held) in zip(tokens, tables, ITEMS, strict=True)
            if held or not present
        ]
        logits = runner.run(Batch(items=tuple(items)))
    return logits, arena.data


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_beside_the_tokens_change_no_logit_and_no_block(dtype, monkeypatch):
    padded, padded_blocks = _computed(dtype)
    monkeypatch.setattr(decoders, "spare_rows", lambda num_tokens: 0)
    plain, plain_blocks = _computed(dtype)
    limit = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(padded, plain, atol=limit, rtol=limit)
    torch.testing.assert_close(padded_blocks, plain_blocks, atol=limit, rtol=limit)


def test_a_step_computes_as_many_rows_as_it_says(monkeypatch):
    seen = set()
    build = decoders.build_linear

    def recording(*args, **named):
        run = build(*args, **named)
        return lambda x: (seen.add(x.shape[0]), run(x))[1]

    monkeypatch.setattr(decoders, "build_linear", recording)
    _computed(torch.bfloat16)
    num_present, num_new = 140, 104
    assert seen == {num_present + spare_rows(num_present), num_new + spare_rows(num_new), 2, len(ITEMS)}
