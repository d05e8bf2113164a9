"""The reader of Stream2LLM's traces, over small files in the format that its programs read."""

import csv
import json

import pytest


@pytest.fixture(scope="module")
def stream2llm(traces):
    return traces("stream2llm")


@pytest.fixture(scope="module")
def contexts(traces):
    return traces("contexts")


@pytest.fixture(scope="module")
def english(traces):
    return traces("corpus").english()


CRAWL = ["startTime", "endTime", "type", "query", "content"]
SEARCH = ["StartTime_us", "EndTime_us", "PipelinePool"]


def table(path, columns, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


@pytest.fixture
def crawls(tmp_path):
    """Return a folder with two crawls; pages are not in the order of their ends."""
    table(
        tmp_path / "query_10.csv",
        CRAWL,
        [0, 1.5, "tavily_search", "Who built it?", ""],
        [1.5, 4.0, "page_scrape", "", 'later,\n"quoted" page'],
        [1.5, 2.5, "page_scrape", "", "earlier page"],
        [1.5, "", "page_scrape", "", "never ended"],
    )
    table(
        tmp_path / "query_2.csv",
        CRAWL,
        [0, 1, "tavily_search", "When?", ""],
        [1, 2, "page_scrape", "", "x" * 200_000],
    )
    return tmp_path


@pytest.fixture
def searches(tmp_path):
    """Return a folder with one search in three windows."""
    map_of = {"7": {"query": "Which?", "trace_file": "7_pipeline_trace.csv"}}
    (tmp_path / "query_trace_map_5k.json").write_text(json.dumps(map_of))
    rows = [[500, 1_000_500, "(1,2)"], [1_000_500, 1_250_500, "(2, 3,2)"], [1_250_500, 3_000_500, "(2,3,4)"]]
    table(tmp_path / "res" / "7_pipeline_trace.csv", SEARCH, *rows)
    for part, texts in enumerate(({"1": "one", "2": "two"}, {"3": "three", "4": "four"})):
        (tmp_path / f"retrieved_corpus_content.part.{part}.json").write_text(json.dumps(texts))
    return tmp_path


def updates(contexts, events):
    return [
        (event.at_s, [(segment.segment, segment.text) for segment in event.segments])
        for event in events
        if isinstance(event, contexts.Update)
    ]


def test_a_page_arrives_at_its_end_and_the_question_with_the_last(stream2llm, contexts, crawls):
    events = contexts.by_context(stream2llm.read_crawls(crawls, [100.0, 200.0]))["query_10"]
    opening, first, last, close = events
    assert (opening.at_s, opening.mode) == (200.0, "append")
    assert (first.at_s, first.text) == (202.5, "earlier page\n")
    assert (last.at_s, last.text) == (204.0, 'later,\n"quoted" page\n')
    assert close.at_s == 204.0
    assert "Who built it?" in close.query


def test_crawls_are_taken_by_their_numbers_as_many_as_begin(stream2llm, contexts, crawls):
    assert list(contexts.by_context(stream2llm.read_crawls(crawls, [0.0, 0.0]))) == ["query_2", "query_10"]
    assert list(contexts.by_context(stream2llm.read_crawls(crawls, [0.0]))) == ["query_2"]


def test_crawls_without_pages_are_left_out(stream2llm, tmp_path):
    table(tmp_path / "query_1.csv", CRAWL[:4], [0, 1, "tavily_search", "Why?"], [1, 2, "page_scrape", ""])
    table(tmp_path / "query_2.csv", CRAWL, [0, 1, "tavily_search", "Why?", ""])
    assert stream2llm.read_crawls(tmp_path, [0.0, 0.0]) == ()


def test_what_is_read_is_a_trace(stream2llm, contexts, english, crawls, searches, tmp_path):
    events = (*stream2llm.read_crawls(crawls, [0, 1]), *stream2llm.read_searches(searches, [0], english))
    contexts.write(tmp_path / "trace", events)
    assert contexts.read(tmp_path / "trace") == contexts.in_order(events)


def test_a_list_arrives_at_the_end_of_its_window_as_it_is_replayed(stream2llm, contexts, english, searches):
    events = stream2llm.read_searches(searches, [10.0], english)
    assert updates(contexts, events) == [
        (11.0, [("1", "one\n"), ("2", "two\n")]),
        (11.25, [("2", "two\n"), ("3", "three\n")]),
        (13.0, [("2", "two\n"), ("3", "three\n"), ("4", "four\n")]),
    ]
    assert (events[0].at_s, events[0].mode) == (10.0, "update")
    assert events[-1].at_s == 13.0
    assert "Which?" in events[-1].query


def test_a_list_can_arrive_at_the_begin_of_its_window(stream2llm, contexts, english, searches):
    events = stream2llm.read_searches(searches, [10.0], english, stream2llm.Sent.AT_BEGIN)
    assert [at_s for at_s, _ in updates(contexts, events)] == [10.0, 11.0, 11.25]
    assert events[-1].at_s == 13.0


def test_documents_without_text_get_one_of_about_the_published_length(stream2llm, contexts, english, searches):
    for path in searches.glob("retrieved_corpus_content.*"):
        path.unlink()
    (_, before), *_, (_, after) = updates(contexts, stream2llm.read_searches(searches, [0.0], english))
    assert dict(before)["2"] == dict(after)["2"]
    assert len(set(dict(after).values())) == 3
    assert sum(len(text) for _, text in after) / 4.1 == pytest.approx(13_006, rel=0.1)


def test_searches_without_windows_are_left_out(stream2llm, english, searches):
    table(searches / "res" / "7_pipeline_trace.csv", SEARCH)
    assert stream2llm.read_searches(searches, [0.0], english) == ()


def test_delays_are_summed_and_comments_skipped(stream2llm, tmp_path):
    (tmp_path / "delays.txt").write_text("# Arrival time: 1\n#\n0.5\n\n1.25\n")
    assert stream2llm.delays(tmp_path / "delays.txt") == (0.5, 1.75)


@pytest.mark.parametrize("line", ["soon", "-1", "nan", "inf"])
def test_a_delay_that_is_none_is_named(stream2llm, contexts, tmp_path, line):
    (tmp_path / "delays.txt").write_text(f"1\n{line}\n")
    with pytest.raises(contexts.TraceError, match=r"delays\.txt:2: not a time"):
        stream2llm.delays(tmp_path / "delays.txt")


@pytest.mark.parametrize(
    ("reason", "columns", "rows"),
    [
        ("no column endTime", ["startTime", "type"], []),
        (":3: not a time: 'soon'", CRAWL, [[0, 1, "tavily_search", "q", ""], [1, "soon", "page_scrape", "", "p"]]),
        (":2: not as many fields", CRAWL, [[0, 1, "tavily_search"]]),
        (":2: not as many fields", CRAWL, [[0, 1, "tavily_search", "q", "", "more"]]),
        ("no row of type tavily_search", CRAWL, [[0, 1, "page_scrape", "", "p"]]),
    ],
)
def test_a_file_that_is_no_crawl_is_named(stream2llm, contexts, tmp_path, reason, columns, rows):
    table(tmp_path / "query_1.csv", columns, *rows)
    with pytest.raises(contexts.TraceError, match=reason):
        stream2llm.read_crawls(tmp_path, [0.0])


@pytest.mark.parametrize(
    ("name", "content"), [("query_x.csv", b"a,b\n"), ("query_1.csv", b'a,"b\n'), ("query_1.csv", b"\xff\xfe")]
)
def test_a_file_that_is_no_table_is_named(stream2llm, contexts, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(contexts.TraceError, match=name):
        stream2llm.read_crawls(tmp_path, [0.0])


@pytest.mark.parametrize(
    ("reason", "rows"),
    [
        ("the window ends before it begins", [[2, 1, "(1)"]]),
        ("not numbers of documents", [[1, 2, "(one)"]]),
        ("not a time", [["", 2, "(1)"]]),
    ],
)
def test_a_file_that_is_no_search_is_named(stream2llm, contexts, english, searches, reason, rows):
    table(searches / "res" / "7_pipeline_trace.csv", SEARCH, *rows)
    with pytest.raises(contexts.TraceError, match=rf"7_pipeline_trace\.csv:2: {reason}"):
        stream2llm.read_searches(searches, [0.0], english)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("query_trace_map_5k.json", "[]"),
        ("query_trace_map_5k.json", "{"),
        ("query_trace_map_5k.json", '{"7": {"query": "q"}}'),
        ("query_trace_map_5k.json", '{"seven": {"query": "q", "trace_file": "f"}}'),
        ("query_trace_map_5k.json", '{"7": {"query": "q", "trace_file": "missing.csv"}}'),
        ("retrieved_corpus_content.part.0.json", '{"1": 2}'),
    ],
)
def test_other_files_are_named(stream2llm, contexts, english, searches, name, content):
    (searches / name).write_text(content)
    with pytest.raises(contexts.TraceError, match=r"missing\.csv" if "missing" in content else name):
        stream2llm.read_searches(searches, [0.0], english)


