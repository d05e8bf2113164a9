"""Fills a sequence's blocks before it starts: from other workers and kvstores, as far as that is faster."""

import asyncio
import bisect
import contextlib
import dataclasses
import itertools
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from headrace.core.bandwidth import LaneMeter
from headrace.core.block import BlockHash, BlockId
from headrace.core.fetch_plan import FetchPlan, FetchTotals, Prompt, Source, plan_fetch
from headrace.core.placement import Tier
from headrace.core.request import SequenceSpec
from headrace.core.segments import segments
from headrace.engine.messages import Keep
from headrace.errors import BlockLost, HeadraceError
from headrace.worker.early_start import EarlyStart
from headrace.worker.engine import OpenSequence
from headrace.worker.exchange_parts import ExchangeConfig, ExchangeParts, owner_of
from headrace.worker.pool_reader import ReadResult, ReadTerms, Wanted
from headrace.worker.pools import Pool, Pools

ItemT = TypeVar("ItemT")


@dataclass(slots=True, kw_only=True)
class ReuseTotals:
    """What prompts found since the start.

    Attributes:
        num_local_blocks: In the own cache.
        fetches: By fetching.
    """

    num_local_blocks: int = 0
    fetches: FetchTotals = field(default_factory=FetchTotals)


class Fetcher:
    """Decides what to fetch for a sequence, and fetches it.

    Args:
        parts: What it works with.
        config: How.
        pools: Whom to ask.

    Attributes:
        totals: What came of it.
        on_corrupt: Hears of blocks whose bytes were wrong.
    """

    def __init__(self, parts: ExchangeParts, config: ExchangeConfig, pools: Pools) -> None:
        self._parts = parts
        self._config = config
        self._pools = pools
        self._layout = parts.links.caller.layout
        self.totals = ReuseTotals()
        self.on_corrupt: Callable[[BlockHash], None] = lambda _: None

    async def fetch(self, sequence: OpenSequence) -> int:
        """Fill the sequence's blocks after the local hit.

        Cancelling it ends the fetch after the READs that are in flight; blocks that they write to stay held.

        Returns:
            Leading tokens present now: the local hit, or more.

        Raises:
            BlockLost: a READ did not end in time and may still write: the sequence must get other blocks. What had
                landed before it is in the local cache.
            Saturated: the engine's mailbox is full.
        """
        num_cached, size = sequence.admitted.num_cached_tokens, self._layout.block_tokens
        self.totals.num_local_blocks += num_cached // size
        plan = self._plan(sequence)
        sequence.declined_tokens = plan.num_declined * size
        if not plan.parts:
            self.totals.fetches.note(plan, 0.0, 0)
            return num_cached
        fetch = _Fetch(self._parts, self._pools, sequence, plan)
        writer_id = "fetch-" + secrets.token_hex(8)
        self._parts.engine.hold_writer(writer_id, fetch.blocks)
        # A task of the worker, not of the request: blocks that a read is still writing to must
        # stay held when the request is cancelled.
        reading = self._parts.tasks.create_task(self._run(fetch, writer_id))
        try:
            num_landed = await asyncio.shield(reading)
        except asyncio.CancelledError:
            fetch.is_given_up = True
            raise
        if isinstance(num_landed, HeadraceError):
            raise num_landed
        return num_cached + num_landed * size

    def _plan(self, sequence: OpenSequence) -> FetchPlan:
        spec, num_cached = sequence.spec, sequence.admitted.num_cached_tokens
        clock, num_tokens = self._parts.links.clock, sequence.admitted.num_tokens
        # The engine may count this sequence already: too short a wait makes for too little patience only.
        waiting = max(0, self._parts.engine.stats().waiting_tokens - (num_tokens - num_cached))
        prompt = Prompt(
            num_tokens=num_tokens,
            num_local=num_cached // self._layout.block_tokens,
            block_tokens=self._layout.block_tokens,
            block_bytes=self._layout.block_bytes,
            remaining_s=min(self._config.deadline_s, (spec.deadline_unix_ms - clock.unix_ms()) / 1000),
            waiting_tokens=waiting,
            chunk_tokens=self._config.chunk_tokens,
            may_layer=self._config.early_start,
        )
        if spec.sources:
            return plan_fetch(prompt, self._config.cost, self._hinted(spec))
        plan = plan_fetch(prompt, self._config.cost, self._unknown(sequence, prompt))
        # Nobody knows whether the stores hold what was not asked for.
        return dataclasses.replace(plan, num_declined=0)

    def _hinted(self, spec: SequenceSpec) -> list[Source]:
        """Return those of whom the router says that they hold blocks."""
        held: dict[tuple[str, Tier], list[tuple[int, int]]] = {}
        for each in spec.sources:
            if each.location != self._parts.links.caller.name and not self._is_resting(each.address):
                held.setdefault((each.address, each.tier), []).append((each.start, each.end))
        return self._sources(held)

    def _unknown(self, sequence: OpenSequence, prompt: Prompt) -> list[Source]:
        """Return the kvstores as if they held everything: without an index nobody knows better."""
        held: dict[tuple[str, Tier], list[tuple[int, int]]] = {}
        chain = sequence.admitted.block_hashes
        for segment in segments(chain, prompt.num_local, end_index=prompt.num_usable):
            for store in self._pools.stores_for(segment.key)[:1]:
                held.setdefault((store.link.address, Tier.DRAM), []).append((segment.start, segment.end))
        return self._sources(held)

    def _sources(self, held: dict[tuple[str, Tier], list[tuple[int, int]]]) -> list[Source]:
        now_s = self._parts.links.clock.now()
        return [
            Source(name=address, tier=tier, held=tuple(ranges), speed=self._pool(address).meter(tier).speed(now_s))
            for (address, tier), ranges in held.items()
        ]

    def _pool(self, address: str) -> Pool:
        return self._pools.pool(address)

    def _is_resting(self, address: str) -> bool:
        return self._pool(address).reader.link.is_resting

    async def _run(self, fetch: "_Fetch", writer_id: str) -> int | HeadraceError:
        """Return the blocks fetched, or the error: raised in a task of the worker it would end the worker."""
        clock, connector = self._parts.links.clock, self._parts.links.connector
        begun_s = clock.now()
        try:
            num_landed = await fetch.run()
            self._count(fetch, num_landed, clock.now() - begun_s)
            if fetch.is_settled():
                fetch.end(num_landed)
                return num_landed
            return self._lost(fetch, num_landed)
        finally:
            fetch.end(0)
            # After a deadline late data may still land: only the transport knows when it cannot.
            connector.when_settled(fetch.blocks, lambda: self._parts.engine.release_writer(writer_id))

    def _lost(self, fetch: "_Fetch", num_landed: int) -> HeadraceError:
        num_present = (fetch.first + num_landed) * self._layout.block_tokens
        with contextlib.suppress(HeadraceError):
            self._parts.engine.send(Keep(sequence_id=fetch.spec.sequence_id, num_present=num_present))
        return BlockLost("a read of cached blocks did not end in time and may still write into these blocks")

    def _count(self, fetch: "_Fetch", num_landed: int, seconds: float) -> None:
        fetch.measure()
        for block_hash, index in fetch.corrupt():
            self._parts.tasks.create_task(self._quarantine(fetch.spec, block_hash, index))
        if not fetch.spec.sources and not fetch.num_leased:
            return  # Nobody had anything, which is no choice that could be regretted.
        totals = self.totals.fetches
        totals.note(fetch.plan, seconds, num_landed)
        num_from_disk = min(num_landed, fetch.num_from_disk)
        totals.num_fetched_blocks[Tier.DRAM] -= num_from_disk
        totals.num_fetched_blocks[Tier.DISK] += num_from_disk

    async def _quarantine(self, spec: SequenceSpec, block_hash: BlockHash, index: int) -> None:
        """Tell everybody who is known to hold a block that its bytes are wrong; the own cache lets go of it too."""
        self.on_corrupt(block_hash)
        holders = {each.address for each in spec.sources if each.start <= index < each.end}
        holders.update(store.link.address for store in self._pools.stores)
        for address in sorted(holders):
            await self._pool(address).reader.report_corrupt(block_hash, owner_of(spec))
        with contextlib.suppress(HeadraceError):
            await self._parts.engine.quarantine(block_hash)


