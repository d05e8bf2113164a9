"""Crawls: the generator keeps the shape that is published of Stream2LLM's crawler workload."""

import math

import pytest


@pytest.fixture(scope="module")
def crawler(traces):
    return traces("crawler")


@pytest.fixture(scope="module")
def contexts(traces):
    return traces("contexts")


@pytest.fixture(scope="module")
def english(traces):
    return traces("corpus").english()


@pytest.fixture(scope="module")
def events(crawler, english):
    return crawler.generate(1, 1_500, 2.0, crawler.Shape(), english)


def test_the_same_seed_gives_the_same_trace(crawler, english):
    shape = crawler.Shape()
    assert crawler.generate(3, 5, 1.0, shape, english) == crawler.generate(3, 5, 1.0, shape, english)
    assert crawler.generate(3, 5, 1.0, shape, english) != crawler.generate(4, 5, 1.0, shape, english)


@pytest.fixture(scope="module")
def figures(crawler, events):
    return crawler.figures(events)


@pytest.mark.parametrize(
    ("name", "published", "within"),
    [
        ("rows", 7.86, 0.03),
        ("median rows", 8, 0.0),
        ("gap_s", 1.053, 0.06),
        ("gap_s p5", 0.082, 0.25),
        ("gap_s p25", 0.387, 0.1),
        ("gap_s p50", 0.701, 0.1),
        ("gap_s p75", 1.340, 0.1),
        ("gap_s p95", 3.078, 0.1),
        ("gap_s p99", 5.293, 0.15),
        ("seconds", 9.870, 0.06),
        ("seconds p50", 9.287, 0.06),
        ("seconds p95", 16.693, 0.1),
        ("tokens", 8_889, 0.1),
        ("tokens p50", 5_749, 0.1),
        ("tokens p75", 11_167, 0.1),
        ("tokens p95", 28_372, 0.1),
    ],
)
def test_a_trace_has_the_published_figures(figures, name, published, within):
    assert figures[name] == pytest.approx(published, rel=within)


def test_crawls_begin_at_the_given_rate(contexts, events):
    begins_s = [event.at_s for event in events if isinstance(event, contexts.Open)]
    assert len(begins_s) / begins_s[-1] == pytest.approx(2.0, rel=0.08)


def test_a_trace_can_be_written_and_read(crawler, contexts, english, tmp_path):
    events = crawler.generate(2, 20, 1.0, crawler.Shape(), english)
    contexts.write(tmp_path / "trace", events)
    assert contexts.read(tmp_path / "trace") == events


def test_the_question_comes_with_the_last_page(contexts, events):
    for crawl in contexts.by_context(events).values():
        *_, page, close = crawl
        assert isinstance(page, contexts.Append)
        assert isinstance(close, contexts.Close)
        assert page.at_s == close.at_s


def test_pages_are_fetched_side_by_side(crawler, contexts, english):
    one_s, two_s = (crawler.LogNormal(median=seconds, sigma=0.0) for seconds in (1.0, 2.0))
    shape = crawler.Shape(num_fetches=3, num_pages=9.0, search_s=one_s, fetch_s=two_s)
    (crawl,) = contexts.by_context(crawler.generate(1, 1, 1.0, shape, english)).values()
    opening, *pages, _ = crawl
    due_s = [opening.at_s + 1.0 + 2.0 * (page // 3 + 1) for page in range(len(pages))]
    assert [page.at_s for page in pages] == pytest.approx(due_s)


def test_longer_crawls_are_shrunk_and_keep_their_times(crawler, contexts, english):
    limited = crawler.generate(1, 100, 1.0, crawler.Shape(most_tokens=4_000), english)
    free = crawler.generate(1, 100, 1.0, crawler.Shape(), english)
    assert crawler.figures(limited)["tokens p99"] < 4_400 < crawler.figures(free)["tokens p75"]
    assert [event.at_s for event in limited] == [event.at_s for event in free]


def test_lengths_are_scaled(crawler, english):
    shape = crawler.Shape(scale=0.25)
    assert crawler.figures(crawler.generate(1, 300, 1.0, shape, english))["tokens"] == pytest.approx(2_222, rel=0.15)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("--contexts", "0"),
        ("--per-s", "0"),
        ("--per-s", "inf"),
        ("--scale", "-1"),
        ("--scale", "nan"),
        ("--most-tokens", "0"),
        ("--max-tokens", "0"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(crawler, script, name, value):
    code, written = script(crawler, name, value)
    assert code == 2
    assert f"argument {name}: not a" in written


def test_a_trace_longer_than_a_trace_may_be_is_refused(crawler, script, tmp_path):
    code, written = script(crawler, tmp_path / "trace", "--contexts", "9", "--per-s", "1e-9")
    assert code == 2
    assert "no time from the trace's begin" in written
    assert not (tmp_path / "trace").exists()


def test_figures_of_what_there_is_none_of_are_not_numbers(crawler, english):
    one = crawler.generate(1, 1, 1.0, crawler.Shape(num_pages=0.0), english)
    assert math.isnan(crawler.figures(one)["gap_s p50"])
