"""KvStoreService on the wire: translates and decides nothing."""

import grpc.aio

from headrace.core.block import BlockHash
from headrace.core.wire import layout_from_proto
from headrace.kvstore.actor import KvStoreActor
from headrace.kvstore.index import Report
from headrace.kvstore.messages import (
    Announce,
    CommitPut,
    Granted,
    Match,
    ReservePut,
)
from headrace.kvstore.pool_service import lease_of
from headrace.v1 import kvstore_pb2, kvstore_pb2_grpc


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
        return kvstore_pb2.ReservePutResponse(lease=lease_of(granted, self._epoch), indices=granted.indices)

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
