"""PoolService of the kvstore on the wire: translates and decides nothing."""

import grpc.aio

from headrace.clock import Clock
from headrace.core.block import BlockHash
from headrace.core.ledger import Holder
from headrace.core.wire import holder_to_proto
from headrace.kvstore.actor import KvStoreActor
from headrace.kvstore.messages import AcquireGet, Granted, ListHolders, Quarantine, ReleaseGet
from headrace.v1 import block_pb2, pool_pb2, pool_pb2_grpc


class PoolServicer(pool_pb2_grpc.PoolServiceServicer):
    """Turn calls into messages.

    Args:
        actor: Answers them.
        epoch: Lifetime of this process, written into leases.
        clock: Leases end on it.
    """

    def __init__(self, actor: KvStoreActor, epoch: str, clock: Clock) -> None:
        self._mailbox = actor.mailbox
        self._epoch = epoch
        self._clock = clock

    async def AcquireGet(
        self, request: pool_pb2.AcquireGetRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pool_pb2.AcquireGetResponse:
        """Lease stored blocks to a reader."""
        granted: Granted = await self._mailbox.ask(
            lambda reply: AcquireGet(
                hashes=request.block_hashes,
                reader=request.reader,
                deadline_unix_ms=request.deadline_unix_ms,
                reply=reply,
            )
        )
        return pool_pb2.AcquireGetResponse(lease=lease_of(granted, self._epoch))

    async def ReleaseGet(
        self, request: pool_pb2.ReleaseGetRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pool_pb2.ReleaseGetResponse:
        """End a read."""
        await self._mailbox.ask(lambda reply: ReleaseGet(lease_id=request.lease_id, epoch=request.epoch, reply=reply))
        return pool_pb2.ReleaseGetResponse()

    async def ReportCorrupt(
        self, request: pool_pb2.ReportCorruptRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pool_pb2.ReportCorruptResponse:
        """Keep back a block whose bytes are not what its digest says."""
        block_hash = BlockHash(request.block_hash)
        was_here: bool = await self._mailbox.ask(lambda reply: Quarantine(block_hash=block_hash, reply=reply))
        return pool_pb2.ReportCorruptResponse(is_quarantined=was_here)

    async def ListLeases(
        self, request: pool_pb2.ListLeasesRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pool_pb2.ListLeasesResponse:
        """List who holds which blocks."""
        holders: tuple[Holder, ...] = await self._mailbox.ask(lambda reply: ListHolders(reply=reply))
        now_s = self._clock.now()
        return pool_pb2.ListLeasesResponse(leases=[holder_to_proto(holder, now_s) for holder in holders])


def lease_of(granted: Granted, epoch: str) -> block_pb2.BlockLease:
    """Write a lease."""
    return block_pb2.BlockLease(
        lease_id=granted.lease_id,
        epoch=epoch,
        deadline_unix_ms=granted.deadline_unix_ms,
        block_ids=granted.blocks,
    )
