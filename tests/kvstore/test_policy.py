"""What the kvstore refuses."""

import pytest

from headrace.core.block import KvLayout
from headrace.errors import PeerMismatch
from headrace.kvstore.policy import check_layout, wanted_indices


def test_blocks_of_another_size_are_refused():
    layout = KvLayout(num_layers=2, block_tokens=16, num_kv_heads=1, head_dim=8, dtype="fp32")
    check_layout(layout, 2 * 2 * 16 * 8 * 4)
    with pytest.raises(PeerMismatch):
        check_layout(layout, 1024)


def test_only_new_blocks_are_wanted_and_each_once():
    names = [bytes([n]) * 16 for n in (1, 2, 3, 2, 4)]
    assert wanted_indices(names, lambda name: name in (names[0], names[4])) == [1, 2]
