"""What was said of an earlier version of a prompt holds for the tokens that every later version kept."""

from hypothesis import given
from hypothesis import strategies as st

from headrace.core.kept_since import NUM_REMEMBERED, KeptSince


@st.composite
def histories(draw):
    """Versions of a prompt as lists, no two of whose tokens are equal, and what each kept of the one before."""
    versions, kept = [list(range(draw(st.integers(0, 20))))], []
    fresh = 1000
    for _ in range(draw(st.integers(0, 12))):
        num_kept = draw(st.integers(0, len(versions[-1])))
        num_new = draw(st.integers(0, 10))
        versions.append(versions[-1][:num_kept] + list(range(fresh, fresh + num_new)))
        kept.append(num_kept)
        fresh += num_new
    return versions, kept


@given(histories(), st.data())
def test_of_what_was_said_the_tokens_that_are_still_in_place_hold(history, data):
    versions, kept = history
    since = KeptSince()
    for num_kept in kept:
        since.revise(num_kept)
    version = data.draw(st.integers(0, len(kept)))
    num_said = data.draw(st.integers(0, len(versions[version])))
    said = versions[version][:num_said]
    in_place = [old for old, new in zip(said, versions[-1], strict=False) if old == new]
    assert since.still(version, num_said) == len(in_place)


def test_versions_are_counted_from_the_one_given():
    since = KeptSince(version=7)
    since.revise(5)
    assert since.version == 8
    assert (since.still(8, 9), since.still(7, 9)) == (9, 5)


def test_of_versions_before_the_first_and_after_the_last_nothing_is_known():
    since = KeptSince(version=7)
    since.revise(5)
    assert (since.still(6, 9), since.still(9, 9)) == (0, 0)


def test_of_versions_too_far_back_nothing_is_known():
    since = KeptSince()
    for _ in range(NUM_REMEMBERED + 1):
        since.revise(5)
    assert (since.still(1, 9), since.still(0, 9)) == (5, 0)
