"""The replay keeps a trace's times, counts from the close on, and ends whatever contexts do."""

import asyncio
import io

import pytest

from headrace.errors import InvalidRequest, Saturated


@pytest.fixture(scope="module")
def replay(traces):
    return traces("replay")


@pytest.fixture(scope="module")
def contexts(traces):
    return traces("contexts")


@pytest.fixture
def crawl(contexts):
    """Return a function that makes a context of two pages of 100 bytes and a question of 10."""

    def events(name="a", begin_s=0.0):
        at = {"context": name}
        return (
            contexts.Open(at_s=begin_s, mode="append", prefix="before ", options={"max_tokens": 2, "seed": 5}, **at),
            contexts.Append(at_s=begin_s + 1.0, text="x" * 100, segment="p", **at),
            contexts.Append(at_s=begin_s + 4.0, text="y" * 100, segment="q", **at),
            contexts.Close(at_s=begin_s + 4.0, query="z" * 10, **at),
        )

    return events


@pytest.fixture
def search(contexts):
    """Return a context with two updates, a replacement and a checkpoint."""
    one, two, three = (contexts.Segment(name, name * 50) for name in "123")
    at = {"context": "s"}
    return (
        contexts.Open(at_s=0.0, mode="update", chat=({"role": "system", "content": "Hm."},), **at),
        contexts.Update(at_s=1.0, segments=(one, two), **at),
        contexts.Update(at_s=2.0, segments=(one, three), **at),
        contexts.Checkpoint(at_s=2.0, **at),
        contexts.Replace(at_s=3.0, from_segment="3", segments=(two,), **at),
        contexts.Close(at_s=5.0, query="which?", **at),
    )


def test_streamed_events_come_at_their_times(replay, run, fake_sdk, crawl):
    client = fake_sdk()
    run(replay.replay(client, crawl(begin_s=2.0), replay.Way.STREAMED, replay.Pace(scale=0.5)))
    assert client.calls == [
        (1.0, 0, "open", "append", "before ", None, {"max_tokens": 2, "seed": 5}),
        (1.5, 0, "append", "x" * 100, "p"),
        (3.0, 0, "append", "y" * 100, "q"),
        (3.0, 0, "close", "z" * 10),
    ]


def test_waited_text_comes_at_once_with_the_close(replay, run, fake_sdk, crawl):
    client = fake_sdk()
    run(replay.replay(client, crawl(), replay.Way.WAITED, replay.Pace(scale=0.5)))
    assert client.calls == [
        (2.0, 0, "open", "append", "before ", None, {"max_tokens": 2, "seed": 5}),
        (2.0, 0, "append", "x" * 100 + "y" * 100, None),
        (2.0, 0, "close", "z" * 10),
    ]


def test_a_search_is_streamed_as_it_was(replay, run, fake_sdk, search):
    client = fake_sdk()
    run(replay.replay(client, search, replay.Way.STREAMED))
    assert [call[:3] for call in client.calls] == [
        (0.0, 0, "open"),
        (1.0, 0, "update"),
        (2.0, 0, "update"),
        (2.0, 0, "checkpoint"),
        (3.0, 0, "replace"),
        (5.0, 0, "close"),
    ]


def test_a_search_that_waits_is_one_update(replay, run, fake_sdk, search):
    client = fake_sdk()
    run(replay.replay(client, search, replay.Way.WAITED))
    assert client.calls[1:] == [(5.0, 0, "update", [("1", "1" * 50), ("2", "2" * 50)]), (5.0, 0, "close", "which?")]


@pytest.mark.parametrize(("way", "first_s"), [("streamed", 1.1), ("waited", 2.1)])
def test_time_counts_from_the_close(replay, run, fake_sdk, crawl, way, first_s):
    client = fake_sdk(byte_s=0.01, token_s=0.25)
    found = run(replay.replay(client, crawl(), replay.Way(way)))
    (played,) = found.played
    assert played.first_token_s == pytest.approx(first_s)
    assert played.total_s == pytest.approx(first_s + 0.5)
    assert found.makespan_s == pytest.approx(4.0 + first_s + 0.5)
    assert (played.text, played.output_tokens, found.output_tokens) == ("one two", 2, 2)
    assert found.first_token_s(50) == played.first_token_s


def test_a_call_that_takes_long_counts_from_when_the_close_was_due(replay, run, fake_sdk, crawl):
    found = run(replay.replay(fake_sdk(call_s=5.0), crawl(), replay.Way.STREAMED))
    assert found.played[0].first_token_s == pytest.approx(1.0 + 2 * 5.0 - 4.0)


@pytest.mark.parametrize(("way", "first_s"), [("streamed", 0.06), ("waited", 1.06)])
def test_a_close_long_after_the_last_piece_is_where_time_counts_from(replay, run, fake_sdk, search, way, first_s):
    found = run(replay.replay(fake_sdk(byte_s=0.01), search, replay.Way(way)))
    assert found.played[0].first_token_s == pytest.approx(first_s)


