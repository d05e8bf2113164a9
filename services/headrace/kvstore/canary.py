"""Proves that blocks can be put and got: the kvstore as a client of its own address."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.clock import Clock
from headrace.core.block import BlockHash, BlockId, KvLayout
from headrace.core.request import PROTOCOL_VERSION
from headrace.errors import HeadraceError
from headrace.index.prefix_index import PrefixMatch
from headrace.kvstore.actor import KvStoreActor
from headrace.kvstore.messages import Match, Prepare
from headrace.runtime.channels import Channels
from headrace.transfer.arena import map_blocks
from headrace.transfer.connector import Connector
from headrace.transfer.wire import pool_to_proto
from headrace.v1 import cluster_pb2
from headrace.worker.digests import BlockDigests
from headrace.worker.kv_client import KvClient
from headrace.worker.peers import Peers
from headrace.worker.pool_link import LinkParts, PoolCaller, PoolLink

TIMEOUT_S = 5.0
INDEX_TIMEOUT_S = 3.0
LOOK_S = 0.05

_WRITTEN, _READ = BlockId(0), BlockId(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Client:
    """A worker in all but name.

    Attributes:
        store: Connector of the pool that it has met.
    """

    kv: KvClient
    connector: Connector
    blocks: NDArray[np.uint8]
    store: Connector | None


class Canary:
    """Puts one block into the store, gets it back and compares, by gRPC and by a transfer agent of its own.

    Args:
        name: Of the kvstore.
        actor: Tells the block's name and size.
        channels: Connections, to the own address.
        clock: Deadlines are on it.
        connect: Makes a connector of these blocks `[block, byte]` with a number in its name, on another thread.
    """

    def __init__(
        self,
        name: str,
        actor: KvStoreActor,
        channels: Channels,
        clock: Clock,
        connect: Callable[[NDArray[np.uint8], int], Connector],
    ) -> None:
        self._name = f"{name} canary"
        self._actor = actor
        self._channels = channels
        self._clock = clock
        self._connect = connect
        self._client: _Client | None = None
        self._num_clients = 0
        self._num_tries = 0

    async def try_once(self, address: str) -> str:
        """Return why a block did not survive the way through the store at `address`, or nothing."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                reason = await self._prove(await self._ready_client(address))
        except TimeoutError:
            reason = "the canary block did not come back in time"
        except HeadraceError as error:
            reason = f"the canary block failed: {error.code}"
        if reason:
            # What its transfers still do must not reach the next one's blocks.
            await self.close()
        return reason

    async def close(self) -> None:
        """Free the canary's transfer agent."""
        client, self._client = self._client, None
        if client is not None:
            await client.connector.close()

    async def _prove(self, client: _Client) -> str:
        self._num_tries += 1
        written, read = client.blocks[_WRITTEN], client.blocks[_READ]
        written[:] = np.frombuffer(np.random.default_rng(self._num_tries).bytes(written.size), dtype=np.uint8)
        read[:] = 0
        hashes, deadline_s = (self._actor.canary_hash,), self._clock.now() + TIMEOUT_S
        if await client.kv.store(hashes, (_WRITTEN,), deadline_s) != 1:
            return "the canary block could not be put"
        reason = await self._find_in_index(hashes)
        if reason:
            return reason
        if await client.kv.fetch(hashes, (_READ,), deadline_s) != 1:
            return "the canary block could not be got"
        return "" if np.array_equal(written, read) else "the canary block came back with other bytes"

    async def _find_in_index(self, hashes: tuple[BlockHash, ...]) -> str:
        """Return why the block was not found by way of the shared log; without a log that answers, say nothing.

        A log that is away makes no store unready: blocks can be put and got, and prefixes that are known stay known.
        """
        index = self._actor.index
        if index is None or not index.is_connected:
            return ""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(INDEX_TIMEOUT_S):
                while not await self._is_matched(hashes):  # noqa: ASYNC110 the index tells nobody of a change
                    await asyncio.sleep(LOOK_S)
                return ""
        return "the canary block was not found through the index" if index.is_connected else ""

    async def _is_matched(self, hashes: tuple[BlockHash, ...]) -> bool:
        found: tuple[PrefixMatch, ...] = await self._actor.mailbox.ask(lambda reply: Match(hashes=hashes, reply=reply))
        return bool(found)

    async def _ready_client(self, address: str) -> _Client:
        layout: KvLayout = await self._actor.mailbox.ask(lambda reply: Prepare(reply=reply))
        if self._client is not None and self._client.store is self._actor.connector:
            return self._client
        await self.close()
        self._client = await self._new_client(address, layout)
        return self._client

    async def _new_client(self, address: str, layout: KvLayout) -> _Client:
        self._num_clients += 1
        store, blocks = self._actor.connector, map_blocks(2, layout.block_bytes)
        connector = await asyncio.to_thread(self._connect, blocks, self._num_clients)
        caller = PoolCaller(name=self._name, epoch=connector.pool.epoch, fingerprint="", layout=layout)
        peers = Peers(connector, self._channels, lambda: self._introduce(connector), "")
        links = LinkParts(channels=self._channels, connector=connector, peers=peers, caller=caller, clock=self._clock)
        kv = KvClient(PoolLink(address, links), BlockDigests(layout, 1.0, blocks.__getitem__))
        return _Client(kv=kv, connector=connector, blocks=blocks, store=store)

    def _introduce(self, connector: Connector) -> cluster_pb2.HandshakeRequest:
        # Without a layout: it is the workers' blocks that the store makes room for.
        return cluster_pb2.HandshakeRequest(
            protocol_version=PROTOCOL_VERSION,
            name=self._name,
            role=cluster_pb2.ROLE_KVSTORE,
            epoch=connector.pool.epoch,
            pool=pool_to_proto(connector.pool),
        )
