"""The index by its rules, and against a model of plain sets."""

import gc
import random
import tracemalloc
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.core.block import BlockHash
from headrace.core.placement import EXACT, Origin, Provenance, Tier
from headrace.errors import Saturated
from headrace.index.events import Applied, Change, ChangeKind, Event, Snapshot
from headrace.index.pages import PAGE_BLOCKS
from headrace.index.prefix_index import PrefixIndex, PrefixMatch
from headrace.index.slots import MAX_SLOTS_PER_LOCATION

ROOMY_BYTES = 1 << 24
LOSSY = Origin(provenance=Provenance.DERIVED, policy_id="half")
DECODED = Origin(provenance=Provenance.DECODED)


def chain(name: int, length: int) -> tuple[BlockHash, ...]:
    """Hashes that differ in few bits, as no real ones do: places of a page must not be taken for one another."""
    return tuple(BlockHash(bytes(12) + bytes((name, 0)) + number.to_bytes(2, "big")) for number in range(length))


def stored(hashes: tuple[BlockHash, ...], tier: Tier = Tier.DEVICE, origin: Origin = EXACT) -> Change:
    return Change(kind=ChangeKind.STORED, tier=tier, origin=origin, hashes=hashes)


def removed(hashes: tuple[BlockHash, ...], tier: Tier = Tier.DEVICE) -> Change:
    return Change(kind=ChangeKind.REMOVED, tier=tier, hashes=hashes)


def quarantined(hashes: tuple[BlockHash, ...]) -> Change:
    return Change(kind=ChangeKind.QUARANTINED, tier=Tier.DEVICE, hashes=hashes)


@dataclass
class Log:
    """Numbers the events of locations."""

    index: PrefixIndex
    sequences: dict[tuple[str, str], int] = field(default_factory=dict)

    def say(self, location: str, *changes: Change, epoch: str = "1") -> Applied:
        sequence = self.sequences.get((location, epoch), 0)
        self.sequences[location, epoch] = sequence + 1
        event = Event(location=location, epoch=epoch, sequence=sequence, changes=changes)
        applied = self.index.apply(event)
        self.index.verify()
        return applied


@pytest.fixture
def index() -> PrefixIndex:
    return PrefixIndex(ROOMY_BYTES, 8)


@pytest.fixture
def log(index: PrefixIndex) -> Log:
    return Log(index)


def lengths(matches: list[PrefixMatch]) -> dict[str, int]:
    return {match.location: match.num_blocks for match in matches}


def test_the_longest_prefix_comes_first(log: Log) -> None:
    blocks = chain(1, 200)
    log.say("a", stored(blocks[:70]))
    log.say("b", stored(blocks))
    log.say("c", stored(blocks[1:]))
    assert [(match.location, match.num_blocks) for match in log.index.match(blocks)] == [("b", 200), ("a", 70)]


def test_a_prompt_that_leaves_the_chain_matches_up_to_there(log: Log) -> None:
    log.say("a", stored(chain(1, 100)))
    assert lengths(log.index.match(chain(1, 75) + chain(2, 9))) == {"a": 75}


def test_blocks_announced_one_by_one_match_like_those_announced_together(log: Log) -> None:
    blocks = chain(1, 150)
    for block in blocks:
        log.say("a", stored((block,)))
    log.say("b", stored(blocks))
    assert lengths(log.index.match(blocks)) == {"a": 150, "b": 150}


def test_an_empty_prompt_matches_nothing(log: Log) -> None:
    log.say("a", stored(chain(1, 4)))
    assert log.index.match(()) == []


def test_each_block_counts_at_its_fastest_tier(log: Log) -> None:
    blocks = chain(1, 10)
    log.say("s", stored(blocks, Tier.DISK), stored(blocks[:4], Tier.DRAM))
    (match,) = log.index.match(blocks)
    assert match.counts == ((Tier.DRAM, EXACT, 4), (Tier.DISK, EXACT, 6))


def test_a_block_removed_from_one_tier_is_still_in_the_other(log: Log) -> None:
    blocks = chain(1, 10)
    log.say("s", stored(blocks, Tier.DISK), stored(blocks, Tier.DRAM))
    log.say("s", removed(blocks, Tier.DRAM))
    (match,) = log.index.match(blocks)
    assert match.counts == ((Tier.DISK, EXACT, 10),)
    assert log.index.locations()[0].num_blocks == {Tier.DISK: 10}


