import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from headrace.core.block import block_hashes, root_hash
from headrace.core.placement import Tier
from headrace.index.events import ChangeKind
from headrace.index.vllm_blocks import ForeignBlocks
from headrace.index.vllm_events import BlockRemoved, BlockStored

ROOT = root_hash("model")
BLOCK = 4


def stored(names, tokens, parent=None, **fields):
    return BlockStored(names, parent, tokens, fields.pop("block_size", BLOCK), **fields)


@pytest.fixture
def blocks():
    return ForeignBlocks(ROOT, BLOCK, max_blocks=8)


def test_blocks_are_named_as_we_name_the_same_tokens(blocks):
    tokens = list(range(12))
    first = blocks.store(stored([b"a", b"b"], tokens[:8], medium="GPU"))
    second = blocks.store(stored([b"c"], tokens[8:], parent=b"b", medium="CPU"))
    assert first.hashes + second.hashes == block_hashes(ROOT, tokens, BLOCK)
    assert (first.kind, first.tier, second.tier) == (ChangeKind.STORED, Tier.DEVICE, Tier.DRAM)


def test_a_longer_foreign_block_is_several_of_ours(blocks):
    change = blocks.store(stored([1], list(range(8)), block_size=8))
    assert change.hashes == block_hashes(ROOT, list(range(8)), BLOCK)
    assert blocks.remove(BlockRemoved([1])).hashes == change.hashes


def test_a_tier_that_sends_hashes_alone_is_understood_from_the_one_before(blocks):
    above = blocks.store(stored([1], [1, 2, 3, 4], medium="GPU"))
    below = blocks.store(stored([1], [], medium="STORAGE", block_size=0))
    assert (below.hashes, below.tier) == (above.hashes, Tier.DISK)


def test_a_block_stays_known_while_a_tier_holds_it(blocks):
    blocks.store(stored([1], [1, 2, 3, 4], medium="GPU"))
    blocks.store(stored([1], [1, 2, 3, 4], medium="CPU"))
    assert blocks.remove(BlockRemoved([1], "GPU")).tier is Tier.DEVICE
    assert blocks.store(stored([2], [5, 6, 7, 8], parent=1)) is not None
    assert blocks.remove(BlockRemoved([1], "CPU")).tier is Tier.DRAM
    assert len(blocks) == 1


def test_a_block_told_twice_counts_once(blocks):
    assert blocks.store(stored([1, 1], [1, 2, 3, 4] * 2)).hashes == block_hashes(ROOT, [1, 2, 3, 4], BLOCK)
    assert blocks.store(stored([1], [1, 2, 3, 4])) is None
    assert blocks.remove(BlockRemoved([1])) is not None
    assert blocks.remove(BlockRemoved([1])) is None


def test_blocks_after_an_unknown_parent_are_left_out(blocks):
    assert blocks.store(stored([2, 3], list(range(8)), parent=1)) is None
    assert blocks.num_orphans == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"medium": "TAPE"},
        {"locality": "REMOTE"},
        {"cache_salt": msgspec.Raw(b"\xa1s")},
        {"kv_cache_spec_kind": "sliding_window"},
        {"kv_cache_spec_sliding_window": 128},
        {"block_size": 3},
        {"block_size": 0},
        {"block_size": -4},
    ],
)
def test_blocks_that_we_cannot_name_are_left_out(blocks, fields):
    assert blocks.store(stored([1], [1, 2, 3, 4], **fields)) is None
    assert (len(blocks), blocks.num_unsupported) == (0, 1)


def test_blocks_of_a_size_that_is_no_multiple_of_ours_are_left_out(blocks):
    assert blocks.store(stored([1, 2], [1, 2, 3, 4, 5, 6], block_size=3)) is None
    assert blocks.num_unsupported == 2


def test_a_window_that_slides_removes_no_whole_prefix(blocks):
    blocks.store(stored([1], [1, 2, 3, 4], group_idx=0, kv_cache_spec_kind="full_attention"))
    blocks.store(stored([1], [1, 2, 3, 4], group_idx=1, kv_cache_spec_kind="sliding_window"))
    assert blocks.remove(BlockRemoved([1], group_idx=1)) is None
    assert blocks.remove(BlockRemoved([1], group_idx=0)) is not None


def test_the_map_is_bounded(blocks):
    change = blocks.store(stored(list(range(10)), list(range(40))))
    assert len(change.hashes) == len(blocks) == 8
    assert blocks.num_refused == 2


class Followed(RuleBasedStateMachine):
    """An engine that stores and drops blocks at random, beside what is made of its words."""

    def __init__(self):
        super().__init__()
        self.blocks = ForeignBlocks(ROOT, BLOCK, max_blocks=6)
        self.truth = {Tier.DEVICE: set(), Tier.DRAM: set()}
        self.believed = {Tier.DEVICE: set(), Tier.DRAM: set()}
        self.names = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=3), tier=st.sampled_from([Tier.DEVICE, Tier.DRAM]))
    def store(self, tokens, tier):
        prompt = [token for token in tokens for _ in range(BLOCK)]
        ours = block_hashes(ROOT, prompt, BLOCK)
        names = [name[-8:] for name in ours]
        self.names.update(zip(names, ours, strict=True))
        self.truth[tier].update(ours)
        self.note(self.blocks.store(stored(names, prompt, medium="GPU" if tier is Tier.DEVICE else "CPU")))

    @rule(data=st.data(), tier=st.sampled_from([Tier.DEVICE, Tier.DRAM]))
    def remove(self, data, tier):
        if self.names:
            name = data.draw(st.sampled_from(sorted(self.names)))
            self.truth[tier].discard(self.names[name])
            self.note(self.blocks.remove(BlockRemoved([name], "GPU" if tier is Tier.DEVICE else "CPU")))

    def note(self, change):
        if change is not None:
            is_stored = change.kind is ChangeKind.STORED
            believed = self.believed[change.tier]
            assert believed.isdisjoint(change.hashes) if is_stored else believed.issuperset(change.hashes)
            self.believed[change.tier] = believed | set(change.hashes) if is_stored else believed - set(change.hashes)

    @invariant()
    def nothing_is_believed_that_is_not_so(self):
        assert all(self.believed[tier] <= self.truth[tier] for tier in self.truth)
        assert len(self.blocks) <= 6
        if not self.blocks.num_refused:
            assert self.believed == self.truth


TestFollowed = Followed.TestCase
TestFollowed.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