def test_options_take_the_place_of_the_trace_s_own(replay, run, fake_sdk, crawl):
    client = fake_sdk()
    run(replay.replay(client, crawl(), replay.Way.STREAMED, cache_salt="s", max_tokens=9))
    assert client.calls[0][-1] == {"max_tokens": 9, "seed": 5, "cache_salt": "s"}


def test_no_more_contexts_are_open_than_may_be(replay, run, fake_sdk, crawl):
    client = fake_sdk()
    events = [event for name in "abcde" for event in crawl(name)]
    found = run(replay.replay(client, events, replay.Way.STREAMED, replay.Pace(most_contexts=2)))
    assert client.most_open == 2
    assert [played.late_s for played in found.played] == [0.0, 0.0, 4.0, 4.0, 8.0]
    assert [played.first_token_s for played in found.played] == [0.0] * 5
    assert found.makespan_s == 12.0


def test_a_context_that_fails_is_counted_and_the_others_go_on(replay, run, fake_sdk, crawl):
    client = fake_sdk()
    client.errors = {
        (0, "open"): Saturated("full"),
        (1, "append"): InvalidRequest("no"),
        (2, "close"): Saturated("full"),
    }
    events = [event for name in "abcd" for event in crawl(name)]
    found = run(replay.replay(client, events, replay.Way.STREAMED))
    assert found.failures == {"saturated": 2, "invalid_request": 1}
    assert [played.failure for played in found.played] == ["saturated", "invalid_request", "saturated", None]
    assert [played.first_token_s for played in found.played] == [None, None, None, 0.0]
    assert client.num_open == 0


def test_a_context_without_an_answer_ends_after_its_time(replay, run, fake_sdk, crawl):
    client = fake_sdk(byte_s=1.0)
    found = run(replay.replay(client, crawl(), replay.Way.STREAMED, replay.Pace(answer_s=30.0)))
    assert found.failures == {replay.TIMEOUT: 1}
    assert found.makespan_s == 34.0
    assert client.operations(0)[-1] == "left"


def test_another_failure_than_headrace_s_ends_the_replay(replay, run, fake_sdk, crawl):
    client = fake_sdk()
    client.errors = {(0, "append"): ZeroDivisionError()}
    with pytest.raises(ExceptionGroup) as caught:
        run(replay.replay(client, [*crawl("a"), *crawl("b")], replay.Way.STREAMED))
    assert caught.group_contains(ZeroDivisionError)
    assert client.num_open == 0


def test_an_abandoned_context_is_no_failure(replay, contexts, run, fake_sdk, crawl):
    events = (*crawl()[:2], contexts.Abandon(at_s=2.0, context="a"))
    client = fake_sdk()
    (played,) = run(replay.replay(client, events, replay.Way.STREAMED)).played
    assert (played.failure, played.first_token_s) == (None, None)
    assert client.operations(0) == ["open", "append", "abandon"]


@pytest.mark.parametrize(("way", "operations"), [("streamed", ["open", "append", "left"]), ("waited", [])])
def test_a_context_that_was_cut_off_is_left_or_never_sent(replay, run, fake_sdk, crawl, way, operations):
    client = fake_sdk()
    found = run(replay.replay(client, crawl()[:2], replay.Way(way)))
    assert found.failures == {}
    assert client.operations(0) == operations


def test_bytes_are_streamed_as_they_were_cut_and_waited_whole(replay, contexts, run, fake_sdk, crawl):
    opening, *_, close = crawl()
    cut = [contexts.Append(at_s=1.0, context="a", text=contexts.Bytes(part)) for part in (b"\xc3", b"\xa9")]
    streamed, waited = fake_sdk(), fake_sdk()
    run(replay.replay(streamed, (opening, *cut, close), replay.Way.STREAMED))
    run(replay.replay(waited, (opening, *cut, close), replay.Way.WAITED))
    assert [call[3] for call in streamed.calls if call[2] == "append"] == [b"\xc3", b"\xa9"]
    assert [call[3] for call in waited.calls if call[2] == "append"] == ["é"]


@pytest.mark.parametrize("way", ["streamed", "waited"])
def test_a_text_that_is_not_known_is_refused_before_anything_is_sent(replay, contexts, run, fake_sdk, crawl, way):
    opening, *_, close = crawl()
    unknown = contexts.Append(at_s=1.0, context="a", text=contexts.Tokens(9))
    client = fake_sdk()
    with pytest.raises(ValueError, match="filled"):
        run(replay.replay(client, (opening, unknown, close), replay.Way(way)))
    assert client.calls == []


def test_an_empty_trace_takes_no_time(replay, run, fake_sdk):
    found = run(replay.replay(fake_sdk(), (), replay.Way.STREAMED))
    assert (found.played, found.makespan_s, found.failures, found.output_tokens) == ((), 0.0, {}, 0)