def test_a_new_copy_takes_the_place_of_one_of_another_origin(log: Log) -> None:
    blocks = chain(1, 3)
    log.say("a", stored(blocks))
    log.say("a", stored(blocks, origin=DECODED))
    assert log.index.match(blocks)[0].counts == ((Tier.DEVICE, DECODED, 3),)


def test_lossy_blocks_are_found_by_requests_of_their_policy_alone(log: Log) -> None:
    blocks = chain(1, 4)
    log.say("a", stored(blocks[:2]), stored(blocks[2:], origin=LOSSY))
    found = [lengths(log.index.match(blocks, policy)) for policy in ("half", "", "third", "half")]
    assert found == [{"a": 4}, {"a": 2}, {"a": 2}, {"a": 4}]


def test_a_new_lifetime_drops_the_blocks_of_the_one_before(log: Log) -> None:
    blocks = chain(1, 500)
    log.say("a", stored(blocks))
    log.say("b", stored(blocks[:3]))
    assert log.say("a", stored(blocks[:7]), epoch="2") is Applied.DONE
    assert lengths(log.index.match(blocks)) == {"a": 7, "b": 3}
    assert log.index.num_blocks == 7


def test_events_of_an_ended_lifetime_are_fenced(log: Log) -> None:
    log.say("a", stored(chain(1, 2)))
    log.say("a", epoch="2")
    assert log.say("a", stored(chain(1, 2))) is Applied.FENCED
    assert log.index.match(chain(1, 2)) == []


def test_blocks_without_holders_leave_the_memory_while_events_come(log: Log) -> None:
    before_bytes = log.index.memory_bytes
    log.say("a", stored(chain(1, 2000)))
    full_bytes = log.index.memory_bytes
    for _ in range(20):
        log.say("a", epoch="2")
    assert log.index.memory_bytes < before_bytes + (full_bytes - before_bytes) / 8


def test_a_repeated_event_is_ignored(index: PrefixIndex) -> None:
    event = Event(location="a", epoch="1", sequence=0, changes=(stored(chain(1, 2)),))
    index.apply(event)
    index.apply(Event(location="a", epoch="1", sequence=1, changes=(removed(chain(1, 2)),)))
    assert index.apply(event) is Applied.REPEATED
    assert index.match(chain(1, 2)) == []


@pytest.mark.parametrize(("epoch", "sequence"), [("1", 2), ("2", 1)])
def test_after_a_gap_nothing_is_applied_until_a_snapshot(index: PrefixIndex, epoch: str, sequence: int) -> None:
    index.apply(Event(location="a", epoch="1", sequence=0, changes=(stored(chain(1, 2)),)))
    late = Event(location="a", epoch=epoch, sequence=sequence, changes=(removed(chain(1, 2)),))
    assert index.apply(late) is Applied.GAP
    assert lengths(index.match(chain(1, 2))) == {"a": 2}
    assert index.locations()[0].is_resyncing
    index.restore(Snapshot(location="a", epoch=epoch, next_sequence=sequence, stored=(stored(chain(1, 1)),)))
    assert not index.locations()[0].is_resyncing
    assert lengths(index.match(chain(1, 2))) == {"a": 1}
    assert index.apply(late) is Applied.DONE


def test_the_first_that_is_heard_of_a_location_may_be_a_gap(index: PrefixIndex) -> None:
    assert index.apply(Event(location="a", epoch="1", sequence=3)) is Applied.GAP
    assert index.locations() == ()


def test_a_quarantined_block_is_nowhere(log: Log) -> None:
    blocks = chain(1, 100)
    log.say("a", stored(blocks))
    log.say("b", stored(blocks, Tier.DISK))
    log.say("b", quarantined(blocks[30:31]))
    assert lengths(log.index.match(blocks)) == {"a": 30, "b": 30}


def test_a_forgotten_location_matches_nothing_and_leaves_its_place(index: PrefixIndex) -> None:
    for name in range(100):
        index.apply(Event(location=str(name), epoch="1", sequence=0, changes=(stored(chain(1, 2)),)))
        index.forget(str(name))
        index.verify()
    assert (index.num_blocks, index.match(chain(1, 2))) == (0, [])


