"""Prefill of a batch of prompts of many lengths: in bins and on one axis, against rows padded to the longest.

Lengths are lognormal (median 64 tokens, sigma 0.8 of the logarithm), clipped to 8 to 256. Counts of tokens that pass
through the linear layers are what the decoder was given; "untiled" is padding to the very longest prompt, which the
128-token tiles of bins and pad alike round up.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from harness import compare, report
from measure import fresh_tokens

from headrace import catalog
from headrace.cli.layout import bundled_model
from headrace.core.block import BlockId, blocks_for
from headrace.engine.arena import KvArena
from headrace.engine.batch import Batch, batch_item
from headrace.engine.models.decoder import Decoder, StepInputs
from headrace.engine.models.loader import Model, load_model
from headrace.engine.packing import PAD_TOKENS, PaddedRows
from headrace.engine.runner import ModelRunner

MEDIAN_TOKENS, SIGMA, LEAST_TOKENS, MOST_TOKENS = 64, 0.8, 8, 256
BLOCK_TOKENS = 16
CPU = torch.device("cpu")
PAIRS = (("pad", "bins"), ("pad", "varlen"), ("varlen", "bins"))
"""Baseline and candidate of each ratio."""


def lengths_of(seed: int, num_prompts: int) -> list[int]:
    """Return prompt lengths, the same for the same seed."""
    drawn = np.random.default_rng(seed).lognormal(np.log(MEDIAN_TOKENS), SIGMA, num_prompts)
    return [int(length) for length in np.clip(drawn, LEAST_TOKENS, MOST_TOKENS)]


def batch_of(seed: int, num_prompts: int) -> Batch:
    """Return one step that computes all prompts and the logits after each."""
    items, first = [], 0
    for index, length in enumerate(lengths_of(seed, num_prompts)):
        num_blocks = blocks_for(length, BLOCK_TOKENS)
        table = [BlockId(block) for block in range(first, first + num_blocks)]
        first += num_blocks
        items.append(batch_item(fresh_tokens(1000 * seed + index, length), 0, table, sample=True))
    return Batch(items=tuple(items))


class Prefill:
    """One model and its memory, with a runner for each way to lay prompts out.

    Attributes:
        tokens: Tokens through the linear layers, by number of prompts, way and seed.
    """

    def __init__(self, most_prompts: int) -> None:
        """Load the model with the precision of `dtype: auto`."""
        model = load_model(bundled_model(), dtype=torch.bfloat16, device=CPU, quantised=True)
        self.tokens: dict[tuple[int, str, int], int] = {}
        self._num_rows = 0
        num_blocks = most_prompts * blocks_for(MOST_TOKENS, BLOCK_TOKENS)
        arena = KvArena(
            model.kv_layout(BLOCK_TOKENS), num_blocks, CPU, num_pad_blocks=blocks_for(PAD_TOKENS, BLOCK_TOKENS)
        )
        make_bins = catalog.load("prepacking").pack
        policies = {"varlen": None, "pad": PaddedRows(), "bins": make_bins() if make_bins else None}
        counting = dataclasses.replace(model, decoder=cast("Decoder", self._counting(model)))
        self._runners = {way: ModelRunner(counting, arena, pack=policy) for way, policy in policies.items()}

    def _counting(self, model: Model) -> Callable[..., torch.Tensor]:
        def decode(step: StepInputs, arena: torch.Tensor, threads: Callable[[], int] | None) -> torch.Tensor:
            self._num_rows = step.token_ids.shape[0]
            return model.decoder(step, arena, threads)

        return decode

    def seconds(self, num_prompts: int, way: str, seed: int) -> float:
        """Return how long a way takes to compute the batch of a seed."""
        batch = batch_of(seed, num_prompts)
        begun_s = time.perf_counter()
        self._runners[way].run(batch)
        took_s = time.perf_counter() - begun_s
        self.tokens[num_prompts, way, seed] = self._num_rows
        return took_s


def bench(sizes: list[int], pairs: int, seed: int, results: Path | None) -> None:
    """Print the ratios of each batch size."""
    prefill = Prefill(max(sizes))
    for way in ("pad", "bins", "varlen"):
        prefill.seconds(2, way, 0)
    for num_prompts in sizes:
        for baseline, candidate in PAIRS:
            ratio = compare(
                f"prefill of {num_prompts} prompts, lognormal lengths of median {MEDIAN_TOKENS}, auto",
                baseline=(baseline, partial(prefill.seconds, num_prompts, baseline)),
                candidate=(candidate, partial(prefill.seconds, num_prompts, candidate)),
                pairs=pairs,
                seed=seed,
                work=partial(counts, prefill, num_prompts, baseline, candidate),
            )
            report(ratio, results)


def counts(prefill: Prefill, num_prompts: int, baseline: str, candidate: str) -> dict[str, float]:
    """Return tokens through the linear layers, summed over the seeds that ran, and their ratio."""
    seeds = [seed for size, way, seed in prefill.tokens if (size, way) == (num_prompts, baseline)]
    total = {way: sum(prefill.tokens[num_prompts, way, seed] for seed in seeds) for way in (baseline, candidate)}
    return {
        **{f"tokens, {way}": count for way, count in total.items()},
        "tokens, pad untiled": sum(max(lengths_of(seed, num_prompts)) * num_prompts for seed in seeds),
        f"tokens, {candidate}/{baseline}": round(total[candidate] / total[baseline], 4),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    bench(options.sizes, options.pairs, options.seed, options.results)
