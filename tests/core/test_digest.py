"""The digest of a block: one number per content, whoever holds which heads in which order."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.block import BlockHash, KvLayout
from headrace.core.digest import block_digest, combine, is_sampled

LAYOUT = KvLayout(num_layers=2, block_tokens=2, num_kv_heads=4, head_dim=2, dtype="bf16")
VECTORS = json.loads((Path(__file__).parent / "digest_vectors.json").read_text(encoding="utf-8"))
BITS = st.integers(0, 8 * LAYOUT.block_bytes - 1)


def block_of(layout=LAYOUT):
    return np.arange(layout.block_bytes, dtype=np.uint32).astype(np.uint8)


def canonical(block, layout=LAYOUT):
    return block.reshape(layout.num_layers, 2, layout.block_tokens, layout.num_kv_heads, -1)


def flipped(block, *bits):
    changed = block.copy()
    for bit in bits:
        changed[bit // 8] ^= 1 << bit % 8
    return changed


def part_of(block, heads):
    """The digest of what a rank with these heads holds, which lies there as a block of its own."""
    rank = KvLayout(num_layers=2, block_tokens=2, num_kv_heads=len(heads), head_dim=2, dtype="bf16")
    held = np.ascontiguousarray(canonical(block)[:, :, :, heads.start : heads.stop : heads.step])
    return block_digest(held.reshape(-1), rank, heads)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_the_digest_is_that_of_the_checked_in_vectors(vector):
    layout = KvLayout(**vector["layout"])
    heads = None if vector["heads"] is None else range(*vector["heads"])
    block = np.frombuffer(bytes.fromhex(vector["block"]), dtype=np.uint8)
    assert block_digest(block, layout, heads) == int(vector["digest"], 16)


def test_every_flipped_bit_changes_the_digest_to_another_one():
    block = block_of()
    found = {block_digest(flipped(block, bit), LAYOUT) for bit in range(8 * LAYOUT.block_bytes)}
    assert len(found - {block_digest(block, LAYOUT)}) == 8 * LAYOUT.block_bytes


@given(st.sets(BITS, min_size=2, max_size=2))
def test_a_pair_of_flipped_bits_changes_the_digest(bits):
    assert block_digest(flipped(block_of(), *bits), LAYOUT) != block_digest(block_of(), LAYOUT)


@given(st.permutations(range(16)))
def test_slices_that_changed_places_change_the_digest(order):
    block = block_of()
    slices = np.moveaxis(canonical(block), 3, 2).reshape(16, -1)
    moved = np.moveaxis(slices[order].reshape(2, 2, 4, 2, -1), 2, 3)
    is_same = order == sorted(order)
    assert (block_digest(moved, LAYOUT) == block_digest(block, LAYOUT)) == is_same


@pytest.mark.parametrize(
    "ranks",
    [[range(4)], [range(2), range(2, 4)], [range(3), range(3, 4)], [range(1, 4, 2), range(0, 4, 2)]],
    ids=["one", "halves", "uneven", "every other"],
)
def test_parts_of_ranks_add_up_to_the_digest_of_the_whole(ranks):
    block = block_of()
    assert combine(part_of(block, heads) for heads in ranks) == block_digest(block, LAYOUT)


def test_a_rank_that_is_missing_shows():
    block = block_of()
    assert combine([part_of(block, range(2))]) != block_digest(block, LAYOUT)


def test_a_holder_with_another_order_in_memory_gets_the_same_digest():
    block = block_of()
    heads_first = np.ascontiguousarray(canonical(block).transpose(3, 0, 1, 2, 4))
    assert block_digest(heads_first.transpose(1, 2, 3, 0, 4), LAYOUT) == block_digest(block, LAYOUT)


def test_a_digest_is_never_the_number_that_says_none_was_taken():
    assert combine([]) == combine([0]) == combine([1 << 63, 1 << 63]) == 1
    assert combine([2**64 - 1, 7]) == 6


def test_a_block_of_another_size_than_its_layout_is_refused():
    with pytest.raises(ValueError, match="a block of 64 bytes where its layout has 128"):
        block_digest(block_of()[:64], LAYOUT)
    with pytest.raises(ValueError, match="3 heads named for a block of 4"):
        block_digest(block_of(), LAYOUT, range(3))


def test_a_sample_takes_its_share_and_a_larger_one_takes_the_same_blocks_and_more():
    hashes = [BlockHash(number.to_bytes(8, "big") + bytes(8)) for number in range(0, 2**64, 2**64 // 997)]
    taken = {share: {name for name in hashes if is_sampled(name, share)} for share in (0.0, 0.1, 0.5, 1.0)}
    assert taken[0.0] == set()
    assert taken[1.0] == set(hashes)
    assert taken[0.1] < taken[0.5]
    assert 0.05 < len(taken[0.1]) / len(hashes) < 0.15
    assert not is_sampled(BlockHash(bytes(16)), 0.0)
    assert is_sampled(BlockHash(b"\xff" * 16), 1.0)
