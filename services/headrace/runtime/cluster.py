"""What every process of the cluster answers, whatever its role."""

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

import grpc.aio

from headrace.core.request import PROTOCOL_VERSION
from headrace.errors import PeerMismatch
from headrace.v1 import cluster_pb2, cluster_pb2_grpc

DEFAULT_REPORT_INTERVAL_MS = 250

LOOK_MS = 200
"""Time between two looks at the load: what has not changed costs no message."""


class Member(Protocol):
    """A process that takes part in the cluster."""

    def describe(self) -> cluster_pb2.HandshakeResponse:
        """Return identity, model and pool."""
        ...

    def load(self) -> cluster_pb2.LoadReport:
        """Return the load now."""
        ...

    async def meet(self, caller: cluster_pb2.HandshakeRequest) -> None:
        """Take note of a caller that passed the checks; may raise HeadraceError to refuse it."""
        ...

    async def drain(self, grace_s: float) -> int:
        """Stop admitting, begin to leave, and return how many sequences still run.

        Args:
            grace_s: How long they may go on; what runs then is ended with Draining.
        """
        ...

    async def measure(self, peer_address: str) -> cluster_pb2.MeasureTransportResponse:
        """Move test blocks to a peer and report the lane."""
        ...


class ClusterServicer(cluster_pb2_grpc.ClusterServiceServicer):
    """Translate ClusterService to a Member."""

    def __init__(self, member: Member) -> None:
        self._member = member

    async def Handshake(
        self, request: cluster_pb2.HandshakeRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> cluster_pb2.HandshakeResponse:
        """Check the caller, then describe this process."""
        described = self._member.describe()
        check_peer(request, described.model_fingerprint)
        await self._member.meet(request)
        return self._member.describe()

    async def WatchLoad(
        self, request: cluster_pb2.WatchLoadRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> AsyncIterator[cluster_pb2.WatchLoadResponse]:
        """Report now, after a change and at every interval, until the caller leaves."""
        interval_ms = request.interval_ms or DEFAULT_REPORT_INTERVAL_MS
        reported, waited_ms = None, 0
        while True:
            load = self._member.load()
            facts = _pressing(load)
            if facts != reported or waited_ms >= interval_ms:
                yield cluster_pb2.WatchLoadResponse(load=load)
                reported, waited_ms = facts, 0
            pause_ms = min(LOOK_MS, interval_ms - waited_ms)
            await asyncio.sleep(pause_ms / 1000)
            waited_ms += pause_ms

    async def Drain(
        self, request: cluster_pb2.DrainRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> cluster_pb2.DrainResponse:
        """Begin to leave."""
        return cluster_pb2.DrainResponse(num_running=await self._member.drain(request.grace_ms / 1000))

    async def MeasureTransport(
        self, request: cluster_pb2.MeasureTransportRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> cluster_pb2.MeasureTransportResponse:
        """Measure the lane to a peer."""
        return await self._member.measure(request.peer_address)


def _pressing(load: cluster_pb2.LoadReport) -> tuple[object, ...]:
    """Return what others act on; counters and blocks, which every step moves, can wait for the interval."""
    return (
        load.num_running,
        load.num_waiting,
        load.waiting_tokens,
        load.num_transfers,
        load.num_tasks,
        load.num_fds,
        load.ledger.num_leases,
        load.ledger.total,
        load.not_ready_reason,
        load.is_ready,
        load.is_draining,
    )


def check_peer(
    peer: cluster_pb2.HandshakeResponse | cluster_pb2.HandshakeRequest,
    fingerprint: str,
) -> None:
    """Refuse a peer that would misread our messages or our KV.

    Raises:
        PeerMismatch: protocol version or model fingerprint differ.
    """
    if peer.protocol_version != PROTOCOL_VERSION:
        raise PeerMismatch(
            f"{peer.name} speaks protocol {peer.protocol_version}, this process {PROTOCOL_VERSION}: upgrade the older",
            field="protocol_version",
        )
    if peer.model_fingerprint and fingerprint and peer.model_fingerprint != fingerprint:
        raise PeerMismatch(
            f"{peer.name} has model fingerprint {peer.model_fingerprint}, this process {fingerprint}: "
            "KV of different weights, dtype or layout does not mix",
            field="model_fingerprint",
        )
