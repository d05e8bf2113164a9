"""Contexts that arrive on a prefill worker with blocks for a quarter of them: who is served first, who gives up what.

Eight contexts begin together, and their pieces come interleaved, over more time than they take to compute; the pool of
the prefill worker has room for two. In `append` pieces are added; in `update` every other context has its second half
replaced once. First tokens count from the arrival of the last piece. In every round each policy sees the same trace,
on a new cluster; another policy begins each time. Ratios are of one round to `fcfs auto` in the same.
"""

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench_stream2llm import play
from contexts import Append, Close, Event, Open, Replace, Segment, in_order
from corpus import CHARACTERS_PER_TOKEN, Corpus, english
from harness import commit, machine
from replay import Way

from headrace.client.values import GenerateOptions
from headrace.testing.cluster import LocalCluster

NUM_STREAMS = 8
NUM_FIT = 2
NUM_TOKENS = 1500
NUM_PIECES = 6
SPREAD_S = 16.0
"""Over which the last of the pieces arrive; eight times 1,500 tokens take 8 to 10 s of two cores."""
BYTES_PER_TOKEN = 2 * 30 * 3 * 64 * 2
"""Of SmolLM2-135M's KV in bf16."""
SPARE = 1.15
"""A text of so many characters has more or fewer tokens."""
KINDS = ("append", "update")
OPTIONS: GenerateOptions = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True}


@dataclass(frozen=True, slots=True)
class Policy:
    """How a worker chooses.

    Attributes:
        order: Value of `worker.stream_order`.
        preempt: Value of `worker.preempt`.
    """

    order: str
    preempt: str


@dataclass(frozen=True, slots=True)
class Figures:
    """What a policy gave in one round: seconds to first tokens, makespan, and what workers did."""

    first_s: list[float]
    makespan_s: float
    num_preemptions: int
    computed_tokens: int


POLICIES = (
    *(Policy("fcfs", preempt) for preempt in ("auto", "recompute", "swap")),
    *(Policy(order, "auto") for order in ("lcas", "mcps", "default")),
)


def trace(seed: int, *, has_updates: bool, corpus: Corpus) -> tuple[Event, ...]:
    """Return the contexts of a round."""
    random = np.random.default_rng(seed)
    events: list[Event] = []
    size = round(NUM_TOKENS * CHARACTERS_PER_TOKEN / NUM_PIECES)
    for number in range(NUM_STREAMS):
        name = f"stream-{number}"
        is_updated = has_updates and number % 2 == 0
        times = np.sort(random.uniform(0.0, SPREAD_S, NUM_PIECES))
        events.append(Open(at_s=0.0, context=name, mode="update" if is_updated else "append", options=OPTIONS))
        for piece, at_s in enumerate(times):
            text = corpus.excerpt(int(random.integers(len(corpus.paragraphs))), size)[:size]
            events.append(Append(at_s=float(at_s), context=name, text=text, segment=f"{piece}"))
        if is_updated:
            other = corpus.excerpt(int(random.integers(len(corpus.paragraphs))), size * NUM_PIECES // 2)
            half = f"{NUM_PIECES // 2}"
            segments = (Segment(segment="other", text=other[: size * NUM_PIECES // 2]),)
            events.append(Replace(at_s=float(times[-1]), context=name, from_segment=half, segments=segments))
        events.append(Close(at_s=float(times[-1]), context=name, query="\n\nSo?"))
    return in_order(events)


@contextmanager
def serving(policy: Policy) -> Iterator[LocalCluster]:
    """Run a cluster whose prefill worker has blocks for a few of the contexts."""
    pool_bytes = round(NUM_FIT * NUM_TOKENS * SPARE * BYTES_PER_TOKEN)
    settings = (
        f"prefill-0.kv_memory_bytes={pool_bytes}",
        f"prefill-0.stream_order={policy.order}",
        f"prefill-0.preempt={policy.preempt}",
    )
    with tempfile.TemporaryDirectory() as folder, LocalCluster(Path(folder), dtype="auto", settings=settings) as found:
        yield found


def measure(policy: Policy, events: tuple[Event, ...]) -> Figures:
    """Play a trace to a cluster of this policy."""
    with serving(policy) as cluster:
        cluster.wait_connected()
        before = _work(cluster)
        found = asyncio.run(play(cluster.grpc, events, Way.STREAMED))
        cluster.wait_quiet()
        after = _work(cluster)
    first_s = [one.first_token_s for one in found.played if one.first_token_s is not None]
    return Figures(first_s, found.makespan_s, after[0] - before[0], after[1] - before[1])


def _work(cluster: LocalCluster) -> tuple[int, int]:
    loads = [member.load for member in cluster.members().values()]
    return sum(load.num_preemptions for load in loads), sum(load.computed_tokens for load in loads)


def bench(asked: argparse.Namespace, kind: str) -> None:
    """Print one line per policy; the ratios are to the first."""
    corpus = english()
    print(
        f"{NUM_STREAMS} streams in mode {kind}, blocks for {NUM_FIT}, {asked.rounds} rounds, seed {asked.seed}; "
        f"{machine()}; commit {commit()}"
    )
    rounds: list[dict[Policy, Figures]] = []
    for number in range(asked.rounds):
        events = trace(asked.seed + number, has_updates=kind == "update", corpus=corpus)
        shift = number % len(POLICIES)
        rounds.append({policy: measure(policy, events) for policy in (*POLICIES[shift:], *POLICIES[:shift])})
    for policy in POLICIES:
        _tell(policy, [each[policy] for each in rounds], [each[POLICIES[0]] for each in rounds])


def _tell(policy: Policy, found: Sequence[Figures], first: Sequence[Figures]) -> None:
    all_s = [first_s for each in found for first_s in each.first_s]
    shown = [f"p{percent} {np.percentile(all_s, percent):.2f} s" for percent in (50, 95, 99)]
    means = _ratios(
        [statistics.mean(each.first_s) for each in found], [statistics.mean(each.first_s) for each in first]
    )
    slowest = _ratios([max(each.first_s) for each in found], [max(each.first_s) for each in first])
    print(
        f"  {policy.order:<8} {policy.preempt:<10} first token {', '.join(shown)}; over fcfs auto: mean {means}, "
        f"slowest of a round {slowest}; makespan {statistics.median(each.makespan_s for each in found):.1f} s; "
        f"{sum(each.num_preemptions for each in found)} preemptions, "
        f"{sum(each.computed_tokens for each in found):,} tokens computed",
        flush=True,
    )


def _ratios(found: Sequence[float], first: Sequence[float]) -> str:
    ratios = [one / other for one, other in zip(found, first, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    for each in options.kinds:
        bench(options, each)
