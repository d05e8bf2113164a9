"""A store that leaves hands its blocks to those who are asked next."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import numpy as np
import pytest

from headrace.clock import WallClock
from headrace.core.block import KvLayout
from headrace.core.placement import Origin, Provenance
from headrace.core.segments import SEGMENT_BLOCKS, store_of
from headrace.errors import Draining
from headrace.kvstore import handover
from headrace.kvstore.__main__ import leave
from headrace.kvstore.config import KvStoreConfig
from headrace.kvstore.handover import chains_of
from headrace.kvstore.opening import NUM_KEPT_BLOCKS
from headrace.kvstore.stored_block import StoredBlock
from headrace.runtime.channels import Channels
from headrace.testing.connector import Fabric, FakeConnector
from headrace.testing.kvstore import StoreClient, fake_kvstore, serve_kvstore
from headrace.transfer.arena import map_blocks
from headrace.worker import pool_link

LAYOUT = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=1, head_dim=32, dtype="fp32")
CLOCK = WallClock()
NOBODY = "127.0.0.1:1"


def name(number: int) -> bytes:
    return number.to_bytes(16, "little")


def content(number: int) -> bytes:
    return np.random.default_rng(number).bytes(LAYOUT.block_bytes)


class Family:
    """Stores that know each other, and a client of each."""

    def __init__(self, stack: AsyncExitStack, folder) -> None:
        self._stack, self._folder = stack, folder
        self.fabric = Fabric()
        self.clients: dict[str, StoreClient] = {}
        self.parts = {}

    async def serve(self, siblings=(), num_blocks=64, has_disk=False) -> str:
        config = KvStoreConfig(
            memory_bytes=(num_blocks + NUM_KEPT_BLOCKS) * LAYOUT.block_bytes,
            siblings=tuple(siblings),
            disk_dir=self._folder if has_disk else None,
            disk_bytes=1 << 20,
            name=f"store-{len(self.parts)}",
        )
        channels = await self._stack.enter_async_context(Channels())
        parts = fake_kvstore(self.fabric, config, CLOCK, channels)
        server = await self._stack.enter_async_context(serve_kvstore(parts))
        memory = map_blocks(64, LAYOUT.block_bytes)
        connector = FakeConnector(self.fabric, f"client-{server.address}", memory, "c", CLOCK)
        self.parts[server.address] = parts
        self.clients[server.address] = StoreClient(server.address, channels, connector, memory, LAYOUT, CLOCK)
        return server.address

    def agent_of(self, address: str) -> str:
        return self.parts[address].actor.connector.pool.agent_name

    async def leave(self, address: str, grace_s: float = 10.0) -> int:
        await leave(self.parts[address], CLOCK, grace_s)
        self.parts[address].actor.verify()
        return self.parts[address].handover.num_blocks


@pytest.fixture
async def family(tmp_path) -> AsyncIterator[Family]:
    async with AsyncExitStack() as stack:
        yield Family(stack, tmp_path)


async def put_chain(client, key: int, length: int, tenant: str = "") -> None:
    chain = {name(number): content(number) for number in range(key, key + length)}
    assert await client.put(chain, tenant=tenant, segment_key=name(key)) == length


async def test_each_segment_goes_to_the_store_that_is_asked_without_this_one(family):
    siblings = [await family.serve(), await family.serve()]
    leaver = await family.serve(siblings)
    # So many that no choice of ports gives them all to one.
    keys = range(100, 2000, 100)
    for key in keys:
        await put_chain(family.clients[leaver], key, 3, tenant="a")
    assert await family.leave(leaver) == 3 * len(keys)
    assert {store_of(name(key), siblings) for key in keys} == set(siblings)
    for key in keys:
        heir = family.clients[store_of(name(key), siblings)]
        chain = range(key, key + 3)
        assert await heir.get([name(number) for number in chain], tenant="a") == [content(number) for number in chain]
        assert await heir.get([name(key)], tenant="b") == []
    with pytest.raises(Draining):
        await family.clients[leaver].acquire([name(100)])


async def test_blocks_on_disk_go_too(family):
    heir = await family.serve()
    leaver = await family.serve([heir], num_blocks=4, has_disk=True)
    errands = family.parts[leaver].actor._errands
    await family.clients[leaver].acquire([])
    for key in (100, 200, 300):
        await errands.settled()
        await put_chain(family.clients[leaver], key, 3)
    await errands.settled()
    assert await family.leave(leaver) == 9
    for key in (100, 200, 300):
        assert len(await family.clients[heir].get([name(number) for number in range(key, key + 3)])) == 3


async def test_a_sibling_that_is_gone_is_passed_over(family):
    heir = await family.serve()
    leaver = await family.serve([NOBODY, heir])
    await put_chain(family.clients[leaver], 100, 3)
    await put_chain(family.clients[leaver], 200, 3)
    assert await family.leave(leaver) == 6


async def test_what_a_sibling_takes_too_long_for_is_held_until_it_has_settled_and_goes_to_the_next(family, monkeypatch):
    monkeypatch.setattr(handover, "PUT_TIMEOUT_S", 0.2)
    siblings = [await family.serve(), await family.serve()]
    leaver = await family.serve(siblings)
    stalled = store_of(name(100), siblings)
    [heir] = set(siblings) - {stalled}
    await put_chain(family.clients[leaver], 100, 3)
    await family.clients[stalled].acquire([])
    family.fabric.stall(family.agent_of(stalled))
    assert await family.leave(leaver, 1.0) == 3
    assert len(await family.clients[heir].get([name(number) for number in range(100, 103)])) == 3
    assert family.parts[leaver].actor.view().counts.leased == 3
    family.fabric.resume(family.agent_of(stalled))
    async with asyncio.timeout(5.0):
        while family.parts[leaver].actor.view().counts.leased:  # noqa: ASYNC110 the actor sets no event
            await asyncio.sleep(0.005)


async def test_a_sibling_that_opens_its_pool_for_it_may_take_longer_than_a_put(family, monkeypatch):
    monkeypatch.setattr(pool_link, "CONTROL_TIMEOUT_S", 0.0)
    leaver = await family.serve([await family.serve()])
    await put_chain(family.clients[leaver], 100, 3)
    assert await family.leave(leaver) == 3


async def test_several_chains_are_on_their_way_at_once_but_no_more_than_memory_is_meant_for(family):
    heir = await family.serve()
    for num_blocks, num_at_once in ((8 * SEGMENT_BLOCKS, handover.PUTS_AT_ONCE), (SEGMENT_BLOCKS, 1)):
        leaver = await family.serve([heir], num_blocks=num_blocks)
        for key in (100, 200, 300, 400, 500, 600):
            await put_chain(family.clients[leaver], key + num_blocks, 2)
        await family.clients[heir].acquire([])
        family.fabric.stall(family.agent_of(heir))
        leaving = asyncio.create_task(family.leave(leaver))
        connector = family.parts[leaver].actor.connector
        async with asyncio.timeout(5.0):
            while connector.stats().num_inflight < num_at_once:  # noqa: ASYNC110 it sets no event
                await asyncio.sleep(0.005)
        for _ in range(50):
            await asyncio.sleep(0)
            assert connector.stats().num_inflight <= num_at_once
        family.fabric.resume(family.agent_of(heir))
        assert await leaving == 12


async def test_without_time_or_siblings_nothing_is_handed_over_and_the_store_leaves(family):
    heir = await family.serve()
    for siblings, grace_s in (((), 10.0), ((heir,), 0.0)):
        leaver = await family.serve(siblings)
        await put_chain(family.clients[leaver], 100, 3)
        assert await family.leave(leaver, grace_s) == 0


async def test_what_a_sibling_has_no_room_for_goes_to_the_next(family):
    siblings = [await family.serve(num_blocks=4), await family.serve(num_blocks=4)]
    leaver = await family.serve(siblings)
    full = store_of(name(100), siblings)
    [heir] = set(siblings) - {full}
    await put_chain(family.clients[full], 900, 2)
    await family.clients[full].acquire([name(900), name(901)])
    await put_chain(family.clients[leaver], 100, 3)
    assert await family.leave(leaver) == 3
    assert len(await family.clients[heir].get([name(number) for number in range(100, 103)])) == 3


async def test_what_nobody_has_room_for_is_not_counted(family):
    full = await family.serve(num_blocks=4)
    leaver = await family.serve([full])
    await put_chain(family.clients[full], 900, 2)
    await family.clients[full].acquire([name(900), name(901)])
    await put_chain(family.clients[leaver], 100, 3)
    assert await family.leave(leaver) == 0


async def test_what_a_sibling_has_already_is_not_moved(family):
    heir = await family.serve()
    leaver = await family.serve([heir])
    for address in (heir, leaver):
        await put_chain(family.clients[address], 100, 3)
    connector = family.parts[leaver].actor.connector
    assert await family.leave(leaver) == 3
    assert connector.stats().written_bytes == 0


def test_neighbours_of_one_segment_and_tenant_make_a_put_and_a_branch_makes_another():
    def block(number: int, before: int, parent: int | None, **facts) -> StoredBlock:
        known = {"tenant": "", "segment_key": name(1)} | facts
        above = None if parent is None else name(parent)
        return StoredBlock(block_hash=name(number), num_blocks_before=before, parent=above, **known)

    decoded = Origin(provenance=Provenance.DECODED)
    blocks = [
        block(50, 64, None, segment_key=name(50)),
        block(3, 2, 2),
        block(1, 0, None),
        block(2, 1, 1),
        block(9, 2, 2),
        block(4, 3, 3, origin=decoded),
        block(7, 0, None, tenant="a"),
    ]
    chains = [[int.from_bytes(part.block_hash, "little") for part in chain] for chain in chains_of(blocks)]
    assert chains == [[50], [1, 2, 3], [9], [4], [7]]
