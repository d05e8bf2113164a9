"""The router's copy of the index says who holds a prefix, and where it can be fetched."""

from headrace.core.placement import FOREIGN_PREFIX, Tier
from headrace.core.segments import SEGMENT_BLOCKS, segments, store_of
from headrace.index.events import Change, ChangeKind, Event
from headrace.index.prefix_index import PrefixIndex
from headrace.router.prefixes import Prefixes

HASHES = tuple(number.to_bytes(16, "big") for number in range(3 * SEGMENT_BLOCKS))
WORKERS = {"p0": "host:1", "p1": "host:2"}


def holding(*held) -> Prefixes:
    """Return the prefixes of an index in which each (location, tier, hashes) is stored."""
    index = PrefixIndex(budget_bytes=1 << 20, max_locations=8)
    sequences = {}
    for location, tier, hashes in held:
        change = Change(kind=ChangeKind.STORED, tier=tier, hashes=tuple(hashes))
        sequence = sequences[location] = sequences.get(location, -1) + 1
        index.apply(Event(location=location, epoch="e", sequence=sequence, changes=(change,)))
    return Prefixes(index)


def spans(cached):
    return [(each.location, each.address, each.tier, each.start, each.end) for each in cached.sources]


def test_workers_and_stores_are_told_apart():
    prefixes = holding(("p0", Tier.DEVICE, HASHES[:3]), ("kv", Tier.DRAM, HASHES[:5]))
    cached = prefixes.look_up(HASHES[:8], WORKERS, {"kv": "host:9"})
    assert (cached.by_worker, cached.num_stored, cached.num_reachable) == ({"p0": 3}, 5, 5)
    assert spans(cached) == [("p0", "host:1", Tier.DEVICE, 0, 3), ("kv", "host:9", Tier.DRAM, 0, 5)]


def test_who_does_not_answer_now_is_no_source():
    prefixes = holding(("p0", Tier.DEVICE, HASHES[:3]), ("kv", Tier.DRAM, HASHES[:5]))
    assert prefixes.look_up(HASHES, {"p1": "host:2"}, {}).sources == ()


def test_what_a_foreign_engine_holds_is_no_hit_and_no_source_whoever_has_its_name():
    name = f"{FOREIGN_PREFIX}pod"
    prefixes = holding((name, Tier.DEVICE, HASHES[:5]), ("p0", Tier.DEVICE, HASHES[:2]))
    for workers, stores in ((WORKERS, {}), ({**WORKERS, name: "host:5"}, {}), (WORKERS, {name: "host:5"})):
        cached = prefixes.look_up(HASHES, workers, stores)
        assert (cached.by_worker, cached.num_stored, cached.num_reachable) == ({"p0": 2}, 0, 2)
        assert spans(cached) == [("p0", "host:1", Tier.DEVICE, 0, 2)]


def test_a_source_is_as_slow_as_its_slowest_block():
    prefixes = holding(("kv", Tier.DRAM, HASHES[:2]), ("kv", Tier.DISK, HASHES[2:4]))
    (source,) = prefixes.look_up(HASHES[:4], {}, {"kv": "host:9"}).sources
    assert (source.tier, source.end) == (Tier.DISK, 4)


def test_a_chain_over_several_stores_names_the_store_of_each_segment():
    stores = {"a": "host:7", "b": "host:8", "c": "host:9"}
    names = {address: name for name, address in stores.items()}
    placed = [(segment, store_of(segment.key, tuple(names))) for segment in segments(HASHES)]
    held = [(names[address], Tier.DRAM, HASHES[segment.start : segment.end]) for segment, address in placed]
    cached = holding(*held).look_up(HASHES, {}, stores)
    assert cached.num_stored == len(HASHES)
    assert spans(cached) == [
        (names[address], address, Tier.DRAM, segment.start, segment.end) for segment, address in placed
    ]


def test_a_prompt_without_a_full_block_asks_for_nothing():
    assert holding(("p0", Tier.DEVICE, HASHES)).look_up((), WORKERS, {}).num_reachable == 0
