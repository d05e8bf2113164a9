"""What the kvstore refuses."""

from dataclasses import replace

import pytest

from headrace.core.block import KvLayout
from headrace.core.placement import EXACT, Origin, Tier
from headrace.core.put_facts import PutFacts
from headrace.errors import PeerMismatch
from headrace.kvstore.policy import check_layout, offered_blocks, own_match, wanted_indices
from headrace.kvstore.stored_block import StoredBlock

LAYOUT = KvLayout(num_layers=2, block_tokens=16, num_kv_heads=1, head_dim=8, dtype="fp32")


def test_blocks_of_another_size_or_of_the_same_size_laid_out_otherwise_are_refused():
    check_layout(LAYOUT, replace(LAYOUT))
    with pytest.raises(PeerMismatch):
        check_layout(replace(LAYOUT, num_layers=1), LAYOUT)
    with pytest.raises(PeerMismatch):
        check_layout(replace(LAYOUT, num_layers=1, num_kv_heads=2), LAYOUT)


def test_each_block_of_a_put_gets_its_place_and_its_parent():
    names = [bytes([n]) * 16 for n in (1, 2)]
    facts = PutFacts(tenant="a", num_blocks_before=7, origin=Origin(policy_id="p"), segment_key=bytes([9]) * 16)
    first, second = offered_blocks(names, facts, 5)
    assert (first.num_blocks_before, first.parent) == (7, None)
    assert (second.num_blocks_before, second.parent) == (8, names[0])
    assert {block.segment_key for block in (first, second)} == {bytes([9]) * 16}
    assert (second.tenant, second.origin, second.stored_unix_ms) == ("a", facts.origin, 5)


def test_the_first_block_of_a_put_follows_the_parent_that_the_writer_names():
    (only,) = offered_blocks([bytes([1]) * 16], PutFacts(num_blocks_before=7, parent=bytes([8]) * 16), 5)
    assert only.parent == bytes([8]) * 16


def test_a_store_says_of_itself_how_much_of_a_prefix_lies_in_which_tier():
    names = [bytes([n]) * 16 for n in (1, 2, 3, 4)]
    tiers = dict(zip(names, (Tier.DRAM, Tier.DISK, Tier.DRAM), strict=False))
    found = own_match("s", names, lambda n: (tiers[n], StoredBlock(block_hash=n, tenant="")) if n in tiers else None)
    assert (found.location, found.num_blocks) == ("s", 3)
    assert found.counts == ((Tier.DRAM, EXACT, 2), (Tier.DISK, EXACT, 1))
    assert own_match("s", names, lambda _: None) is None


def test_only_new_blocks_are_wanted_and_each_once():
    names = [bytes([n]) * 16 for n in (1, 2, 3, 2, 4)]
    assert wanted_indices(names, lambda name: name in (names[0], names[4])) == [1, 2]
