import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from headrace.core.block import BlockHash
from headrace.core.holder import Holder
from headrace.core.ledger import BlockLedger
from headrace.errors import InternalError, Saturated


def name_of(number):
    return BlockHash(number.to_bytes(16, "little"))


def states(ledger):
    counts = ledger.counts()
    return counts.free, counts.cached, counts.leased


def test_a_lease_takes_free_blocks_and_its_release_returns_them():
    ledger = BlockLedger(4)
    assert ledger.lease("a", 3) == (0, 1, 2)
    assert states(ledger) == (1, 0, 3)
    assert ledger.release("a")
    assert states(ledger) == (4, 0, 0)


def test_named_blocks_stay_findable_after_the_release():
    ledger = BlockLedger(4)
    first, second = ledger.lease("a", 2)
    ledger.name(first, name_of(1))
    ledger.release("a")
    assert states(ledger) == (3, 1, 0)
    assert ledger.match([name_of(1), name_of(2)]) == (first,)
    assert ledger.lookup(name_of(2)) is None
    assert second != first


def test_a_shared_block_is_leased_until_its_last_lease_ends():
    ledger = BlockLedger(4)
    blocks = ledger.lease("a", 2)
    ledger.lease("b", 1, shared=blocks)
    assert [len(ledger.exclusive(name)) for name in ("a", "b", "none")] == [0, 1, 0]
    ledger.release("a")
    assert states(ledger) == (1, 0, 3)
    assert len(ledger.exclusive("b")) == 3
    ledger.release("b")
    assert states(ledger) == (4, 0, 0)


def test_free_blocks_are_taken_before_cached_ones_are_forgotten():
    ledger = BlockLedger(3)
    (block,) = ledger.lease("a", 1)
    ledger.name(block, name_of(1))
    ledger.release("a")
    ledger.lease("b", 2)
    assert ledger.lookup(name_of(1)) == block
    assert ledger.take_evicted() == ()
    assert ledger.extend("b", 1) == (block,)
    assert ledger.take_evicted() == (name_of(1),)
    assert ledger.take_evicted() == ()


def test_the_longest_unused_is_forgotten_first_and_the_end_of_a_prefix_before_its_start():
    ledger = BlockLedger(4)
    for lease, numbers in (("old", (1, 2)), ("new", (3, 4))):
        for block, number in zip(ledger.lease(lease, 2), numbers, strict=True):
            ledger.name(block, name_of(number))
    ledger.release("old")
    ledger.release("new")
    ledger.lease("again", 0, shared=ledger.match([name_of(1), name_of(2)]))
    ledger.release("again")
    order = []
    for index in range(4):
        ledger.lease(str(index), 1)
        order.extend(ledger.take_evicted())
    assert order == [name_of(4), name_of(3), name_of(2), name_of(1)]


@pytest.mark.parametrize("take", [lambda ledger: ledger.lease("b", 3), lambda ledger: ledger.extend("a", 3)])
def test_what_does_not_fit_changes_nothing(take):
    ledger = BlockLedger(4)
    ledger.lease("a", 2)
    before = ledger.counts()
    with pytest.raises(Saturated, match="3 blocks wanted, 2 of 4 can be had"):
        take(ledger)
    assert ledger.counts() == before
    assert ledger.find("b") is None


def test_reviving_cached_blocks_counts_against_what_can_be_had():
    ledger = BlockLedger(2)
    (block,) = ledger.lease("a", 1)
    ledger.name(block, name_of(1))
    ledger.release("a")
    with pytest.raises(Saturated):
        ledger.lease("b", 2, shared=[block])
    assert states(ledger) == (1, 1, 0)


def test_a_block_with_a_writer_is_not_reused_when_its_lease_ends():
    ledger = BlockLedger(2)
    blocks = ledger.lease("a", 2)
    ledger.hold("peer", blocks[:1])
    ledger.release("a")
    assert states(ledger) == (1, 0, 1)
    with pytest.raises(Saturated):
        ledger.lease("b", 2)
    assert ledger.release_writer("peer")
    assert states(ledger) == (2, 0, 0)
    assert not ledger.release_writer("peer")


