"""Puts blocks into a kvstore that no model has computed: what is timed of a block is its bytes, not what they mean."""

import asyncio
from collections.abc import Sequence
from types import TracebackType

from stage import Answer, Service, Worker

from headrace.clock import WallClock
from headrace.core.block import BlockHash
from headrace.core.digest import block_digest, is_sampled
from headrace.core.placement import Tier
from headrace.core.request import CachedPrefix
from headrace.runtime.channels import Channels
from headrace.testing.kvstore import StoreClient
from headrace.transfer.agent import Transport
from headrace.transfer.arena import arena_of, map_blocks
from headrace.transfer.nixl import NixlConnector

DIGEST_SHARE = 1 / 16
"""As workers do by default."""
NUM_BLOCKS = 64
"""Of one put."""
BYTE = 0x3C
"""Repeated it is a small number in bf16 and fp32: arithmetic on it is as fast as on real keys and values."""


class Feeder:
    """Puts blocks for a worker's prompts; a context manager.

    Args:
        worker: Whose model and layout the blocks have.
        name: Unique on this machine.
    """

    def __init__(self, worker: Worker, name: str) -> None:
        self._layout = worker.layout
        self._name = name
        self._runner = asyncio.Runner()
        self._clients: dict[str, StoreClient] = {}

    def __enter__(self) -> "Feeder":
        self._blocks = map_blocks(NUM_BLOCKS, self._layout.block_bytes)
        self._blocks[:] = BYTE
        self._digest = block_digest(self._blocks[0], self._layout)
        self._channels = Channels()
        self._connector = self._runner.run(self._connect())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.run(self._connector.close())
        self._runner.run(self._channels.close())
        self._runner.close()

    def put(self, store: Service, hashes: Sequence[BlockHash]) -> None:
        """Store a chain from its first block on.

        Raises:
            RuntimeError: the store has not taken all of them.
        """
        self._runner.run(self._put(self._client(store.address), hashes))

    def hit(self, worker: Worker, store: Service, prompt: Sequence[int], num_held: int) -> Answer:
        """Ask a worker for a prompt of which the store holds so many leading tokens; the worker then comes to rest."""
        hashes = worker.hashes(prompt[:num_held])
        self.put(store, hashes)
        held = CachedPrefix(location="store", address=store.address, tier=Tier.DRAM, start=0, end=len(hashes))
        answer = worker.ask(prompt, (held,))
        worker.settle()
        return answer

    def forget(self, store: Service) -> None:
        """Meet a store anew: it was restarted."""
        self._clients.pop(store.address, None)

    async def _connect(self) -> NixlConnector:
        return NixlConnector(Transport(self._name), arena_of(self._blocks), self._name, WallClock())

    async def _put(self, client: StoreClient, hashes: Sequence[BlockHash]) -> None:
        for start in range(0, len(hashes), NUM_BLOCKS):
            batch = hashes[start : start + NUM_BLOCKS]
            put = await client.reserve(batch, num_blocks_before=start)
            if put.num_refused:
                raise RuntimeError(f"the store has no room for {put.num_refused} blocks")
            if not put.indices:
                continue  # all are stored
            named = [batch[index] for index in put.indices]
            await client.write(put.lease, range(len(named)))
            digests = [self._digest if is_sampled(name, DIGEST_SHARE) else 0 for name in named]
            if await client.commit(put.lease, digests=digests) < len(named):
                raise RuntimeError(f"the store took less than {len(named)} blocks")

    def _client(self, address: str) -> StoreClient:
        if address not in self._clients:
            self._clients[address] = StoreClient(
                address, self._channels, self._connector, self._blocks, self._layout, WallClock()
            )
        return self._clients[address]
