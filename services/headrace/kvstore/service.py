"""KvStoreService on the wire: translates and decides nothing."""

import grpc.aio

from headrace.core.block import BlockHash
from headrace.core.wire import layout_from_proto
from headrace.kvstore.actor import (
    AcquireGet,
    Announce,
    CommitPut,
    Granted,
    KvStoreActor,
    Match,
    ReleaseGet,
    ReservePut,
)
from headrace.kvstore.index import Report
from headrace.v1 import block_pb2, kvstore_pb2, kvstore_pb2_grpc


class KvStoreServicer(kvstore_pb2_grpc.KvStoreServiceServicer):
    """Turn calls into messages.

    Args:
        actor: Answers them.
        epoch: Lifetime of this process, written into leases.
    """

    def __init__(self, actor: KvStoreActor, epoch: str) -> None:
        self._mailbox = actor.mailbox
        self._epoch = epoch

    async def Match(
        self, request: kvstore_pb2.MatchRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> kvstore_pb2.MatchResponse:
        """Find the longest known prefix per location."""
        found: dict[str, int] = await self._mailbox.ask(lambda reply: Match(hashes=request.block_hashes, reply=reply))
        ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
        matches = [kvstore_pb2.PrefixMatch(location=name, num_blocks=length) for name, length in ordered]
        return kvstore_pb2.MatchResponse(matches=matches)

    async def ReservePut(
        self, request: kvstore_pb2.ReservePutRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> kvstore_pb2.ReservePutResponse:
        """Reserve room for blocks that the store does not have."""
        layout = layout_from_proto(request.layout)
        granted: Granted = await self._mailbox.ask(
            lambda reply: ReservePut(
                hashes=request.block_hashes,
                layout=layout,
                writer=request.writer,
                deadline_unix_ms=request.deadline_unix_ms,
                reply=reply,
            )
        )
        return kvstore_pb2.ReservePutResponse(lease=self._lease(granted), indices=granted.indices)

    async def CommitPut(
        self, request: kvstore_pb2.CommitPutRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> kvstore_pb2.CommitPutResponse:
        """Make written blocks visible, or revoke them."""
        num_committed: int = await self._mailbox.ask(
            lambda reply: CommitPut(
                lease_id=request.lease_id, epoch=request.epoch, is_complete=request.is_complete, reply=reply
            )
        )
        return kvstore_pb2.CommitPutResponse(num_committed=num_committed)

    async def AcquireGet(
        self, request: kvstore_pb2.AcquireGetRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> kvstore_pb2.AcquireGetResponse:
        """Lease stored blocks to a reader."""
        granted: Granted = await self._mailbox.ask(
            lambda reply: AcquireGet(
                hashes=request.block_hashes,
                reader=request.reader,
                deadline_unix_ms=request.deadline_unix_ms,
                reply=reply,
            )
        )
        return kvstore_pb2.AcquireGetResponse(lease=self._lease(granted))

    async def ReleaseGet(
        self, request: kvstore_pb2.ReleaseGetRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> kvstore_pb2.ReleaseGetResponse:
        """End a read."""
        await self._mailbox.ask(lambda reply: ReleaseGet(lease_id=request.lease_id, epoch=request.epoch, reply=reply))
        return kvstore_pb2.ReleaseGetResponse()

    async def AnnounceBlocks(
        self, request: kvstore_pb2.AnnounceBlocksRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> kvstore_pb2.AnnounceBlocksResponse:
        """Take in what a worker's own cache holds."""
        report = Report(
            worker=request.worker,
            epoch=request.epoch,
            sequence=request.sequence,
            stored=tuple(map(BlockHash, request.stored)),
            removed=tuple(map(BlockHash, request.removed)),
            is_snapshot=request.is_snapshot,
        )
        needs_snapshot: bool = await self._mailbox.ask(lambda reply: Announce(report=report, reply=reply))
        return kvstore_pb2.AnnounceBlocksResponse(needs_snapshot=needs_snapshot)

    def _lease(self, granted: Granted) -> block_pb2.BlockLease:
        return block_pb2.BlockLease(
            lease_id=granted.lease_id,
            epoch=self._epoch,
            deadline_unix_ms=granted.deadline_unix_ms,
            block_ids=granted.blocks,
        )
