"""Traces of contexts: the file keeps every event, and nothing else is a trace."""

import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.ingestor.segments import MAX_ID_CHARS

ROOT = Path(__file__).resolve().parents[2]
OPEN = '{"op":"open","at_s":0.0,"context":"a","mode":"update"}'
SECONDS = st.floats(0, 604_800)
NAMES = st.text(min_size=1, max_size=4)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(1, 9) | st.none(),
        "temperature": st.floats(0, 2),
        "seed": st.integers(0, 2**63 - 1),
        "stop": st.text() | st.lists(st.text()),
        "logit_bias": st.dictionaries(st.integers(0, 99), st.floats(-9, 9)),
        "cache_scope": st.sampled_from(["tenant", "public"]),
    },
)


@pytest.fixture(scope="module")
def contexts(traces):
    return traces("contexts")


@pytest.fixture
def read(contexts, tmp_path):
    def lines(*found):
        (tmp_path / "trace.jsonl").write_text("".join(f"{line}\n" for line in found))
        return contexts.read(tmp_path / "trace.jsonl")

    return lines


@st.composite
def scripts(draw, contexts, name):
    """Draw the events of one context, some of which do not end."""
    texts = st.text() | st.binary(max_size=5).map(contexts.Bytes) | st.integers(0, 99).map(contexts.Tokens)
    times = iter(sorted(draw(st.lists(SECONDS, min_size=6, max_size=6))))
    mode = draw(st.sampled_from(["append", "update"]))
    before = draw(st.sampled_from([{"prefix": "p\u2028"}, {"chat": ({"role": "user", "content": "\r\n"},)}, {}]))
    events = [contexts.Open(at_s=next(times), context=name, mode=mode, options=draw(OPTIONS), **before)]
    names = []
    for number in range(draw(st.integers(0, 3))):
        kinds = ["append", "checkpoint", *(["update"] if mode == "update" else []), *(["replace"] if names else [])]
        at = {"at_s": next(times), "context": name}
        kind = draw(st.sampled_from(kinds))
        if kind == "checkpoint":
            events.append(contexts.Checkpoint(**at))
        elif kind == "append":
            events.append(contexts.Append(text=draw(texts), segment=f"new-{number}", **at))
        else:
            drawn = draw(st.lists(NAMES, max_size=3, unique=True))
            segments = tuple(contexts.Segment(one, draw(texts)) for one in drawn)
            replaced = {"from_segment": names[0]} if kind == "replace" else {}
            events.append((contexts.Replace if replaced else contexts.Update)(segments=segments, **replaced, **at))
            names = drawn
    return events if draw(st.booleans()) else [*events, contexts.Abandon(at_s=next(times), context=name)]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_file_gives_back_what_was_written(contexts, data):
    found = [event for name in "abc" for event in data.draw(scripts(contexts, name))]
    with tempfile.TemporaryDirectory() as folder:
        contexts.write(Path(folder) / "trace", found)
        assert contexts.read(Path(folder) / "trace") == contexts.in_order(found)


def test_an_empty_file_is_an_empty_trace(read):
    assert read() == ()


def test_lines_of_different_contexts_stand_in_any_order(read):
    events = read(
        '{"op":"open","at_s":2,"context":"a","mode":"append"}',
        '{"op":"open","at_s":1,"context":"b","mode":"append"}',
        '{"op":"close","at_s":3,"context":"a"}',
    )
    assert [(event.at_s, event.context) for event in events] == [(1, "b"), (2, "a"), (3, "a")]


def test_the_example_of_the_readme_is_a_trace(contexts, read):
    readme = (ROOT / "loadtest" / "traces" / "README.md").read_text()
    lines = re.search(r"```jsonl\n(.*?)```", readme, re.DOTALL).group(1).splitlines()
    events = read(*lines)
    assert {type(event) for event in events} == set(contexts.Event.__args__)
    assert [contexts.line_of(event).decode() for event in events] == lines


@pytest.mark.parametrize(
    "line",
    [
        "",
        "nonsense",
        "[]",
        '{"op":"sing","at_s":1,"context":"a"}',
        '{"at_s":1,"context":"a"}',
        '{"op":"close","context":"a"}',
        '{"op":"close","at_s":1}',
        '{"op":"close","at_s":-1,"context":"a"}',
        '{"op":"close","at_s":1e999,"context":"a"}',
        '{"op":"close","at_s":null,"context":"a"}',
        '{"op":"close","at_s":1,"context":"a","answer":"no"}',
        '{"op":"append","at_s":1,"context":"a"}',
        '{"op":"append","at_s":1,"context":"a","text":7}',
        '{"op":"append","at_s":1,"context":"a","text":{"kind":"song"}}',
        '{"op":"append","at_s":1,"context":"a","text":{"kind":"tokens","number":-1}}',
        '{"op":"append","at_s":1,"context":"a","text":{"kind":"bytes","utf8":"*"}}',
        '{"op":"update","at_s":1,"context":"a","segments":[{"segment":"b"}]}',
        '{"op":"open","at_s":1,"context":"b","mode":"other"}',
        '{"op":"open","at_s":1,"context":"b","mode":"append","prefix":"p","chat":[]}',
        '{"op":"open","at_s":1,"context":"b","mode":"append","options":{"max_token":1}}',
        '{"op":"open","at_s":1,"context":"b","mode":"append","options":{"max_tokens":"1"}}',
        '{"op":"open","at_s":1,"context":"b","mode":"append","options":{"max_tokens":0}}',
        '{"op":"open","at_s":1,"context":"b","mode":"append","options":{"seed":1,"seed":2}}',
        '{"op":"open","at_s":1,"context":"b","mode":"append","chat":[{"role":"user","content":"","name":"n"}]}',
        '{"op":"open","at_s":1,"context":"","mode":"append"}',
        '{"op":"close","at_s":1,"at_s":2,"context":"a"}',
        '{"op":"close","at_s":604801,"context":"a"}',
        '{"op":"close","at_s":1,"context":"a","query":' + "[" * 100_000,
        '{"op":"append","at_s":1,"context":"a","text":{"kind":"tokens","number":1000001}}',
        '{"op":"update","at_s":1,"context":"a","segments":[{"segment":"b","segment":"c","text":""}]}',
    ],
)
def test_a_line_that_is_no_event_is_named(contexts, read, line):
    with pytest.raises(contexts.TraceError, match=r"trace\.jsonl:2: ") as caught:
        read(OPEN, line)
    assert caught.value.line == 2


