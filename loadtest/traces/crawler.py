"""Crawls: contexts in append mode, pages of which arrive over seconds as they are fetched, and then a question.

Crawls begin as a Poisson process. Each searches first, which brings no text, then fetches pages, two at a time, the
next as soon as one is there: so pages come in bursts and pauses, in the order in which they are done. The question
comes with the last page. Texts are excerpts of `corpus.english`.

The shape is that of Stream2LLM's crawler workload (4,322 crawls for questions of SimpleQA; Bachkaniwala et al., MLSys
2026), as far as two tables of the GitHub repository rajveerb/stream2llm state it, chunk_arrival_characterization.txt
and workload_stats_crawler.txt. Published, and met by a long generated trace within a tenth, but for the longest gaps:

- rows per crawl, pages and one search: mean 7.86, median 8, between 1 and 17. Here one and a Poisson number; that they
  are so distributed is a guess.
- seconds between rows: mean 1.053, median 0.70; quantiles 0.05 0.25 0.75 0.95 0.99 at 0.08, 0.39, 1.34, 3.08, 5.29. The
  time of a fetch and the number of fetches at once are not published. Two at once with log-normal times of sigma 0.85
  give all of these but the last one, 5.9 to 6.1 in long traces; with one at once the shortest gaps are too long, with
  four the longest ones.
- seconds per crawl: mean 9.87, median 9.29, 0.95 at 16.7. The search is what is left of the mean.
- tokens per crawl: mean 8,889, median 5,749, 0.75 at 11,167, 0.95 at 28,372. A log-normal factor per crawl times one
  per page; how the variance divides between the two is a guess.

Run as a script it writes a trace, or prints its figures.
"""

import argparse
import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from arguments import at_least_one, deliver, positive
from contexts import Append, Close, Event, Open, by_context, in_order
from corpus import CHARACTERS_PER_TOKEN, Corpus, english, question
from distributions import LogNormal, arrivals, mean_and_percentiles

from headrace.client.values import GenerateOptions

PREFIX = "Answer with the pages below.\n\n"
MOST_PAGES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What crawls look like.

    Attributes:
        num_pages: Mean of the Poisson distribution that the number of pages is drawn from, then kept within 1 and 16.
        num_fetches: Pages that are fetched at once.
        search_s: Time until the first fetch begins.
        fetch_s: Time of a fetch.
        page_tokens: Length of a page.
        crawl_factor: What all pages of a crawl are longer or shorter by.
        scale: What all lengths are multiplied by: the published ones are too long for small models.
        most_tokens: A longer crawl is shrunk to about this as a whole; None leaves it.
        options: How to answer.
    """

    num_pages: float = 6.86
    num_fetches: int = 2
    search_s: LogNormal = field(default_factory=lambda: LogNormal(median=2.53, sigma=0.3))
    fetch_s: LogNormal = field(default_factory=lambda: LogNormal(median=1.28, sigma=0.85))
    page_tokens: LogNormal = field(default_factory=lambda: LogNormal(median=683.0, sigma=0.8))
    crawl_factor: LogNormal = field(default_factory=lambda: LogNormal(median=1.0, sigma=0.8))
    scale: float = 1.0
    most_tokens: int | None = None
    options: GenerateOptions = field(default_factory=lambda: GenerateOptions(max_tokens=16, temperature=0.0))


def generate(seed: int, num_contexts: int, per_s: float, shape: Shape, corpus: Corpus) -> tuple[Event, ...]:
    """Return the trace of so many crawls, which begin so often per second."""
    random = np.random.default_rng(seed)
    sentences = corpus.sentences()
    events: list[Event] = []
    for number, at_s in enumerate(arrivals(random, num_contexts, per_s)):
        events += _crawl(random, f"crawl-{number}", at_s, shape, corpus, sentences)
    return in_order(events)


def _crawl(
    random: np.random.Generator, name: str, at_s: float, shape: Shape, corpus: Corpus, sentences: Sequence[str]
) -> Iterator[Event]:
    yield Open(at_s=at_s, context=name, mode="append", prefix=PREFIX, options=shape.options)
    at_s += shape.search_s.draw(random)
    num_pages = int(np.clip(random.poisson(shape.num_pages), 1, MOST_PAGES))
    lengths = _lengths(random, num_pages, shape)
    for page, (ready_s, num_tokens) in enumerate(zip(_fetches(random, num_pages, shape), lengths, strict=True)):
        last_s = at_s + ready_s
        text = corpus.excerpt(int(random.integers(len(corpus.paragraphs))), round(num_tokens * CHARACTERS_PER_TOKEN))
        yield Append(at_s=last_s, context=name, text=text + "\n\n", segment=f"page-{page}")
    yield Close(at_s=last_s, context=name, query=question(sentences[int(random.integers(len(sentences)))]))


def _lengths(random: np.random.Generator, num_pages: int, shape: Shape) -> list[float]:
    """Return the tokens of each page."""
    factor = shape.crawl_factor.draw(random) * shape.scale
    lengths = [factor * shape.page_tokens.draw(random) for _ in range(num_pages)]
    shrink = 1.0 if shape.most_tokens is None else min(1.0, shape.most_tokens / sum(lengths))
    return [shrink * length for length in lengths]


def _fetches(random: np.random.Generator, num_pages: int, shape: Shape) -> list[float]:
    """Return when pages are there, in order, from the first fetch's begin."""
    free_s = [0.0] * shape.num_fetches
    ready_s = []
    for _ in range(num_pages):
        ready_s.append(heapq.heappop(free_s) + shape.fetch_s.draw(random))
        heapq.heappush(free_s, ready_s[-1])
    return sorted(ready_s)


def figures(events: Iterable[Event]) -> dict[str, float]:
    """Return what a trace is compared by; the search counts as a row, as in the published tables, and ends unseen."""
    rows, seconds, gaps, tokens = [], [], [], []
    for crawl in by_context(events).values():
        pages = [event for event in crawl if isinstance(event, Append)]
        rows.append(len(pages) + 1)
        seconds.append(crawl[-1].at_s - crawl[0].at_s)
        gaps += [later.at_s - earlier.at_s for earlier, later in pairwise(pages)]
        tokens.append(sum(len(str(page.text)) for page in pages) / CHARACTERS_PER_TOKEN)
    found = {"crawls": float(len(rows)), "rows": float(np.mean(rows)), "median rows": float(np.median(rows))}
    for name, values in (("gap_s", gaps), ("seconds", seconds), ("tokens", tokens)):
        found |= mean_and_percentiles(name, values, (5, 25, 50, 75, 95, 99))
    return found


def main() -> None:
    """Write a trace, or print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, nargs="?", help="file to write; without it the figures are printed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--contexts", type=at_least_one, default=200)
    parser.add_argument("--per-s", type=positive, default=1.0, help="crawls that begin per second")
    parser.add_argument("--scale", type=positive, default=1.0, help="what the lengths of pages are multiplied by")
    parser.add_argument("--most-tokens", type=at_least_one, help="what longer crawls are shrunk to")
    parser.add_argument("--max-tokens", type=at_least_one, default=16, help="of an answer")
    options = parser.parse_args()
    asked: GenerateOptions = {"max_tokens": options.max_tokens, "temperature": 0.0}
    shape = Shape(scale=options.scale, most_tokens=options.most_tokens, options=asked)
    deliver(
        parser,
        options.trace,
        lambda: generate(options.seed, options.contexts, options.per_s, shape, english()),
        figures,
    )


if __name__ == "__main__":
    main()