def test_a_replay_that_is_recorded_gives_the_trace_again(
    replay, contexts, traces, run, fake_sdk, crawl, search, tmp_path
):
    recorder, file = traces("recorder"), io.BytesIO()
    events = contexts.in_order((*crawl("1"), *(type(event)(**fields(event, context="2")) for event in search)))

    async def record():
        client = recorder.Recorder(fake_sdk(), recorder.writer(file), asyncio.get_running_loop().time)
        await replay.replay(client, events, replay.Way.STREAMED)

    run(record())
    (tmp_path / "trace").write_bytes(file.getvalue())
    assert contexts.by_context(contexts.read(tmp_path / "trace")) == contexts.by_context(events)


def fields(event, **others):
    return {name: getattr(event, name) for name in event.__struct_fields__} | others


def test_streaming_is_told_as_the_ratio_of_the_times(replay, run, fake_sdk, crawl):
    streamed, waited = (
        run(replay.replay(fake_sdk(byte_s=0.01), crawl(), way)) for way in (replay.Way.STREAMED, replay.Way.WAITED)
    )
    ratios = replay.ratios(waited, streamed)
    assert ratios["first token p50"] == pytest.approx(2.1 / 1.1)
    assert ratios["makespan"] == pytest.approx(6.1 / 5.1)
    assert ratios["same answers"] == 1.0
    assert "first token after p50 1.100 s" in replay.summary(streamed)


def test_a_context_that_failed_in_one_way_is_in_no_ratio(replay, run, fake_sdk, crawl):
    events = [event for name, begin_s in (("a", 0.0), ("b", 50.0)) for event in crawl(name, begin_s)]
    streamed_by, waited_by = fake_sdk(byte_s=0.01), fake_sdk(byte_s=0.01)
    streamed_by.errors = {(1, "append"): Saturated("full")}
    streamed = run(replay.replay(streamed_by, events, replay.Way.STREAMED))
    waited = run(replay.replay(waited_by, events, replay.Way.WAITED))
    ratios = replay.ratios(waited, streamed)
    assert ratios["first token p95"] == pytest.approx(2.1 / 1.1)
    assert ratios["makespan"] == pytest.approx(6.1 / 5.1)
    assert ratios["same answers"] == 1.0
    assert replay.left_out(waited, streamed) == "left out of the ratios: 1 contexts; 0 failed waited, 1 streamed"
    assert replay.left_out(waited, waited) == ""


def test_without_an_answer_in_both_ways_there_are_no_ratios(replay, run, fake_sdk, crawl):
    client = fake_sdk()
    client.errors = {(0, "close"): Saturated("full")}
    streamed = run(replay.replay(client, crawl(), replay.Way.STREAMED))
    waited = run(replay.replay(fake_sdk(), crawl(), replay.Way.WAITED))
    assert replay.ratios(waited, streamed) == {}


@pytest.fixture
def play(replay, contexts, fake_sdk, crawl, script, monkeypatch, tmp_path):
    """Return a function that runs the script over one context with a fake, some calls of which fail."""

    def played(**errors):
        client = fake_sdk(byte_s=0.0001)
        client.errors = {(int(number), "append"): Saturated("full") for number in errors.get("fail", ())}

        class Client:
            def __init__(self, *_, **__):
                self.context = client.context

            async def __aenter__(self):
                return self

            async def __aexit__(self, *_):
                pass

        monkeypatch.setattr(replay, "AsyncClient", Client)
        contexts.write(tmp_path / "trace", crawl())
        return script(replay, tmp_path / "trace", "--rounds", "2", "--scale", "0.001")

    return played


def test_the_script_ends_well_if_nothing_failed(play):
    code, written = play()
    assert code == 0
    assert "in 2 rounds)" in written


@pytest.mark.parametrize(("fail", "reason"), [((0,), "in 1 rounds)"), ((0, 1, 2, 3), "no ratios")])
def test_the_script_says_what_failed_and_ends_with_1(play, fail, reason):
    code, written = play(fail=fail)
    assert code == 1
    assert "left out of the ratios: 1 contexts" in written
    assert reason in written


@pytest.mark.parametrize(
    "arguments", [("--scale", "0"), ("--scale", "inf"), ("--scale", "nan"), ("--rounds", "0"), ("--most-contexts", "0")]
)
def test_arguments_that_mean_nothing_are_refused(replay, script, tmp_path, arguments):
    code, written = script(replay, tmp_path / "trace", *arguments)
    assert code == 2
    assert f"argument {arguments[0]}: not a" in written


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "the trace is empty"), (b"no\n", "trace:1: "), (None, "be read")]
)
def test_a_file_that_is_nothing_to_play_is_refused(replay, script, tmp_path, content, reason):
    if content is not None:
        (tmp_path / "trace").write_bytes(content)
    code, written = script(replay, tmp_path / "trace")
    assert code == 2
    assert reason in written