@pytest.mark.parametrize(
    ("reason", "lines"),
    [
        ("not open yet", ['{"op":"close","at_s":1,"context":"b"}']),
        ("is open", [OPEN]),
        ("has ended", ['{"op":"close","at_s":1,"context":"a"}', '{"op":"abandon","at_s":2,"context":"a"}']),
        ("back in time", ['{"op":"checkpoint","at_s":2,"context":"a"}', '{"op":"close","at_s":1,"context":"a"}']),
        ("no segment 'x'", ['{"op":"replace","at_s":1,"context":"a","from_segment":"x","segments":[]}']),
        ("no name", ['{"op":"append","at_s":1,"context":"a","text":"t","segment":""}']),
        ("129 characters", [f'{{"op":"append","at_s":1,"context":"a","text":"t","segment":"{"x" * 129}"}}']),
        ("no name", ['{"op":"update","at_s":1,"context":"a","segments":[{"segment":"","text":""}]}']),
        (
            "there already",
            [
                '{"op":"update","at_s":1,"context":"a","segments":[{"segment":"x","text":""},{"segment":"x","text":""}]}',
            ],
        ),
        (
            "there already",
            [
                '{"op":"append","at_s":1,"context":"a","text":"t","segment":"x"}',
                '{"op":"append","at_s":1,"context":"a","text":"t","segment":"y"}',
                '{"op":"append","at_s":1,"context":"a","text":"t","segment":"x"}',
            ],
        ),
        (
            "unexpected end",
            [
                '{"op":"append","at_s":1,"context":"a","text":{"kind":"bytes","utf8":"ww=="}}',
                '{"op":"close","at_s":1,"context":"a"}',
            ],
        ),
        (
            "invalid continuation",
            [
                '{"op":"append","at_s":1,"context":"a","text":{"kind":"bytes","utf8":"ww=="}}',
                '{"op":"append","at_s":1,"context":"a","text":{"kind":"tokens","number":9}}',
                '{"op":"close","at_s":1,"context":"a"}',
            ],
        ),
        (
            "update mode only",
            [
                '{"op":"open","at_s":1,"context":"b","mode":"append"}',
                '{"op":"update","at_s":1,"context":"b","segments":[]}',
            ],
        ),
    ],
)
def test_a_line_that_cannot_follow_those_before_it_is_named(contexts, read, reason, lines):
    with pytest.raises(contexts.TraceError, match=reason) as caught:
        read(OPEN, *lines)
    assert caught.value.line == 1 + len(lines)


def test_segments_are_what_their_events_left(contexts, read):
    events = read(
        OPEN,
        '{"op":"append","at_s":1,"context":"a","text":"one "}',
        '{"op":"append","at_s":1,"context":"a","text":{"kind":"bytes","utf8":"ww=="}}',
        '{"op":"append","at_s":1,"context":"a","text":{"kind":"bytes","utf8":"qQ=="}}',
        '{"op":"append","at_s":1,"context":"a","text":"two","segment":"x"}',
        '{"op":"append","at_s":1,"context":"a","text":"three","segment":"y"}',
        '{"op":"replace","at_s":1,"context":"a","from_segment":"x","segments":[{"segment":"y","text":"four"}]}',
    )
    contents = contexts.Contents()
    for event in events:
        contents.apply(event)
    assert contents.segments() == (("0", "one é"), ("y", "four"))
    contents.apply(contexts.Update(at_s=2, context="a", segments=(contexts.Segment("z", "all"),)))
    assert contents.segments() == (("z", "all"),)


def test_a_text_of_which_only_the_length_is_known_has_no_segments(contexts):
    contents = contexts.Contents()
    contents.apply(contexts.Open(at_s=0, context="a", mode="append"))
    contents.apply(contexts.Append(at_s=0, context="a", text=contexts.Tokens(3)))
    with pytest.raises(ValueError, match="3 tokens"):
        contents.segments()
    contents.apply(contexts.Close(at_s=0, context="a"))


def test_a_segment_s_name_is_as_long_as_the_ingestor_takes_it(contexts):
    assert contexts.MOST_NAME_CHARACTERS == MAX_ID_CHARS


def test_a_file_that_cannot_be_read_is_named(contexts, tmp_path):
    with pytest.raises(contexts.TraceError, match=r"missing: cannot be read"):
        contexts.read(tmp_path / "missing")


@pytest.mark.parametrize("at_s", [-1.0, float("nan"), float("inf"), 604_801.0])
def test_an_event_has_a_time(contexts, at_s):
    with pytest.raises(ValueError, match="time"):
        contexts.Close(at_s=at_s, context="a")
