"""Hands a leaving kvstore's blocks to its siblings."""

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from headrace.clock import Clock
from headrace.core.block import BlockHash, BlockId, KvLayout
from headrace.core.request import PROTOCOL_VERSION
from headrace.core.segments import SEGMENT_BLOCKS, stores_by_preference
from headrace.core.wire import layout_to_proto
from headrace.errors import Draining, HeadraceError, Saturated
from headrace.kvstore.actor import KvStoreActor
from headrace.kvstore.config import KvStoreConfig
from headrace.kvstore.messages import HandedOver, ListForHandover, TakeForHandover, Taken
from headrace.kvstore.stored_block import StoredBlock
from headrace.runtime.channels import Channels, translate_errors
from headrace.transfer.connector import Connector
from headrace.transfer.wire import pool_to_proto
from headrace.v1 import block_pb2, cluster_pb2, kvstore_pb2, kvstore_pb2_grpc
from headrace.worker.peers import Peers

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 2.0
PUT_TIMEOUT_S = 10.0

_Held: TypeAlias = tuple[tuple[StoredBlock, BlockId], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """One put of a handover."""

    connector: Connector
    peers: Peers
    layout: KvLayout
    hold_id: str
    end_s: float


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
        num_blocks: Blocks that siblings have taken, or had.
    """

    def __init__(
        self, config: KvStoreConfig, epoch: str, actor: KvStoreActor, channels: Channels, clock: Clock
    ) -> None:
        self._config = config
        self._epoch = epoch
        self._actor = actor
        self._channels = channels
        self._clock = clock
        self._gone: set[str] = set()
        self.num_blocks = 0

    async def run(self, end_s: float) -> None:
        """Hand over what can be until `end_s` on the clock, what is most worth keeping first."""
        connector, layout = self._actor.connector, self._actor.layout
        if not self._config.siblings or connector is None or layout is None:
            return
        peers = Peers(connector, self._channels, lambda: self._introduce(connector, layout), "")
        blocks: tuple[StoredBlock, ...] = await self._actor.mailbox.ask(lambda reply: ListForHandover(reply=reply))
        for number, chain in enumerate(chains_of(blocks)):
            if self._clock.now() >= end_s:
                break
            hold_id = f"handover {number}"
            put = _Task(connector=connector, peers=peers, layout=layout, hold_id=hold_id, end_s=end_s)
            await self._hand(put, chain)
        logger.info("blocks handed over", extra={"num_blocks": self.num_blocks, "num_known": len(blocks)})

    async def _hand(self, task: _Task, chain: Sequence[StoredBlock]) -> None:
        key = chain[0].segment_key or chain[0].block_hash
        for number, address in enumerate(stores_by_preference(key, self._config.siblings)):
            if address in self._gone:
                continue
            # Of its own for each try: blocks that one has not settled are still held under the other.
            task = replace(task, hold_id=f"{task.hold_id} {number}")
            try:
                async with asyncio.timeout(max(0.0, task.end_s - self._clock.now())), translate_errors(address):
                    await self._put(task, address, chain)
            except (HeadraceError, TimeoutError) as error:
                logger.warning("sibling takes no blocks", extra={"address": address, "error": str(error)})
                self._gone.add(address)
                continue
            return

    async def _put(self, task: _Task, address: str, chain: Sequence[StoredBlock]) -> None:
        peer = await task.peers.ensure(address)
        held = await self._take(task, tuple(block.block_hash for block in chain))
        is_done = False
        try:
            if held:
                await self._write(task, address, peer.pool.agent_name, held)
                self.num_blocks += len(held)
                is_done = True
        finally:
            names = tuple(block.block_hash for block, _ in held) if is_done else ()
            ended = HandedOver(hold_id=task.hold_id, hashes=names)
            task.connector.when_settled([place for _, place in held], lambda: self._tell(ended))

    async def _take(self, task: _Task, hashes: tuple[BlockHash, ...]) -> _Held:
        """Return the leading blocks of a chain, which are in memory and stay there."""
        taken = await self._ask(task, hashes, may_promote=True)
        if taken.coming is not None:
            await asyncio.wait(taken.coming.ends)
            taken = await self._ask(task, hashes, may_promote=False)
        num = next((i for i, (block, _) in enumerate(taken.held) if block.block_hash != hashes[i]), None)
        return taken.held[:num]

    async def _ask(self, task: _Task, hashes: tuple[BlockHash, ...], *, may_promote: bool) -> Taken:
        taken: Taken = await self._actor.mailbox.ask(
            lambda reply: TakeForHandover(hold_id=task.hold_id, hashes=hashes, may_promote=may_promote, reply=reply)
        )
        return taken

    async def _write(self, task: _Task, address: str, agent: str, held: _Held) -> None:
        stub: kvstore_pb2_grpc.KvStoreServiceAsyncStub = kvstore_pb2_grpc.KvStoreServiceStub(
            self._channels.get(address)
        )
        deadline_s = min(task.end_s, self._clock.now() + PUT_TIMEOUT_S)
        put = await stub.ReservePut(self._request(task.layout, held, deadline_s), timeout=CALL_TIMEOUT_S)
        if not put.indices:
            return
        wanted = [held[index] for index in put.indices]
        await task.connector.write(agent, [place for _, place in wanted], put.lease.block_ids, deadline_s)
        commit = kvstore_pb2.CommitPutRequest(
            lease_id=put.lease.lease_id,
            epoch=put.lease.epoch,
            is_complete=True,
            tenant=held[0][0].tenant,
            digests=[block.digest for block, _ in wanted],
        )
        await stub.CommitPut(commit, timeout=CALL_TIMEOUT_S)

    def _request(self, layout: KvLayout, held: _Held, deadline_s: float) -> kvstore_pb2.ReservePutRequest:
        first = held[0][0]
        return kvstore_pb2.ReservePutRequest(
            block_hashes=[block.block_hash for block, _ in held],
            layout=layout_to_proto(layout),
            writer=self._config.name,
            writer_epoch=self._epoch,
            deadline_unix_ms=self._clock.unix_ms() + int((deadline_s - self._clock.now()) * 1000),
            tenant=first.tenant,
            num_blocks_before=first.num_blocks_before,
            provenance=block_pb2.Provenance.ValueType(first.origin.provenance),
            policy_id=first.origin.policy_id,
            segment_key=first.segment_key or b"",
            parent_hash=first.parent or b"",
        )

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
