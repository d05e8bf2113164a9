import pytest

from headrace.core.block import BlockHash, block_hashes
from headrace.core.request import SequenceId, SequenceSpec
from headrace.engine.cache import BlockCache
from headrace.engine.messages import CacheChange, Goal
from headrace.engine.sequence import Sequence
from headrace.errors import Saturated

ROOT = BlockHash(b"r" * 16)
BLOCK = 4


def sequence_of(name, tokens):
    spec = SequenceSpec(sequence_id=SequenceId(name), model="m", prompt=tuple(tokens), deadline_unix_ms=0)
    return Sequence(
        spec=spec,
        goal=Goal.ANSWER,
        sink=lambda event: None,
        arrival=0,
        deadline_s=1.0,
        root=ROOT,
        tokens=list(tokens),
    )


def admit(cache, name, tokens, *, computed=True):
    sequence = sequence_of(name, tokens)
    cache.share(sequence)
    cache.grow(sequence, len(tokens))
    if computed:
        sequence.kv_length = len(tokens)
        cache.name_full_blocks(sequence)
    return sequence


@pytest.fixture
def cache():
    return BlockCache(8, BLOCK)


def test_full_computed_blocks_are_found_by_whoever_starts_alike(cache):
    first = admit(cache, "a", range(10))
    second = sequence_of("b", [*range(8), 50, 51])
    assert cache.match(second) == tuple(first.blocks[:2])
    assert cache.match(sequence_of("c", [*range(4), 50, 51, 52, 53, 54])) == tuple(first.blocks[:1])
    assert cache.match(sequence_of("d", [9, *range(1, 10)])) == ()


def test_blocks_have_no_name_before_they_are_computed(cache):
    admit(cache, "a", range(10), computed=False)
    assert cache.match(sequence_of("b", range(10))) == ()


@pytest.mark.parametrize(("length", "shared"), [(8, 1), (9, 2), (4, 0), (5, 1), (1, 0)])
def test_at_least_the_last_known_token_is_left_to_compute(cache, length, shared):
    admit(cache, "a", range(12))
    later = sequence_of("b", range(length))
    cache.share(later)
    assert len(later.blocks) == shared
    assert later.kv_length == later.next_position == shared * BLOCK


def test_sharing_leases_the_prefix_and_growing_leases_the_rest(cache):
    first = admit(cache, "a", range(10))
    second = admit(cache, "b", [*range(8), 70, 71, 72])
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] not in first.blocks
    assert cache.counts().leased == 4
    cache.release(first)
    assert cache.counts().leased == 3


def test_growing_within_the_last_block_takes_nothing(cache):
    sequence = admit(cache, "a", range(10))
    cache.grow(sequence, 12)
    assert len(sequence.blocks) == 3
    cache.grow(sequence, 13)
    assert len(sequence.blocks) == 4


def test_an_admission_costs_new_blocks_and_those_it_revives(cache):
    first = admit(cache, "a", range(10))
    later = sequence_of("b", range(12))
    assert cache.admission_cost(later, cache.match(later)) == 1
    cache.release(first)
    assert cache.admission_cost(later, cache.match(later)) == 3
    before = cache.ledger.num_available
    admit(cache, "b", range(12))
    assert before - cache.ledger.num_available == 3


def test_what_does_not_fit_is_refused(cache):
    with pytest.raises(Saturated):
        admit(cache, "a", range(40))


def test_names_are_the_chained_hashes_that_every_service_computes(cache):
    sequence = admit(cache, "a", range(11))
    assert tuple(sequence.hashes) == block_hashes(ROOT, range(11), BLOCK)
    assert cache.take_change() == CacheChange(stored=tuple(sequence.hashes))
    assert cache.take_change() is None


def test_tokens_that_come_later_extend_the_chain(cache):
    sequence = admit(cache, "a", range(6))
    sequence.tokens += [6, 7, 8]
    cache.grow(sequence, 9)
    sequence.kv_length = 8
    cache.name_full_blocks(sequence)
    assert tuple(sequence.hashes) == block_hashes(ROOT, range(9), BLOCK)
    assert sequence.num_named == 2


def test_the_same_content_computed_twice_is_told_once(cache):
    one, other = sequence_of("a", range(8)), sequence_of("b", range(8))
    for sequence in (one, other):
        cache.share(sequence)
        cache.grow(sequence, 8)
    for sequence in (one, other):
        sequence.kv_length = 8
        cache.name_full_blocks(sequence)
    assert cache.take_change() == CacheChange(stored=tuple(one.hashes))
    cache.release(other)
    assert cache.counts().cached == 0


def test_blocks_that_hold_generated_tokens_are_told_as_decoded(cache):
    sequence = sequence_of("a", range(6))
    sequence.tokens.extend(range(50, 60))
    cache.share(sequence)
    cache.grow(sequence, 16)
    sequence.kv_length = 12
    cache.name_full_blocks(sequence)
    change = cache.take_change()
    assert change.stored == tuple(sequence.hashes[:3])
    assert change.decoded == change.stored[1:]


def test_forgotten_blocks_are_told(cache):
    first = admit(cache, "a", range(8))
    cache.release(first)
    cache.take_change()
    admit(cache, "b", range(100, 132), computed=False)
    assert set(cache.take_change().removed) == set(first.hashes)


def test_what_came_and_went_between_two_reports_is_not_told(cache):
    first = admit(cache, "a", range(8))
    cache.release(first)
    admit(cache, "b", range(100, 132), computed=False)
    change = cache.take_change()
    assert change is None or change.stored == ()


def test_what_went_and_came_back_between_two_reports_is_not_told_as_gone(cache):
    first = admit(cache, "a", range(8))
    cache.release(first)
    cache.take_change()
    cache.release(admit(cache, "b", range(100, 132), computed=False))
    admit(cache, "c", range(8))
    assert cache.take_change().removed == ()


def test_eviction_gives_back_only_what_nobody_shares(cache):
    first = admit(cache, "a", range(10))
    second = admit(cache, "b", [*range(8), 70, 71])
    assert len(cache.exclusive(first)) == len(cache.exclusive(second)) == 1
    cache.release(first)
    assert len(cache.exclusive(second)) == 3


def test_a_cache_that_is_asked_to_describes_what_it_stored_with_tokens_and_parents():
    cache = BlockCache(8, BLOCK, describes_stored=True)
    sequence = admit(cache, "a", list(range(2 * BLOCK + 1)))
    change = cache.take_change()
    assert tuple(block.block_hash for block in change.described) == change.stored == tuple(sequence.hashes)
    assert [block.parent for block in change.described] == [ROOT, sequence.hashes[0]]
    assert [block.tokens for block in change.described] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert {block.root for block in change.described} == {ROOT}


def test_a_cache_describes_nothing_unasked(cache):
    admit(cache, "a", list(range(BLOCK + 1)))
    assert cache.take_change().described == ()
