"""What a worker gets from the kvstore, and what it gets when the store fails."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager

import numpy as np
import pytest

from headrace.clock import Clock, VirtualClock, WallClock
from headrace.core.block import BlockHash, KvLayout
from headrace.core.digest import block_digest
from headrace.core.placement import DECODED, Provenance
from headrace.core.put_facts import PutFacts
from headrace.core.request import PROTOCOL_VERSION
from headrace.core.wire import layout_to_proto
from headrace.errors import BlockLost
from headrace.kvstore.config import KvStoreConfig
from headrace.kvstore.opening import NUM_KEPT_BLOCKS
from headrace.kvstore.service import KvStoreServicer
from headrace.runtime.channels import Channels
from headrace.testing.connector import Fabric, FakeConnector
from headrace.testing.kvstore import fake_kvstore, serve_kvstore
from headrace.transfer.agent import Transport
from headrace.transfer.arena import arena_of, map_blocks
from headrace.transfer.connector import Connector
from headrace.transfer.nixl import NixlConnector
from headrace.transfer.wire import pool_to_proto
from headrace.v1 import cluster_pb2
from headrace.worker.digests import BlockDigests
from headrace.worker.kv_client import KvClient, Put, PutTerms, Stored
from headrace.worker.peers import Peers
from headrace.worker.pool_link import LinkParts, PoolCaller, PoolLink

LAYOUT = KvLayout(num_layers=2, block_tokens=16, num_kv_heads=2, head_dim=16, dtype="fp32")
REAL_LAYOUT = KvLayout(num_layers=30, block_tokens=16, num_kv_heads=3, head_dim=64, dtype="bf16")
NUM_BLOCKS = 32
CLOCK = WallClock()


def names(*numbers: int) -> tuple[BlockHash, ...]:
    return tuple(BlockHash(number.to_bytes(16, "little")) for number in numbers)


def soon(seconds: float = 10.0) -> float:
    return CLOCK.now() + seconds


async def until(is_true: Callable[[], bool], limit_s: float = 5.0) -> None:
    async with asyncio.timeout(limit_s):
        while not is_true():  # noqa: ASYNC110 what is waited for is a counter
            await asyncio.sleep(0.002)


class Worker:
    """A worker's pool and its client."""

    def __init__(self, name: str, address: str, channels: Channels, layout: KvLayout, fabric: Fabric | None) -> None:
        self.name = f"{name}-{time.monotonic_ns()}"
        self.blocks = map_blocks(NUM_BLOCKS, layout.block_bytes)
        self.connector = self._connector(fabric)
        self._caller = PoolCaller(name=name, epoch=self.name, fingerprint="f", layout=layout)
        self.peers = Peers(self.connector, channels, self._introduce, "f")
        self._address, self._channels = address, channels
        self.client = self.client_on(CLOCK)

    def client_on(self, clock: Clock) -> KvClient:
        links = LinkParts(
            channels=self._channels, connector=self.connector, peers=self.peers, caller=self._caller, clock=clock
        )
        digests = BlockDigests(self._caller.layout, 1.0, self.blocks.__getitem__)
        return KvClient(PoolLink(self._address, links), digests)

    def _connector(self, fabric: Fabric | None) -> Connector:
        if fabric is None:
            return NixlConnector(Transport(self.name), arena_of(self.blocks), self.name, CLOCK)
        return FakeConnector(fabric, self.name, self.blocks, self.name, CLOCK)

    def _introduce(self) -> cluster_pb2.HandshakeRequest:
        return cluster_pb2.HandshakeRequest(
            protocol_version=PROTOCOL_VERSION,
            model_fingerprint="f",
            name=self._caller.name,
            role=cluster_pb2.ROLE_PREFILL,
            epoch=self._caller.epoch,
            pool=pool_to_proto(self.connector.pool),
            layout=layout_to_proto(self._caller.layout),
        )

    def fill(self, *blocks: int) -> None:
        for block in blocks:
            self.blocks[block] = block + 1


class Setup:
    """A fake fabric, a served kvstore, workers."""

    def __init__(self, stack: AsyncExitStack, channels: Channels) -> None:
        self.fabric = Fabric()
        self.channels = channels
        self._stack = stack
        self.server = None
        self.parts = None

    async def serve(self, port: int = 0, max_lease_s: float = 60.0) -> None:
        config = KvStoreConfig(memory_bytes=(32 + NUM_KEPT_BLOCKS) * LAYOUT.block_bytes, max_lease_s=max_lease_s)
        self.parts = fake_kvstore(self.fabric, config, CLOCK, self.channels)
        self._serving = serve_kvstore(self.parts, port)
        self.server = await self._serving.__aenter__()

    async def stop(self) -> int:
        port = self.server.port
        await self._serving.__aexit__(None, None, None)
        return port

    def worker(self, name: str = "w") -> Worker:
        worker = Worker(name, self.server.address, self.channels, LAYOUT, self.fabric)
        self._stack.push_async_callback(worker.connector.close)
        return worker

    def store_agent(self) -> str:
        return self.parts.actor.connector.pool.agent_name

    def ledger(self) -> tuple[int, int, int]:
        ledger = self.parts.member.load().ledger
        assert ledger.free + ledger.cached + ledger.leased == ledger.total == 32
        return ledger.cached, ledger.leased, ledger.num_leases


