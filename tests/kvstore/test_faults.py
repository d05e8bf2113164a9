"""A kvstore and its clients that stop, stall and die at bad moments, as processes and over the real transport."""

import asyncio
import contextlib
import itertools
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest

from headrace.clock import WallClock
from headrace.core.block import KvLayout
from headrace.core.segments import store_of
from headrace.errors import BlockLost, Draining, HeadraceError, PeerFailed
from headrace.kvstore.__main__ import leave
from headrace.kvstore.config import KvStoreConfig
from headrace.kvstore.messages import Tick
from headrace.kvstore.opening import NUM_KEPT_BLOCKS
from headrace.kvstore.parts import KvStoreParts, build
from headrace.runtime.channels import Channels
from headrace.testing.connector import Fabric, FakeConnector
from headrace.testing.kvstore import SETTLE_S, StoreClient, fake_kvstore, serve_kvstore
from headrace.transfer.agent import Transport
from headrace.transfer.arena import arena_of, map_blocks
from headrace.transfer.nixl import NixlConnector
from headrace.v1 import cluster_pb2, cluster_pb2_grpc

LAYOUT = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=1, head_dim=64, dtype="fp32")
NUM_BLOCKS = 6
NUM_ROUNDS = 25
CHAIN = 4
NUM_HANDED = 60 * CHAIN
CLOCK = WallClock()


def name(number: int) -> bytes:
    return number.to_bytes(16, "little")


def content(number: int) -> bytes:
    return np.random.default_rng(number).bytes(LAYOUT.block_bytes)


@asynccontextmanager
async def process(folder, num_blocks=NUM_BLOCKS) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    size = str((num_blocks + NUM_KEPT_BLOCKS) * LAYOUT.block_bytes)
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.DEVNULL}
    command = [sys.executable, "-m", "headrace.testing.kvstore", size, str(folder)]
    started = await asyncio.create_subprocess_exec(*command, **pipes)
    try:
        async with asyncio.timeout(30.0):
            yield started, (await started.stdout.readline()).decode().strip()
    finally:
        with contextlib.suppress(ProcessLookupError):
            started.kill()
        await started.wait()


@asynccontextmanager
async def client_of(address: str, agent: str) -> AsyncIterator[tuple[StoreClient, Channels]]:
    memory = map_blocks(32, LAYOUT.block_bytes)
    connector = NixlConnector(Transport(agent, is_passive=False), arena_of(memory), agent, CLOCK)
    try:
        async with Channels() as channels:
            yield StoreClient(address, channels, connector, memory, LAYOUT, CLOCK), channels
    finally:
        await connector.close()


async def until(channels: Channels, address: str, is_true: Callable[[cluster_pb2.LoadReport], object]) -> None:
    stub = cluster_pb2_grpc.ClusterServiceStub(channels.get(address))
    async with asyncio.timeout(10.0 + SETTLE_S):
        async for answer in stub.WatchLoad(cluster_pb2.WatchLoadRequest(interval_ms=100)):
            if is_true(answer.load):
                return


