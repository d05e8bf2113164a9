"""The kvstore's pool over real gRPC: leases for readers, blocks kept back, who holds what."""

from collections.abc import AsyncIterator

import pytest

from headrace.clock import VirtualClock
from headrace.core.block import KvLayout
from headrace.core.request import PROTOCOL_VERSION
from headrace.core.wire import layout_to_proto
from headrace.errors import BlockLost, DeadlineExceeded, Draining, InvalidRequest
from headrace.kvstore.config import KvStoreConfig
from headrace.kvstore.opening import NUM_KEPT_BLOCKS
from headrace.runtime.channels import Channels, translate_errors
from headrace.testing.connector import Fabric
from headrace.testing.kvstore import fake_kvstore, serve_kvstore
from headrace.v1 import cluster_pb2, cluster_pb2_grpc, kvstore_pb2, kvstore_pb2_grpc, pool_pb2, pool_pb2_grpc

LAYOUT = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=1, head_dim=8, dtype="fp32")
NUM_BLOCKS = 8
NAMES = [bytes([number]) * 16 for number in range(NUM_BLOCKS)]


class Store:
    """A kvstore on a virtual clock, and the calls of one worker."""

    def __init__(self, parts, clock, channel):
        self.parts, self.clock = parts, clock
        self.puts = kvstore_pb2_grpc.KvStoreServiceStub(channel)
        self.pool = pool_pb2_grpc.PoolServiceStub(channel)
        self.cluster = cluster_pb2_grpc.ClusterServiceStub(channel)

    def deadline_ms(self, seconds):
        return self.clock.unix_ms() + int(seconds * 1000)

    async def meet(self):
        hello = cluster_pb2.HandshakeRequest(
            protocol_version=PROTOCOL_VERSION,
            name="w",
            role=cluster_pb2.ROLE_PREFILL,
            epoch="w-1",
            layout=layout_to_proto(LAYOUT),
        )
        await self.cluster.Handshake(hello, timeout=5.0)

    async def reserve(self, hashes, seconds=10.0):
        request = kvstore_pb2.ReservePutRequest(
            block_hashes=hashes,
            layout=layout_to_proto(LAYOUT),
            writer="w",
            deadline_unix_ms=self.deadline_ms(seconds),
        )
        return (await self.puts.ReservePut(request, timeout=5.0)).lease

    async def put(self, *hashes):
        lease = await self.reserve(hashes)
        request = kvstore_pb2.CommitPutRequest(lease_id=lease.lease_id, epoch=lease.epoch, is_complete=True)
        assert (await self.puts.CommitPut(request, timeout=5.0)).num_committed == len(hashes)

    async def acquire(self, hashes, seconds=10.0):
        request = pool_pb2.AcquireGetRequest(
            block_hashes=hashes, reader="r", deadline_unix_ms=self.deadline_ms(seconds)
        )
        async with translate_errors("kvstore"):
            return (await self.pool.AcquireGet(request, timeout=5.0)).lease

    async def release(self, lease_id, epoch):
        async with translate_errors("kvstore"):
            request = pool_pb2.ReleaseGetRequest(lease_id=lease_id, epoch=epoch)
            await self.pool.ReleaseGet(request, timeout=5.0)

    async def report(self, block_hash):
        request = pool_pb2.ReportCorruptRequest(block_hash=block_hash, reader="r")
        return (await self.pool.ReportCorrupt(request, timeout=5.0)).is_quarantined

    async def leases(self):
        return (await self.pool.ListLeases(pool_pb2.ListLeasesRequest(), timeout=5.0)).leases

    def states(self):
        counts = self.parts.actor.view().counts
        return counts.free, counts.cached, counts.leased


