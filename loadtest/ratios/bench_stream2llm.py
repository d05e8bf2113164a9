"""A context that is computed while it arrives, against one that is sent when all of it is there.

The clock runs from the arrival of the last piece to the first token; both ways see the same pieces at the same times.
Two modes: `append` adds pieces until 4,096 tokens are there, over some share of the time that their prefill takes;
`update` replaces the last part of a context that is there, as a retrieval that refines its hits does.
"""

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc.aio
from harness import compare, report
from measure import fresh_tokens, seconds_to_token

from headrace.testing.cluster import LocalCluster
from headrace.testing.token_context import TokenContext

NUM_TOKENS = 4096
NUM_PIECES = 16
SHARES = (0.0, 0.5, 1.0, 2.0)
"""Times over which a context arrives, in times of its prefill."""
STABLE = (0.0, 0.5, 0.7, 0.9)
"""Shares of the context that an update leaves as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What arrives at one time.

    Attributes:
        at_s: When, from the begin.
        keep: Tokens of the context so far that stay.
        tokens: Those that follow them.
    """

    at_s: float
    keep: int
    tokens: list[int]


def appended(seed: int, seconds: float) -> list[Piece]:
    """Return pieces of equal size at equal distances; the first is there at once."""
    tokens, size = fresh_tokens(seed, NUM_TOKENS), NUM_TOKENS // NUM_PIECES
    pause_s = seconds / (NUM_PIECES - 1)
    return [
        Piece(at_s=number * pause_s, keep=number * size, tokens=tokens[number * size : (number + 1) * size])
        for number in range(NUM_PIECES)
    ]


def updated(seed: int, stable: float, seconds: float) -> list[Piece]:
    """Return a context and, when it may be computed, another end of it."""
    keep = int(NUM_TOKENS * stable)
    rest = fresh_tokens(50_000 + seed, NUM_TOKENS - keep)
    return [
        Piece(at_s=0.0, keep=0, tokens=fresh_tokens(seed, NUM_TOKENS)),
        Piece(at_s=seconds, keep=keep, tokens=rest),
    ]


async def _streamed_s(address: str, pieces: Sequence[Piece]) -> float:
    """Return the seconds from the last piece to the first token, all pieces sent as they come."""
    async with grpc.aio.insecure_channel(address) as channel:
        context = TokenContext(channel, max_tokens=1)
        begun_s = time.perf_counter()
        for piece in pieces:
            await asyncio.sleep(max(0.0, piece.at_s - (time.perf_counter() - begun_s)))
            sent_s = time.perf_counter()
            context.revise(piece.tokens, piece.keep, is_closed=piece is pieces[-1])
        await context.until_answered()
        return context.arrived_s[0] - sent_s


Shape = Callable[[int], Sequence[Piece]]


class Ways:
    """Both ways on one cluster, with their seconds.

    Args:
        cluster: Serves.
        shape: Makes the pieces of a context from a number.
        numbers: Never the same twice: nothing may be in a cache from an earlier run.
    """

    def __init__(self, cluster: LocalCluster, shape: Shape, numbers: Iterator[int]) -> None:
        self._cluster = cluster
        self._shape = shape
        self._numbers = numbers
        self.streamed: list[float] = []
        self.waited: list[float] = []

    def stream(self, _: int) -> float:
        """Return how long a context takes whose pieces are sent as they come."""
        self._cluster.wait_quiet()
        self.streamed.append(asyncio.run(_streamed_s(self._cluster.grpc, self._shape(next(self._numbers)))))
        return self.streamed[-1]

    def wait(self, _: int) -> float:
        """Return how long such a context takes when it is sent as a whole: nothing is known of it before."""
        self._cluster.wait_quiet()
        tokens: list[int] = []
        for piece in self._shape(next(self._numbers)):
            tokens[piece.keep :] = piece.tokens
        self.waited.append(seconds_to_token(self._cluster.grpc, tokens, 0))
        return self.waited[-1]

    def percentiles(self) -> dict[str, float]:
        """Return how many times later the first token comes to who waits."""
        return {
            f"waited / streamed, p{percent}": _at(self.waited, percent) / _at(self.streamed, percent)
            for percent in (50, 95)
        }


def bench(workers: str, dtype: str, pairs: int, seed: int, results: Path | None) -> None:
    """Print the ratios."""
    numbers = itertools.count(1_000_000 * (seed + 1))
    with tempfile.TemporaryDirectory() as folder, LocalCluster(Path(folder), workers=workers, dtype=dtype) as cluster:
        times = [seconds_to_token(cluster.grpc, fresh_tokens(next(numbers), NUM_TOKENS), 0) for _ in range(3)]
        whole_s = statistics.median(times)
        print(f"{workers}: {NUM_TOKENS} tokens at once take {whole_s:.3f} s to the first token")
        shapes: dict[str, Shape] = {}
        for share in SHARES:
            shapes[f"append over {share:g} of its prefill"] = partial(appended, seconds=share * whole_s)
        for stable in STABLE:
            shapes[f"update that leaves {stable:.0%}"] = partial(updated, stable=stable, seconds=1.2 * whole_s)
        for name, shape in shapes.items():
            ways = Ways(cluster, shape, numbers)
            ratio = compare(
                f"first token after the last piece, {name}, {workers}",
                baseline=("waited", ways.wait),
                candidate=("streamed", ways.stream),
                pairs=pairs,
                seed=seed,
                work=ways.percentiles,
            )
            report(ratio, results)


def _at(values: Sequence[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--workers", nargs="*", default=["prefill=1,decode=1", "hybrid=1"])
    parser.add_argument("--results", type=Path)
    asked = parser.parse_args()
    for each in asked.workers:
        bench(each, asked.dtype, asked.pairs, asked.seed, asked.results)
