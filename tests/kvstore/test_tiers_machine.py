"""Any order of puts, gets, aborts, ends by the clock, evictions and promotions keeps the law and every byte."""

import asyncio
import itertools
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from headrace.clock import VirtualClock
from headrace.core.block import KvLayout
from headrace.core.put_facts import PutFacts
from headrace.errors import BlockLost
from headrace.kvstore.actor import Edges, KvStoreActor
from headrace.kvstore.config import DiskWrite, Eviction, KvStoreConfig
from headrace.kvstore.disk import DiskTier
from headrace.kvstore.messages import AcquireGet, CommitPut, Match, Meet, Quarantine, ReleaseGet, ReservePut, Tick
from headrace.kvstore.opening import NUM_KEPT_BLOCKS
from headrace.kvstore.store import Claim
from headrace.testing.connector import Fabric, FakeConnector

LAYOUT = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=1, head_dim=32, dtype="fp32")
NUM_BLOCKS, NUM_SLOTS = 5, 7
EPOCH = "now"
CHAINS = {tenant: [bytes([number, index]) * 8 for index in range(4)] for number, tenant in enumerate(("", "a", "b"))}
"""A chain of blocks per tenant; a block's content is its name, repeated."""

tenants = st.sampled_from(sorted(CHAINS))
lengths = st.integers(1, 4)
picks = st.integers(0, 99)
"""Drawn whatever is there to pick from: a disk's threads decide what is, and draws must not depend on that."""


