"""What is refused of those who ask for blocks."""

import pytest

from headrace.core.lease_terms import checked_hashes, lease_end_s
from headrace.errors import DeadlineExceeded, InvalidRequest


def test_hashes_have_sixteen_bytes_and_are_not_too_many():
    assert checked_hashes([b"x" * 16], 1) == (b"x" * 16,)
    with pytest.raises(InvalidRequest, match="found 15"):
        checked_hashes([b"x" * 16, b"x" * 15], 2)
    with pytest.raises(InvalidRequest, match="at most 1"):
        checked_hashes([b"x" * 16] * 2, 1)


def test_a_lease_is_neither_endless_nor_over():
    assert lease_end_s(5.0, 60.0) == 5.0
    assert lease_end_s(1e9, 60.0) == 60.0
    with pytest.raises(DeadlineExceeded):
        lease_end_s(0.0, 60.0)
