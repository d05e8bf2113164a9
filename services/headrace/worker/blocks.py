"""Move a sequence's blocks: fetched before it starts, stored after it ends."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.clock import Clock
from headrace.core.block import BlockHash, BlockId, block_hashes, root_hash
from headrace.engine.messages import CacheChange
from headrace.errors import HeadraceError
from headrace.transfer.connector import Connector
from headrace.worker.engine import AsyncEngine, OpenSequence
from headrace.worker.kv_client import KvClient

logger = logging.getLogger(__name__)

MAX_QUEUED_STORES = 256
ANNOUNCE_INTERVAL_S = 0.25
"""Shortest time between two announcements: the first change goes out at once, those after it together."""

SNAPSHOT_LOOK_S = 1.0
"""Longest time until an index that must be told everything is told so, where nothing changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeParts:
    """What an exchange works with.

    Attributes:
        engine: Owner of the local blocks.
        connector: Moves them.
        tasks: Outlives every request.
        clock: Source of deadlines.
        block_tokens: Tokens per block.
    """

    engine: AsyncEngine
    connector: Connector
    tasks: asyncio.TaskGroup
    clock: Clock
    block_tokens: int


class BlockExchange:
    """A worker's dealings with the kvstore; every failure there is a miss, never an error here.

    Args:
        parts: What it works with.
        client: The kvstore; None runs without one.
        fingerprint: Digest of the model, under which blocks are hashed.
        deadline_s: Longest time for one fetch or store.
    """

    def __init__(self, parts: ExchangeParts, client: KvClient | None, fingerprint: str, deadline_s: float) -> None:
        self._engine = parts.engine
        self._connector = parts.connector
        self._tasks = parts.tasks
        self._clock = parts.clock
        self._block_tokens = parts.block_tokens
        self._client = client
        self._fingerprint = fingerprint
        self._deadline_s = deadline_s
        self._stores: asyncio.Queue[tuple[BlockHash, ...]] = asyncio.Queue(MAX_QUEUED_STORES)
        self._changes: list[CacheChange] = []
        self._changed = asyncio.Event()
        self.num_dropped_stores = 0

    def hashes(self, tokens: Sequence[int], cache_key: bytes) -> tuple[BlockHash, ...]:
        """Return the hashes of the full blocks of `tokens`."""
        return block_hashes(root_hash(self._fingerprint, cache_key), tokens, self._block_tokens)

    async def fetch(self, sequence: OpenSequence) -> int:
        """Fill the sequence's blocks after the local hit from the kvstore.

        Returns:
            Leading tokens present now: the local hit, or more.

        Raises:
            BlockLost: a read did not end in time and may still write: the sequence must get other blocks.
            Saturated: the engine's mailbox is full.
        """
        admitted = sequence.admitted
        local = admitted.num_cached_tokens // self._block_tokens
        # The last known token is always computed: its logits choose the next one.
        usable = (len(sequence.spec.tokens) - 1) // self._block_tokens
        if self._client is None or local >= usable:
            return admitted.num_cached_tokens
        hashes, blocks = admitted.block_hashes[local:usable], admitted.block_ids[local:usable]
        writer_id = "fetch-" + secrets.token_hex(8)
        self._engine.hold_writer(writer_id, blocks)
        # A task of the worker, not of the request: blocks that a read is still writing to must
        # stay held when the request is cancelled.
        reading = self._tasks.create_task(self._read(self._client, hashes, blocks, writer_id))
        num_fetched = await asyncio.shield(reading)
        if isinstance(num_fetched, HeadraceError):
            raise num_fetched
        return (local + num_fetched) * self._block_tokens

    def store_later(self, hashes: tuple[BlockHash, ...]) -> None:
        """Queue full blocks for the kvstore; dropped when too many wait, for it is only a cache."""
        if self._client is None or not hashes:
            return
        try:
            self._stores.put_nowait(hashes)
        except asyncio.QueueFull:
            self.num_dropped_stores += 1

    def note_change(self, change: CacheChange) -> None:
        """Remember a change of the local cache for the next announcement; called on the loop."""
        self._changes.append(change)
        self._changed.set()

    async def run_stores(self) -> None:
        """Put queued blocks until cancelled."""
        while True:
            hashes = await self._stores.get()
            try:
                await self._store(hashes)
            except HeadraceError as error:
                logger.warning("blocks not stored", extra={"error": error.code})

    async def run_announcements(self) -> None:
        """Tell the index what the local cache holds until cancelled."""
        while self._client is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SNAPSHOT_LOOK_S):
                    await self._changed.wait()
            self._changed.clear()
            if not self._changes and not self._client.owes_snapshot:
                continue
            changes, self._changes = self._changes, []
            is_present: dict[BlockHash, bool] = {}
            for change in changes:
                is_present.update(dict.fromkeys(change.removed, False))
                is_present.update(dict.fromkeys(change.stored, True))
            stored = tuple(block for block, is_there in is_present.items() if is_there)
            removed = tuple(block for block, is_there in is_present.items() if not is_there)
            await self._client.announce(stored, removed)
            await asyncio.sleep(ANNOUNCE_INTERVAL_S)

    async def _read(
        self, client: KvClient, hashes: tuple[BlockHash, ...], blocks: tuple[BlockId, ...], writer_id: str
    ) -> int | HeadraceError:
        """Return the blocks fetched, or the error: raised in a task of the worker it would end the worker."""
        try:
            return await client.fetch(hashes, blocks, self._clock.now() + self._deadline_s)
        except HeadraceError as error:
            return error
        finally:
            # After a deadline late data may still land: only the transport knows when it cannot.
            self._connector.when_settled(blocks, lambda: self._engine.release_writer(writer_id))

    async def _store(self, hashes: tuple[BlockHash, ...]) -> None:
        if self._client is None:
            return
        deadline_s = self._clock.now() + self._deadline_s
        lease_id = "store-" + secrets.token_hex(8)
        blocks = await self._engine.pin(lease_id, hashes, deadline_s)
        try:
            if blocks:
                await self._client.store(hashes[: len(blocks)], blocks, deadline_s)
        finally:
            self._engine.unpin(lease_id)