@pytest.fixture
async def unmet() -> AsyncIterator[Store]:
    clock = VirtualClock(1000.0)
    config = KvStoreConfig(memory_bytes=(NUM_BLOCKS + NUM_KEPT_BLOCKS) * LAYOUT.block_bytes, max_hashes=NUM_BLOCKS)
    async with Channels() as channels:
        parts = fake_kvstore(Fabric(), config, clock, channels)
        async with serve_kvstore(parts) as server:
            yield Store(parts, clock, channels.get(server.address))


@pytest.fixture
async def store(unmet) -> Store:
    await unmet.meet()
    await unmet.put(*NAMES[:3])
    return unmet


async def test_a_reader_leases_the_stored_prefix_and_gives_it_back(store):
    lease = await store.acquire(NAMES)
    assert (len(lease.block_ids), len(lease.lease_id)) == (3, 32)
    assert lease.deadline_unix_ms == store.deadline_ms(10.0)
    assert store.states() == (5, 0, 3)
    await store.release(lease.lease_id, lease.epoch)
    assert store.states() == (5, 3, 0)


async def test_what_is_not_stored_is_no_lease(store):
    assert (await store.acquire(NAMES[3:])).lease_id == ""
    assert store.states() == (5, 3, 0)


async def test_a_release_proves_that_the_lease_was_alive(store):
    lease = await store.acquire(NAMES[:1])
    for lease_id, epoch in (("0" * 32, lease.epoch), (lease.lease_id, "before")):
        with pytest.raises(BlockLost):
            await store.release(lease_id, epoch)
    store.clock.advance(10.0)
    with pytest.raises(BlockLost, match="ended by the clock"):
        await store.release(lease.lease_id, lease.epoch)
    assert store.states() == (5, 3, 0)


async def test_bad_calls_and_those_of_a_store_that_leaves_are_refused(store):
    with pytest.raises(InvalidRequest, match="16 bytes"):
        await store.acquire([b"short"])
    with pytest.raises(InvalidRequest, match="at most 8"):
        await store.acquire([*NAMES, NAMES[0]])
    with pytest.raises(DeadlineExceeded):
        await store.acquire(NAMES, seconds=0.0)
    await store.parts.actor.close_door()
    with pytest.raises(Draining):
        await store.acquire(NAMES)


async def test_a_block_reported_as_corrupt_is_given_to_nobody_again(store):
    assert await store.report(NAMES[1])
    assert not await store.report(NAMES[1])
    assert not await store.report(NAMES[5])
    assert len((await store.acquire(NAMES)).block_ids) == 1
    assert store.parts.actor.view().totals.num_quarantined_blocks == 1
    await store.put(NAMES[1])
    assert len((await store.acquire(NAMES)).block_ids) == 3


async def test_a_corrupt_block_that_is_being_read_is_free_when_its_last_reader_leaves(store):
    lease = await store.acquire(NAMES[:3])
    assert await store.report(NAMES[2])
    assert store.states() == (5, 0, 3)
    await store.release(lease.lease_id, lease.epoch)
    assert store.states() == (6, 2, 0)


async def test_the_list_names_readers_and_writers_and_shows_no_usable_handle(store):
    read = await store.acquire(NAMES[:3])
    put = await store.reserve(NAMES[3:5], seconds=20.0)
    store.clock.advance(4.0)
    found = {(report.reader, report.owner, report.is_writer): report for report in await store.leases()}
    reader, lease, writer = found["r", "", False], found["", "w", False], found["", "", True]
    assert (reader.lease, reader.num_blocks, reader.remaining_ms) == (read.lease_id[:8], 3, 6_000)
    assert (lease.lease, lease.num_blocks, lease.remaining_ms) == (put.lease_id[:8], 2, 16_000)
    assert (writer.lease, writer.num_blocks, writer.HasField("remaining_ms")) == (put.lease_id[:8], 2, False)
    assert len(found) == 3


async def test_a_store_without_a_pool_has_nothing_to_list_or_to_lend(unmet):
    assert not await unmet.leases()
    assert not await unmet.report(NAMES[0])
    assert (await unmet.acquire(NAMES)).lease_id == ""