def test_leases_end_by_the_clock():
    ledger = BlockLedger(4)
    ledger.lease("soon", 1, deadline_s=10.0)
    ledger.lease("late", 1, deadline_s=20.0)
    ledger.lease("never", 1)
    assert ledger.next_deadline_s() == 10.0
    assert ledger.expire(9.9) == ()
    assert ledger.expire(10.0) == ("soon",)
    assert ledger.expire(20.0) == ("late",)
    assert ledger.next_deadline_s() == float("inf")
    assert states(ledger) == (3, 0, 1)


def test_a_lease_tells_its_terms():
    ledger = BlockLedger(4)
    blocks = ledger.lease("a", 2, owner="put", reader="peer", epoch="e1", deadline_s=5.0)
    lease = ledger.find("a")
    assert lease is not None
    assert (lease.owner, lease.reader, lease.epoch, lease.deadline_s) == ("put", "peer", "e1", 5.0)
    assert tuple(lease.blocks) == blocks


def test_the_same_content_twice_keeps_the_first_name():
    ledger = BlockLedger(4)
    first, second = ledger.lease("a", 2)
    assert ledger.name(first, name_of(1))
    assert not ledger.name(second, name_of(1))
    ledger.release("a")
    assert states(ledger) == (3, 1, 0)


def test_forgetting_the_cache_frees_it_and_reports_the_names():
    ledger = BlockLedger(4)
    for number, block in enumerate(ledger.lease("a", 3)):
        ledger.name(block, name_of(number))
    ledger.release("a")
    ledger.forget_cached()
    assert states(ledger) == (4, 0, 0)
    assert set(ledger.take_evicted()) == {name_of(0), name_of(1), name_of(2)}
    assert ledger.names() == ()


def test_a_cached_block_that_loses_its_name_is_free():
    ledger = BlockLedger(2)
    (block,) = ledger.lease("a", 1)
    ledger.name(block, name_of(1))
    ledger.release("a")
    assert ledger.unname(name_of(1))
    assert states(ledger) == (2, 0, 0)
    assert ledger.lookup(name_of(1)) is None
    assert ledger.take_evicted() == (name_of(1),)
    assert not ledger.unname(name_of(1))
    ledger.verify()


def test_a_leased_block_that_loses_its_name_stays_until_its_last_holder_leaves():
    ledger = BlockLedger(2)
    (block,) = ledger.lease("a", 1)
    ledger.name(block, name_of(1))
    ledger.hold("peer", [block])
    assert ledger.unname(name_of(1))
    assert ledger.match([name_of(1)]) == ()
    ledger.release("a")
    assert states(ledger) == (1, 0, 1)
    ledger.release_writer("peer")
    assert states(ledger) == (2, 0, 0)
    ledger.verify()


def test_holders_are_the_leases_with_their_ends_and_the_writers_without():
    ledger = BlockLedger(4)
    ledger.lease("a", 2, owner="sequence", reader="peer", epoch="e", deadline_s=7.0)
    ledger.hold("w", [0])
    assert ledger.holders() == (
        Holder(lease_id="a", owner="sequence", reader="peer", epoch="e", deadline_s=7.0, num_blocks=2),
        Holder(lease_id="w", deadline_s=None, num_blocks=1),
    )
    ledger.release("a")
    ledger.release_writer("w")
    assert ledger.holders() == ()


def _leak(ledger):
    ledger._users[1] += 1


def _lose(ledger):
    ledger._free[-1] = ledger._free[0]


def _rename(ledger):
    ledger._hash_of[0] = name_of(5)


def _keep_name(ledger):
    ledger._hash_of[3], ledger._block_of[name_of(3)] = name_of(3), 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_leak, "number of users differs"),
        (_lose, "neither free nor cached"),
        (_rename, "names and blocks disagree"),
        (_keep_name, "a free block has a name"),
        (lambda ledger: ledger._free.append(0), "does not add up"),
    ],
    ids=["a user too many", "a block lost", "another name", "a name on a free block", "a block too many"],
)
def test_verify_finds_damage(damage, message):
    ledger = BlockLedger(4)
    ledger.name(ledger.lease("a", 2)[0], name_of(1))
    ledger.verify()
    damage(ledger)
    with pytest.raises(InternalError, match=message):
        ledger.verify()


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda ledger: ledger.lease("a", 1), "lease a exists"),
        (lambda ledger: ledger.hold("peer", [0]), "writer peer exists"),
        (lambda ledger: ledger.hold("other", [3]), "leased blocks"),
        (lambda ledger: ledger.name(3, name_of(9)), "leased"),
        (lambda ledger: ledger.name(0, name_of(9)), "another name"),
        (lambda ledger: ledger.lease("b", 0, shared=[3]), "shared"),
    ],
    ids=["lease twice", "writer twice", "write to a free block", "name a free block", "rename", "share a free block"],
)
def test_misuse_is_refused_and_changes_nothing(misuse, message):
    ledger = BlockLedger(4)
    ledger.name(ledger.lease("a", 2)[0], name_of(1))
    ledger.hold("peer", [0])
    before = ledger.counts()
    with pytest.raises(ValueError, match=message):
        misuse(ledger)
    assert ledger.counts() == before
    ledger.verify()


