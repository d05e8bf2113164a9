import itertools

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.block import root_hash
from headrace.index.vllm_blocks import ForeignBlocks
from headrace.index.vllm_subscriber import ResetReason, VllmFeed

MAX_BLOCKS = 4
VALUES = st.none() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=3) | st.binary(max_size=70)
HASHES = st.lists(st.integers(0, 3) | st.binary(max_size=1) | VALUES, max_size=4)
TOKENS = st.lists(st.integers(0, 9), max_size=12) | st.lists(VALUES, max_size=4) | VALUES
STORED = st.tuples(
    st.just("BlockStored"), HASHES, st.none() | st.integers(0, 3), TOKENS, st.integers(-1, 5) | VALUES, VALUES
)
REMOVED = st.tuples(st.just("BlockRemoved"), HASHES, st.sampled_from([None, "GPU", "TAPE"]))
CLEARED = st.tuples(st.just("AllBlocksCleared"))
BATCHES = st.lists(STORED | REMOVED | CLEARED | VALUES, max_size=6).map(
    lambda events: msgspec.msgpack.encode([1.0, events])
)


def feed_of(events):
    epochs = map(str, itertools.count())
    return VllmFeed("pod", ForeignBlocks(root_hash("m"), 2, MAX_BLOCKS), lambda: next(epochs), events.append)


@settings(deadline=None)
@given(st.lists(BATCHES | st.binary(max_size=60), max_size=6))
def test_whatever_an_engine_says_its_events_stay_in_order_and_its_map_bounded(payloads):
    events, blocks = [], ForeignBlocks(root_hash("m"), 2, MAX_BLOCKS)
    epochs = map(str, itertools.count())
    feed = VllmFeed("pod", blocks, lambda: next(epochs), events.append)
    feed.reset(ResetReason.CONNECTED)
    for number, payload in enumerate(payloads):
        feed.take(number, payload)
        assert len(blocks) <= MAX_BLOCKS
    assert feed.counts.num_batches == len(payloads)
    for before, after in itertools.pairwise(events):
        is_next = after.epoch == before.epoch and after.sequence == before.sequence + 1
        assert is_next or (int(after.epoch) == int(before.epoch) + 1 and after.sequence == 0 and not after.changes)


def test_an_unreadable_batch_is_counted_and_moves_the_sequence_on():
    feed = feed_of([])
    feed.take(7, b"\xff")
    assert (feed.expected, feed.counts.num_malformed, feed.counts.num_batches) == (8, 1, 1)


def test_what_was_said_before_a_clear_in_the_same_batch_is_void():
    events = []
    stored = ["BlockStored", [1], None, [1, 2], 2]
    feed_of(events).take(0, msgspec.msgpack.encode([1.0, [stored, ["AllBlocksCleared"]]]))
    assert [(event.epoch, event.sequence, event.changes) for event in events] == [("0", 0, ()), ("1", 0, ())]


def test_the_first_batch_begins_an_epoch():
    events = []
    feed_of(events).take(5, msgspec.msgpack.encode([1.0, [["BlockStored", [1], None, [1, 2], 2]]]))
    assert [(event.epoch, event.sequence, len(event.changes)) for event in events] == [("0", 0, 0), ("0", 1, 1)]


def test_a_reset_forgets_blocks_and_where_counting_stands():
    events = []
    feed = feed_of(events)
    child = ["BlockStored", [2], 1, [3, 4], 2]
    feed.take(3, msgspec.msgpack.encode([1.0, [["BlockStored", [1], None, [1, 2], 2]]]))
    feed.reset(ResetReason.GAP)
    assert feed.expected is None
    feed.take(9, msgspec.msgpack.encode([1.0, [child]]))
    assert events[-1].changes == ()
    assert feed.counts.resets == {ResetReason.GAP: 1}