class TiersMachine(RuleBasedStateMachine):
    """Drives an actor with a real disk on a virtual clock."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.clock = VirtualClock(1000.0)
        self.puts: dict[str, tuple[str, tuple[int, ...], list[bytes]]] = {}
        self.gets: dict[str, tuple[str, tuple[int, ...], list[bytes]]] = {}
        ids = itertools.count()
        config = KvStoreConfig(
            memory_bytes=(NUM_BLOCKS + NUM_KEPT_BLOCKS) * LAYOUT.block_bytes,
            disk_dir=Path(self.folder.name),
            disk_bytes=512 + NUM_SLOTS * (4096 + 512),
            eviction=self.eviction,
            disk_write=self.disk_write,
            tenant_quotas=(f"b={3 * LAYOUT.block_bytes}:{3 * LAYOUT.block_bytes}",),
        )
        edges = Edges(
            clock=self.clock,
            connect=lambda blocks: FakeConnector(Fabric(), "store", blocks, EPOCH, self.clock),
            new_id=lambda: f"lease-{next(ids)}",
            open_disk=lambda space: DiskTier(space, self.clock),
        )
        self.actor = KvStoreActor(config, EPOCH, edges)
        self.runner.run(self._start())

    eviction = Eviction.VALUE
    disk_write = DiskWrite.THROUGH

    async def _start(self) -> None:
        self.is_over = asyncio.Event()
        started = asyncio.Event()

        async def live() -> None:
            async with asyncio.TaskGroup() as tasks:
                self.actor.start(tasks)
                started.set()
                await self.is_over.wait()
                await self.actor.close()

        self.life = asyncio.create_task(live())
        await started.wait()
        await self.actor.mailbox.ask(lambda reply: Meet(worker="w", epoch="w", layout=LAYOUT, reply=reply))

    def _ask(self, make):
        return self.runner.run(self.actor.mailbox.ask(make))

    def _deadline_ms(self) -> int:
        return self.clock.unix_ms() + 3000

    @rule(tenant=tenants, start=st.integers(0, 3), length=lengths)
    def reserve(self, tenant, start, length):
        hashes = CHAINS[tenant][start : start + length]
        put = {"hashes": hashes, "layout": LAYOUT, "writer": "w", "deadline_unix_ms": self._deadline_ms()}
        facts = PutFacts(tenant=tenant, num_blocks_before=start)
        granted = self._ask(lambda reply: ReservePut(**put, facts=facts, reply=reply))
        if granted.blocks:
            names = [hashes[index] for index in granted.indices]
            self.puts[granted.lease_id] = (tenant, granted.blocks, names)

    @rule(pick=picks, is_complete=st.booleans())
    def commit(self, pick, is_complete):
        if not self.puts:
            return
        lease_id = sorted(self.puts)[pick % len(self.puts)]
        tenant, blocks, names = self.puts.pop(lease_id)
        for block, name in zip(blocks, names, strict=True):
            self.actor.connector.blocks[block] = list(name) * (LAYOUT.block_bytes // 16)
        claim = Claim(lease_id=lease_id, epoch=EPOCH, tenant=tenant)
        try:
            self._ask(lambda reply: CommitPut(claim=claim, is_complete=is_complete, reply=reply))
        except BlockLost:
            return

    @rule(tenant=tenants, asker=tenants, length=lengths, may_wait=st.booleans())
    def acquire(self, tenant, asker, length, may_wait):
        hashes = CHAINS[tenant][:length]
        get = {"hashes": hashes, "reader": "r", "tenant": asker, "deadline_unix_ms": self._deadline_ms()}
        granted = self._ask(lambda reply: AcquireGet(**get, may_promote=True, reply=reply))
        if granted.coming is not None:
            if not may_wait:
                return
            self.runner.run(asyncio.wait(granted.coming.ends))
            granted = self._ask(lambda reply: AcquireGet(**get, reply=reply))
        assert not granted.blocks or tenant in ("", asker)
        if granted.blocks:
            self.gets[granted.lease_id] = (asker, granted.blocks, hashes[: len(granted.blocks)])

    @rule(pick=picks)
    def release(self, pick):
        if not self.gets:
            return
        lease_id = sorted(self.gets)[pick % len(self.gets)]
        tenant, blocks, names = self.gets.pop(lease_id)
        read = [bytes(self.actor.connector.blocks[block][:16]) for block in blocks]
        claim = Claim(lease_id=lease_id, epoch=EPOCH, tenant=tenant)
        try:
            self._ask(lambda reply: ReleaseGet(claim=claim, reply=reply))
        except BlockLost:
            return
        assert read == names

    @rule(seconds=st.sampled_from([0.5, 4.0, 9.0]))
    def wait(self, seconds):
        self.clock.advance(seconds)
        self.actor.mailbox.tell(Tick())
        self._settle()

    @rule(tenant=tenants, index=st.integers(0, 3))
    def quarantine(self, tenant, index):
        name = CHAINS[tenant][index]
        self._ask(lambda reply: Quarantine(block_hash=name, tenant=tenant, reply=reply))
        found = self._ask(lambda reply: Match(hashes=[name], reply=reply))
        assert found == ()

    @rule()
    def let_the_disk_work(self):
        self.runner.run(self.actor._errands.settled())

    def _settle(self) -> None:
        self._ask(lambda reply: Match(hashes=[], reply=reply))

    @invariant()
    def nothing_is_lost_or_counted_twice(self):
        self.actor.verify()
        disk = self.actor.view().disk
        assert disk.counts.num_blocks <= NUM_SLOTS

    def teardown(self):
        for _ in range(3):
            self.wait(100.0)
            self.let_the_disk_work()
            self._settle()
        counts = self.actor.view().counts
        assert (counts.leased, counts.num_leases) == (0, 0)
        self.actor.verify()
        assert self.actor.view().mailbox.num_failed == 0

        async def end() -> None:
            self.is_over.set()
            await self.life

        self.runner.run(end())
        self.runner.close()
        self.folder.cleanup()


QUICK = settings(max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(QUICK, max_examples=650, stateful_step_count=50)


def _machine(eviction: Eviction, disk_write: DiskWrite, how: settings) -> type:
    made = type("Machine", (TiersMachine,), {"eviction": eviction, "disk_write": disk_write})
    case = made.TestCase
    case.settings = how
    return case


TestWriteThrough = _machine(Eviction.VALUE, DiskWrite.THROUGH, QUICK)
TestWriteBack = _machine(Eviction.LRU, DiskWrite.BACK, QUICK)
TestLongWriteThrough = pytest.mark.slow(_machine(Eviction.S3FIFO, DiskWrite.THROUGH, LONG))
TestLongWriteBack = pytest.mark.slow(_machine(Eviction.VALUE, DiskWrite.BACK, LONG))
TestLongLeastRecentlyUsed = pytest.mark.slow(_machine(Eviction.LRU, DiskWrite.THROUGH, LONG))
