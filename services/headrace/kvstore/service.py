"""KvStoreService on the wire: translates and decides nothing."""

import grpc.aio

from headrace.core.wire import layout_from_proto, read_facts
from headrace.index.prefix_index import PrefixMatch
from headrace.kvstore.actor import KvStoreActor
from headrace.kvstore.messages import CommitPut, Granted, Match, ReservePut
from headrace.kvstore.pool_service import lease_of
from headrace.kvstore.store import Claim
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
        found: tuple[PrefixMatch, ...] = await self._mailbox.ask(
            lambda reply: Match(hashes=request.block_hashes, reply=reply)
        )
        return kvstore_pb2.MatchResponse(matches=map(_match_to_proto, found))

    async def ReservePut(
        self, request: kvstore_pb2.ReservePutRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> kvstore_pb2.ReservePutResponse:
        """Reserve room for blocks that the store does not have."""
        layout, facts = layout_from_proto(request.layout), read_facts(request)
        granted: Granted = await self._mailbox.ask(
            lambda reply: ReservePut(
                hashes=request.block_hashes,
                layout=layout,
                writer=request.writer,
                writer_epoch=request.writer_epoch,
                deadline_unix_ms=request.deadline_unix_ms,
                facts=facts,
                reply=reply,
            )
        )
        return kvstore_pb2.ReservePutResponse(
            lease=lease_of(granted, self._epoch), indices=granted.indices, num_refused=granted.num_refused
        )

    async def CommitPut(
        self, request: kvstore_pb2.CommitPutRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> kvstore_pb2.CommitPutResponse:
        """Make written blocks visible, or revoke them."""
        claim = Claim(lease_id=request.lease_id, epoch=request.epoch, tenant=request.tenant)
        num_committed: int = await self._mailbox.ask(
            lambda reply: CommitPut(
                claim=claim, is_complete=request.is_complete, digests=tuple(request.digests), reply=reply
            )
        )
        return kvstore_pb2.CommitPutResponse(num_committed=num_committed)


def _match_to_proto(match: PrefixMatch) -> kvstore_pb2.PrefixMatch:
    tiers = [
        kvstore_pb2.TierCount(
            tier=block_pb2.Tier.ValueType(tier),
            provenance=block_pb2.Provenance.ValueType(origin.provenance),
            policy_id=origin.policy_id,
            num_blocks=num_blocks,
        )
        for tier, origin, num_blocks in match.counts
    ]
    return kvstore_pb2.PrefixMatch(location=match.location, num_blocks=match.num_blocks, tiers=tiers)
