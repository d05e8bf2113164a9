"""Fetch a shared prefix from the kvstore, against computing it again."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from harness import compare, report
from measure import fresh_tokens, seconds_to_token

from headrace.testing.cluster import LocalCluster, wait_until

PREFIX_TOKENS = 2048
OWN_TOKENS = 64
BLOCK_BYTES = 30 * 2 * 16 * 3 * 64 * 2
POOL_BLOCKS = 160
"""Room for one prompt only: the next one pushes its blocks out of the prefill worker's own cache."""


def bench(pairs: int, seed: int, results: Path | None) -> None:
    """Time the first token after a 2k prefix that only the kvstore still holds."""
    settings = (f"prefill-0.kv_memory_bytes={POOL_BLOCKS * BLOCK_BYTES}", "kvstore.memory_bytes=1073741824")
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(Path(folder), dtype="bf16", settings=settings) as cluster,
    ):
        address = cluster.grpc

        def computed() -> int:
            return sum(member.load.computed_tokens for member in cluster.members().values())

        def fresh(pair: int) -> float:
            return seconds_to_token(address, fresh_tokens(10_000 + pair, PREFIX_TOKENS + OWN_TOKENS), 0)

        def hit(pair: int) -> float:
            prefix = fresh_tokens(20_000 + pair, PREFIX_TOKENS)
            seconds_to_token(address, prefix + fresh_tokens(30_000 + pair, OWN_TOKENS), 0)
            seconds_to_token(address, fresh_tokens(40_000 + pair, PREFIX_TOKENS), 0)  # Pushes the prefix out.
            cluster.wait_quiet()
            before = computed()
            took_s = seconds_to_token(address, prefix + fresh_tokens(50_000 + pair, OWN_TOKENS), 0)
            _settled(cluster, computed, before)
            work["tokens computed on a hit"] = computed() - before
            return took_s

        work: dict[str, float] = {"tokens computed without": PREFIX_TOKENS + OWN_TOKENS}
        fresh(seed - 1)
        hit(seed - 1)
        ratio = compare(
            f"first token after a {PREFIX_TOKENS}-token prefix and {OWN_TOKENS} own tokens, bf16",
            baseline=("recompute", fresh),
            candidate=("fetch from the kvstore", hit),
            pairs=pairs,
            seed=seed,
            work=lambda: work,
        )
    report(ratio, results)


def _settled(cluster: LocalCluster, computed: Callable[[], int], before: int) -> None:
    """Wait until the counters of the last request have been reported."""
    wait_until(lambda: computed() > before, 5.0, lambda: "no tokens were reported")
    cluster.wait_quiet()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    bench(options.pairs, options.seed, options.results)
