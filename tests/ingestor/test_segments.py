"""Segments in order, bytes into characters; what is refused changes nothing."""

import codecs
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.context import Append, Replace, Segment
from headrace.errors import InvalidRequest
from headrace.ingestor.segments import SegmentedText

EMPTY = SegmentedText()


def appended(text, segment="", to=EMPTY):
    return to.append(Append(segment_id=segment, text=text))


def replaced(to, start, *segments):
    new = tuple(Segment(segment_id=name, text=text) for name, text in segments)
    return to.replace(Replace(from_segment_id=start, segments=new))


@pytest.fixture
def three():
    return replaced(EMPTY, None, ("a", b"one "), ("b", b"two "), ("c", b"three "))


@given(st.text(max_size=20), st.lists(st.integers(0, 80), max_size=8))
def test_a_text_that_is_cut_anywhere_is_the_same_text(text, places):
    raw, whole = text.encode(), EMPTY
    cuts = sorted({0, len(raw), *(place for place in places if place < len(raw))})
    for start, end in itertools.pairwise(cuts):
        whole = appended(raw[start:end], to=whole)
    assert whole.whole() == text


@given(st.binary(max_size=6))
def test_bytes_are_refused_as_soon_as_nothing_can_make_them_characters(raw):
    ends = [bytes(each) for size in range(4) for each in itertools.product((0x80, 0x9F, 0xA0, 0xBF), repeat=size)]

    def is_text(found):
        try:
            found.decode()
        except UnicodeDecodeError:
            return False
        return True

    if not any(is_text(raw + end) for end in ends):
        with pytest.raises(InvalidRequest, match="is not UTF-8"):
            appended(raw)
    else:
        found = appended(raw)
        assert found.text == codecs.decode(raw[: len(raw) - len(found.rest)])


def test_the_first_text_has_a_segment_of_its_own():
    assert appended(b"x").ids == ("0",)


def test_text_without_a_segment_is_of_the_last_one(three):
    assert appended(b"more", to=three).ids == three.ids


def test_a_new_segment_stands_behind_the_others(three):
    found = appended(b"four ", "d", to=three)
    assert (found.ids, found.text) == (("a", "b", "c", "d"), "one two three four ")
    assert replaced(found, "d").text == three.text


def test_a_segment_that_is_not_the_last_cannot_be_appended_to(three):
    with pytest.raises(InvalidRequest, match="there already") as caught:
        appended(b"x", "a", to=three)
    assert caught.value.field == "append.segment_id"


def test_a_name_is_not_long(three):
    with pytest.raises(InvalidRequest, match="128 characters"):
        appended(b"x", "n" * 129, to=three)


def test_a_segment_does_not_begin_inside_a_character(three):
    cut = appended("é".encode()[:1], to=three)
    with pytest.raises(InvalidRequest, match="'c' ends inside a character"):
        appended(b"x", "d", to=cut)
    assert appended("é".encode()[1:], to=cut).text == "one two three é"


def test_a_context_does_not_end_inside_a_character(three):
    with pytest.raises(InvalidRequest, match="inside a character"):
        appended("é".encode()[:1], to=three).whole()


def test_segments_are_replaced_from_one_on(three):
    found = replaced(three, "b", ("x", b"four "), ("c", b"five "))
    assert (found.ids, found.text) == (("a", "x", "c"), "one four five ")


def test_all_segments_are_replaced(three):
    assert replaced(three, None, ("b", b"two ")) == replaced(EMPTY, None, ("b", b"two "))
    assert replaced(three, None) == EMPTY


def test_replacing_drops_the_beginning_of_a_character(three):
    cut = appended("é".encode()[:1], to=three)
    assert replaced(cut, "c").whole() == "one two "


def test_empty_segments_keep_their_places(three):
    found = replaced(three, "b", ("x", b""), ("y", b""), ("z", b"end"))
    assert replaced(found, "y", ("w", b"!")).text == "one !"


@pytest.mark.parametrize(
    ("start", "segments", "field"),
    [
        ("d", [], "replace.from_segment_id"),
        ("", [], "replace.from_segment_id"),
        ("b", [("a", b"x")], "segments[0].id"),
        ("b", [("x", b"x"), ("x", b"x")], "segments[1].id"),
        (None, [("", b"x")], "segments[0].id"),
        (None, [("x" * 129, b"x")], "segments[0].id"),
        (None, [("x", b"x"), ("y", b"\xff")], "segments[1].text"),
        (None, [("x", "é".encode()[:1])], "segments[0].text"),
    ],
    ids=["unknown", "unnamed", "kept", "twice", "empty", "long", "no UTF-8", "half a character"],
)
def test_segments_that_make_no_sense_are_refused_by_their_place(three, start, segments, field):
    with pytest.raises(InvalidRequest) as caught:
        replaced(three, start, *segments)
    assert caught.value.field == field
