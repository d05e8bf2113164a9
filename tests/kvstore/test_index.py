"""The index of workers' caches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.block import BlockHash
from headrace.errors import Saturated
from headrace.kvstore.index import PrefixIndex, Report


def names(*numbers: int) -> tuple[BlockHash, ...]:
    return tuple(BlockHash(number.to_bytes(16, "little")) for number in numbers)


def report(worker="w", epoch="e", sequence=0, stored=(), removed=(), is_snapshot=False) -> Report:
    return Report(
        worker=worker,
        epoch=epoch,
        sequence=sequence,
        stored=names(*stored),
        removed=names(*removed),
        is_snapshot=is_snapshot,
    )


def test_each_worker_matches_with_its_longest_prefix():
    index = PrefixIndex(8)
    index.apply(report("a", stored=[1, 2, 3]))
    index.apply(report("b", stored=[1, 3]))
    index.apply(report("c", stored=[2]))
    assert index.match(names(1, 2, 3, 4)) == {"a": 3, "b": 1}
    assert index.match(names(4)) == {}
    assert index.match(()) == {}


def test_removed_blocks_match_no_more():
    index = PrefixIndex(8)
    index.apply(report(stored=[1, 2]))
    assert not index.apply(report(sequence=1, removed=[2, 9]))
    assert index.match(names(1, 2)) == {"w": 1}


def test_a_gap_asks_for_a_snapshot_until_one_comes():
    index = PrefixIndex(8)
    index.apply(report(stored=[1]))
    assert index.apply(report(sequence=2, stored=[5]))
    assert index.apply(report(sequence=3, stored=[6]))
    assert index.match(names(5)) == {}
    assert not index.apply(report(sequence=4, stored=[7], is_snapshot=True))
    assert index.match(names(1)) == {}
    assert index.match(names(7)) == {"w": 1}
    assert not index.apply(report(sequence=5, stored=[8]))
    assert index.match(names(7, 8)) == {"w": 2}


def test_a_repeated_report_changes_nothing():
    index = PrefixIndex(8)
    index.apply(report(stored=[1]))
    index.apply(report(sequence=1, removed=[1]))
    assert not index.apply(report(stored=[1]))
    assert index.match(names(1)) == {}


def test_a_reborn_worker_loses_its_old_blocks_with_its_first_report():
    index = PrefixIndex(8)
    index.apply(report(stored=[1, 2]))
    assert not index.apply(report(epoch="f", stored=[2]))
    assert index.match(names(1)) == {}
    assert index.match(names(2)) == {"w": 1}
    assert index.apply(report(epoch="g", sequence=4, stored=[1]))
    assert index.num_hashes == 0


def test_a_forgotten_worker_is_gone():
    index = PrefixIndex(8)
    index.apply(report("a", stored=[1]))
    index.apply(report("b", stored=[1]))
    index.forget("a")
    index.forget("nobody")
    assert index.match(names(1)) == {"b": 1}


def test_the_number_of_workers_is_bounded():
    index = PrefixIndex(1)
    index.apply(report("a", stored=[1]))
    with pytest.raises(Saturated):
        index.apply(report("b", stored=[1]))
    index.apply(report("a", epoch="f", stored=[2]))


blocks = st.lists(st.integers(0, 6), max_size=5, unique=True)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("ef"), blocks, blocks, st.booleans()), max_size=30))
def test_the_index_equals_a_set_per_worker(reports):
    index, model, epochs, counts = PrefixIndex(8), {}, {}, {}
    for worker, epoch, stored, removed, is_snapshot in reports:
        if epochs.get(worker) != epoch:
            epochs[worker], model[worker], counts[worker] = epoch, set(), 0
        index.apply(report(worker, epoch, counts[worker], stored, removed, is_snapshot))
        counts[worker] += 1
        kept = set() if is_snapshot else model[worker] - set(removed)
        model[worker] = kept | set(stored)
    for first in range(7):
        asked = [first, (first + 1) % 7, (first + 2) % 7]
        expected = {}
        for worker, held in model.items():
            length = next((n for n, block in enumerate(asked) if block not in held), 3)
            if length:
                expected[worker] = length
        assert index.match(names(*asked)) == expected