def test_one_location_too_many_is_refused(index: PrefixIndex) -> None:
    for name in range(8):
        index.apply(Event(location=str(name), epoch="1", sequence=0))
    with pytest.raises(Saturated):
        index.apply(Event(location="more", epoch="1", sequence=0))
    with pytest.raises(Saturated):
        index.restore(Snapshot(location="more", epoch="1", next_sequence=0))
    assert len(index.locations()) == 8


def test_segments_of_a_chain_at_several_stores_are_pooled(log: Log) -> None:
    blocks = chain(1, 192)
    log.say("s1", stored(blocks[:64]), stored(blocks[128:]))
    log.say("s2", stored(blocks[64:128]))
    log.say("s3", stored(blocks))
    assert log.index.pooled(blocks, ("s1", "s2", "nobody")) == 192
    assert log.index.pooled(blocks, ("s1",)) == 64
    assert log.index.pooled(blocks, ()) == 0


def test_pooled_blocks_are_those_that_the_policy_may_have(log: Log) -> None:
    blocks = chain(1, 4)
    log.say("s1", stored(blocks[:2]))
    log.say("s2", stored(blocks[2:], origin=LOSSY))
    assert [log.index.pooled(blocks, ("s1", "s2"), policy) for policy in ("", "half")] == [2, 4]


def test_a_location_with_ever_new_policies_runs_out_of_slots_and_gets_them_back(log: Log) -> None:
    for number in range(2 * MAX_SLOTS_PER_LOCATION):
        log.say("a", stored(chain(number, 1), origin=Origin(policy_id=str(number))))
    assert log.index.num_blocks == MAX_SLOTS_PER_LOCATION
    log.say("a", removed(chain(0, 1)))
    log.say("a", stored(chain(200, 1), origin=Origin(policy_id="new")))
    assert lengths(log.index.match(chain(200, 1), "new")) == {"a": 1}


def test_what_was_matched_outlives_what_was_only_announced() -> None:
    log = Log(PrefixIndex(1 << 18, 2))
    log.say("a", stored(chain(0, 256)))
    assert lengths(log.index.match(chain(0, 256))) == {"a": 256}
    for name in range(1, 60):
        log.say("a", stored(chain(name, 128)))
    assert lengths(log.index.match(chain(0, 256))) == {"a": 256}
    assert log.index.num_evicted > 0


def test_a_chain_is_dropped_from_its_end() -> None:
    log = Log(PrefixIndex(1 << 18, 2))
    known = []
    for name in range(12):
        log.say("a", stored(chain(name, 256)))
        log.index.match(chain(name, 256))
    for name in range(12):
        blocks = chain(name, 256)
        known.append(log.index.pooled(blocks, ("a",)))
    assert sum(known) == log.index.num_blocks
    assert known[-1] == 256


def test_a_chain_longer_than_the_budget_keeps_its_beginning() -> None:
    log = Log(PrefixIndex(1 << 17, 2))
    log.say("a", stored(chain(1, 5000)))
    assert lengths(log.index.match(chain(1, 5000))) == {"a": log.index.num_blocks}
    assert log.index.num_blocks > 4 * PAGE_BLOCKS


def test_a_budget_without_room_keeps_nothing() -> None:
    log = Log(PrefixIndex(1, 2))
    log.say("a", stored(chain(1, 100)), removed(chain(1, 7)))
    assert (log.index.num_blocks, log.index.match(chain(1, 100))) == (0, [])


