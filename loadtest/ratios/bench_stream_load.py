"""Many contexts at once, computed while they arrive or when each is complete: what that costs the cluster.

Crawls of `crawler.py` (append mode) or searches of `retrieval.py` (update mode), played in both ways in turn. At half
of what the cluster can do the makespan shows what streaming delays; when all begin at once, as many more as it can do,
the makespan is the work, and its ratio that of throughputs. First tokens are told beside.
"""

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import crawler
import retrieval
from bench_stream2llm import play
from contexts import Event
from corpus import english
from harness import compare, report
from replay import Way

from headrace.client.values import GenerateOptions
from headrace.testing.cluster import LocalCluster

MOST_TOKENS = 2000
OPTIONS: GenerateOptions = {"max_tokens": 16, "temperature": 0.0, "ignore_eos": True}
KINDS = ("crawls", "searches")
LOADS = {"half of the load": 0.5, "saturated": 50.0}
"""Contexts that begin per second: 2,000 tokens and an answer take about 1 s of two cores."""


class Load:
    """One trace on one cluster, with the first tokens of both ways.

    Args:
        cluster: Serves.
        traces: One per seed.
    """

    def __init__(self, cluster: LocalCluster, traces: Sequence[Sequence[Event]]) -> None:
        self._cluster = cluster
        self._traces = traces
        self.first_s: dict[str, list[float]] = {}
        self.tokens: set[int] = set()

    def makespan(self, seed: int, way: Way) -> float:
        """Return the seconds from the first opening to the end of the last answer."""
        self._cluster.wait_quiet()
        found = asyncio.run(play(self._cluster.grpc, self._traces[seed % len(self._traces)], way))
        for percent in (50, 99):
            self.first_s.setdefault(f"{way.value} p{percent}_s", []).append(found.first_token_s(percent))
        self.tokens.add(found.output_tokens)
        return found.makespan_s

    def work(self) -> dict[str, float]:
        """Return the mean times to first tokens."""
        return {name: round(sum(values) / len(values), 3) for name, values in self.first_s.items()}


def traces_of(kind: str, per_s: float, num_contexts: int, pairs: int, seed: int) -> list[Sequence[Event]]:
    """Return one trace per pair."""
    corpus = english()
    if kind == "crawls":
        shape = crawler.Shape(most_tokens=MOST_TOKENS, options=OPTIONS)
        return [crawler.generate(seed + pair, num_contexts, per_s, shape, corpus) for pair in range(pairs)]
    wanted = retrieval.Shape(num_hits=6, options=OPTIONS)
    return [retrieval.generate(seed + pair, num_contexts, per_s, wanted, corpus) for pair in range(pairs)]


def bench(kind: str, asked: argparse.Namespace) -> None:
    """Print the ratios of one kind of contexts."""
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(Path(folder), workers=asked.workers, dtype="auto", settings=tuple(asked.set)) as cluster,
    ):
        for name in asked.loads:
            load = Load(cluster, traces_of(kind, LOADS[name], asked.contexts, asked.pairs, asked.seed))
            ratio = compare(
                " ".join((f"makespan of {asked.contexts} {kind}, {name}, {asked.workers}", *asked.set)),
                baseline=("waited", partial(load.makespan, way=Way.WAITED)),
                candidate=("streamed", partial(load.makespan, way=Way.STREAMED)),
                pairs=asked.pairs,
                seed=asked.seed,
                work=load.work,
            )
            report(ratio, asked.results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--contexts", type=int, default=12)
    parser.add_argument("--workers", default="prefill=1,decode=1")
    parser.add_argument("--set", nargs="*", default=[], help="settings of the cluster, SECTION.NAME=VALUE")
    parser.add_argument("--loads", nargs="+", choices=list(LOADS), default=list(LOADS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    for each in options.kinds:
        bench(each, options)
