"""Retrievals: hits come from a real index and become better, and each better list is an update."""

from itertools import pairwise

import numpy as np
import pytest


@pytest.fixture(scope="module")
def retrieval(traces):
    return traces("retrieval")


@pytest.fixture(scope="module")
def contexts(traces):
    return traces("contexts")


@pytest.fixture(scope="module")
def english(traces):
    return traces("corpus").english()


@pytest.fixture(scope="module")
def events(retrieval, english):
    return retrieval.generate(1, 400, 2.0, retrieval.Shape(), english)


@pytest.fixture(scope="module")
def updates(contexts, events):
    """Return the updates of each context."""
    return [
        [event for event in context if isinstance(event, contexts.Update)]
        for context in contexts.by_context(events).values()
    ]


def test_the_same_seed_gives_the_same_trace(retrieval, english):
    shape = retrieval.Shape()
    assert retrieval.generate(3, 9, 1.0, shape, english) == retrieval.generate(3, 9, 1.0, shape, english)
    assert retrieval.generate(3, 9, 1.0, shape, english) != retrieval.generate(4, 9, 1.0, shape, english)


def test_an_update_is_all_hits_by_the_names_of_their_passages(english, updates):
    passages = english.passages(1_000)
    for update in (update for lists in updates for update in lists):
        assert len(update.segments) == 10
        assert all(segment.text == passages[int(segment.segment)] + "\n\n" for segment in update.segments)


def test_each_update_differs_from_the_one_before(updates):
    assert all(one.segments != other.segments for lists in updates for one, other in pairwise(lists))


def test_later_hits_are_better(retrieval, traces, english):
    passages, queries = english.passages(1_000), english.sentences()[::20]
    words = traces("embedding").HashedWords(passages)
    near = words.embed(queries) @ words.embed(passages).T
    true = [set(row.argsort()[::-1][:10].tolist()) for row in near]
    index = retrieval.PassageIndex(passages)
    lists = [index.refine(query, 10) for query in queries]
    first, last = (
        np.mean([len(true[query] & set(found[which])) / 10 for query, found in enumerate(lists)]) for which in (0, -1)
    )
    assert first < 0.9 < 0.95 < last


@pytest.fixture(scope="module")
def figures(retrieval, events):
    return retrieval.figures(events)


@pytest.mark.parametrize(
    ("name", "published", "within"),
    [
        ("lists", 4.42, 0.1),
        ("gap_s", 0.157, 0.25),
        ("gap_s p25", 0.0113, 0.2),
        ("gap_s p50", 0.0367, 0.15),
        ("gap_s p75", 0.1243, 0.2),
        ("seconds", 3.630, 0.06),
        ("seconds p50", 3.464, 0.06),
        ("seconds p95", 5.375, 0.15),
    ],
)
def test_a_trace_has_the_published_figures(figures, name, published, within):
    assert figures[name] == pytest.approx(published, rel=within)


def test_updates_keep_the_share_that_the_module_states(figures):
    assert figures["kept"] == pytest.approx(0.43, abs=0.05)
    assert figures["kept nothing"] == pytest.approx(0.11, abs=0.05)


def test_the_context_is_closed_when_the_search_is_over_and_the_last_list_there(contexts, events):
    for context in contexts.by_context(events).values():
        assert isinstance(context[0], contexts.Open)
        assert isinstance(context[-1], contexts.Close)
        assert context[-1].at_s >= context[-2].at_s


def test_a_trace_can_be_written_and_read(contexts, events, tmp_path):
    contexts.write(tmp_path / "trace", events[:500])
    assert contexts.read(tmp_path / "trace") == events[:500]


def test_kept_shares_count_the_common_begin_of_successive_updates(retrieval, contexts):
    def update(at_s, *texts):
        segments = tuple(contexts.Segment(str(number), text) for number, text in enumerate(texts))
        return contexts.Update(at_s=at_s, context="a", segments=segments)

    events = [update(0), update(1, "abcd", "efgh"), update(2, "abcd", "eXgh"), update(3, "Z"), update(4, "Z", "y")]
    assert retrieval.kept_shares(events) == [5 / 8, 0.0, 1.0]


@pytest.mark.parametrize("name", ["--contexts", "--per-s", "--hits", "--characters", "--max-tokens"])
@pytest.mark.parametrize("value", ["0", "-1", "nan"])
def test_arguments_that_mean_nothing_are_refused(retrieval, script, name, value):
    code, written = script(retrieval, f"{name}={value}")
    assert code == 2
    assert f"argument {name}: not a" in written


def test_figures_of_a_single_passage_can_be_printed(retrieval, script):
    code, written = script(retrieval, "--contexts", "1", "--characters", "1000000")
    assert code == 0
    assert "kept nothing: nan" in written
