"""Reads the published traces of Stream2LLM (Bachkaniwala et al., MLSys 2026) into traces of contexts.

The data set is rbachkaniwala3/stream2llm-data on Hugging Face. Its repository of programs, rajveerb/stream2llm on
GitHub, names its folders and has no description of the files; what follows is what the programs do with them
(experiments/crawler/replay_query_crawls.py, experiments/anns/replay_anns_queries.py and
scripts/utils/analysis/chunk_arrival_characterization.py). Nothing here was run on the files themselves.

Crawls, `crawl/traces/simpleQA_ALL/query_N.csv`, one file each (4,322). Documented by the code: the columns startTime,
endTime (seconds), type ("tavily_search" with the question in the column query, "page_scrape" with the page in the
column content); a page arrives at its endTime, the question with the last page; crawls without pages, or without the
column content, are left out. Inferred: times count from the crawl's begin, since the replay sleeps until the first
endTime; rows without an endTime never ended, since the statistics leave them out.

Searches, `anns/query_trace_map_5k.json`, for each number of a query its text (query) and the name of its file
(trace_file) in `anns/res`. Documented by the code: the columns StartTime_us and EndTime_us of a window of time, and
PipelinePool, the documents found in it, as "(12,7,41)"; `anns/retrieved_corpus_content.part.*.json` map a document's
number to its text; documents are sent in the order of the pool, and searches without windows are left out. Inferred:
windows follow each other without gaps, since the replay waits for their lengths only.

Two programs disagree on when a list of documents is there: the replay sends it at the end of its window, with the last
one as the end of the prompt; the statistics of arrivals count from the begin of a window. `Sent` chooses.

Arrivals of contexts are not part of the traces: the replay draws them, or reads files of delays (see `delays`). What
stands around pages and documents is that of this folder's generators. Documents that the corpus files lack, or all if
the files are not there, get texts of `corpus.english`, so long that a context has the published mean of 13,006 tokens.

Run as a script it writes a trace.
"""

import argparse
import csv
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from pathlib import Path

import crawler
import numpy as np
import retrieval
from arguments import at_least_one, positive
from contexts import Append, Close, Event, Open, Segment, TraceError, Update, in_order, write
from corpus import CHARACTERS_PER_TOKEN, Corpus, english
from distributions import arrivals

from headrace.client.values import GenerateOptions

MEAN_SEARCH_TOKENS = 13_006
"""Of the final contexts of searches, by tables/workload_stats_anns.txt of the repository."""
OPTIONS: GenerateOptions = {"max_tokens": 1, "temperature": 0.0, "seed": 42}
"""How the published experiments ask: only the time to the first token counts."""
FIELD_BYTES = 1 << 30
"""Longest field of a CSV file; Python's own limit is shorter than a page may be."""


class Sent(Enum):
    """When a list of documents arrives: at the end of its window, as it is replayed, or at its begin."""

    AT_END = "end"
    AT_BEGIN = "begin"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window:
    begin_s: float
    end_s: float
    documents: tuple[str, ...]


