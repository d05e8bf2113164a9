"""What a sector says of its block."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.block import BlockHash
from headrace.core.placement import Origin, Provenance
from headrace.kvstore.disk_header import (
    SECTOR_BYTES,
    Header,
    HeaderForm,
    format_sector,
)
from headrace.kvstore.stored_block import MAX_TEXT_BYTES, StoredBlock

FORM = HeaderForm(format_sector(4096, b"model"))
HEADER = Header(block=StoredBlock(block_hash=BlockHash(bytes(16)), tenant="t"), checksum=bytes(range(16)))

headers = st.builds(
    Header,
    block=st.builds(
        StoredBlock,
        block_hash=st.binary(min_size=16, max_size=16),
        tenant=st.text(max_size=9),
        digest=st.integers(0, 2**64 - 1),
        num_blocks_before=st.integers(0, 2**32 - 1),
        origin=st.builds(Origin, provenance=st.sampled_from(Provenance), policy_id=st.text(max_size=9)),
        stored_unix_ms=st.integers(0, 2**64 - 1),
        parent=st.none() | st.binary(min_size=16, max_size=16).filter(any),
        segment_key=st.none() | st.binary(min_size=16, max_size=16).filter(any),
    ),
    checksum=st.binary(min_size=16, max_size=16),
)


@given(headers, st.integers(0, 2**32))
def test_a_sector_says_what_was_put_into_it(header, slot):
    sector = FORM.encode(slot, header)
    assert len(sector) == SECTOR_BYTES
    assert FORM.decode(slot, sector) == header


@given(st.integers(0, SECTOR_BYTES * 8 - 1))
def test_a_sector_with_any_bit_flipped_is_worthless(bit):
    sector = bytearray(FORM.encode(3, HEADER))
    sector[bit // 8] ^= 1 << bit % 8
    assert FORM.decode(3, bytes(sector)) is None


def test_a_sector_in_another_slot_is_worthless():
    assert FORM.decode(4, FORM.encode(3, HEADER)) is None


@pytest.mark.parametrize(("block_bytes", "format_id"), [(8192, b"model"), (4096, b"other")])
def test_a_sector_of_another_format_is_worthless(block_bytes, format_id):
    other = HeaderForm(format_sector(block_bytes, format_id))
    assert other.decode(3, FORM.encode(3, HEADER)) is None


def test_an_empty_sector_holds_no_block():
    assert FORM.decode(0, bytes(SECTOR_BYTES)) is None


@pytest.mark.parametrize(
    "facts",
    [
        {"block_hash": b"short"},
        {"tenant": "ü" * (MAX_TEXT_BYTES // 2 + 1)},
        {"digest": -1},
        {"stored_unix_ms": 2**64},
        {"num_blocks_before": 2**32},
    ],
)
def test_facts_that_fit_no_header_are_refused(facts):
    with pytest.raises(ValueError, match=r"16 bytes|longer than|too large"):
        StoredBlock(**{"block_hash": BlockHash(bytes(16)), "tenant": "t", **facts})
