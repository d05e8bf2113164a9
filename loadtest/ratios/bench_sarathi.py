"""A running stream while a long prompt arrives: prompts in chunks, against whole ones and against no prompt at all.

Three things, each as a ratio: the longest gap of the stream and the throughput of the same mixed work, chunks over
whole prompts; and the 95th percentile of the stream's gaps while a prompt is computed over that of a stream alone,
with the seconds to the prompt's first token that this costs.
"""

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

from harness import compare, report
from measure import fresh_tokens, token_times

from headrace import AsyncClient
from headrace.testing.cluster import LocalCluster

LONG_TOKENS = 8000
BUDGET = 128
STREAM_TOKENS = 100
SHORT_TOKENS = 4000
IDLE_TOKENS = 100
ENDLESS = 4000
STREAM_PROMPT_TOKENS = 16
BEGUN_TOKENS = 10
PERCENTILE = 95


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """A stream and a prompt at the same time; all times in seconds since one begin.

    Attributes:
        stream_s: When each token of the stream came.
        sent_s: When the prompt was sent.
        answered_s: When its first token came.
        computed: Tokens computed for both.
    """

    stream_s: tuple[float, ...]
    sent_s: float
    answered_s: float
    computed: int = 0

    @property
    def longest_gap_s(self) -> float:
        """Longest gap of the stream."""
        return max(_gaps(self.stream_s))

    @property
    def tokens_per_s(self) -> float:
        """Tokens of prompts and answers over the time of all of it."""
        num_tokens = STREAM_PROMPT_TOKENS + LONG_TOKENS + 1 + len(self.stream_s)
        return num_tokens / max(self.stream_s[-1], self.answered_s)

    @property
    def disturbed_gap_s(self) -> float:
        """95th percentile of the stream's gaps while the prompt was computed."""
        times = [at for at in self.stream_s if self.sent_s <= at <= self.answered_s]
        return _p95(_gaps(times))

    @property
    def first_token_s(self) -> float:
        """From sending the prompt to its first token."""
        return self.answered_s - self.sent_s


async def _mix(address: str, seed: int, prompt_tokens: int, stream_tokens: int | None) -> Mixed:
    """Stream an answer, and send a prompt once it runs; `stream_tokens` None streams until the prompt is answered."""
    begun, answered = asyncio.Event(), asyncio.Event()
    sent_s = answered_s = 0.0
    stream_s: list[float] = []
    async with AsyncClient(address) as client:
        await client.models()  # The connection is part of no figure.
        begun_s = time.perf_counter()

        async def disturb() -> None:
            nonlocal sent_s, answered_s
            await begun.wait()
            sent_s = time.perf_counter() - begun_s
            prompt = fresh_tokens(seed, prompt_tokens)
            async with client.stream(prompt, max_tokens=1, temperature=0.0, ignore_eos=True) as stream:
                async for _ in stream:
                    answered_s = answered_s or time.perf_counter() - begun_s
            answered.set()

        disturbing = asyncio.create_task(disturb())
        prompt, most = fresh_tokens(10_000 + seed, STREAM_PROMPT_TOKENS), stream_tokens or ENDLESS
        async with client.stream(prompt, max_tokens=most, temperature=0.0, ignore_eos=True) as stream:
            async for piece in stream:
                stream_s += [time.perf_counter() - begun_s] * len(piece.tokens)
                if len(stream_s) >= BEGUN_TOKENS:
                    begun.set()
                if stream_tokens is None and answered.is_set():
                    break
        await disturbing
    return Mixed(stream_s=tuple(stream_s), sent_s=sent_s, answered_s=answered_s)


def _idle_gap_s(address: str, seed: int) -> float:
    times = asyncio.run(token_times(address, fresh_tokens(20_000 + seed, STREAM_PROMPT_TOKENS), IDLE_TOKENS))
    return _p95(_gaps(times[BEGUN_TOKENS:]))


@contextmanager
def _cluster(workers: str, dtype: str, *settings: str) -> Iterator[LocalCluster]:
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(Path(folder), workers=workers, dtype=dtype, settings=settings) as cluster,
    ):
        yield cluster


