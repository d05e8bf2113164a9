"""A context that is computed while it arrives, against one that is sent when all of it is there.

Text goes through SDK, router, ingestor and workers. The clock runs from the arrival of the last piece to the first
token; both ways see the same pieces at the same times. Two modes: `append` adds pieces until 4,096 tokens are there,
over some share of the time that their prefill takes; `update` replaces the last part of a context that is there, as a
retrieval that refines its hits does.
"""

import argparse
import asyncio
import itertools
import secrets
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from contexts import Append, Close, Event, Open, Replace, Segment, Update
from corpus import Corpus, english
from harness import compare, report
from replay import Replay, Way, replay

from headrace import AsyncClient
from headrace.client.values import GenerateOptions
from headrace.testing.cluster import LocalCluster

NUM_TOKENS = 4096
NUM_PIECES = 16
SHARES = (0.0, 0.5, 1.0, 2.0)
"""Times over which a context arrives, in times of its prefill."""
STABLE = (0.0, 0.5, 0.7, 0.9)
"""Shares of the context that an update leaves as they are."""
QUERY = "\n\nWhat is this about?"
OPTIONS: GenerateOptions = {"max_tokens": 1, "temperature": 0.0}

Shape = Callable[[str], tuple[Event, ...]]


def appended(text: str, seconds: float) -> tuple[Event, ...]:
    """Return a text in pieces of equal size at equal distances; the first is there at once."""
    pause_s = seconds / (NUM_PIECES - 1)
    pieces = [
        Append(at_s=number * pause_s, context="c", text=piece, segment=f"{number}")
        for number, piece in enumerate(_cut(text))
    ]
    close = Close(at_s=pieces[-1].at_s, context="c", query=QUERY)
    return (Open(at_s=0.0, context="c", mode="append", options=OPTIONS), *pieces, close)


def updated(text: str, stable: float, seconds: float) -> tuple[Event, ...]:
    """Return a text and, when it may be computed, another end of it."""
    segments = tuple(Segment(segment=f"{number}", text=piece) for number, piece in enumerate(_cut(text)))
    keep = int(len(text) * stable)
    num_kept = keep * NUM_PIECES // len(text)
    start = len("".join(str(segment.text) for segment in segments[:num_kept]))
    # The same words in another order: as many tokens, in other places.
    other = text[start:keep] + " ".join(reversed(text[keep:].split(" ")))
    replaced = (Segment(segment="new", text=other),)
    change = (
        Replace(at_s=seconds, context="c", from_segment=f"{num_kept}", segments=replaced)
        if num_kept
        else Update(at_s=seconds, context="c", segments=replaced)
    )
    return (
        Open(at_s=0.0, context="c", mode="update", options=OPTIONS),
        Update(at_s=0.0, context="c", segments=segments),
        change,
        Close(at_s=seconds, context="c", query=QUERY),
    )


def _cut(text: str) -> list[str]:
    size = -(-len(text) // NUM_PIECES)
    return [text[start : start + size] for start in range(0, len(text), size)]


class Texts:
    """Real texts of some number of tokens.

    Args:
        address: Of a router, which counts tokens.
        corpus: Where they are from.
    """

    def __init__(self, address: str, corpus: Corpus) -> None:
        self._address = address
        self._corpus = corpus

    def take(self, seed: int, num_tokens: int) -> str:
        """Return the text of a seed, cut to as many tokens, give or take a few at its end."""
        text = self._corpus.excerpt(37 * seed % len(self._corpus.paragraphs), 8 * num_tokens)
        return asyncio.run(self._cut(text, num_tokens))

    async def _cut(self, text: str, num_tokens: int) -> str:
        async with AsyncClient(self._address) as client:
            return await client.detokenize((await client.tokenize(text))[:num_tokens])


async def play(address: str, events: Sequence[Event], way: Way) -> Replay:
    """Play a trace under a salt of its own: nothing may be in a cache from an earlier run.

    Raises:
        RuntimeError: a context failed.
    """
    async with AsyncClient(address) as client:
        await client.models()  # The connection is part of no figure.
        found = await replay(client, events, way, cache_salt=secrets.token_hex(8))
    if found.failures:
        raise RuntimeError(f"contexts failed: {found.failures}")
    return found


class Ways:
    """Both ways on one cluster, with their seconds.

    Args:
        cluster: Serves.
        shape: Makes the events of a context from its text.
        texts: Makes that.
        numbers: Number the texts.
    """

    def __init__(self, cluster: LocalCluster, shape: Shape, texts: Texts, numbers: Iterator[int]) -> None:
        self._cluster = cluster
        self._shape = shape
        self._texts = texts
        self._numbers = numbers
        self.seconds: dict[Way, list[float]] = {way: [] for way in Way}

    def take(self, _: int, way: Way) -> float:
        """Return the seconds from the last piece to the first token."""
        events = self._shape(self._texts.take(next(self._numbers), NUM_TOKENS))
        self._cluster.wait_quiet()
        found = asyncio.run(play(self._cluster.grpc, events, way))
        self.seconds[way].append(found.first_token_s(50))
        return self.seconds[way][-1]

    def percentiles(self) -> dict[str, float]:
        """Return how many times later the first token comes to who waits."""
        waited, streamed = self.seconds[Way.WAITED], self.seconds[Way.STREAMED]
        return {f"waited / streamed, p{percent}": _at(waited, percent) / _at(streamed, percent) for percent in (50, 95)}


def bench(workers: str, shares: Sequence[float], stables: Sequence[float], asked: argparse.Namespace) -> None:
    """Print the ratios."""
    numbers = itertools.count(1000 * (asked.seed + 1))
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(Path(folder), workers=workers, dtype=asked.dtype) as cluster,
    ):
        texts = Texts(cluster.grpc, english())
        first = Ways(cluster, partial(appended, seconds=0.0), texts, numbers)
        whole_s = statistics.median([first.take(0, Way.WAITED) for _ in range(4)][1:])
        print(f"{workers}: {NUM_TOKENS} tokens at once take {whole_s:.3f} s to the first token")
        shapes: dict[str, Shape] = {}
        for share in shares:
            shapes[f"append over {share:g} of its prefill"] = partial(appended, seconds=share * whole_s)
        for stable in stables:
            shapes[f"update that leaves {stable:.0%}"] = partial(updated, stable=stable, seconds=1.2 * whole_s)
        for name, shape in shapes.items():
            ways = Ways(cluster, shape, texts, numbers)
            ratio = compare(
                f"first token after the last piece, {name}, {workers}",
                baseline=("waited", partial(ways.take, way=Way.WAITED)),
                candidate=("streamed", partial(ways.take, way=Way.STREAMED)),
                pairs=asked.pairs,
                seed=asked.seed,
                work=ways.percentiles,
            )
            report(ratio, asked.results)


def _at(values: Sequence[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def share(text: str) -> float:
    """Read a share, which may be more than the whole."""
    value = float(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"must be from 0 to 100, found {text}")
    return value


def stable_share(text: str) -> float:
    """Read a share of a whole."""
    value = share(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, found {text}")
    return value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--workers", nargs="*", default=["prefill=1,decode=1", "hybrid=1"])
    parser.add_argument("--append", nargs="*", type=share, default=SHARES, help="shares of the prefill's time")
    parser.add_argument("--update", nargs="*", type=stable_share, default=STABLE, help="shares that stay")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    for each in options.workers:
        bench(each, options.append, options.update, options)
