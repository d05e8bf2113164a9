"""A store with a disk below its memory, over real gRPC and a fake transport."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest

from headrace.clock import WallClock
from headrace.core.block import KvLayout
from headrace.errors import BlockLost, InvalidRequest, PeerMismatch
from headrace.kvstore import tiers
from headrace.kvstore.config import DiskWrite, Eviction, KvStoreConfig
from headrace.kvstore.messages import Tick
from headrace.kvstore.opening import NUM_KEPT_BLOCKS
from headrace.kvstore.parts import KvStoreParts
from headrace.runtime.channels import Channels
from headrace.testing.connector import Fabric, FakeConnector
from headrace.testing.kvstore import StoreClient, fake_kvstore, serve_kvstore
from headrace.transfer.arena import map_blocks
from headrace.v1 import pool_pb2

LAYOUT = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=1, head_dim=32, dtype="fp32")
CLOCK = WallClock()


def name(number: int) -> bytes:
    return number.to_bytes(16, "little")


def content(number: int) -> bytes:
    return np.random.default_rng(number).bytes(LAYOUT.block_bytes)


def contents(*numbers: int) -> dict[bytes, bytes]:
    return {name(number): content(number) for number in numbers}


class FailingDisk:
    """The system, until it is told to fail."""

    def __init__(self) -> None:
        self.write_errno = self.read_errno = 0

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        if self.write_errno:
            raise OSError(self.write_errno, "told to fail")
        return os.pwrite(fd, data, offset)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self.read_errno:
            raise OSError(self.read_errno, "told to fail")
        return os.preadv(fd, buffers, offset)


class Store:
    """A served store, a client of it, and its disk."""

    def __init__(self, parts: KvStoreParts, client: StoreClient, calls: FailingDisk) -> None:
        self.parts, self.client, self.calls = parts, client, calls
        self.put, self.get = client.put, client.get

    @property
    def disk(self):
        return self.parts.actor.view().disk

    @property
    def totals(self):
        return self.parts.actor.view().totals

    async def until(self, is_true: Callable[[], bool]) -> None:
        async with asyncio.timeout(10.0):
            while not is_true():  # noqa: ASYNC110 what is waited for is a counter
                await asyncio.sleep(0.002)

    async def settle(self) -> None:
        """Wait until the disk has nothing to do."""
        await self.until(lambda: self.disk is not None and not self.parts.actor._errands._running)
        await self.client.acquire([])
        self.check()

    def check(self) -> None:
        """Nothing leaks: the ledger adds up, and nobody holds anything."""
        self.parts.actor.verify()
        counts = self.parts.actor.view().counts
        assert (counts.leased, counts.num_leases) == (0, 0)


@pytest.fixture
async def open_store(tmp_path):
    """Return a way to serve a store with room for some blocks in memory and on disk."""
    async with AsyncExitStack() as stack:

        @asynccontextmanager
        async def serve(num_blocks=4, num_slots=64, folder=tmp_path, **settings) -> AsyncIterator[Store]:
            fabric, calls = Fabric(), FailingDisk()
            config = KvStoreConfig(
                memory_bytes=(num_blocks + NUM_KEPT_BLOCKS) * LAYOUT.block_bytes,
                disk_dir=folder,
                disk_bytes=512 + num_slots * (4096 + 512),
                eviction=settings.pop("eviction", Eviction.LRU),
                settle_s=0.05,
                **settings,
            )
            async with Channels() as channels:
                parts = fake_kvstore(fabric, config, CLOCK, channels, calls)
                async with serve_kvstore(parts) as server:
                    memory = map_blocks(64, LAYOUT.block_bytes)
                    connector = FakeConnector(fabric, "client", memory, "client-1", CLOCK)
                    client = StoreClient(server.address, channels, connector, memory, LAYOUT, CLOCK)
                    store = Store(parts, client, calls)
                    await client.acquire([])
                    await store.until(lambda: store.disk is not None and not parts.actor._errands._running)
                    await client.acquire([])
                    yield store
                    await store.settle()

        yield serve
        await stack.aclose()


async def test_a_block_that_memory_forgot_comes_back_from_disk_byte_for_byte(open_store):
    async with open_store(num_blocks=4) as store:
        await store.put(contents(1, 2, 3, 4))
        await store.settle()
        assert store.disk.counts.num_blocks == 4
        await store.put(contents(5, 6, 7, 8))
        await store.settle()
        assert await store.get([name(n) for n in (1, 2, 3)]) == [content(n) for n in (1, 2, 3)]
        assert store.client.last_get.num_from_disk == 3
        assert await store.get([name(1)]) == [content(1)]
        assert store.client.last_get.num_from_disk == 0


async def test_blocks_written_back_leave_memory_only_when_they_are_on_disk(open_store):
    async with open_store(num_blocks=20, disk_write=DiskWrite.BACK) as store:
        await store.put(contents(*range(1, 18)))
        await store.settle()
        assert store.disk.counts.num_blocks == 0
        await store.put(contents(101, 102, 103))
        await store.settle()
        assert store.disk.counts.num_blocks == 2
        assert store.parts.actor.view().counts.free == 2
        assert await store.get([name(n) for n in range(1, 18)]) == [content(n) for n in range(1, 18)]


async def test_several_readers_wait_for_one_promotion(open_store):
    async with open_store(num_blocks=4) as store:
        await store.put(contents(1, 2))
        await store.settle()
        await store.put(contents(3, 4, 5, 6))
        await store.settle()
        names = [name(1), name(2)]
        leases = await asyncio.gather(*(store.client.acquire(names) for _ in range(5)))
        assert all(lease.block_ids == leases[0].block_ids for lease in leases)
        assert len(leases[0].block_ids) == 2
        assert store.disk.totals.num_read_blocks == 2
        for lease in leases:
            await store.client.release(lease)


async def test_a_restart_finds_the_blocks_of_before_with_their_tenants(open_store):
    async with open_store() as store:
        await store.put(contents(1, 2), tenant="a", num_blocks_before=8, segment_key=name(7))
        await store.settle()
    async with open_store() as store:
        assert await store.get([name(1), name(2)], tenant="b") == []
        assert store.disk.num_forged == 1
        assert await store.get([name(1), name(2)], tenant="a") == [content(1), content(2)]
        found = store.parts.actor._tiers.shelf.find(name(2))
        assert (found.num_blocks_before, found.parent, found.segment_key) == (9, name(1), name(7))


async def test_a_buffer_of_one_block_serves_one_block_from_disk(open_store):
    async with open_store(num_blocks=1) as store:
        for number in (1, 2, 3):
            await store.put(contents(number))
            await store.settle()
        for number in (1, 2, 3, 1):
            assert await store.get([name(number)]) == [content(number)]
        assert await store.get([name(1), name(2)]) == [content(1)]


async def test_a_full_disk_keeps_what_came_last_and_the_store_goes_on(open_store):
    async with open_store(num_blocks=2, num_slots=3) as store:
        for number in range(1, 7):
            await store.put(contents(number))
            await store.settle()
        assert store.disk.counts.num_blocks == 3
        assert store.disk.num_evicted == 3
        assert await store.get([name(1)]) == []
        assert await store.get([name(4)]) == [content(4)]


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EIO])
async def test_a_disk_that_refuses_writes_is_left_alone_for_a_while_and_tried_again(open_store, monkeypatch, reason):
    monkeypatch.setattr(tiers, "FIRST_PAUSE_S", 0.01)
    async with open_store(num_blocks=4) as store:
        store.calls.write_errno = reason
        await store.put(contents(1))
        await store.settle()
        assert await store.get([name(1)]) == [content(1)]
        assert store.parts.member.load().store.num_disk_failed_blocks == 1
        store.calls.write_errno = 0
        store.parts.actor._tiers.disk._slots._retry_at_s = 0.0
        await store.put(contents(2))
        await asyncio.sleep(0.02)
        store.parts.actor.mailbox.tell(Tick())
        await store.until(lambda: store.disk.counts.num_blocks == 1)


async def test_an_unreadable_block_is_a_miss_and_is_not_offered_again(open_store):
    async with open_store(num_blocks=2) as store:
        await store.put(contents(1))
        await store.settle()
        await store.put(contents(2, 3))
        await store.settle()
        store.calls.read_errno = errno.EIO
        assert await store.get([name(1)]) == []
        store.calls.read_errno = 0
        assert store.parts.actor._tiers.shelf.find(name(1)) is None
        assert store.disk.totals.num_io_errors == 1
        # The disk is left alone for a while: what lies only there is a miss, what lies in memory is not.
        assert await store.get([name(2), name(3)]) == [content(2)]


async def test_a_damaged_block_is_a_miss(open_store, tmp_path):
    async with open_store(num_blocks=2) as store:
        await store.put(contents(1))
        await store.settle()
        await store.put(contents(2, 3))
        await store.settle()
        payloads = bytearray((tmp_path / "kvstore" / "payloads").read_bytes())
        payloads[payloads.index(content(1))] ^= 1
        (tmp_path / "kvstore" / "payloads").write_bytes(payloads)
        assert await store.get([name(1)]) == []
        assert store.disk.totals.num_corrupt == 1


async def test_a_quarantined_block_is_gone_from_memory_and_disk(open_store):
    async with open_store() as store:
        await store.put(contents(1), tenant="a")
        await store.settle()
        report = {"block_hash": name(1), "reader": "client"}
        for tenant, is_gone in (("b", False), ("a", True), ("a", False)):
            answer = await store.client.pool.ReportCorrupt(pool_pb2.ReportCorruptRequest(tenant=tenant, **report))
            assert answer.is_quarantined is is_gone
        assert await store.get([name(1)], tenant="a") == []
        assert store.disk.counts.num_blocks == 0
        assert store.totals.num_quarantined_blocks == 1


async def test_a_tenant_over_its_quota_on_disk_forgets_its_own_blocks_only(open_store):
    quota = f"a={64 * LAYOUT.block_bytes}:{2 * LAYOUT.block_bytes}"
    async with open_store(num_blocks=8, tenant_quotas=(quota,)) as store:
        await store.put(contents(50), tenant="b")
        await store.settle()
        for number in (1, 2, 3):
            await store.put(contents(number), tenant="a")
            await store.settle()
        shelf = store.parts.actor._tiers.shelf
        assert [number for number in (50, 1, 2, 3) if shelf.find(name(number))] == [50, 2, 3]


async def test_another_tenant_finds_nothing_and_can_end_no_lease(open_store):
    async with open_store() as store:
        await store.put(contents(1), tenant="a")
        assert await store.get([name(1)], tenant="b") == []
        assert await store.get([name(1)]) == []
        assert store.totals.num_forged_blocks == 2
        lease = await store.client.acquire([name(1)], tenant="a")
        with pytest.raises(BlockLost):
            await store.client.release(lease, tenant="b")
        await store.client.release(lease, tenant="a")
        put = await store.client.reserve([name(2)], tenant="a")
        with pytest.raises(BlockLost):
            await store.client.commit(put.lease, tenant="b")
        assert await store.client.commit(put.lease, tenant="a") == 1


async def test_wrong_ends_of_a_put_are_refused_and_leave_nothing_behind(open_store):
    async with open_store() as store:
        put = await store.client.reserve([name(1)])
        foreign = put.lease.__class__(lease_id="made up", epoch=put.lease.epoch)
        earlier = put.lease.__class__(lease_id=put.lease.lease_id, epoch="before")
        for lease in (foreign, earlier):
            with pytest.raises(BlockLost):
                await store.client.commit(lease)
        with pytest.raises(InvalidRequest):
            await store.client.commit(put.lease, digests=(1, 2))
        assert await store.client.commit(put.lease, digests=(7,)) == 1
        with pytest.raises(BlockLost):
            await store.client.commit(put.lease)
        revoked = await store.client.reserve([name(2)])
        assert await store.client.commit(revoked.lease, is_complete=False) == 0
        with pytest.raises(BlockLost):
            await store.client.commit(revoked.lease)
        await store.client.release(await store.client.acquire([name(1), name(2)]))
        assert list(store.client.last_get.digests) == [7]


async def test_blocks_of_another_layout_are_refused_whatever_their_size(open_store):
    async with open_store() as store:
        for other in (replace(LAYOUT, num_layers=2), replace(LAYOUT, num_layers=2, head_dim=16)):
            store.client._layout = other
            with pytest.raises(PeerMismatch):
                await store.client.reserve([name(1)])
        store.client._layout = LAYOUT


async def test_a_reader_that_dies_with_its_lease_keeps_nothing(open_store):
    async with open_store() as store:
        await store.put(contents(1))
        await store.client.acquire([name(1)], lease_s=0.05)
        await asyncio.sleep(0.06)
        store.parts.actor.mailbox.tell(Tick())
        await store.settle()


async def test_the_report_counts_what_happened(open_store):
    async with open_store(num_blocks=2) as store:
        await store.put(contents(1, 2))
        await store.settle()
        await store.put(contents(3, 4))
        await store.settle()
        await store.get([name(1), name(9)])
        await store.settle()
        report = store.parts.member.load().store
        assert report.dram_bytes == 2 * LAYOUT.block_bytes
        assert report.disk_bytes == 4 * LAYOUT.block_bytes
        assert report.disk_capacity_bytes == 64 * LAYOUT.block_bytes
        assert (report.num_asked_blocks, report.num_hit_blocks, report.num_disk_hit_blocks) == (2, 1, 1)
        assert (report.num_evicted_blocks, report.num_disk_written_blocks) == (3, 4)


async def test_two_stores_do_not_share_a_folder_and_the_second_goes_on_without(open_store):
    async with open_store() as store, open_store() as other:
        await other.put(contents(1))
        assert await other.get([name(1)]) == [content(1)]
        assert other.disk.counts.num_blocks == 0
        await store.put(contents(2))
