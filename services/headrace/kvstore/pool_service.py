"""PoolService of the kvstore on the wire: translates and decides nothing."""

import asyncio

import grpc.aio

from headrace.clock import Clock
from headrace.core.holder import Holder
from headrace.core.wire import holder_to_proto
from headrace.kvstore.actor import KvStoreActor
from headrace.kvstore.messages import AcquireGet, Granted, ListHolders, Quarantine, ReleaseGet
from headrace.kvstore.store import Claim
from headrace.v1 import block_pb2, pool_pb2, pool_pb2_grpc

PATIENCE_SHARE = 0.75
"""Of a caller's patience that the disk may take."""


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
        """Lease stored blocks to a reader; what lies on disk is brought into memory first, if there is time."""
        granted = await self._acquire(request, may_promote=True)
        coming = granted.coming
        if coming is not None:
            await asyncio.wait(coming.ends, timeout=self._patience_s(request, context.time_remaining()))
            granted = await self._acquire(request, may_promote=False)
        leased = request.block_hashes[: len(granted.blocks)]
        return pool_pb2.AcquireGetResponse(
            lease=lease_of(granted, self._epoch),
            digests=granted.digests,
            num_from_disk=0 if coming is None else sum(name in coming.hashes for name in leased),
        )

    async def ReleaseGet(
        self, request: pool_pb2.ReleaseGetRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pool_pb2.ReleaseGetResponse:
        """End a read."""
        claim = Claim(lease_id=request.lease_id, epoch=request.epoch, tenant=request.tenant)
        await self._mailbox.ask(lambda reply: ReleaseGet(claim=claim, reply=reply))
        return pool_pb2.ReleaseGetResponse()

    async def ReportCorrupt(
        self, request: pool_pb2.ReportCorruptRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pool_pb2.ReportCorruptResponse:
        """Keep back a block whose bytes are not what its digest says."""
        was_here: bool = await self._mailbox.ask(
            lambda reply: Quarantine(block_hash=request.block_hash, tenant=request.tenant, reply=reply)
        )
        return pool_pb2.ReportCorruptResponse(is_quarantined=was_here)

    async def ListLeases(
        self, request: pool_pb2.ListLeasesRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pool_pb2.ListLeasesResponse:
        """List who holds which blocks."""
        holders: tuple[Holder, ...] = await self._mailbox.ask(lambda reply: ListHolders(reply=reply))
        now_s = self._clock.now()
        return pool_pb2.ListLeasesResponse(leases=[holder_to_proto(holder, now_s) for holder in holders])

    async def _acquire(self, request: pool_pb2.AcquireGetRequest, *, may_promote: bool) -> Granted:
        granted: Granted = await self._mailbox.ask(
            lambda reply: AcquireGet(
                hashes=request.block_hashes,
                reader=request.reader,
                reader_epoch=request.reader_epoch,
                tenant=request.tenant,
                deadline_unix_ms=request.deadline_unix_ms,
                may_promote=may_promote,
                reply=reply,
            )
        )
        return granted

    def _patience_s(self, request: pool_pb2.AcquireGetRequest, remaining_s: float | None) -> float:
        """Return how long to wait for the disk, so that the caller still learns what there is."""
        lease_s = (request.deadline_unix_ms - self._clock.unix_ms()) / 1000
        return max(0.0, lease_s if remaining_s is None else min(lease_s, PATIENCE_SHARE * remaining_s))


def lease_of(granted: Granted, epoch: str) -> block_pb2.BlockLease:
    """Write a lease."""
    return block_pb2.BlockLease(
        lease_id=granted.lease_id,
        epoch=epoch,
        deadline_unix_ms=granted.deadline_unix_ms,
        block_ids=granted.blocks,
    )