@pytest.mark.parametrize(("event_blocks", "num_blocks"), [(1, 5_000), (64, 30_000)])
def test_the_bytes_it_reports_are_those_it_takes(event_blocks: int, num_blocks: int) -> None:
    randomness = random.Random(1)
    gc.collect()
    tracemalloc.start()
    try:
        index = PrefixIndex(1 << 26, 4)
        for sequence in range(num_blocks // event_blocks):
            hashes = tuple(BlockHash(randomness.randbytes(16)) for _ in range(event_blocks))
            index.apply(Event(location="a", epoch="1", sequence=sequence, changes=(stored(hashes),)))
        del hashes
        gc.collect()
        taken_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The allocator rounds each hash up to 64 bytes, of which tracemalloc sees 49.
    taken_bytes += (64 - 49) * index.num_blocks
    assert index.memory_bytes == pytest.approx(taken_bytes, rel=0.15)


@settings(max_examples=15, deadline=None)
@given(budget_bytes=st.integers(10_000, 100_000), seed=st.integers(0, 1 << 30))
def test_the_budget_holds_after_every_event(budget_bytes: int, seed: int) -> None:
    randomness = random.Random(seed)
    log = Log(PrefixIndex(budget_bytes, 2))
    for _ in range(30):
        blocks = chain(randomness.randrange(40), randomness.randrange(1, 300))
        change = stored(blocks) if randomness.random() < 0.8 else removed(blocks[randomness.randrange(len(blocks)) :])
        log.say(randomness.choice("ab"), change)
        log.index.match(blocks)
        assert log.index.memory_bytes <= budget_bytes


NAMES = ("a", "b", "c")
CHAINS = tuple(chain(name, 40) for name in range(2)) + (chain(0, 20) + chain(9, 100),)
ORIGINS = (EXACT, DECODED, LOSSY)

names = st.sampled_from(NAMES)


@st.composite
def some_blocks(draw: st.DrawFn) -> tuple[BlockHash, ...]:
    blocks = draw(st.sampled_from(CHAINS))
    start = draw(st.integers(0, len(blocks) - 1))
    part = blocks[start : start + draw(st.integers(1, 120))]
    return draw(st.sampled_from((part, part[::-1], part[::3], part + part[:2])))


changes = st.lists(
    st.one_of(
        st.builds(stored, some_blocks(), st.sampled_from(Tier), st.sampled_from(ORIGINS)),
        st.builds(stored, some_blocks()),
        st.builds(removed, some_blocks(), st.sampled_from(Tier)),
        st.builds(quarantined, st.lists(some_blocks().map(lambda blocks: blocks[0]), max_size=2).map(tuple)),
    ),
    max_size=3,
).map(tuple)


class Model:
    """What the index must know, as one dictionary per location: block -> tier -> origin."""

    def __init__(self) -> None:
        self.held: dict[str, dict[BlockHash, dict[Tier, Origin]]] = {}

    def change(self, location: str, change: Change) -> None:
        for block in change.hashes:
            match change.kind:
                case ChangeKind.STORED:
                    self.held[location].setdefault(block, {})[change.tier] = change.origin
                case ChangeKind.REMOVED:
                    self.held[location].get(block, {}).pop(change.tier, None)
                case ChangeKind.QUARANTINED:
                    for blocks in self.held.values():
                        blocks.pop(block, None)

    def copy_of(self, location: str, block: BlockHash, policy: str) -> tuple[Tier, Origin] | None:
        copies = self.held[location].get(block, {})
        return min(
            ((tier, origin) for tier, origin in copies.items() if origin.serves(policy)), default=None, key=_tier
        )

    def match(self, hashes: tuple[BlockHash, ...], policy: str) -> dict[str, list[tuple[Tier, Origin]]]:
        found: dict[str, list[tuple[Tier, Origin]]] = {}
        for location in self.held:
            for block in hashes:
                copy = self.copy_of(location, block, policy)
                if copy is None:
                    break
                found.setdefault(location, []).append(copy)
        return found


def _tier(copy: tuple[Tier, Origin]) -> Tier:
    return copy[0]


class IndexMachine(RuleBasedStateMachine):
    """Events, gaps, lifetimes and snapshots at random."""

    budget_bytes = ROOMY_BYTES

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(self.budget_bytes, len(NAMES))
        self.model = Model()
        self.epochs: dict[str, int] = {}
        self.sequences: dict[str, int] = {}

    def say(self, name: str, epoch: int, sequence: int, said: tuple[Change, ...]) -> Applied:
        return self.index.apply(Event(location=name, epoch=str(epoch), sequence=sequence, changes=said))

    @rule(name=names, said=changes)
    def next_event(self, name: str, said: tuple[Change, ...]) -> None:
        sequence = self.sequences.setdefault(name, 0)
        self.model.held.setdefault(name, {})
        assert self.say(name, self.epochs.setdefault(name, 0), sequence, said) is Applied.DONE
        self.sequences[name] += 1
        for change in said:
            self.model.change(name, change)

    @rule(name=names, said=changes)
    def new_lifetime(self, name: str, said: tuple[Change, ...]) -> None:
        self.epochs[name] = self.epochs.get(name, -1) + 1
        self.sequences[name] = 0
        self.model.held[name] = {}
        self.next_event(name, said)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), said=changes)
    def event_that_does_not_count(self, data: st.DataObject, said: tuple[Change, ...]) -> None:
        name = data.draw(st.sampled_from(sorted(self.sequences)))
        epoch, sequence = self.epochs[name], self.sequences[name]
        if sequence:
            assert self.say(name, epoch, sequence - 1, said) is Applied.REPEATED
        assert self.say(name, epoch, sequence + 1, said) is Applied.GAP
        assert self.say(name, epoch + 1000, 5, said) is Applied.GAP
        if epoch:
            assert self.say(name, epoch - 1, sequence, said) is Applied.FENCED

    @rule(name=names, is_reborn=st.booleans(), sequence=st.integers(0, 9), blocks=some_blocks())
    def snapshot(self, name: str, is_reborn: bool, sequence: int, blocks: tuple[BlockHash, ...]) -> None:  # noqa: FBT001
        self.epochs[name] = self.epochs[name] + is_reborn if name in self.epochs else 0
        self.sequences[name] = sequence
        self.model.held[name] = {}
        parts = (stored(blocks[:30], Tier.DRAM), stored(blocks[20:], Tier.DISK, DECODED))
        self.index.restore(Snapshot(location=name, epoch=str(self.epochs[name]), next_sequence=sequence, stored=parts))
        for part in parts:
            self.model.change(name, part)

    @rule(name=names)
    def forget(self, name: str) -> None:
        self.index.forget(name)
        for known in (self.model.held, self.epochs, self.sequences):
            known.pop(name, None)

    @rule(hashes=st.sampled_from(CHAINS), policy=st.sampled_from(("", "half", "third")), skip=st.integers(0, 70))
    def match(self, hashes: tuple[BlockHash, ...], policy: str, skip: int) -> None:
        hashes = hashes[skip:]
        wanted = self.model.match(hashes, policy)
        found = self.index.match(hashes, policy)
        self.check(lengths(found), {name: len(copies) for name, copies in wanted.items()})
        assert [match.num_blocks for match in found] == sorted((match.num_blocks for match in found), reverse=True)
        for match in found:
            copies = wanted[match.location][: match.num_blocks]
            assert set(match.counts) == {(*copy, copies.count(copy)) for copy in copies}
            assert [tier for tier, _, _ in match.counts] == sorted(tier for tier, _, _ in match.counts)

    @rule(hashes=st.sampled_from(CHAINS), some=st.sets(names), policy=st.sampled_from(("", "half")))
    def pooled(self, hashes: tuple[BlockHash, ...], some: set[str], policy: str) -> None:
        length = 0
        for block in hashes:
            if not any(self.model.copy_of(name, block, policy) for name in some & self.model.held.keys()):
                break
            length += 1
        self.check({"all": self.index.pooled(hashes, some, policy)}, {"all": length})

    def check(self, found: dict[str, int], wanted: dict[str, int]) -> None:
        assert found == wanted

    def check_counts(self, found: dict[Tier, int], wanted: dict[Tier, int]) -> None:
        assert found == wanted

    @invariant()
    def everything_adds_up(self) -> None:
        self.index.verify()
        for state in self.index.locations():
            held = self.model.held[state.name].values()
            wanted = {tier: sum(tier in copies for copies in held) for tier in Tier}
            self.check_counts({tier: state.num_blocks.get(tier, 0) for tier in Tier}, wanted)


class TightIndexMachine(IndexMachine):
    """The same with less room than needed: less may be found, never more, and nothing else."""

    budget_bytes = 28_000

    def check(self, found: dict[str, int], wanted: dict[str, int]) -> None:
        assert all(length <= wanted[name] for name, length in found.items())

    check_counts = check  # type: ignore[assignment]


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestTightIndex = TightIndexMachine.TestCase
TestTightIndex.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
