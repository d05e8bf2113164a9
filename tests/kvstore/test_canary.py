"""The kvstore calls itself ready when a block has come back from its own address, and only then."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from headrace.clock import WallClock
from headrace.core.block import KvLayout
from headrace.errors import ConfigError
from headrace.kvstore import canary, member
from headrace.kvstore.config import KvStoreConfig
from headrace.kvstore.messages import Meet
from headrace.kvstore.parts import KvStoreParts, build
from headrace.runtime.channels import Channels
from headrace.runtime.server import GrpcServer
from headrace.testing.connector import Fabric, FakeConnector
from headrace.testing.kvstore import fake_kvstore, serve_kvstore

LAYOUT = KvLayout(num_layers=2, block_tokens=16, num_kv_heads=2, head_dim=16, dtype="fp32")
CONFIG = KvStoreConfig(memory_bytes=40 * LAYOUT.block_bytes, settle_s=0.05)
CLOCK = WallClock()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(member, "CANARY_INTERVAL_S", 0.01)
    monkeypatch.setattr(member, "CANARY_RETRY_S", 0.005)


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10.0):
        while not is_true():  # noqa: ASYNC110 what is waited for is a counter
            await asyncio.sleep(0.002)


class Store:
    """A served kvstore that proves itself when told to."""

    def __init__(self, parts: KvStoreParts, server: GrpcServer, fabric: Fabric, tasks: asyncio.TaskGroup) -> None:
        self.parts, self.server, self.fabric = parts, server, fabric
        self._tasks = tasks
        self.keeping: asyncio.Task[None] | None = None

    def keep_ready(self) -> None:
        self.keeping = self._tasks.create_task(self.parts.member.keep_ready(self.server, self.parts.canary))

    async def ready(self) -> None:
        await until(lambda: self.health() == (True, ""))

    def health(self) -> tuple[bool, str]:
        return self.server.is_ready, self.parts.member.not_ready_reason

    async def meet(self) -> None:
        await self.parts.actor.mailbox.ask(
            lambda reply: Meet(worker="w", epoch="a", layout=LAYOUT, reply=reply),
        )

    def num_proven(self) -> int:
        return self.parts.actor.view().canary.num_hit_blocks


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    fabric = Fabric()
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        channels = await stack.enter_async_context(Channels())
        parts = fake_kvstore(fabric, CONFIG, CLOCK, channels)
        server = await stack.enter_async_context(serve_kvstore(parts))
        made = Store(parts, server, fabric, tasks)
        yield made
        if made.keeping is not None:
            made.keeping.cancel()


async def test_it_is_ready_before_any_worker_came_and_keeps_proving(store):
    assert store.parts.member.load().is_ready is False
    store.keep_ready()
    await store.ready()
    assert store.parts.member.load().is_ready
    await until(lambda: store.num_proven() >= 3)
    assert store.parts.member.describe().HasField("layout") is False
    assert store.parts.actor.view().counts is None


async def test_it_reports_its_load_while_its_pool_is_being_opened(store):
    store.keep_ready()
    async with asyncio.timeout(10.0):
        while not store.parts.member.load().is_ready:  # noqa: ASYNC110 each turn of the loop asks for a report
            await asyncio.sleep(0)


async def test_a_pool_that_a_worker_opened_is_proven_too_and_stays_as_it_was(store):
    store.keep_ready()
    await store.ready()
    await store.meet()
    before = (store.parts.actor.view().counts, repr(store.parts.actor.view().totals))
    num_messages = store.parts.member.load().num_steps
    await until(lambda: store.num_proven() >= 3)
    assert store.health() == (True, "")
    assert (store.parts.actor.view().counts, repr(store.parts.actor.view().totals)) == before
    # The timer and a canary's handshake are counted; four calls for each of three canaries would be twelve.
    assert store.parts.member.load().num_steps - num_messages < 6
    assert store.parts.actor.view().num_own_messages >= 12


async def test_blocks_that_do_not_move_take_readiness_away_and_give_it_back(store, monkeypatch):
    monkeypatch.setattr(canary, "TIMEOUT_S", 0.1)
    store.keep_ready()
    await store.ready()
    agent = store.parts.actor.connector.pool.agent_name
    store.fabric.stall(agent)
    await until(lambda: not store.server.is_ready)
    assert "canary block" in store.server.not_ready_reason
    store.fabric.resume(agent)
    await store.ready()


async def test_bytes_that_change_on_the_way_take_readiness_away(store, monkeypatch):
    read = FakeConnector.read

    async def damaging(self, agent_name, local_ids, *where):
        await read(self, agent_name, local_ids, *where)
        self.blocks[local_ids[0], -1] ^= 1

    monkeypatch.setattr(FakeConnector, "read", damaging)
    store.keep_ready()
    await until(lambda: store.parts.member.not_ready_reason == "the canary block came back with other bytes")
    assert not store.server.is_ready
    monkeypatch.undo()
    await store.ready()


async def test_an_address_where_nobody_answers_is_not_ready(store):
    reason = await store.parts.canary.try_once("127.0.0.1:1")
    assert reason == "the canary block could not be put"


async def test_an_answer_that_never_comes_ends_by_the_clock(store, monkeypatch):
    monkeypatch.setattr(canary, "TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert await store.parts.canary.try_once(f"127.0.0.1:{port}") == "the canary block did not come back in time"


async def test_without_a_transport_it_is_not_ready_and_says_what_is_wrong(store):
    def refuse(blocks: object) -> FakeConnector:
        raise ConfigError("NIXL finds no transport")

    actor = store.parts.actor
    actor._edges = replace(actor._edges, connect=refuse)
    assert await store.parts.canary.try_once(store.server.address) == "the canary block failed: config"


async def test_a_draining_store_is_not_ready_whatever_the_canary_says(store):
    store.keep_ready()
    await store.ready()
    await store.parts.member.drain(0.0)
    load = store.parts.member.load()
    assert (load.is_ready, load.not_ready_reason) == (False, "draining")


async def test_real_blocks_by_the_real_transport_before_and_after_the_first_worker():
    async with asyncio.TaskGroup() as tasks, Channels() as channels:
        config = replace(CONFIG, name="proven")
        parts = build(config, epoch="e", clock=CLOCK, channels=channels, begin_drain=lambda _: None)
        async with serve_kvstore(parts) as server:
            store = Store(parts, server, Fabric(), tasks)
            store.keep_ready()
            await store.ready()
            await store.meet()
            assert parts.actor.connector.pool.block_bytes == LAYOUT.block_bytes
            await until(lambda: store.num_proven() >= 1)
            await store.ready()
            store.keeping.cancel()
            await asyncio.wait([store.keeping])