@pytest.fixture
async def setup() -> AsyncIterator[Setup]:
    async with AsyncExitStack() as stack:
        channels = await stack.enter_async_context(Channels())
        made = Setup(stack, channels)
        await made.serve()
        yield made
        await made.stop()


async def test_what_one_worker_stores_another_fetches(setup):
    one, other = setup.worker("one"), setup.worker("other")
    one.fill(3, 4, 5)
    assert await one.client.store(names(1, 2, 3), [3, 4, 5], soon()) == 3
    assert await other.client.match(names(1, 2, 3, 4)) == {"kvstore": 3}
    assert await other.client.fetch(names(1, 2, 3, 4), [9, 8, 7, 6], soon()) == 3
    assert [int(other.blocks[block, 0]) for block in (9, 8, 7, 6)] == [4, 5, 6, 0]
    assert setup.ledger() == (3, 0, 0)
    assert one.client.num_stored_blocks == 3


async def test_blocks_the_store_has_are_not_moved_again(setup):
    worker = setup.worker()
    await worker.client.store(names(1, 2), [0, 1], soon())
    written = worker.connector.stats().written_bytes
    assert await worker.client.store(names(1, 2), [0, 1], soon()) == 0
    assert await worker.client.store(names(1, 2, 3), [0, 1, 2], soon()) == 1
    assert worker.connector.stats().written_bytes == written + LAYOUT.block_bytes
    assert await worker.client.fetch(names(8), [5], soon()) == 0
    assert worker.client.link.num_failures == 0


async def test_a_restarted_store_is_met_again(setup):
    worker = setup.worker()
    await worker.client.store(names(1), [0], soon())
    await setup.serve(await setup.stop())
    async with asyncio.timeout(10.0):
        while not await worker.client.store(names(1), [0], soon()):  # noqa: ASYNC110 the store comes back by itself
            await asyncio.sleep(0.05)
    assert await worker.client.fetch(names(1), [7], soon()) == 1


async def test_a_dead_store_is_a_miss_and_soon_costs_nothing(setup):
    worker = setup.worker()
    await worker.client.store(names(1), [0], soon())
    port = await setup.stop()
    assert await worker.client.fetch(names(1), [7], soon()) == 0
    begun_s = time.monotonic()
    for _ in range(20):
        assert await worker.client.fetch(names(1), [7], soon()) == 0
        assert await worker.client.store(names(2), [1], soon()) == 0
        assert await worker.client.match(names(1)) == {}
    assert time.monotonic() - begun_s < 0.2
    assert worker.client.link.num_failures == 1
    await setup.serve(port)


async def test_a_store_that_stays_away_costs_one_call_per_growing_pause(setup):
    worker, clock = setup.worker(), VirtualClock(100.0)
    await worker.client.store(names(1), [0], soon())
    client = worker.client_on(clock)
    port = await setup.stop()
    assert await client.match(names(1)) == {}
    failures = []
    for _ in range(20):
        clock.advance(1.0)
        answers = await asyncio.gather(*(client.match(names(1)) for _ in range(5)))
        assert answers == [{}] * 5
        failures.append(client.link.num_failures)
    assert failures == [2, 2, 3, 3, 3, 3, *[4] * 8, *[5] * 6]
    await setup.serve(port)


async def test_a_read_that_stalls_costs_its_deadline_and_the_blocks_it_may_still_write(setup):
    worker = setup.worker()
    worker.fill(0)
    await worker.client.store(names(1), [0], soon())
    setup.fabric.stall(setup.store_agent())
    with pytest.raises(BlockLost):
        await worker.client.fetch(names(1), [7], soon(0.2))
    settled = asyncio.Event()
    worker.connector.when_settled([7], settled.set)
    assert not settled.is_set()
    setup.fabric.resume(setup.store_agent())
    await asyncio.wait_for(settled.wait(), 2.0)
    assert setup.ledger() == (1, 0, 0)


async def test_a_write_that_stalls_is_not_revoked_while_it_may_still_land(setup):
    worker = setup.worker()
    await worker.client.store(names(1), [0], soon())
    setup.fabric.stall(setup.store_agent())
    assert await worker.client.store(names(2), [1], soon(0.2)) == 0
    cached, leased, _ = setup.ledger()
    assert (cached, leased) == (1, 1)
    setup.fabric.resume(setup.store_agent())
    assert await worker.client.match(names(2)) == {}


