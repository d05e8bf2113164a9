"""What the ingestor says of itself to the cluster."""

import asyncio

from headrace.core.request import PROTOCOL_VERSION
from headrace.errors import HeadraceError, InvalidRequest
from headrace.ingestor.parts import IngestParts
from headrace.ingestor.sessions import Sessions
from headrace.runtime.footprint import num_fds, num_tasks
from headrace.runtime.lifecycle import Lifecycle
from headrace.runtime.server import GrpcServer
from headrace.v1 import cluster_pb2

LOOK_S = 5.0
RETRY_S = 0.25


class IngestorMember:
    """Identity and load of an ingestor; implements `runtime.cluster.Member`.

    Args:
        epoch: Lifetime of this process.
        sessions: Its contexts.
        parts: What they share.
        lifecycle: Asked to stop when the ingestor drains.
    """

    def __init__(self, epoch: str, sessions: Sessions, parts: IngestParts, lifecycle: Lifecycle) -> None:
        self._epoch = epoch
        self._sessions = sessions
        self._parts = parts
        self._lifecycle = lifecycle
        self._not_ready_reason = "starting: no router has answered"

    def describe(self) -> cluster_pb2.HandshakeResponse:
        """Return the ingestor's identity; it has no model of its own and no pool."""
        return cluster_pb2.HandshakeResponse(
            protocol_version=PROTOCOL_VERSION,
            name=self._parts.config.name,
            role=cluster_pb2.ROLE_INGESTOR,
            epoch=self._epoch,
        )

    def load(self) -> cluster_pb2.LoadReport:
        """Return the load now: contexts whose client is there run, the others wait."""
        live, counts = self._sessions.live(), self._parts.counts
        num_attended = sum(session.num_calls > 0 for session in live)
        reason = "draining" if self._sessions.is_draining else self._not_ready_reason
        return cluster_pb2.LoadReport(
            name=self._parts.config.name,
            epoch=self._epoch,
            num_running=num_attended,
            num_waiting=len(live) - num_attended,
            ledger=cluster_pb2.LedgerReport(),
            num_tasks=num_tasks(),
            num_fds=num_fds(),
            is_ready=not reason,
            not_ready_reason=reason,
            is_draining=self._sessions.is_draining,
            ingest=cluster_pb2.IngestReport(
                text_chars=self._parts.room.num_chars,
                num_opened=counts.opened,
                num_operations=counts.operations,
                num_refused=counts.refused,
                num_revisions=counts.revisions,
                sent_tokens=counts.sent_tokens,
                dropped_tokens=counts.dropped_tokens,
                num_resumed=counts.resumed,
                num_expired=counts.expired,
                num_kept=self._sessions.num_kept,
            ),
        )

    async def meet(self, caller: cluster_pb2.HandshakeRequest) -> None:
        """Nothing to note of callers."""

    async def drain(self, grace_s: float) -> int:
        """Begin to leave."""
        self._sessions.is_draining = True
        self._lifecycle.stop("drain", grace_s)
        return len(self._sessions.live())

    async def measure(self, peer_address: str) -> cluster_pb2.MeasureTransportResponse:
        """Refuse: an ingestor moves no blocks."""
        raise InvalidRequest("the ingestor moves no blocks; ask a worker", field="peer_address")

    async def keep_ready(self, server: GrpcServer) -> None:
        """Ask a router for its models, at the start and every few seconds, until cancelled.

        A token of its own would be counted among those of users; that there are tokens is the router's to prove.
        """
        while True:
            try:
                await self._parts.routers.model("")
                self._not_ready_reason = ""
            except HeadraceError as error:
                self._not_ready_reason = error.message
            await server.set_ready(is_ready=not self._not_ready_reason, reason=self._not_ready_reason)
            await asyncio.sleep(RETRY_S if self._not_ready_reason else LOOK_S)
