"""Retrievals: contexts in update mode, the hits of a search that refines them, and then a question.

The index is a real one, a graph (HNSW) of usearch over passages of `corpus.english`, embedded by `embedding`; a query
is a sentence of the corpus. The same query is searched with more and more candidates (`EXPANSIONS`). Each list of hits
that differs from the one before is an update with all hits, best first; a segment is a passage. The graph is kept
sparse (`CONNECTIVITY`): with usearch's defaults one search among a few hundred passages is nearly complete, as it is
not among millions.

Retrievals begin as a Poisson process. Their times are those of Stream2LLM's ANNS workload (4,997 queries; Bachkaniwala
et al., MLSys 2026), as far as a table of the GitHub repository rajveerb/stream2llm states them,
chunk_arrival_characterization.txt:

- seconds between two lists: mean 0.157, median 0.037; quantiles 0.25 0.75 0.95 0.99 at 0.011, 0.124, 0.70, 2.08. A
  log-normal of this median and mean has 0.012, 0.116, 0.61, 1.94.
- seconds per search: mean 3.63, median 3.46, 0.95 at 5.38. A log-normal of this median and mean has 0.95 at 5.8.

So the last list stands for some three seconds before the search is over, and with it the context is closed: an update
comes when its list is found. (Stream2LLM's own replay sends each list only when the next one is found, and the last one
with the close; `stream2llm.Sent` has both.)

Lists per query are what the index gives: 4.3 in the mean with the shape below, where 4.42 is published. Lengths are not
matched: hits and passages are as many and as long as suits small models, 2,860 tokens in the mean, while the published
contexts have 13,006.

Measured with the shape below, 1,000 retrievals of seed 1: an update leaves the first 43 % of the context as it is in
the mean, 42 % in the median, nothing in 11 % of the cases. With 5 hits it is 37 %, with 20 hits 46 %. Of the true ten
nearest the first list has 56 %, the last one 97 %.

Run as a script it writes a trace, or prints its figures, among them how much of a context an update leaves as it is.
"""

import argparse
import math
import os.path
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from arguments import at_least_one, deliver, positive
from contexts import Close, Event, Open, Segment, Update, by_context, in_order
from corpus import CHARACTERS_PER_TOKEN, Corpus, english, question
from distributions import LogNormal, arrivals, mean_and_percentiles
from embedding import DIMENSIONS, HashedWords
from numpy.typing import NDArray
from usearch.index import Index

from headrace.client.values import GenerateOptions