class LedgerMachine(RuleBasedStateMachine):
    """A ledger beside a model that keeps for each block the set of its users."""

    leases = Bundle("leases")
    writers = Bundle("writers")

    def __init__(self):
        super().__init__()
        self.size = 12
        self.ledger = BlockLedger(self.size)
        self.users = {block: [] for block in range(self.size)}
        self.names = {}
        self.deadlines = {}
        self.now_s = 0.0
        self.count = 0

    def fresh(self):
        self.count += 1
        return f"id-{self.count}"

    def unused(self):
        return [block for block, users in self.users.items() if not users]

    def settle_evictions(self):
        for block_hash in self.ledger.take_evicted():
            del self.names[block_hash]

    @rule(
        target=leases, num_new=st.integers(0, 6), shared=st.lists(st.integers(0, 9), max_size=4), life=st.integers(1, 9)
    )
    def lease(self, num_new, shared, life):
        known = sorted(self.names.values())
        found = list(dict.fromkeys(known[index % len(known)] for index in shared if known))
        lease_id, before = self.fresh(), self.ledger.counts()
        wanted = num_new + sum(not self.users[block] for block in found)
        if wanted > len(self.unused()):
            with pytest.raises(Saturated):
                self.ledger.lease(lease_id, num_new, shared=found)
            assert self.ledger.counts() == before
            return multiple()
        blocks = self.ledger.lease(lease_id, num_new, shared=found, deadline_s=self.now_s + life)
        assert list(blocks[: len(found)]) == found
        assert len(set(blocks)) == num_new + len(found)
        assert not any(self.users[block] for block in blocks[len(found) :])
        self.deadlines[lease_id] = self.now_s + life
        for block in blocks:
            self.users[block].append(lease_id)
        self.settle_evictions()
        return lease_id

    @rule(lease_id=leases, num_new=st.integers(0, 4))
    def extend(self, lease_id, num_new):
        if lease_id not in self.deadlines:
            with pytest.raises(KeyError):
                self.ledger.extend(lease_id, num_new)
        elif num_new > len(self.unused()):
            with pytest.raises(Saturated):
                self.ledger.extend(lease_id, num_new)
        else:
            for block in self.ledger.extend(lease_id, num_new):
                assert not self.users[block]
                self.users[block].append(lease_id)
            self.settle_evictions()

    @rule(lease_id=consumes(leases))
    def release(self, lease_id):
        assert self.ledger.release(lease_id) == (lease_id in self.deadlines)
        self.forget_user(lease_id)

    @rule(seconds=st.integers(0, 4))
    def expire(self, seconds):
        self.now_s += seconds
        late = {lease for lease, end in self.deadlines.items() if end <= self.now_s}
        assert set(self.ledger.expire(self.now_s)) == late
        for lease_id in late:
            self.forget_user(lease_id)

    @rule(target=writers, lease_id=leases)
    def hold(self, lease_id):
        blocks = [block for block, users in self.users.items() if lease_id in users]
        writer_id = self.fresh()
        self.ledger.hold(writer_id, blocks)
        for block in blocks:
            self.users[block].append(writer_id)
        return writer_id

    @rule(writer_id=consumes(writers))
    def release_writer(self, writer_id):
        assert self.ledger.release_writer(writer_id)
        self.forget_user(writer_id)

    @rule(lease_id=leases, index=st.integers(0, 5), number=st.integers(0, 9))
    def name(self, lease_id, index, number):
        lease = self.ledger.find(lease_id)
        if lease is None or index >= len(lease.blocks):
            return
        block, block_hash = lease.blocks[index], name_of(number)
        if block_hash in self.names:
            assert self.ledger.name(block, block_hash) == (self.names[block_hash] == block)
        elif block not in self.names.values():
            assert self.ledger.name(block, block_hash)
            self.names[block_hash] = block

    @rule(lease_id=consumes(leases))
    def finish(self, lease_id):
        lease = self.ledger.find(lease_id)
        for block in lease.blocks if lease else ():
            if block not in self.names.values():
                block_hash = name_of(100 + self.count)
                self.count += 1
                assert self.ledger.name(block, block_hash)
                self.names[block_hash] = block
        self.release(lease_id)

    @rule(number=st.integers(0, 9))
    def unname(self, number):
        assert self.ledger.unname(name_of(number)) == (name_of(number) in self.names)
        self.settle_evictions()

    @rule()
    def forget_cached(self):
        self.ledger.forget_cached()
        self.settle_evictions()

    def forget_user(self, user):
        self.deadlines.pop(user, None)
        for users in self.users.values():
            while user in users:
                users.remove(user)

    @invariant()
    def every_block_has_one_state(self):
        counts, unused = self.ledger.counts(), set(self.unused())
        cached = {block for block in self.names.values() if block in unused}
        assert (counts.free, counts.cached) == (len(unused - cached), len(cached))
        assert counts.free + counts.cached + counts.leased == counts.total == self.size
        assert self.ledger.num_available == len(unused)
        self.ledger.verify()

    @invariant()
    def names_find_their_blocks(self):
        assert set(self.ledger.names()) == set(self.names)
        for block_hash, block in self.names.items():
            assert self.ledger.lookup(block_hash) == block
            assert self.ledger.is_cached(block) == (not self.users[block])


LedgerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestLedgerAgainstAModel = LedgerMachine.TestCase


def test_a_lease_can_be_shortened():
    ledger = BlockLedger(4)
    blocks = ledger.lease("a", 3)
    ledger.name(blocks[1], name_of(1))
    ledger.shrink("a", 1)
    ledger.verify()
    assert states(ledger) == (2, 1, 1)
    assert ledger.extend("a", 1) != blocks[:1]
    ledger.release("a")
    assert states(ledger) == (3, 1, 0)


def test_a_lease_can_take_blocks_that_others_have_filled():
    ledger = BlockLedger(4)
    [mine], [other] = ledger.lease("a", 1), ledger.lease("b", 1)
    ledger.name(other, name_of(1))
    ledger.release("b")
    ledger.share("a", [other])
    ledger.verify()
    assert states(ledger) == (2, 0, 2)
    assert ledger.find("a").blocks == [mine, other]
    with pytest.raises(ValueError, match="cached or leased"):
        ledger.share("a", [next(block for block in range(4) if block not in {mine, other})])


def test_blocks_that_only_writers_are_on_besides_come_after_them():
    ledger = BlockLedger(4)
    blocks = ledger.lease("a", 3)
    ledger.lease("b", 0, shared=blocks[:1])
    ledger.hold("writer", blocks[:2])
    ledger.hold("another", blocks[1:2])
    assert ledger.exclusive("a") == {blocks[2]}
    assert ledger.exclusive("a", after_writers=True) == {blocks[1], blocks[2]}


def test_what_is_named_or_shared_may_not_change():
    ledger = BlockLedger(4)
    named, shared, own = ledger.lease("a", 3)
    ledger.name(named, name_of(1))
    ledger.name(shared, name_of(2))
    ledger.lease("b", 0, shared=[shared])
    ledger.unname(name_of(2))
    ledger.hold("writer", [own])
    assert [ledger.may_change(block) for block in (named, shared, own)] == [False, False, True]
    ledger.release("b")
    assert ledger.may_change(shared)


def test_blocks_are_left_to_writers_once_their_lease_has_ended():
    ledger = BlockLedger(4)
    blocks = ledger.lease("a", 2)
    ledger.hold("writer", blocks[:1])
    assert ledger.num_left_to_writers(blocks) == 0
    ledger.release("a")
    assert ledger.num_left_to_writers(blocks) == 1
    ledger.release_writer("writer")
    assert ledger.num_left_to_writers(blocks) == 0
