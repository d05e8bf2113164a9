"""The store of blocks: two-phase puts, leases, the conservation law."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from headrace.core.block import BlockHash
from headrace.errors import BlockLost
from headrace.index.events import ChangeKind
from headrace.kvstore.store import BlockStore, Claim, Terms
from headrace.kvstore.stored_block import StoredBlock

EPOCH = "now"
SETTLE_S = 5.0


def names(*numbers: int) -> tuple[BlockHash, ...]:
    return tuple(BlockHash(number.to_bytes(16, "little")) for number in numbers)


def blocks(*numbers: int, tenant: str = "") -> tuple[StoredBlock, ...]:
    return tuple(StoredBlock(block_hash=name, tenant=tenant) for name in names(*numbers))


def terms(lease_id: str, deadline_s: float = 10.0, holder: str = "w", tenant: str = "") -> Terms:
    return Terms(lease_id=lease_id, holder=holder, deadline_s=deadline_s, tenant=tenant)


def claim(lease_id: str, epoch: str = EPOCH, tenant: str = "") -> Claim:
    return Claim(lease_id=lease_id, epoch=epoch, tenant=tenant)


def stored(store: BlockStore, *numbers: int, tenant: str = "") -> None:
    lease_id = f"setup-{tenant}-{numbers}"
    store.reserve(blocks(*numbers, tenant=tenant), terms(lease_id, tenant=tenant))
    store.commit(claim(lease_id, tenant=tenant), 0.0, is_complete=True)


def ledger(store: BlockStore) -> tuple[int, int, int]:
    counts = store.counts()
    return counts.free, counts.cached, counts.leased


def test_a_put_is_visible_after_its_commit_and_not_before():
    store = BlockStore(8, EPOCH, SETTLE_S)
    put = store.reserve(blocks(1, 2, 3), terms("p"))
    assert put.indices == (0, 1, 2)
    assert store.match(names(1, 2, 3)) == 0
    assert store.acquire(names(1, 2, 3), terms("g")) == ()
    assert len(store.commit(claim("p"), 1.0, is_complete=True)) == 3
    assert store.acquire(names(1, 2, 3, 4), terms("g")) == put.blocks
    assert ledger(store) == (5, 0, 3)


def test_a_torn_put_is_never_visible():
    store = BlockStore(8, EPOCH, SETTLE_S)
    store.reserve(blocks(1, 2), terms("revoked"))
    assert len(store.commit(claim("revoked"), 1.0, is_complete=False)) == 0
    store.reserve(blocks(1, 2), terms("late"))
    with pytest.raises(BlockLost):
        store.commit(claim("late"), 10.0, is_complete=True)
    assert store.match(names(1)) == 0
    assert ledger(store) == (8, 0, 0)


def test_blocks_stored_or_being_written_are_not_written_again():
    store = BlockStore(8, EPOCH, SETTLE_S)
    stored(store, 1, 2)
    assert store.reserve(blocks(1, 2, 3, 4), terms("first")).indices == (2, 3)
    assert store.reserve(blocks(1, 2, 3, 4, 5), terms("second")).indices == (4,)
    assert store.reserve(blocks(1, 2, 3), terms("third")).blocks == ()
    assert store.counts().num_leases == 4


def test_a_full_store_forgets_the_longest_unused_but_no_block_of_the_same_prefix():
    store = BlockStore(4, EPOCH, SETTLE_S)
    stored(store, 1, 2)
    stored(store, 8, 9)
    put = store.reserve(blocks(1, 2, 3, 4, 5), terms("p"))
    assert put.indices == (2, 3)
    store.commit(claim("p"), 1.0, is_complete=True)
    assert store.match(names(1, 2, 3, 4, 5)) == 4
    assert store.match(names(8)) == 0
    assert store.totals.num_evicted_blocks == 2


def test_leased_blocks_stay_while_they_are_read():
    store = BlockStore(2, EPOCH, SETTLE_S)
    stored(store, 1, 2)
    store.acquire(names(1, 2), terms("g"))
    assert store.reserve(blocks(3), terms("p")).blocks == ()
    store.release(claim("g"), 1.0)
    assert store.reserve(blocks(3), terms("p")).indices == (0,)


def test_a_read_that_took_too_long_is_told_so():
    store = BlockStore(2, EPOCH, SETTLE_S)
    stored(store, 1)
    store.acquire(names(1), terms("g", deadline_s=4.0))
    with pytest.raises(BlockLost):
        store.release(claim("g"), 4.0)
    assert store.totals.num_expired_leases == 1
    assert ledger(store) == (1, 1, 0)


def test_leases_of_another_epoch_are_fenced():
    store = BlockStore(4, EPOCH, SETTLE_S)
    stored(store, 1)
    store.acquire(names(1), terms("g"))
    store.reserve(blocks(2), terms("p"))
    with pytest.raises(BlockLost):
        store.commit(claim("p", "before"), 1.0, is_complete=True)
    with pytest.raises(BlockLost):
        store.release(claim("g", "before"), 1.0)
    with pytest.raises(BlockLost):
        store.release(claim("p"), 1.0)
    assert len(store.commit(claim("p"), 1.0, is_complete=True)) == 1


def test_blocks_of_a_silent_writer_are_kept_back_for_a_while():
    store = BlockStore(2, EPOCH, SETTLE_S)
    store.reserve(blocks(1, 2), terms("p", deadline_s=1.0))
    store.expire(3.0)
    assert ledger(store) == (0, 0, 2)
    assert store.reserve(blocks(1), terms("q")).blocks == ()
    store.expire(3.0 + SETTLE_S)
    assert ledger(store) == (2, 0, 0)
    assert store.reserve(blocks(1), terms("q")).indices == (0,)


def test_a_late_writer_that_speaks_up_gives_its_blocks_back_at_once():
    store = BlockStore(2, EPOCH, SETTLE_S)
    store.reserve(blocks(1, 2), terms("p", deadline_s=1.0))
    with pytest.raises(BlockLost):
        store.commit(claim("p"), 2.0, is_complete=True)
    assert ledger(store) == (2, 0, 0)


def test_the_puts_of_a_dead_writer_end_with_it():
    store = BlockStore(4, EPOCH, SETTLE_S)
    store.reserve(blocks(1), terms("p", holder="dead"))
    store.reserve(blocks(2), terms("q", holder="alive"))
    store.drop_writer("dead")
    assert ledger(store) == (3, 0, 1)
    assert store.reserve(blocks(1), terms("r")).indices == (0,)


QUOTAS = {"a": 2, "b": 4}


def test_a_tenant_over_its_quota_forgets_its_own_blocks_only():
    store = BlockStore(8, EPOCH, SETTLE_S, quota_of=QUOTAS.get)
    stored(store, 1, tenant="")
    stored(store, 2, 3, tenant="a")
    stored(store, 4, tenant="a")
    assert [store.match(names(number)) for number in (1, 2, 3, 4)] == [1, 1, 0, 1]
    assert store.totals.num_over_quota_puts == 1
    store.verify()


def test_a_tenant_whose_blocks_are_all_in_use_gets_less_room_although_there_is_some():
    store = BlockStore(8, EPOCH, SETTLE_S, quota_of=QUOTAS.get)
    stored(store, 1, tenant="a")
    store.acquire(names(1), terms("g", tenant="a"))
    put = store.reserve(blocks(2, 3, tenant="a"), terms("p", tenant="a"))
    assert put.indices == (0,)
    assert store.reserve(blocks(4, tenant="a"), terms("q", tenant="a")).blocks == ()
    store.verify()


def test_a_silent_writers_blocks_count_against_its_tenant_until_they_are_let_go():
    store = BlockStore(8, EPOCH, SETTLE_S, quota_of=QUOTAS.get)
    store.reserve(blocks(1, 2, tenant="a"), terms("p", deadline_s=1.0, tenant="a"))
    store.expire(2.0)
    assert store.reserve(blocks(3, tenant="a"), terms("q", tenant="a")).blocks == ()
    store.expire(2.0 + SETTLE_S)
    assert store.reserve(blocks(3, tenant="a"), terms("r", tenant="a")).indices == (0,)
    store.verify()


def test_what_comes_and_goes_is_told_once_and_in_order():
    store = BlockStore(2, EPOCH, SETTLE_S)
    stored(store, 1)
    stored(store, 2, 3)
    told = [(change.kind, change.hashes) for change in store.take_changes()]
    one, two, three = ((name,) for name in names(1, 2, 3))
    stored_kind, removed = ChangeKind.STORED, ChangeKind.REMOVED
    assert told == [(stored_kind, one), (removed, one), (stored_kind, two), (stored_kind, three)]
    assert store.take_changes() == ()


class StoreMachine(RuleBasedStateMachine):
    """Any order of verbs keeps the law; every get sees committed content only."""

    def __init__(self) -> None:
        super().__init__()
        self.store = BlockStore(6, EPOCH, SETTLE_S)
        self.now_s = 0.0
        self.count = 0
        self.content: dict[int, BlockHash | None] = {}
        self.puts: dict[str, tuple] = {}
        self.gets: dict[str, tuple] = {}

    def _terms(self) -> Terms:
        self.count += 1
        return terms(str(self.count), self.now_s + 3.0)

    @rule(hashes=st.lists(st.integers(0, 9), min_size=1, max_size=5))
    def reserve(self, hashes):
        asked = self._terms()
        put = self.store.reserve(blocks(*hashes), asked)
        put_names = tuple(block.block_hash for block in put.facts)
        assert [names(*hashes)[index] for index in put.indices] == list(put_names)
        if put.blocks:
            self.puts[asked.lease_id] = (put.blocks, put_names)
            for block in put.blocks:
                self.content[block] = None

    @rule(data=st.data(), is_complete=st.booleans())
    def commit(self, data, is_complete):
        if self.puts:
            lease_id = data.draw(st.sampled_from(sorted(self.puts)))
            blocks, hashes = self.puts.pop(lease_id)
            try:
                self.store.commit(claim(lease_id), self.now_s, is_complete=is_complete)
            except BlockLost:
                return
            if is_complete:
                self.content.update(zip(blocks, hashes, strict=True))

    @rule(hashes=st.lists(st.integers(0, 9), min_size=1, max_size=5))
    def acquire(self, hashes):
        asked = self._terms()
        blocks = self.store.acquire(names(*hashes), asked)
        assert [self.content[block] for block in blocks] == list(names(*hashes)[: len(blocks)])
        if blocks:
            self.gets[asked.lease_id] = tuple((block, self.content[block]) for block in blocks)

    @rule(data=st.data())
    def release(self, data):
        if self.gets:
            lease_id = data.draw(st.sampled_from(sorted(self.gets)))
            read = self.gets.pop(lease_id)
            try:
                self.store.release(claim(lease_id), self.now_s)
            except BlockLost:
                return
            assert all(self.content[block] == name for block, name in read)

    @rule(seconds=st.sampled_from([0.5, 2.0, 6.0]))
    def wait(self, seconds):
        self.now_s += seconds
        self.store.expire(self.now_s)

    @invariant()
    def blocks_are_conserved(self):
        counts = self.store.counts()
        assert counts.free + counts.cached + counts.leased == counts.total == 6

    def teardown(self):
        for _ in range(2):
            self.now_s += 100.0
            self.store.expire(self.now_s)
        counts = self.store.counts()
        assert (counts.leased, counts.num_leases) == (0, 0)


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestStoreMachine = StoreMachine.TestCase
