"""Hands a leaving kvstore's blocks to its siblings."""

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrace.clock import Clock
from headrace.core.block import BlockHash, BlockId, KvLayout
from headrace.core.put_facts import PutFacts
from headrace.core.request import PROTOCOL_VERSION
from headrace.core.segments import SEGMENT_BLOCKS, stores_by_preference
from headrace.core.wire import layout_to_proto
from headrace.errors import Draining, HeadraceError, InternalError, Saturated
from headrace.kvstore.actor import KvStoreActor
from headrace.kvstore.config import KvStoreConfig
from headrace.kvstore.messages import HandedOver, ListForHandover, TakeForHandover, Taken
from headrace.kvstore.stored_block import StoredBlock
from headrace.runtime.channels import Channels
from headrace.transfer.connector import Connector
from headrace.transfer.wire import pool_to_proto
from headrace.v1 import cluster_pb2
from headrace.worker.digests import BlockDigests
from headrace.worker.kv_client import KvClient, Put, PutTerms
from headrace.worker.peers import Peers
from headrace.worker.pool_link import LinkParts, PoolCaller, PoolLink

logger = logging.getLogger(__name__)

PUT_TIMEOUT_S = 10.0

PUTS_AT_ONCE = 2
"""While one waits for a sibling's answer, the blocks of another are on their way."""

_Held: TypeAlias = tuple[tuple[StoredBlock, BlockId], ...]


def chains_of(blocks: Iterable[StoredBlock]) -> list[list[StoredBlock]]:
    """Return puts: neighbours of one segment, tenant and origin, in the order of the best block of each.

    Args:
        blocks: The best first.
    """
    groups: dict[tuple[object, ...], list[StoredBlock]] = {}
    for block in blocks:
        groups.setdefault((block.segment_key or block.block_hash, block.tenant, block.origin), []).append(block)
    chains: list[list[StoredBlock]] = []
    for group in groups.values():
        by_last: dict[BlockHash, list[StoredBlock]] = {}
        for block in sorted(group, key=lambda block: block.num_blocks_before):
            chain = None if block.parent is None else by_last.pop(block.parent, None)
            if chain is None or len(chain) >= SEGMENT_BLOCKS:
                chain = []
                chains.append(chain)
            chain.append(block)
            by_last[block.block_hash] = chain
    return chains


