"""Longest gap in a running stream while a long prompt arrives: prompts in chunks, against whole ones."""

import argparse
import asyncio
import itertools
import tempfile
from pathlib import Path

from harness import compare, report
from measure import fresh_tokens, token_times

from headrace.testing.cluster import LocalCluster

PROMPT_TOKENS = 1024
BUDGET = 128
STREAM_TOKENS = 60
BEGUN_S = 0.6


async def longest_gap_s(address: str, seed: int) -> float:
    """Stream one answer, send a long prompt meanwhile, and return the stream's longest gap between tokens."""

    async def disturb() -> None:
        await asyncio.sleep(BEGUN_S)
        await token_times(address, fresh_tokens(seed, PROMPT_TOKENS), 1)

    stream, _ = await asyncio.gather(token_times(address, fresh_tokens(10_000 + seed, 16), STREAM_TOKENS), disturb())
    return max(later - earlier for earlier, later in itertools.pairwise(stream))


def bench(pairs: int, seed: int, results: Path | None) -> None:
    """Print the gap with chunks over the gap with whole prompts, one hybrid worker each."""
    work: dict[str, float] = {}

    def gap(shape: str, pair: int) -> float:
        settings = (f"worker.shape={shape}", f"worker.token_budget={BUDGET}")
        with (
            tempfile.TemporaryDirectory() as folder,
            LocalCluster(Path(folder), workers="hybrid=1", dtype="bf16", settings=settings) as cluster,
        ):
            before = _computed(cluster)
            longest_s = asyncio.run(longest_gap_s(cluster.grpc, pair))
            cluster.wait_quiet()
            work[f"tokens computed, {shape}"] = _computed(cluster) - before
            return longest_s

    ratio = compare(
        f"longest gap of a stream while a {PROMPT_TOKENS}-token prompt arrives, budget {BUDGET}, bf16",
        baseline=("whole", lambda pair: gap("whole", pair)),
        candidate=("sarathi", lambda pair: gap("sarathi", pair)),
        pairs=pairs,
        seed=seed,
        work=lambda: work,
    )
    report(ratio, results)


def _computed(cluster: LocalCluster) -> int:
    return sum(member.load.computed_tokens for member in cluster.members().values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    bench(options.pairs, options.seed, options.results)
