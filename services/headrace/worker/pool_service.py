"""PoolService of a worker on the wire: its own cached blocks, for readers elsewhere. Decides nothing."""

from collections.abc import Callable

import grpc.aio

from headrace.core.block import BlockHash
from headrace.core.lease_terms import checked_hashes
from headrace.core.wire import holder_to_proto
from headrace.errors import PeerMismatch
from headrace.v1 import block_pb2, pool_pb2, pool_pb2_grpc
from headrace.worker.digests import BlockDigests
from headrace.worker.process import MemberParts
from headrace.worker.reads import Reader, Reads


class PoolServicer(pool_pb2_grpc.PoolServiceServicer):
    """Turn calls into reads and questions to the engine.

    Whose blocks these are is in their names, which only those can tell who know the key of their root; leases are
    bound to the tenant that they were granted to.

    Args:
        reads: Owner of the leases.
        parts: Of the worker.
        digests: Of its blocks.
        on_corrupt: Hears of blocks whose bytes a reader found to be wrong.
    """

    def __init__(
        self, reads: Reads, parts: MemberParts, digests: BlockDigests, on_corrupt: Callable[[BlockHash], None]
    ) -> None:
        self._reads = reads
        self._digests = digests
        self._on_corrupt = on_corrupt
        self._engine = parts.engine
        self._epoch = parts.epoch
        self._fingerprint = parts.fingerprint
        self._clock = parts.clock

    async def AcquireGet(
        self, request: pool_pb2.AcquireGetRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pool_pb2.AcquireGetResponse:
        """Lease cached blocks to a reader."""
        if request.model_fingerprint != self._fingerprint:
            raise PeerMismatch(
                f"blocks of model {request.model_fingerprint!r} wanted, those of {self._fingerprint!r} are here",
                field="model_fingerprint",
            )
        reader = Reader(name=request.reader, epoch=request.reader_epoch, tenant=request.tenant)
        read = await self._reads.acquire(request.block_hashes, reader, request.deadline_unix_ms)
        lease = block_pb2.BlockLease(
            lease_id=read.lease_id,
            epoch=self._epoch,
            deadline_unix_ms=read.deadline_unix_ms,
            block_ids=read.blocks,
        )
        try:
            hashes = [BlockHash(block_hash) for block_hash in request.block_hashes[: len(read.blocks)]]
            digests = await self._digests.take(hashes, read.blocks)
        except BaseException:
            self._reads.release(read.lease_id, self._epoch, request.tenant)
            raise
        return pool_pb2.AcquireGetResponse(lease=lease, digests=digests)

    async def ReleaseGet(
        self, request: pool_pb2.ReleaseGetRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pool_pb2.ReleaseGetResponse:
        """End a read."""
        self._reads.release(request.lease_id, request.epoch, request.tenant)
        return pool_pb2.ReleaseGetResponse()

    async def ReportCorrupt(
        self, request: pool_pb2.ReportCorruptRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pool_pb2.ReportCorruptResponse:
        """Keep back a block whose bytes are not what its digest says."""
        (block_hash,) = checked_hashes((request.block_hash,), 1)
        is_quarantined = await self._engine.quarantine(block_hash)
        if is_quarantined:
            self._on_corrupt(block_hash)
        return pool_pb2.ReportCorruptResponse(is_quarantined=is_quarantined)

    async def ListLeases(
        self, request: pool_pb2.ListLeasesRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pool_pb2.ListLeasesResponse:
        """List who holds which blocks."""
        holders = await self._engine.holders()
        now_s = self._clock.now()
        return pool_pb2.ListLeasesResponse(leases=[holder_to_proto(holder, now_s) for holder in holders])