def delays(path: Path) -> tuple[float, ...]:
    """Return the times of arrivals of a file of delays: one per line, in seconds, each before an arrival.

    Lines that begin with # are comments, empty ones nothing.

    Raises:
        TraceError: a line is no delay, or there is none; the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise TraceError(path, None, f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TraceError(path, None, f"not UTF-8: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            found.append(_seconds(path, number, line))
    if not found:
        raise TraceError(path, None, "there are no delays")
    return tuple(accumulate(found))


def read_crawls(folder: Path, begins_s: Sequence[float], options: GenerateOptions = OPTIONS) -> tuple[Event, ...]:
    """Return the crawls of a folder by the numbers of their queries, as many as there are begins.

    Raises:
        TraceError: a file is no crawl, or there are no files.
    """
    paths = sorted(folder.glob("query_*.csv"), key=_number)
    if not paths:
        raise TraceError(folder, None, "there are no files query_N.csv")
    events: list[Event] = []
    for path, begin_s in zip(paths, begins_s, strict=False):
        events += _crawl(path, begin_s, options)
    return in_order(events)


def read_searches(
    folder: Path,
    begins_s: Sequence[float],
    corpus: Corpus,
    sent: Sent = Sent.AT_END,
    options: GenerateOptions = OPTIONS,
) -> tuple[Event, ...]:
    """Return the searches of a folder by the numbers of their queries, as many as there are begins.

    Raises:
        TraceError: a file is not what it should be.
    """
    texts: dict[str, str] = {}
    for path in sorted(folder.glob("retrieved_corpus_content.part.*.json")):
        texts |= _texts(path)
    queries = _queries(folder / "query_trace_map_5k.json")
    events: list[Event] = []
    for (number, query, name), begin_s in zip(queries, begins_s, strict=False):
        windows = _windows(folder / "res" / name)
        if not windows:
            continue
        context = f"search-{number}"
        events.append(Open(at_s=begin_s, context=context, mode="update", prefix=retrieval.PREFIX, options=options))
        events += _updates(context, begin_s, windows, _filled(windows, texts, corpus), sent)
        events.append(Close(at_s=begin_s + windows[-1].end_s, context=context, query=_question(query)))
    return in_order(events)


def _crawl(path: Path, begin_s: float, options: GenerateOptions) -> Iterator[Event]:
    """Yield nothing for a file without pages, as in the published replay."""
    pages: list[tuple[float, str]] = []
    query: str | None = None
    for number, row in _rows(path, ("endTime", "type")):
        if row["type"] == "tavily_search" and query is None:
            query = row.get("query")
        elif row["type"] == "page_scrape" and "content" in row and row["endTime"]:
            pages.append((_seconds(path, number, row["endTime"]), row["content"]))
    if not pages:
        return
    if not query:
        raise TraceError(path, None, "there is no row of type tavily_search with a query")
    context = path.stem
    yield Open(at_s=begin_s, context=context, mode="append", prefix=crawler.PREFIX, options=options)
    pages.sort(key=lambda page: page[0])
    for page, (end_s, text) in enumerate(pages):
        yield Append(at_s=begin_s + end_s, context=context, text=text + "\n", segment=f"page-{page}")
    yield Close(at_s=begin_s + pages[-1][0], context=context, query=_question(query))


def _updates(
    context: str, begin_s: float, windows: Iterable[_Window], texts: Mapping[str, str], sent: Sent
) -> Iterator[Event]:
    for window in windows:
        segments = tuple(Segment(document, texts[document]) for document in window.documents)
        at_s = begin_s + (window.end_s if sent is Sent.AT_END else window.begin_s)
        yield Update(at_s=at_s, context=context, segments=segments)


def _windows(path: Path) -> list[_Window]:
    """Return the windows of a search, times from the begin of the first."""
    found, at_s = [], 0.0
    for number, row in _rows(path, ("StartTime_us", "EndTime_us", "PipelinePool")):
        length_s = (_seconds(path, number, row["EndTime_us"]) - _seconds(path, number, row["StartTime_us"])) / 1e6
        if length_s < 0:
            raise TraceError(path, number, "the window ends before it begins")
        documents = [name.strip() for name in row["PipelinePool"].strip('()" ').split(",") if name.strip()]
        if not all(name.isdecimal() for name in documents):
            raise TraceError(path, number, f"not numbers of documents: {row['PipelinePool'][:80]!r}")
        # Segments have names of their own: a document that is there twice is sent once.
        found.append(_Window(begin_s=at_s, end_s=at_s + length_s, documents=tuple(dict.fromkeys(documents))))
        at_s += length_s
    return found


def _filled(windows: Sequence[_Window], texts: Mapping[str, str], corpus: Corpus) -> dict[str, str]:
    """Return a text for each document of a search."""
    documents = {document for window in windows for document in window.documents}
    characters = round(MEAN_SEARCH_TOKENS * CHARACTERS_PER_TOKEN / max(1, len(windows[-1].documents)))
    return {
        document: (texts.get(document) or corpus.excerpt(zlib.crc32(document.encode()), characters)) + "\n"
        for document in documents
    }


def _queries(path: Path) -> list[tuple[int, str, str]]:
    """Return numbers, texts and names of files of the queries, by their numbers."""
    found = []
    for number, query in _object(path).items():
        match query:
            case {"query": str() as text, "trace_file": str() as name} if number.isdecimal():
                found.append((int(number), text, name))
            case _:
                raise TraceError(path, None, f"query {number!r} has no number, text (query) or file (trace_file)")
    return sorted(found)


def _texts(path: Path) -> dict[str, str]:
    texts = _object(path)
    if not all(isinstance(text, str) for text in texts.values()):
        raise TraceError(path, None, "a document is not a text")
    return {number: str(text) for number, text in texts.items()}


def _object(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise TraceError(path, None, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TraceError(path, None, f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise TraceError(path, None, "not a JSON object")
    return found


def _rows(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Return the rows of a CSV file by column, each with the number of its last line."""
    before = csv.field_size_limit(FIELD_BYTES)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            if lacking := [column for column in columns if column not in (reader.fieldnames or ())]:
                raise TraceError(path, 1, f"no column {', '.join(lacking)}")
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    raise TraceError(path, reader.line_num, "not as many fields as columns")
                rows.append((reader.line_num, dict(row)))
            return rows
    except OSError as error:
        raise TraceError(path, None, f"cannot be read: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise TraceError(path, None, f"not CSV: {error}") from error
    finally:
        csv.field_size_limit(before)


def _seconds(path: Path, line: int, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise TraceError(path, line, f"not a time: {text[:80]!r}")
    return number


def _number(path: Path) -> int:
    number = path.stem.rpartition("_")[2]
    if not number.isdecimal():
        raise TraceError(path, None, "the name has no number of a query")
    return int(number)


def _question(query: str) -> str:
    return f"\n\nAnswer this question with the text above: {query}\n"


def main() -> None:
    """Write a trace of one of the two workloads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=("crawls", "searches"))
    parser.add_argument("folder", type=Path, help="with query_N.csv files, or the data set's folder anns")
    parser.add_argument("trace", type=Path, help="file to write")
    parser.add_argument("--delays", type=Path, help="file of delays; without it they are drawn")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--contexts", type=at_least_one, default=500)
    parser.add_argument("--per-s", type=positive, default=1.0, help="contexts that begin per second")
    parser.add_argument("--sent", choices=[sent.value for sent in Sent], default="end", help="of a search's window")
    options = parser.parse_args()
    try:
        if not (events := _events(options)):
            parser.error(f"{options.folder}: nothing to write, no query has found anything")
        write(options.trace, events)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _events(options: argparse.Namespace) -> tuple[Event, ...]:
    drawn = arrivals(np.random.default_rng(options.seed), options.contexts, options.per_s)
    begins_s = delays(options.delays)[: options.contexts] if options.delays else drawn
    if options.workload == "crawls":
        return read_crawls(options.folder, begins_s)
    return read_searches(options.folder, begins_s, english(), Sent(options.sent))


if __name__ == "__main__":
    main()