class Handover:
    """Puts blocks into siblings as a worker would: the store that a reader asks next is the one that gets them.

    Nothing depends on it: what does not arrive in time is computed again by who needs it.

    Args:
        config: Names the store and its siblings.
        epoch: Lifetime of this process.
        actor: Owns the blocks.
        channels: Connections to siblings.
        clock: Ends it.

    Attributes:
        num_blocks: Blocks that siblings have taken, or had; of a chain that none has room for all of, none counts.
    """

    def __init__(
        self, config: KvStoreConfig, epoch: str, actor: KvStoreActor, channels: Channels, clock: Clock
    ) -> None:
        self._config = config
        self._epoch = epoch
        self._actor = actor
        self._channels = channels
        self._clock = clock
        self.num_blocks = 0

    async def run(self, end_s: float) -> None:
        """Hand over what can be until `end_s` on the clock, what is most worth keeping first."""
        connector, layout = self._actor.connector, self._actor.layout
        if not self._config.siblings or connector is None or layout is None:
            return
        siblings = self._clients(connector, layout)
        await asyncio.gather(*(self._meet(siblings, address, end_s) for address in self._config.siblings))
        blocks: tuple[StoredBlock, ...] = await self._actor.mailbox.ask(lambda reply: ListForHandover(reply=reply))
        chains = enumerate(chains_of(blocks))
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._num_at_once()):
                tasks.create_task(self._give(chains, siblings, end_s))
        logger.info("blocks handed over", extra={"num_blocks": self.num_blocks, "num_known": len(blocks)})

    async def _meet(self, siblings: dict[str, KvClient], address: str, end_s: float) -> None:
        """Connect, with more patience than a put has: one that nobody has met yet opens its pool first."""
        try:
            async with asyncio.timeout(max(0.0, end_s - self._clock.now())):
                await siblings[address].link.parts.peers.ensure(address)
        except (HeadraceError, TimeoutError) as error:
            logger.warning("sibling not met", extra={"address": address, "error": type(error).__name__})
            del siblings[address]

    def _num_at_once(self) -> int:
        """Return how many puts go on at once: what comes from disk for one must not push another's blocks out."""
        counts = self._actor.view().counts
        return max(1, min(PUTS_AT_ONCE, 0 if counts is None else counts.total // (2 * SEGMENT_BLOCKS)))

    async def _give(
        self, chains: Iterator[tuple[int, list[StoredBlock]]], siblings: dict[str, KvClient], end_s: float
    ) -> None:
        """Put one chain after the other; several of these share the chains and the siblings that are left."""
        for number, chain in chains:
            if self._clock.now() >= end_s:
                return
            key = chain[0].segment_key or chain[0].block_hash
            for address in stores_by_preference(key, siblings):
                if address not in siblings:
                    continue  # It failed while this waited for another.
                # Of its own for each try: blocks that one has not settled are still held under the other.
                num_refused = await self._put(siblings[address], f"handover {number} {address}", chain, end_s)
                if num_refused == 0:
                    break
                if num_refused is None and siblings.pop(address, None) is not None:
                    logger.warning("sibling takes no blocks", extra={"address": address})

    def _clients(self, connector: Connector, layout: KvLayout) -> dict[str, KvClient]:
        peers = Peers(connector, self._channels, lambda: self._introduce(connector, layout), "")
        caller = PoolCaller(name=self._config.name, epoch=self._epoch, fingerprint="", layout=layout)
        links = LinkParts(channels=self._channels, connector=connector, peers=peers, caller=caller, clock=self._clock)
        # Digests travel as they are known: one that was taken now would vouch for bytes that went wrong here.
        digests = BlockDigests(layout, 0.0, _unread)
        return {address: KvClient(PoolLink(address, links), digests) for address in self._config.siblings}

    async def _put(self, sibling: KvClient, hold_id: str, chain: Sequence[StoredBlock], end_s: float) -> int | None:
        """Put what is in memory of a chain; return how many blocks the sibling has no room for, None if it failed."""
        held = await self._take(hold_id, tuple(block.block_hash for block in chain))
        if not held:
            return 0
        first, hashes = held[0][0], tuple(block.block_hash for block, _ in held)
        put = Put(
            hashes=hashes,
            local_ids=[place for _, place in held],
            facts=PutFacts(
                tenant=first.tenant,
                num_blocks_before=first.num_blocks_before,
                origin=first.origin,
                segment_key=first.segment_key,
                parent=first.parent,
            ),
            digests=[block.digest for block, _ in held],
        )
        now_s, stored = self._clock.now(), None
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, end_s - now_s)):
                    stored = await sibling.put(put, PutTerms(deadline_s=min(end_s, now_s + PUT_TIMEOUT_S)))
        finally:
            has_all = stored is not None and not stored.num_refused
            ended = HandedOver(hold_id=hold_id, hashes=hashes if has_all else ())
            sibling.link.parts.connector.when_settled(put.local_ids, lambda: self._tell(ended))
        self.num_blocks += len(held) if has_all else 0
        return None if stored is None else stored.num_refused

    async def _take(self, hold_id: str, hashes: tuple[BlockHash, ...]) -> _Held:
        """Return the leading blocks of a chain, which are in memory and stay there."""
        taken = await self._ask(hold_id, hashes, may_promote=True)
        if taken.coming is not None:
            await asyncio.wait(taken.coming.ends)
            taken = await self._ask(hold_id, hashes, may_promote=False)
        num = next((i for i, (block, _) in enumerate(taken.held) if block.block_hash != hashes[i]), None)
        return taken.held[:num]

    async def _ask(self, hold_id: str, hashes: tuple[BlockHash, ...], *, may_promote: bool) -> Taken:
        taken: Taken = await self._actor.mailbox.ask(
            lambda reply: TakeForHandover(hold_id=hold_id, hashes=hashes, may_promote=may_promote, reply=reply)
        )
        return taken

    def _introduce(self, connector: Connector, layout: KvLayout) -> cluster_pb2.HandshakeRequest:
        # With the layout: a sibling that has met no worker yet has to open its pool for these blocks.
        return cluster_pb2.HandshakeRequest(
            protocol_version=PROTOCOL_VERSION,
            name=self._config.name,
            role=cluster_pb2.ROLE_KVSTORE,
            epoch=self._epoch,
            pool=pool_to_proto(connector.pool),
            layout=layout_to_proto(layout),
        )

    def _tell(self, message: HandedOver) -> None:
        # The actor may have ended before the last transfer settled; its blocks went with it.
        with contextlib.suppress(Draining, Saturated):
            self._actor.mailbox.tell(message)


def _unread(block: BlockId) -> NDArray[np.uint8]:
    raise InternalError(f"a handover passes digests on as they are, and takes none of block {block}")