def test_a_folder_without_queries_is_named(stream2llm, contexts, english, tmp_path):
    with pytest.raises(contexts.TraceError, match="query_trace_map"):
        stream2llm.read_searches(tmp_path, [0.0], english)


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "cannot be read"), (b"\xff1\n", "not UTF-8"), (b"# none\n", "there are no delays")]
)
def test_a_file_without_delays_is_named(stream2llm, contexts, tmp_path, content, reason):
    if content is not None:
        (tmp_path / "delays.txt").write_bytes(content)
    with pytest.raises(contexts.TraceError, match=rf"delays\.txt: {reason}"):
        stream2llm.delays(tmp_path / "delays.txt")


def test_a_folder_without_crawls_is_named(stream2llm, contexts, tmp_path):
    with pytest.raises(contexts.TraceError, match="no files query_N"):
        stream2llm.read_crawls(tmp_path, [0.0])


def test_the_script_writes_a_trace(stream2llm, contexts, crawls, script, tmp_path):
    assert script(stream2llm, "crawls", crawls, tmp_path / "trace") == (0, "")
    assert len(contexts.by_context(contexts.read(tmp_path / "trace"))) == 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("crawls", "empty"), "no files query_N"),
        (("searches", "empty"), "cannot be read"),
        (("crawls", "pageless"), "nothing to write"),
        (("crawls", "pageless", "--delays", "missing"), "missing: cannot be read"),
        (("crawls", "pageless", "--contexts", "0"), "argument --contexts: not a"),
        (("crawls", "pageless", "--per-s", "nan"), "argument --per-s: not a"),
    ],
)
def test_the_script_says_what_is_amiss_and_writes_no_file(stream2llm, script, tmp_path, arguments, reason):
    (tmp_path / "empty").mkdir()
    table(tmp_path / "pageless" / "query_1.csv", CRAWL, [0, 1, "tavily_search", "Why?", ""])
    workload, folder, *others = arguments
    code, written = script(stream2llm, workload, tmp_path / folder, tmp_path / "trace", *others)
    assert code == 2
    assert reason in written
    assert not (tmp_path / "trace").exists()


def test_a_text_that_cannot_be_written_leaves_no_file(stream2llm, searches, script, tmp_path):
    (searches / "retrieved_corpus_content.part.0.json").write_text(r'{"1": "\ud800"}')
    code, written = script(stream2llm, "searches", searches, tmp_path / "trace")
    assert code == 2
    assert "surrogates" in written
    assert not (tmp_path / "trace").exists()