async def keep_busy(client: StoreClient, is_busy: asyncio.Event) -> None:
    """Put and get until the store is gone."""
    for number in range(10_000):
        with contextlib.suppress(HeadraceError):
            chain = {name(10 * number + i): content(10 * number + i) for i in range(3)}
            await client.put(chain)
            got = await client.get(list(chain))
            assert got == list(chain.values())[: len(got)]
            if number == NUM_ROUNDS:
                is_busy.set()
            got = await client.get([name(10 * (number // 2))])
            assert got in ([], [content(10 * (number // 2))])


@pytest.mark.cluster
async def test_killed_in_the_midst_of_puts_gets_and_evictions_it_never_gives_a_wrong_byte_again(tmp_path):
    num_found = 0
    for life in range(2):
        async with process(tmp_path) as (started, address), client_of(address, f"busy-{life}") as (client, _):
            is_busy = asyncio.Event()
            busy = asyncio.create_task(keep_busy(client, is_busy))
            async with asyncio.timeout(20.0):
                await is_busy.wait()
            started.kill()
            busy.cancel()
            with contextlib.suppress(asyncio.CancelledError, HeadraceError):
                await busy
    async with process(tmp_path) as (_, address), client_of(address, "after") as (client, channels):
        await client.acquire([])
        await until(channels, address, lambda load: load.store.disk_bytes)
        for number in range(200):
            got = await client.get([name(10 * number + i) for i in range(3)])
            assert got == [content(10 * number + i) for i in range(len(got))]
            num_found += len(got)
        await until(channels, address, lambda load: not load.ledger.num_leases and not load.ledger.leased)
    assert num_found > 3


@pytest.mark.cluster
async def test_stopped_for_longer_than_a_lease_it_takes_no_late_commit_and_leaks_nothing(tmp_path):
    async with process(tmp_path) as (started, address), client_of(address, "late") as (client, channels):
        late = await client.reserve([name(1), name(2)], lease_s=0.3)
        started.send_signal(signal.SIGSTOP)
        await asyncio.sleep(0.5)
        started.send_signal(signal.SIGCONT)
        await client.write(late.lease, (0, 1))
        with pytest.raises(BlockLost):
            await client.commit(late.lease)
        silent = await client.reserve([name(3)], lease_s=0.1)
        assert silent.indices
        await until(channels, address, lambda load: load.ledger.free == NUM_BLOCKS and not load.ledger.num_leases)
        assert await client.get([name(1)]) == []


@asynccontextmanager
async def leaver_of(siblings: list[str], channels: Channels) -> AsyncIterator[tuple[KvStoreParts, str]]:
    size = (NUM_HANDED + NUM_KEPT_BLOCKS) * LAYOUT.block_bytes
    config = KvStoreConfig(name="leaver", memory_bytes=size, siblings=tuple(siblings), settle_s=SETTLE_S)
    epoch = secrets.token_hex(4)
    parts = build(config, epoch=epoch, clock=CLOCK, channels=channels, begin_drain=lambda _: None)
    async with serve_kvstore(parts) as server:
        yield parts, server.address


@asynccontextmanager
async def reading_on(clients: list[StoreClient], keys: list[int], refusals: list[HeadraceError]) -> AsyncIterator[None]:
    """Read chains everywhere meanwhile; what comes is right, and what does not come is a typed miss."""

    is_over = asyncio.Event()

    async def keep_reading() -> None:
        for client, key in itertools.cycle(itertools.product(clients, keys)):
            if is_over.is_set():
                return  # Between two reads: one that is cancelled leaves its lease to the clock.
            try:
                got = await client.get([name(key + i) for i in range(CHAIN)])
            except HeadraceError as error:
                refusals.append(error)
            else:
                assert got == [content(key + i) for i in range(len(got))]

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(keep_reading())
        try:
            yield
        finally:
            is_over.set()


@pytest.mark.cluster
async def test_a_store_that_leaves_while_a_sibling_is_killed_gives_the_rest_to_the_other_and_readers_no_fault(tmp_path):
    keys = [1000 * number for number in range(1, NUM_HANDED // CHAIN + 1)]
    refusals: list[HeadraceError] = []
    async with (
        process(tmp_path / "a", NUM_HANDED) as (victim, lost),
        process(tmp_path / "b", NUM_HANDED) as (_, kept),
        client_of(kept, "reader") as (reader, channels),
        leaver_of([lost, kept], channels) as (parts, address),
    ):
        clients = [reader.of(address), reader.of(lost), reader]
        for key in keys:
            assert await clients[0].put({name(key + i): content(key + i) for i in range(CHAIN)}, segment_key=name(key))
        await clients[1].acquire([])
        async with asyncio.timeout(10.0), reading_on(clients, keys, refusals):
            leaving = asyncio.create_task(leave(parts, CLOCK, 20.0))
            while parts.handover.num_blocks < NUM_HANDED // 4:  # noqa: ASYNC110 it sets no event
                await asyncio.sleep(0)
            num_before = parts.handover.num_blocks
            victim.kill()
            await leaving
        assert num_before < NUM_HANDED
        assert parts.handover.num_blocks == NUM_HANDED
        parts.actor.verify()
        assert parts.actor.view().counts.num_leases == 0
        assert {type(error) for error in refusals} <= {Draining, PeerFailed, BlockLost}
        assert Draining in map(type, refusals)
        heirs = [key for key in keys if len(await reader.get([name(key + i) for i in range(CHAIN)])) == CHAIN]
        assert {key for key in keys if store_of(name(key), [lost, kept]) == kept} < set(heirs)
        await until(channels, kept, lambda load: not load.ledger.num_leases)


class Writer:
    """A process that puts; see `headrace.testing.store_writer`."""

    def __init__(self, started: asyncio.subprocess.Process) -> None:
        self.signal = started.send_signal
        self._started = started

    async def ask(self, line: str) -> str:
        self._started.stdin.write(line.encode() + b"\n")
        return (await self._started.stdout.readline()).decode().strip()

    async def blocks(self, verb: str, lease_s: float, *numbers: int) -> set[int]:
        answer = await self.ask(f"{verb} {lease_s} {' '.join(map(str, numbers))}")
        return {int(word) for word in answer.split()}


@asynccontextmanager
async def writer_of(address: str) -> AsyncIterator[Writer]:
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.DEVNULL}
    command = [sys.executable, "-m", "headrace.testing.store_writer", address]
    started = await asyncio.create_subprocess_exec(*command, **pipes)
    try:
        yield Writer(started)
    finally:
        with contextlib.suppress(ProcessLookupError):
            started.kill()
        await started.wait()


@pytest.mark.cluster
async def test_a_writer_process_stopped_for_longer_than_its_lease_spoils_nothing_when_it_goes_on(tmp_path):
    async with (
        process(tmp_path) as (_, address),
        client_of(address, "other") as (other, channels),
        writer_of(address) as late,
    ):
        pages = await late.blocks("reserve", 0.3, 1, 2)
        late.signal(signal.SIGSTOP)
        await until(channels, address, lambda load: load.ledger.num_leases == 1)
        put = await other.reserve([name(number) for number in range(11, 17)])
        assert len(pages) == 2
        assert set(put.lease.block_ids) == set(range(NUM_BLOCKS)) - pages
        assert await other.commit(put.lease, is_complete=False) == 0
        late.signal(signal.SIGCONT)
        assert await late.ask("write 30") == "ok"
        assert await late.ask("commit") == "block_lost"
        assert await other.get([name(1)]) == []

        pages = await late.blocks("reserve", 0.3, *range(1, NUM_BLOCKS + 1))
        late.signal(signal.SIGSTOP)
        await until(channels, address, lambda load: load.ledger.free == NUM_BLOCKS)
        assert pages == set(range(NUM_BLOCKS))
        chain = {name(number): content(number) for number in range(21, 21 + NUM_BLOCKS)}
        assert await other.put(chain) == NUM_BLOCKS
        late.signal(signal.SIGCONT)
        assert await late.ask("write 0") == "deadline_exceeded"
        assert await late.ask("commit") == "block_lost"
        assert await other.get(list(chain)) == list(chain.values())
        assert await other.get([name(1)]) == []
        await until(channels, address, lambda load: load.ledger.cached == NUM_BLOCKS and not load.ledger.num_leases)


@pytest.mark.cluster
async def test_what_a_killed_reader_had_leased_stays_until_its_lease_ends_and_no_longer(tmp_path):
    async with (
        process(tmp_path) as (_, address),
        client_of(address, "other") as (other, channels),
        writer_of(address) as reader,
    ):
        assert await other.put({name(number): content(number) for number in (1, 2)}) == 2
        assert len(await reader.blocks("acquire", 3.0, 1, 2)) == 2
        reader.signal(signal.SIGKILL)
        assert await other.put({name(number): content(number) for number in range(11, 17)}) == NUM_BLOCKS - 2
        assert await other.get([name(1), name(2)]) == [content(1), content(2)]
        await until(channels, address, lambda load: not load.ledger.num_leases and not load.ledger.leased)
        assert await other.put({name(number): content(number) for number in range(21, 27)}) == NUM_BLOCKS


async def test_a_writer_that_stalls_beyond_its_lease_writes_into_no_block_of_others():
    fabric = Fabric()
    config = KvStoreConfig(memory_bytes=(2 + NUM_KEPT_BLOCKS) * LAYOUT.block_bytes, settle_s=0.2)
    async with Channels() as channels:
        parts = fake_kvstore(fabric, config, CLOCK, channels)
        async with serve_kvstore(parts) as server:
            clients = []
            for agent in ("slow", "quick"):
                memory = map_blocks(4, LAYOUT.block_bytes)
                connector = FakeConnector(fabric, agent, memory, "c", CLOCK)
                clients.append(StoreClient(server.address, channels, connector, memory, LAYOUT, CLOCK))
            slow, quick = clients
            put = await slow.reserve([name(1), name(2)], lease_s=0.05)
            fabric.stall("slow")
            writing = asyncio.create_task(slow.write(put.lease, (0, 1)))
            await asyncio.sleep(0.06)
            parts.actor.mailbox.tell(Tick())
            assert await quick.put({name(3): content(3)}) == 0
            fabric.resume("slow")
            await writing
            with pytest.raises(BlockLost):
                await slow.commit(put.lease)
            assert await quick.put({name(3): content(3)}) == 1
            assert await quick.get([name(3)]) == [content(3)]
            parts.actor.verify()
