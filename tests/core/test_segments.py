"""Segments lie at fixed places of a chain, and stores share them evenly and keep them."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.block import BlockHash, block_hashes, root_hash
from headrace.core.segments import SEGMENT_BLOCKS, Segment, segments, store_of, stores_by_preference
from headrace.errors import NotReady

CHAIN = block_hashes(root_hash("model"), range(1000), 1)
KEYS = block_hashes(root_hash("other"), range(4000), 1)
PINNED = ["kv-1", "kv-1", "kv-0", "kv-3", "kv-2", "kv-0"]
STORES = ("kv-0", "kv-1", "kv-2", "kv-3")


def test_a_segment_starts_at_a_multiple_of_its_size_in_the_chain():
    assert segments(CHAIN[:130]) == (
        *(
            Segment(start=start, end=min(start + SEGMENT_BLOCKS, 130), key=CHAIN[start])
            for start in range(0, 130, SEGMENT_BLOCKS)
        ),
    )


def test_a_range_amid_a_segment_has_the_key_of_the_whole_segment():
    assert segments(CHAIN, 70, end_index=75) == (Segment(start=70, end=75, key=CHAIN[64]),)


@given(first=st.integers(0, 300), length=st.integers(0, 300), size=st.integers(1, 80))
def test_a_range_has_the_same_keys_wherever_it_is_cut(first, length, size):
    def key_of_each(start, end):
        found = segments(CHAIN, start, size, end_index=end)
        return {place: segment.key for segment in found for place in range(segment.start, segment.end)}

    end, amid = first + length, first + length // 3
    whole = key_of_each(first, end)
    assert sorted(whole) == list(range(first, end))
    assert key_of_each(first, amid) | key_of_each(amid, end) == whole


def test_a_range_behind_the_chain_has_no_segments():
    assert segments(CHAIN[:10], 10) == ()
    assert segments((), 0) == ()


def test_stores_share_segments_evenly():
    counts = Counter(store_of(key, STORES) for key in KEYS)
    assert set(counts) == set(STORES)
    # 1,000 each are expected, with a deviation of 27.
    assert all(860 < count < 1140 for count in counts.values())


def test_a_store_that_leaves_moves_only_its_own_segments_to_all_others():
    left = STORES[:-1]
    moved = Counter()
    for key in KEYS:
        before, after = store_of(key, STORES), store_of(key, left)
        if before != STORES[-1]:
            assert after == before
        else:
            moved[after] += 1
    assert set(moved) == set(left)
    assert max(moved.values()) < 1.5 * min(moved.values())


def test_a_store_that_joins_takes_its_share_and_moves_nothing_else():
    taken = 0
    for key in KEYS:
        before, after = store_of(key, STORES), store_of(key, (*STORES, "kv-4"))
        assert after in (before, "kv-4")
        taken += after == "kv-4"
    assert 680 < taken < 920


@given(st.permutations(STORES), st.sampled_from(KEYS))
def test_who_keeps_a_segment_depends_on_names_alone(stores, key):
    assert store_of(key, stores) == store_of(key, STORES)
    assert stores_by_preference(key, stores) == stores_by_preference(key, STORES)


@given(st.sampled_from(KEYS))
def test_the_next_in_preference_keeps_it_when_all_before_are_gone(key):
    order = stores_by_preference(key, STORES)
    assert sorted(order) == sorted(STORES)
    for gone in range(len(order)):
        assert store_of(key, order[gone:]) == order[gone]


def test_the_choice_is_the_same_in_every_release():
    assert [store_of(BlockHash(bytes([place]) * 16), STORES) for place in range(6)] == PINNED


def test_without_a_store_nothing_can_be_placed():
    with pytest.raises(NotReady):
        store_of(KEYS[0], ())
    assert stores_by_preference(KEYS[0], ()) == ()
