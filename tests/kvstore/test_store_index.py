"""The kvstore as a location of the shared index, over a real Redis-compatible server."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from headrace.core.placement import Tier
from headrace.kvstore import canary, member
from headrace.kvstore.disk import DiskTier
from headrace.testing.index_log import until
from headrace.testing.indexed_store import block_name
from headrace.v1 import index_pb2, pool_pb2

pytestmark = pytest.mark.cpu


async def test_stores_find_each_others_blocks_and_forget_those_of_one_that_left(serve):
    async with serve("a") as first:
        async with serve("b") as second:
            await second.put(1, 2)
            await first.put(1)
            await first.until_match([1, 2], {"b": [(Tier.DRAM, 2)], "a": [(Tier.DRAM, 1)]})
            answer = await first.describe(index_pb2.DescribeIndexRequest())
            assert {place.name: place.num_dram_blocks for place in answer.locations} == {"a": 1, "b": 2}
        await first.until_match([1, 2], {"a": [(Tier.DRAM, 1)]})


async def test_a_block_found_wrong_in_one_store_is_dropped_by_all(serve):
    async with serve("a") as first, serve("b") as second:
        for store in (first, second):
            await store.put(1, 2)
        await first.client.pool.ReportCorrupt(pool_pb2.ReportCorruptRequest(block_hash=block_name(2), reader="r"))
        for store in (first, second):
            await store.until_match([1, 2], {"a": [(Tier.DRAM, 1)], "b": [(Tier.DRAM, 1)]})
        assert second.parts.actor.view().totals.num_quarantined_blocks == 1
        second.parts.actor.verify()


def num_written(store):
    disk = store.parts.actor.view().disk
    return 0 if disk is None else disk.totals.num_written_blocks


@pytest.mark.parametrize("is_disk_late", [False, True])
async def test_a_block_found_wrong_while_a_store_was_down_is_not_on_its_disk_when_it_is_back(
    serve, tmp_path, monkeypatch, is_disk_late
):
    disk = {"disk_dir": tmp_path / "disk", "disk_bytes": 1 << 20}
    async with serve("a") as first:
        await first.put(1)
        async with serve("b", **disk) as second:
            await second.put(1, 2)
            await until(lambda: num_written(second) == 2)
        await first.client.pool.ReportCorrupt(pool_pb2.ReportCorruptRequest(block_hash=block_name(1), reader="r"))
        await first.until_match([1], {})
        may_open = asyncio.Event()
        open_disk = DiskTier.open

        async def open_late(tier):
            await may_open.wait()
            return await open_disk(tier)

        monkeypatch.setattr(DiskTier, "open", open_late)
        if not is_disk_late:
            may_open.set()
        async with serve("b", **disk) as back:
            # By then the copy of the index has been told of all that was quarantined.
            await first.put(3)
            await back.until_match([3], {"a": [(Tier.DRAM, 1)]})
            may_open.set()
            await back.until_match([2], {"b": [(Tier.DISK, 1)]})
            await back.until_match([1], {})
            assert back.parts.actor.view().totals.num_quarantined_blocks == 1


async def test_tiers_are_published(serve, tmp_path):
    disk = {"disk_dir": tmp_path / "disk", "disk_bytes": 1 << 20}
    async with serve("a", num_blocks=2, **disk) as first, serve("b") as second:
        await first.put(1, 2)
        await first.parts.actor._errands.settled()
        await first.put(3, 4)
        await second.until_match([1, 2], {"a": [(Tier.DISK, 2)]})
        await second.until_match([3, 4], {"a": [(Tier.DRAM, 2)]})


async def test_the_canary_goes_through_the_index(serve, monkeypatch):
    monkeypatch.setattr(member, "CANARY_INTERVAL_S", 0.01)
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(serve("a"))
        assert await store.parts.canary.try_once(store.server.address) == ""
        monkeypatch.setattr(canary, "INDEX_TIMEOUT_S", 0.2)
        monkeypatch.setattr(store.parts.index, "match", lambda hashes: [])
        reason = await store.parts.canary.try_once(store.server.address)
        assert reason == "the canary block was not found through the index"
