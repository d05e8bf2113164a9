import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.text.stop import StopMatcher

SMALL = st.text(alphabet="ab🙂中", max_size=40)
STOPS = st.lists(st.text(alphabet="ab🙂中", min_size=1, max_size=5), max_size=4)


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[left:right] for left, right in zip(edges, edges[1:], strict=False)]


def first_stop(text: str, stops: list[str]) -> int | None:
    """Return where the text ends when it is cut at the first stop to be completed."""
    for end in range(1, len(text) + 1):
        done = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if done:
            return end - max(done)
    return None


def play(stops: list[str], pushes: list[str]) -> tuple[str, bool, list[str]]:
    matcher = StopMatcher(stops)
    shown, pieces = "", []
    for push in pushes:
        text, is_matched = matcher.push(push)
        shown += text
        pieces.append(text)
        if is_matched:
            return shown, True, pieces
    return shown + matcher.flush(), False, pieces


@given(text=SMALL, stops=STOPS, places=st.lists(st.integers(0, 1000), max_size=10))
def test_any_cut_shows_exactly_the_text_before_the_first_stop(text, stops, places):
    shown, is_matched, _ = play(stops, cut(text, places))
    end = first_stop(text, stops)
    assert is_matched == (end is not None)
    assert shown == (text if end is None else text[:end])


@given(text=SMALL, stops=STOPS)
def test_only_a_beginning_of_a_stop_is_held_back(text, stops):
    matcher = StopMatcher(stops)
    num_shown = 0
    for index, character in enumerate(text):
        piece, is_matched = matcher.push(character)
        if is_matched:
            return
        num_shown += len(piece)
        held = text[num_shown : index + 1]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_a_stop_split_over_pushes_never_leaks():
    assert play(["<end>"], ["one <", "en", "d", "> two"]) == ("one ", True, ["one ", "", "", ""])


def test_a_held_prefix_comes_out_when_it_is_broken():
    assert play(["<end>"], ["a<en", "x"])[2] == ["a", "<enx"]


def test_a_stop_that_repeats_itself_is_found_after_a_false_start():
    assert play(["aab"], ["a", "a", "a", "b"])[0] == "a"
    assert play(["abcabd"], ["abcabcabd"])[0] == "abc"


def test_the_longest_of_stops_that_end_together_is_taken():
    assert play(["b", "ab"], ["xab"])[0] == "x"


def test_nothing_comes_out_after_a_match():
    matcher = StopMatcher(["."])
    assert matcher.push("a.b") == ("a", True)
    assert matcher.push("c") == ("", True)
    assert matcher.flush() == ""


def test_without_stops_all_text_passes_at_once():
    assert StopMatcher([]).push("abc") == ("abc", False)


def test_an_empty_stop_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])
