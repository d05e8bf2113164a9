"""Puts full blocks into the kvstores, slowly enough not to delay a step."""

import asyncio
import logging
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from headrace.core.bandwidth import EXPECTED, LaneMeter
from headrace.core.block import BlockHash
from headrace.core.fetch_plan import GROUP_BYTES
from headrace.core.pace import Pace
from headrace.core.placement import DECODED, EXACT, Tier
from headrace.core.put_facts import PutFacts
from headrace.core.segments import segments
from headrace.errors import HeadraceError
from headrace.worker.exchange_parts import ExchangeConfig, ExchangeParts
from headrace.worker.kv_client import Put, PutTerms
from headrace.worker.pools import Pools

logger = logging.getLogger(__name__)

MAX_QUEUED_CHAINS = 256
FOREVER_S = float("inf")

LANE_SHARE = 1 / 8
"""Share of the time that puts may keep a lane busy while the engine works: of memory's bandwidth or a core's time,
as a lane of one machine takes both, steps lose no more than that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Full blocks of one sequence, from its first.

    Attributes:
        num_exact: Leading blocks that were computed as part of a prompt; the others were decoded.
        tenant: Whose they are; empty for public ones.
    """

    hashes: tuple[BlockHash, ...]
    num_exact: int
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stretch:
    """Neighbours in a chain that go into one put."""

    hashes: tuple[BlockHash, ...]
    facts: PutFacts


class Storer:
    """Owner of the queue of what is to be put. The stores are caches: a failure there is forgotten.

    Args:
        parts: What it works with.
        config: How.
        pools: The stores.

    Attributes:
        num_dropped_blocks: Blocks that were not put because too many waited.
    """

    def __init__(self, parts: ExchangeParts, config: ExchangeConfig, pools: Pools) -> None:
        self._engine = parts.engine
        self._connector = parts.links.connector
        self._clock = parts.links.clock
        self._block_bytes = parts.links.caller.layout.block_bytes
        self._config = config
        self._pools = pools
        self._queue: asyncio.Queue[Chain] = asyncio.Queue(MAX_QUEUED_CHAINS)
        self._meter = LaneMeter(EXPECTED[Tier.DRAM])
        self._pace = Pace(self._rate(), GROUP_BYTES, self._clock.now())
        self.num_dropped_blocks = 0

    @property
    def num_stored_blocks(self) -> int:
        """Blocks that became visible in stores by puts from here."""
        return sum(store.num_stored_blocks for store in self._pools.stores)

    def later(self, chain: Chain) -> None:
        """Queue blocks; dropped when too many wait."""
        if not chain.hashes or not self._pools.stores or not self._config.stores_blocks:
            return
        try:
            self._queue.put_nowait(chain)
        except asyncio.QueueFull:
            self.num_dropped_blocks += len(chain.hashes)

    async def run(self) -> None:
        """Put what is queued until cancelled."""
        while True:
            chain = await self._queue.get()
            try:
                await self._store(chain)
            except HeadraceError as error:
                logger.warning("blocks not stored", extra={"error": error.code})

    async def _store(self, chain: Chain) -> None:
        for stretch in _stretches(chain):
            deadline_s = self._clock.now() + self._config.deadline_s + self._longest_wait_s(len(stretch.hashes))
            lease_id = "store-" + secrets.token_hex(8)
            # Without an end by the clock: what ends it is the transport, which may be done later than the deadline.
            blocks = await self._engine.pin(lease_id, stretch.hashes, FOREVER_S)
            try:
                if blocks:
                    put = Put(hashes=stretch.hashes[: len(blocks)], local_ids=blocks, facts=stretch.facts)
                    await self._put(put, deadline_s)
            finally:
                # A write that ran out of time still reads them: other bytes in their place would be sent.
                self._connector.when_settled(blocks, partial(self._engine.unpin, lease_id))
            if len(blocks) < len(stretch.hashes):
                return  # What follows a gap is found by nobody.

    async def _put(self, put: Put, deadline_s: float) -> None:
        terms = PutTerms(
            deadline_s=deadline_s,
            group_blocks=max(1, GROUP_BYTES // self._block_bytes),
            before_write=self._wait,
            after_write=self._note_write,
        )
        assert put.facts.segment_key is not None
        for store in self._pools.stores_for(put.facts.segment_key):
            if await store.put(put, terms) is not None:
                return

    async def _wait(self, num_blocks: int) -> None:
        """Keep to the pace; while the engine rests there is none."""
        stats = self._engine.stats()
        if stats.num_running + stats.num_waiting:
            await asyncio.sleep(self._pace.delay_s(num_blocks * self._block_bytes, self._clock.now()))

    def _note_write(self, num_blocks: int, seconds: float) -> None:
        now_s = self._clock.now()
        self._meter.note(num_blocks * self._block_bytes, seconds, now_s)
        self._pace.set_rate(self._rate(), now_s)

    def _rate(self) -> float:
        if self._config.store_bytes_per_s is not None:
            return self._config.store_bytes_per_s
        return LANE_SHARE / self._meter.seconds(GROUP_BYTES, self._clock.now()) * GROUP_BYTES

    def _longest_wait_s(self, num_blocks: int) -> float:
        return num_blocks * self._block_bytes / self._rate()


def _stretches(chain: Chain) -> Iterator[_Stretch]:
    """Cut a chain where segments or provenances change."""
    for segment in segments(chain.hashes):
        middle = min(max(segment.start, chain.num_exact), segment.end)
        for start, end in pairwise((segment.start, middle, segment.end)):
            if start == end:
                continue
            facts = PutFacts(
                tenant=chain.tenant,
                num_blocks_before=start,
                segment_key=segment.key,
                parent=chain.hashes[start - 1] if start else None,
                origin=EXACT if start < chain.num_exact else DECODED,
            )
            yield _Stretch(hashes=chain.hashes[start:end], facts=facts)
