"""What the kvstore refuses."""

import pytest

from headrace.core.block import KvLayout
from headrace.errors import DeadlineExceeded, InvalidRequest, PeerMismatch
from headrace.kvstore.policy import check_layout, checked_hashes, lease_end_s, wanted_indices


def test_hashes_have_sixteen_bytes_and_are_not_too_many():
    assert checked_hashes([b"x" * 16], 1) == (b"x" * 16,)
    with pytest.raises(InvalidRequest, match="found 15"):
        checked_hashes([b"x" * 16, b"x" * 15], 2)
    with pytest.raises(InvalidRequest, match="at most 1"):
        checked_hashes([b"x" * 16] * 2, 1)


def test_blocks_of_another_size_are_refused():
    layout = KvLayout(num_layers=2, block_tokens=16, num_kv_heads=1, head_dim=8, dtype="fp32")
    check_layout(layout, 2 * 2 * 16 * 8 * 4)
    with pytest.raises(PeerMismatch):
        check_layout(layout, 1024)


def test_a_lease_is_neither_endless_nor_over():
    assert lease_end_s(5.0, 60.0) == 5.0
    assert lease_end_s(1e9, 60.0) == 60.0
    with pytest.raises(DeadlineExceeded):
        lease_end_s(0.0, 60.0)


def test_only_new_blocks_are_wanted_and_each_once():
    names = [bytes([n]) * 16 for n in (1, 2, 3, 2, 4)]
    assert wanted_indices(names, lambda name: name in (names[0], names[4])) == [1, 2]