def bench_whole(pairs: int, seed: int, dtype: str, results: Path | None) -> None:
    """Print longest gap and throughput with chunks over those with whole prompts, one hybrid worker each."""

    @cache
    def mixed(shape: str, pair: int) -> Mixed:
        settings = (f"worker.shape={shape}", f"worker.token_budget={BUDGET}")
        with _cluster("hybrid=1", dtype, *settings) as cluster:
            before = _computed(cluster)
            found = asyncio.run(_mix(cluster.grpc, pair, LONG_TOKENS, STREAM_TOKENS))
            cluster.wait_quiet()
            work[f"tokens computed, {shape}"] = _computed(cluster) - before
            return found

    def figure(shape: str, read: Callable[[Mixed], float], pair: int) -> float:
        return read(mixed(shape, pair))

    work: dict[str, float] = {}
    readings: dict[str, tuple[str, Callable[[Mixed], float]]] = {
        "longest gap of a stream": ("s", lambda found: found.longest_gap_s),
        "throughput of a stream and a prompt": ("tokens/s", lambda found: found.tokens_per_s),
    }
    for name, (unit, read) in readings.items():
        ratio = compare(
            f"{name} while a {LONG_TOKENS}-token prompt arrives, budget {BUDGET}, {dtype}",
            baseline=("whole", partial(figure, "whole", read)),
            candidate=("sarathi", partial(figure, "sarathi", read)),
            pairs=pairs,
            seed=seed,
            unit=unit,
            work=lambda: work,
        )
        report(ratio, results)


def bench_idle(pairs: int, seed: int, dtype: str, target_ms: float, results: Path | None) -> None:
    """Print the gaps of a stream while a prompt is computed over those of a stream alone, and what that costs."""
    plain, *others = (
        Variant(name="hybrid, budget 512", workers="hybrid=1"),
        Variant(
            name=f"hybrid, target {target_ms:g} ms", workers="hybrid=1", settings=(f"worker.tbt_target_ms={target_ms}",)
        ),
        Variant(name="prefill and decode apart, budget 512", workers="prefill=1,decode=1"),
    )
    for variant in (plain, *others):
        with _cluster(variant.workers, dtype, *variant.settings) as cluster:
            ratio = compare(
                f"p95 gap of a stream while a {SHORT_TOKENS}-token prompt is computed, {variant.name}, {dtype}",
                baseline=("alone", partial(_idle_gap_s, cluster.grpc)),
                candidate=("beside the prompt", partial(variant.disturbed_gap_s, cluster.grpc)),
                pairs=pairs,
                seed=seed,
                work=partial(_costs, cluster),
            )
        report(ratio, results)
    for variant in others:
        ratio = compare(
            f"seconds to the first token of that prompt, {dtype}",
            baseline=(plain.name, plain.first_token_s.__getitem__),
            candidate=(variant.name, variant.first_token_s.__getitem__),
            pairs=pairs,
            seed=seed,
        )
        report(ratio, results)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A cluster to measure.

    Attributes:
        first_token_s: Seconds to the first token of each pair's prompt, filled while gaps are measured.
    """

    name: str
    workers: str
    settings: tuple[str, ...] = ()
    first_token_s: dict[int, float] = field(default_factory=dict)

    def disturbed_gap_s(self, address: str, pair: int) -> float:
        """Stream beside a prompt and return the 95th percentile of the gaps meanwhile."""
        found = asyncio.run(_mix(address, pair, SHORT_TOKENS, None))
        self.first_token_s[pair] = found.first_token_s
        return found.disturbed_gap_s


def _gaps(times: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def _p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[PERCENTILE - 1]


def _computed(cluster: LocalCluster) -> int:
    return sum(member.load.computed_tokens for member in cluster.members().values())


def _costs(cluster: LocalCluster) -> dict[str, float]:
    """Return what the workers measured of themselves: whether to trust their targets."""
    loads = {name: member.load for name, member in cluster.members().items()}
    return {f"R2 of {name}": round(load.cost.r2, 3) for name, load in loads.items() if load.HasField("cost")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--target-ms", type=float, default=25.0)
    parser.add_argument("--part", choices=("whole", "idle", "both"), default="both")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    if options.part != "idle":
        bench_whole(options.pairs, options.seed, options.dtype, options.results)
    if options.part != "whole":
        bench_idle(options.pairs, options.seed, options.dtype, options.target_ms, options.results)