@dataclass(slots=True, kw_only=True)
class _Lane:
    """One source of a fetch.

    Attributes:
        indices: Places in the chain of the blocks that it is to deliver, in order.
        num_landed: Of them, so far.
        num_spans: Spans of its layered blocks that have landed.
        num_there: Blocks that the source has, as far as it has said so.
        late: Bytes and seconds of a READ that landed after it was given up.
        guessed: The meter that was told a guess, as nothing had landed.
    """

    pool: Pool
    tier: Tier
    indices: list[int]
    num_landed: int = 0
    num_spans: int = 0
    num_there: int = 0
    late: tuple[int, float] | None = None
    guessed: LaneMeter | None = None
    result: ReadResult = ReadResult()


class _Fetch:
    """A plan that is being carried out.

    Attributes:
        first: Place in the chain of the first block to fetch.
        blocks: Own blocks to fill.
        is_given_up: Whether nobody waits any more.
    """

    def __init__(self, parts: ExchangeParts, pools: Pools, sequence: OpenSequence, plan: FetchPlan) -> None:
        self.spec, self.plan = sequence.spec, plan
        self.first, self._end = plan.parts[0].start, plan.parts[-1].end
        self.blocks: tuple[BlockId, ...] = sequence.admitted.block_ids[self.first : self._end]
        self.is_given_up = False
        self._hashes = sequence.admitted.block_hashes
        self._links = parts.links
        self._begun_s = parts.links.clock.now()
        self._lanes = self._split(pools)
        self._has_landed = bytearray(len(self.blocks) + 1)
        self._num_landed = 0
        self._gap = self._end
        self._early = EarlyStart(parts.engine, parts.links.clock, parts.links.caller.layout, sequence, plan)

    @property
    def num_leased(self) -> int:
        """Blocks that sources had."""
        return sum(lane.result.num_leased for lane in self._lanes)

    @property
    def num_from_disk(self) -> int:
        """Blocks that a store read from disk although it was not known that they were there."""
        return sum(lane.result.num_from_disk for lane in self._lanes if lane.tier is Tier.DRAM)

    async def run(self) -> int:
        """Read from all sources side by side; return leading blocks that have landed and are good."""
        async with asyncio.TaskGroup() as readers:
            for lane in self._lanes:
                readers.create_task(self._read(lane))
        # What was read under a lease that had ended is not believed.
        self._has_landed, self._num_landed = bytearray(len(self.blocks) + 1), 0
        for lane in self._lanes:
            self._note(lane.indices[: lane.result.num_landed])
        return self._num_landed

    def is_settled(self) -> bool:
        """Return whether no READ touches the blocks any more."""
        return self._lanes[0].pool.reader.link.is_settled(self.blocks)

    def corrupt(self) -> list[tuple[BlockHash, int]]:
        """Return blocks whose bytes were wrong, and their places."""
        found = (lane.result.corrupt for lane in self._lanes)
        return [(block_hash, self._hashes.index(block_hash)) for block_hash in found if block_hash is not None]

    def measure(self) -> None:
        """Tell the meters what it took."""
        now_s, block_bytes = self._links.clock.now(), self._links.caller.layout.block_bytes
        for lane in self._lanes:
            found = lane.result
            was_stopped = self.is_given_up or self._gap < lane.indices[0]
            if not found.is_measured or (was_stopped and not found.num_landed):
                continue
            if found.epoch:
                lane.pool.note_epoch(found.epoch)
            meter = lane.pool.meter(Tier.DISK if found.num_from_disk else lane.tier)
            if found.num_landed:
                meter.note(found.num_landed * block_bytes, found.seconds, now_s)
            elif lane.late is not None:
                meter.note(*lane.late, now_s)
            else:
                seconds = max(found.seconds, self.plan.predicted_recompute_s or 0.0)
                meter.note(len(lane.indices) * block_bytes, seconds, now_s, is_whole=False)
                lane.guessed = meter

    def _note_late(self, lane: _Lane, num_bytes: int, seconds: float) -> None:
        """Measure a READ that was given up and has landed: a lane may be slow and yet faster than computing."""
        if lane.guessed is None:
            lane.late = num_bytes, seconds
        else:
            lane.guessed.note_late(num_bytes, seconds, self._links.clock.now())

    def _split(self, pools: Pools) -> list[_Lane]:
        """Gather the parts of each source: it is asked once for all of them."""
        lanes: dict[tuple[str, Tier], _Lane] = {}
        for part in self.plan.parts:
            key = part.name, part.tier
            lane = lanes.setdefault(key, _Lane(pool=pools.pool(part.name), tier=part.tier, indices=[]))
            lane.indices.extend(range(part.start, part.end))
        return list(lanes.values())

    async def _read(self, lane: _Lane) -> None:
        lane.pool.meter(lane.tier).note_try(self._links.clock.now())
        wanted = Wanted(
            hashes=_at(self._hashes, lane.indices),
            local_ids=_at(self.blocks, [index - self.first for index in lane.indices]),
            tenant=owner_of(self.spec),
        )
        terms = ReadTerms(
            lease_end_s=self._begun_s + self.plan.limit_s,
            answer_by_s=self._begun_s + min(self.plan.patience_s, self.plan.limit_s),
            group_blocks=self.plan.group_blocks,
            num_whole=self._num_whole(lane),
            spans=self._early.spans,
            may_go_on=lambda: self._may_go_on(lane),
            deadline_s=self._lost_at_s,
            on_late=lambda num_bytes, seconds: self._note_late(lane, num_bytes, seconds),
            on_landed=lambda num_landed: self._note_landed(lane, num_landed),
            on_span=lambda num_spans, num_there: self._note_span(lane, num_spans, num_there),
        )
        lane.result = await lane.pool.reader.read(wanted, terms)
        if lane.result.num_landed < lane.result.num_leased:
            self._early.end(0)  # What it was reading may still land.
        self._note_span(lane, len(self._early.spans), lane.result.num_landed)
        # What lies behind a gap is of no use to anybody.
        self._gap = min([self._gap, *lane.indices[lane.result.num_landed :][:1]])

    def _lost_at_s(self, is_layered: bool) -> float:  # noqa: FBT001 as ReadTerms asks
        elapsed_s = self._links.clock.now() - self._begun_s
        return self._begun_s + self.plan.lost_after_s(self._num_landed, elapsed_s, is_layered=is_layered)

    def _may_go_on(self, lane: _Lane) -> bool:
        if self.is_given_up or lane.indices[lane.num_landed] > self._gap:
            return False
        return self.plan.may_go_on(self._num_landed, self._links.clock.now() - self._begun_s)

    def _note_landed(self, lane: _Lane, num_landed: int) -> None:
        self._note(lane.indices[lane.num_landed : num_landed])
        lane.num_landed = num_landed

    def _num_whole(self, lane: _Lane) -> int | None:
        """Return how many of a lane's blocks come before the layered ones."""
        from_index = self.plan.layered_from
        return None if from_index is None else bisect.bisect_left(lane.indices, from_index)

    def _note_span(self, lane: _Lane, num_spans: int, num_there: int) -> None:
        """Let the engine compute with the layers that have landed from everybody."""
        lane.num_spans, lane.num_there = num_spans, num_there
        num_ready = min(each.num_spans for each in self._lanes)
        if self.plan.layered_from is None or not num_ready:
            return
        there = {index for each in self._lanes for index in each.indices[: each.num_there]}
        num_blocks = next(count for count in itertools.count() if self.first + count not in there)
        # A step computes into the blocks behind these: nobody may be reading into them, as behind a gap.
        if num_blocks == len(there) > 0:
            self._early.advance(num_ready, num_blocks)

    def end(self, num_landed: int) -> None:
        """Tell the engine whether what it began to compute with is to be believed."""
        self._early.end(num_landed)

    def _note(self, indices: Sequence[int]) -> None:
        for index in indices:
            self._has_landed[index - self.first] = True
        while self._has_landed[self._num_landed]:
            self._num_landed += 1


def _at(items: Sequence[ItemT], indices: Sequence[int]) -> tuple[ItemT, ...]:
    return tuple(items[index] for index in indices)