async def test_the_store_is_told_whose_blocks_these_are_how_they_came_to_be_and_their_digests(setup, monkeypatch):
    worker, told = setup.worker(), []
    worker.fill(0)
    for method in ("ReservePut", "CommitPut"):
        monkeypatch.setattr(KvStoreServicer, method, heard(getattr(KvStoreServicer, method), told))
    await setup.serve(await setup.stop())
    facts = PutFacts(tenant="acme", num_blocks_before=70, segment_key=names(9)[0], origin=DECODED)
    put = Put(hashes=names(1), local_ids=[0], facts=facts)
    assert await worker.client.put(put, PutTerms(deadline_s=soon())) == Stored(num_new=1)
    reserve, commit = told
    assert (reserve.tenant, reserve.num_blocks_before, reserve.segment_key) == ("acme", 70, names(9)[0])
    assert (reserve.provenance, reserve.writer_epoch) == (Provenance.DECODED, worker.name)
    assert (commit.tenant, list(commit.digests)) == ("acme", [block_digest(worker.blocks[0], LAYOUT)])


def heard(method, told):
    """Return a method of a servicer that tells its requests."""

    async def tell(self, request, context):
        told.append(request)
        return await method(self, request, context)

    return tell


async def test_a_put_in_groups_waits_before_each_and_becomes_visible_at_once(setup):
    worker, waits = setup.worker(), []
    worker.fill(0, 1, 2)

    async def wait(num_blocks):
        waits.append(num_blocks)
        assert setup.ledger()[0] == 0

    terms = PutTerms(deadline_s=soon(), group_blocks=2, before_write=wait)
    assert await worker.client.put(Put(hashes=names(1, 2, 3), local_ids=[0, 1, 2]), terms) == Stored(num_new=3)
    assert waits == [2, 1]
    assert await worker.client.fetch(names(1, 2, 3), [9, 8, 7], soon()) == 3
    assert [int(worker.blocks[block, 0]) for block in (9, 8, 7)] == [1, 2, 3]


async def test_a_put_says_whether_the_store_failed_or_has_all_blocks(setup):
    worker = setup.worker()
    put, terms = Put(hashes=names(1), local_ids=[0]), PutTerms(deadline_s=soon())
    assert [await worker.client.put(put, terms), await worker.client.put(put, terms)] == [Stored(num_new=1), Stored()]
    await setup.stop()
    assert await worker.client.put(put, terms) is None
    await setup.serve()


async def test_nothing_is_written_after_a_lease_that_the_store_has_cut(setup):
    await setup.serve(await setup.stop(), max_lease_s=0.1)
    worker = setup.worker()

    async def dawdle(_: int) -> None:
        await asyncio.sleep(0.15)

    put = Put(hashes=names(1, 2), local_ids=(0, 1))
    assert await worker.client.put(put, PutTerms(deadline_s=soon(), before_write=dawdle)) is None
    assert worker.connector.stats().written_bytes == 0


async def test_data_read_after_the_lease_had_ended_is_not_believed(setup):
    await setup.serve(await setup.stop(), max_lease_s=0.5)
    worker = setup.worker()
    await worker.client.store(names(1), [0], soon())
    setup.fabric.stall(setup.store_agent())
    fetching = asyncio.create_task(worker.client.fetch(names(1), [7], soon()))
    await until(lambda: setup.ledger()[2] == 1)
    await until(lambda: setup.ledger()[2] == 0)
    setup.fabric.resume(setup.store_agent())
    assert await fetching == 0


async def test_a_cancelled_fetch_ends_its_lease(setup):
    worker = setup.worker()
    await worker.client.store(names(1), [0], soon())
    setup.fabric.stall(setup.store_agent())
    fetching = asyncio.create_task(worker.client.fetch(names(1), [7], soon()))
    await until(lambda: worker.connector.stats().num_inflight == 1)
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert setup.ledger() == (1, 0, 0)
    setup.fabric.resume(setup.store_agent())


@contextmanager
def store_process(memory_bytes: int) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace.testing.kvstore", str(memory_bytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.mark.cluster
@pytest.mark.parametrize("tls", ["", "tcp"])
async def test_real_blocks_survive_the_way_through_a_store_in_another_process(tls, monkeypatch):
    if tls:
        monkeypatch.setenv("UCX_TLS", tls)
    with store_process(64 * REAL_LAYOUT.block_bytes) as (process, address):
        async with Channels() as channels:
            one = Worker("one", address, channels, REAL_LAYOUT, None)
            other = Worker("other", address, channels, REAL_LAYOUT, None)
            words = one.blocks.view(np.uint64)
            words[:] = np.arange(words.size, dtype=np.uint64).reshape(words.shape)
            hashes = names(*range(NUM_BLOCKS))
            await one.peers.ensure(address)
            await other.peers.ensure(address)
            assert await one.client.store(hashes, range(NUM_BLOCKS), soon()) == NUM_BLOCKS
            backwards = range(NUM_BLOCKS - 1, -1, -1)
            assert await other.client.fetch(hashes, backwards, soon()) == NUM_BLOCKS
            assert (other.blocks[::-1] == one.blocks).all()

            process.send_signal(signal.SIGKILL)
            begun_s = time.monotonic()
            assert await other.client.fetch(hashes, backwards, soon()) == 0
            assert time.monotonic() - begun_s < 2.0
            await one.connector.close()
            await other.connector.close()
