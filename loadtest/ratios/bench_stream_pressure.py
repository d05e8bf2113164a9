"""Contexts that arrive on a prefill worker with blocks for a quarter of them: who is served first, who gives up what.

Eight contexts begin together, and their pieces come interleaved, over more time than they take to compute; the pool of
the prefill worker has room for two. In `append` pieces are added; in `update` every other context has its second half
replaced once. First tokens count from the arrival of the last piece. Every policy sees the same traces, on a
cluster of its own, one after the other.
"""

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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


@dataclass(slots=True)
class Figures:
    """What a policy gave: seconds to first tokens, makespans, and what workers did."""

    first_s: list[float] = field(default_factory=list)
    makespan_s: list[float] = field(default_factory=list)
    num_preemptions: int = 0
    computed_tokens: int = 0


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


def measure(policy: Policy, traces: Sequence[tuple[Event, ...]]) -> Figures:
    """Play all traces to a cluster of this policy."""
    figures = Figures()
    with serving(policy) as cluster:
        cluster.wait_connected()
        before = _work(cluster)
        for events in traces:
            cluster.wait_quiet()
            found = asyncio.run(play(cluster.grpc, events, Way.STREAMED))
            figures.first_s += [one.first_token_s for one in found.played if one.first_token_s is not None]
            figures.makespan_s.append(found.makespan_s)
        cluster.wait_quiet()
        after = _work(cluster)
    figures.num_preemptions, figures.computed_tokens = after[0] - before[0], after[1] - before[1]
    return figures


def _work(cluster: LocalCluster) -> tuple[int, int]:
    loads = [member.load for member in cluster.members().values()]
    return sum(load.num_preemptions for load in loads), sum(load.computed_tokens for load in loads)


def bench(asked: argparse.Namespace, *, has_updates: bool) -> None:
    """Print one line per policy; the ratios are to the first."""
    corpus = english()
    traces = [trace(asked.seed + number, has_updates=has_updates, corpus=corpus) for number in range(asked.rounds)]
    kind = "update" if has_updates else "append"
    print(
        f"{NUM_STREAMS} streams in mode {kind}, blocks for {NUM_FIT}, {asked.rounds} rounds, seed {asked.seed}; "
        f"{machine()}; commit {commit()}"
    )
    first: Figures | None = None
    for policy in POLICIES:
        found = measure(policy, traces)
        first = first or found
        shown = [f"p{percent} {np.percentile(found.first_s, percent):.2f} s" for percent in (50, 95, 99)]
        ratios = [
            f"p{percent} {np.percentile(found.first_s, percent) / np.percentile(first.first_s, percent):.2f}"
            for percent in (50, 99)
        ]
        print(
            f"  {policy.order:<8} {policy.preempt:<10} first token {', '.join(shown)}; "
            f"over fcfs auto {', '.join(ratios)}; "
            f"makespan {statistics.median(found.makespan_s):.1f} s; {found.num_preemptions} preemptions, "
            f"{found.computed_tokens:,} tokens computed",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=["append", "update"])
    options = parser.parse_args()
    for each in options.kinds:
        bench(options, has_updates=each == "update")
