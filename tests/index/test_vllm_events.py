import struct
import tracemalloc

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import InvalidRequest
from headrace.index.vllm_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventForm,
    decode_batch,
    encode_batch,
)

STORED = BlockStored([1, b"x" * 32], None, [7, 8], 1, medium="GPU")
TIME = b"\xcb" + struct.pack(">d", 1.0)


def batch_of(*events):
    return msgspec.msgpack.encode([1.0, events])


def hashes_of(payload):
    batch = decode_batch(payload)
    return [event.block_hashes for event in batch.events], batch.num_malformed


@pytest.mark.parametrize("form", list(EventForm))
def test_what_is_written_is_read_again(form):
    payload = encode_batch(1.0, [STORED, BlockRemoved([3], "CPU"), AllBlocksCleared()], 2, form)
    stored, removed, cleared = decode_batch(payload).events
    assert (stored.block_hashes, stored.token_ids, stored.medium) == ([1, b"x" * 32], [7, 8], "GPU")
    assert (removed.block_hashes, removed.medium) == ([3], "CPU")
    assert isinstance(cleared, AllBlocksCleared)


@pytest.mark.parametrize("trailing", [(), (None,), (None, "GPU"), (None, "GPU", None, [None], 0, "full_attention")])
def test_every_age_of_the_array_form_is_read(trailing):
    assert hashes_of(batch_of(["BlockStored", [5], None, [1], 1, *trailing])) == ([[5]], 0)


def test_fields_that_are_not_known_yet_are_passed_over():
    by_place = ["BlockRemoved", [5], "GPU", 0, "LOCAL", {"new": [1]}, "newer"]
    by_name = {"type": "BlockRemoved", "block_hashes": [6], "medium": "GPU", "new": {"deep": [1]}}
    assert hashes_of(batch_of(by_place, by_name)) == ([[5], [6]], 0)


def test_a_batch_by_name_is_read():
    assert hashes_of(msgspec.msgpack.encode({"ts": 1.0, "events": [["BlockRemoved", [5]]]})) == ([[5]], 0)


@pytest.mark.parametrize(
    "broken",
    [
        5,
        [],
        {},
        ["Unheard"],
        {"type": "Unheard"},
        ["BlockRemoved"],
        ["BlockRemoved", "text"],
        ["BlockRemoved", [1.5]],
        ["BlockRemoved", [b"x" * 65]],
        ["BlockStored", [1], None, [-1], 1],
        ["BlockStored", [1], None, [2**32], 1],
        ["BlockStored", [1], None, [1], "16"],
    ],
)
def test_a_broken_event_is_counted_and_its_neighbours_are_read(broken):
    good = ["BlockRemoved", [5]]
    assert hashes_of(batch_of(good, broken, good)) == ([[5], [5]], 1)


@pytest.mark.parametrize(
    "extra",
    [
        {"lora_id": 1},
        {"lora_name": "adapter"},
        {"extra_keys": [["salt"]]},
        {"extra_keys": [None, ["salt"]]},
        {"cache_salt": "tenant"},
    ],
)
def test_blocks_that_more_than_tokens_name_are_not_plain(extra):
    event = {"type": "BlockStored", "block_hashes": [1], "parent_block_hash": None, "token_ids": [1], "block_size": 1}
    plain, salted = decode_batch(batch_of(event | {"extra_keys": [None]}, event | extra)).events
    assert plain.is_plain
    assert not salted.is_plain


HUGE = struct.pack(">I", 0x3FFFFFFF)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xdd" + HUGE,
        b"\xdf" + HUGE,
        b"\xc6" + HUGE,
        b"\x92" + TIME + b"\xdd" + HUGE,
        b"\x92" + TIME + b"\x91" * 1_000_000,
        b"\x91" * 1_000_000,
    ],
)
def test_a_lying_length_or_deep_nesting_is_refused_without_memory(payload):
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest):
            decode_batch(payload)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_batch_or_refused(payload):
    try:
        decode_batch(payload)
    except InvalidRequest:
        pass


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
TAGS = st.sampled_from(["BlockStored", "BlockRemoved", "AllBlocksCleared", "Unheard"])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.builds(lambda tag, rest: [tag, *rest], TAGS, st.lists(VALUES, max_size=8)) | VALUES, max_size=4))
def test_every_event_of_a_batch_is_read_or_counted(events):
    batch = decode_batch(batch_of(*events))
    assert len(batch.events) + batch.num_malformed == len(events)