PREFIX = "Answer with the passages below, best first.\n\n"
CONNECTIVITY = 4
EXPANSION_ADD = 8
EXPANSIONS = (1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
"""Candidates of the successive searches, in times of the hits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What retrievals look like.

    Attributes:
        num_hits: Passages of a context.
        passage_characters: Least length of a passage; the mean is a fifth above.
        gap_s: Time before a list.
        search_s: Time from the begin to the close, if the last list is there by then.
        options: How to answer.
    """

    num_hits: int = 10
    passage_characters: int = 1_000
    gap_s: LogNormal = field(default_factory=lambda: LogNormal(median=0.0367, sigma=1.706))
    search_s: LogNormal = field(default_factory=lambda: LogNormal(median=3.46, sigma=0.31))
    options: GenerateOptions = field(default_factory=lambda: GenerateOptions(max_tokens=16, temperature=0.0))


class PassageIndex:
    """A searchable set of passages; the same on the same machine for the same passages.

    Args:
        passages: What is found, by its number.
    """

    def __init__(self, passages: Sequence[str]) -> None:
        self._words = HashedWords(passages)
        self._index = Index(
            ndim=DIMENSIONS, metric="ip", dtype="f32", connectivity=CONNECTIVITY, expansion_add=EXPANSION_ADD
        )
        # More threads would build another graph each time.
        self._index.add(np.arange(len(passages)), self._words.embed(passages), threads=1)

    def refine(self, query: str, num_hits: int) -> tuple[tuple[int, ...], ...]:
        """Return the lists of the successive searches, best passage first, each other than the one before."""
        vector = self._words.embed([query])[0]
        lists: list[tuple[int, ...]] = []
        for factor in EXPANSIONS:
            found = self._search(vector, num_hits, round(factor * num_hits))
            if not lists or found != lists[-1]:
                lists.append(found)
        return tuple(lists)

    def _search(self, vector: NDArray[np.float32], num_hits: int, expansion: int) -> tuple[int, ...]:
        self._index.expansion_search = expansion  # type: ignore[misc] # usearch parts property and setter
        found = self._index.search(vector, num_hits, threads=1)
        return tuple(int(key) for key in found.keys)


def generate(seed: int, num_contexts: int, per_s: float, shape: Shape, corpus: Corpus) -> tuple[Event, ...]:
    """Return the trace of so many retrievals, which begin so often per second."""
    random = np.random.default_rng(seed)
    passages, sentences = corpus.passages(shape.passage_characters), corpus.sentences()
    index = PassageIndex(passages)
    events: list[Event] = []
    for number, at_s in enumerate(arrivals(random, num_contexts, per_s)):
        sentence = sentences[int(random.integers(len(sentences)))]
        lists = index.refine(sentence, shape.num_hits)
        updates = [tuple(Segment(str(hit), passages[hit] + "\n\n") for hit in hits) for hits in lists]
        events += _retrieval(random, f"retrieval-{number}", at_s, shape, updates, question(sentence))
    return in_order(events)


def _retrieval(
    random: np.random.Generator,
    name: str,
    at_s: float,
    shape: Shape,
    updates: Iterable[tuple[Segment, ...]],
    query: str,
) -> Iterator[Event]:
    yield Open(at_s=at_s, context=name, mode="update", prefix=PREFIX, options=shape.options)
    over_s = at_s + shape.search_s.draw(random)
    for segments in updates:
        at_s += shape.gap_s.draw(random)
        yield Update(at_s=at_s, context=name, segments=segments)
    yield Close(at_s=max(at_s, over_s), context=name, query=query)


def kept_shares(events: Iterable[Event]) -> list[float]:
    """Return which share of the context each update leaves as it is, from its begin on, in characters.

    The first update of a context is not counted, nor one of an empty context. What stands before the context is not
    part of it.
    """
    shares = []
    for context in by_context(events).values():
        texts = [_text(event.segments) for event in context if isinstance(event, Update)]
        shares += [_kept(earlier, later) for earlier, later in pairwise(texts) if earlier]
    return shares


def _kept(earlier: str, later: str) -> float:
    return len(os.path.commonprefix([earlier, later])) / len(earlier)


def _text(segments: Iterable[Segment]) -> str:
    return "".join(str(segment.text) for segment in segments)


def figures(events: Iterable[Event]) -> dict[str, float]:
    """Return what a trace is compared by."""
    contexts = by_context(events).values()
    updates = [[event for event in context if isinstance(event, Update)] for context in contexts]
    seconds = [context[-1].at_s - context[0].at_s for context in contexts]
    gaps = [later.at_s - earlier.at_s for lists in updates for earlier, later in pairwise(lists)]
    tokens = [len(_text(lists[-1].segments)) / CHARACTERS_PER_TOKEN for lists in updates]
    kept = kept_shares(event for context in contexts for event in context)
    found = {"retrievals": float(len(updates)), "lists": float(np.mean([len(lists) for lists in updates]))}
    for name, values in (("gap_s", gaps), ("seconds", seconds), ("tokens", tokens), ("kept", kept)):
        found |= mean_and_percentiles(name, values, (25, 50, 75, 95))
    return found | {"kept nothing": kept.count(0.0) / len(kept) if kept else math.nan}


def main() -> None:
    """Write a trace, or print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, nargs="?", help="file to write; without it the figures are printed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--contexts", type=at_least_one, default=200)
    parser.add_argument("--per-s", type=positive, default=1.0, help="retrievals that begin per second")
    parser.add_argument("--hits", type=at_least_one, default=10, help="passages of a context")
    parser.add_argument("--characters", type=at_least_one, default=1_000, help="least length of a passage")
    parser.add_argument("--max-tokens", type=at_least_one, default=16, help="of an answer")
    options = parser.parse_args()
    asked: GenerateOptions = {"max_tokens": options.max_tokens, "temperature": 0.0}
    shape = Shape(num_hits=options.hits, passage_characters=options.characters, options=asked)
    deliver(
        parser,
        options.trace,
        lambda: generate(options.seed, options.contexts, options.per_s, shape, english()),
        figures,
    )


if __name__ == "__main__":
    main()
