"""Reuse a prefix that the prefill worker itself has lost, against computing it again, over lengths of the prefix."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from harness import Ratio, compare, report
from measure import fresh_tokens, seconds_to_token

from headrace.testing.cluster import LocalCluster, wait_until
from headrace.v1 import cluster_pb2

PREFIXES = {128: 5, 512: 5, 2048: 5, 4096: 3, 8000: 2}
"""Pairs by the prefix's tokens: to compute 8,000 takes most of a minute on two cores."""
FILLER_TOKENS = 512
"""Of a prompt that pushes others out: many short ones are computed sooner than a long one."""
OWN_TOKENS = 64
BLOCK_TOKENS = 16
BLOCK_BYTES = 30 * 2 * BLOCK_TOKENS * 3 * 64 * 2
SPARE_BLOCKS = 24
WORKER = "prefill-0"


class Bench:
    """A cluster whose prefill worker has room for one prompt: the next one pushes its blocks out."""

    def __init__(self, cluster: LocalCluster, num_prefix: int) -> None:
        self._cluster = cluster
        self._num_prefix = num_prefix
        self._first_s: dict[int, float] = {}
        self.work: dict[str, float] = {"tokens of the prompt": num_prefix + OWN_TOKENS}

    def recompute(self, pair: int) -> float:
        """Return the seconds to the first token of a prompt that nobody has seen; `hit` finds its prefix."""
        if pair not in self._first_s:
            self._first_s[pair] = self._seconds(self._prefix(pair) + fresh_tokens(30_000 + pair, OWN_TOKENS))
            self._settle(lambda before: self._load().reuse.num_stored_blocks > before.reuse.num_stored_blocks)
        return self._first_s[pair]

    def hit(self, pair: int) -> float:
        """Return the seconds to the first token after a prefix that others hold."""
        self.recompute(pair)
        num_tokens = self._num_prefix + OWN_TOKENS + SPARE_BLOCKS * BLOCK_TOKENS
        for number, start in enumerate(range(0, num_tokens, FILLER_TOKENS)):
            length = min(FILLER_TOKENS, num_tokens - start, self._num_prefix + OWN_TOKENS)
            self._seconds(fresh_tokens(40_000 + 1000 * pair + number, length))
        self._cluster.wait_quiet()
        before = self._load()
        took_s = self._seconds(self._prefix(pair) + fresh_tokens(50_000 + pair, OWN_TOKENS))
        wait_until(
            lambda: self._load().computed_tokens > before.computed_tokens, 5.0, lambda: "no tokens were reported"
        )
        after = self._load()
        self.work["tokens computed on a hit"] = after.computed_tokens - before.computed_tokens
        self.work["tokens from peers"] = after.reuse.peer_tokens - before.reuse.peer_tokens
        self.work["tokens from the store"] = after.reuse.dram_tokens - before.reuse.dram_tokens
        return took_s

    def _prefix(self, pair: int) -> list[int]:
        return fresh_tokens(20_000 + pair, self._num_prefix)

    def _seconds(self, prompt: list[int]) -> float:
        return seconds_to_token(self._cluster.grpc, prompt, 0)

    def _load(self) -> cluster_pb2.LoadReport:
        return self._cluster.members()[WORKER].load

    def _settle(self, is_done: Callable[[cluster_pb2.LoadReport], bool]) -> None:
        """Wait until the blocks of the last prompt are stored; a small prompt may have been stored before it ended."""
        before = self._load()
        try:
            wait_until(lambda: is_done(before), 1.0, lambda: "")
        except AssertionError:
            pass
        self._cluster.wait_quiet()


def settings_for(num_prefix: int) -> tuple[str, ...]:
    """Return what gives the prefill worker room for one prompt."""
    num_blocks = (num_prefix + OWN_TOKENS) // BLOCK_TOKENS + SPARE_BLOCKS
    return (f"{WORKER}.kv_memory_bytes={num_blocks * BLOCK_BYTES}",)


def bench(num_prefix: int, pairs: int, seed: int) -> Ratio:
    """Compare both ways for one length."""
    settings = settings_for(num_prefix)
    with tempfile.TemporaryDirectory() as folder, LocalCluster(Path(folder), dtype="auto", settings=settings) as found:
        run = Bench(found, num_prefix)
        for warm in range(3):  # Lanes are measured by the first fetches.
            run.hit(seed - 10 + warm)
        return compare(
            f"first token after a prefix of {num_prefix} tokens and {OWN_TOKENS} own ones",
            baseline=("recompute", run.recompute),
            candidate=("fetch", run.hit),
            pairs=pairs,
            seed=seed,
            work=lambda: run.work,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, help="for every length; by default fewer of the long ones")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prefixes", type=int, nargs="*", default=tuple(PREFIXES))
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    for length in options.prefixes:
        report(bench(length, options.pairs or PREFIXES.get(length, 3), options.seed), options.results)
