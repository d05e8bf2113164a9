"""What the kvstore says of itself to the cluster."""

import asyncio
import contextlib
from collections.abc import Callable

from headrace.clock import Clock
from headrace.core.request import PROTOCOL_VERSION
from headrace.core.wire import layout_from_proto, layout_to_proto
from headrace.errors import NotReady
from headrace.kvstore.actor import KvStoreActor
from headrace.kvstore.canary import Canary
from headrace.kvstore.config import KvStoreConfig
from headrace.kvstore.handover import Handover
from headrace.kvstore.messages import Meet
from headrace.kvstore.report import store_report
from headrace.runtime.channels import Channels
from headrace.runtime.footprint import num_fds, num_tasks
from headrace.runtime.server import GrpcServer
from headrace.transfer.connector import TransferStats
from headrace.transfer.measure import NUM_SCRATCH_BLOCKS, measure
from headrace.transfer.wire import pool_to_proto
from headrace.v1 import cluster_pb2
from headrace.worker.peers import Peers

CANARY_INTERVAL_S = 5.0
CANARY_RETRY_S = 0.5


class KvStoreMember:
    """The kvstore as the cluster sees it; implements `runtime.cluster.Member`.

    Args:
        config: Name.
        epoch: Lifetime of this process.
        actor: Source of load and pool.
        handover: Source of what was handed over.
        channels: Connections for transport tests.
        clock: Times them.
        begin_drain: Asks the process to leave; gets the seconds that puts and gets under way may go on.

    Attributes:
        not_ready_reason: Empty when a canary has come back lately.
    """

    def __init__(  # noqa: PLR0913 its parts
        self,
        config: KvStoreConfig,
        epoch: str,
        actor: KvStoreActor,
        handover: Handover,
        channels: Channels,
        *,
        clock: Clock,
        begin_drain: Callable[[float], None],
    ) -> None:
        self._config = config
        self._epoch = epoch
        self._actor = actor
        self._handover = handover
        self._channels = channels
        self._clock = clock
        self._begin_drain = begin_drain
        self._peers: Peers | None = None
        self._is_draining = False
        self.not_ready_reason = "starting"

    def introduce(self) -> cluster_pb2.HandshakeRequest:
        """Return what the kvstore says when it opens a connection."""
        described = self.describe()
        return cluster_pb2.HandshakeRequest(
            protocol_version=PROTOCOL_VERSION,
            name=described.name,
            role=described.role,
            epoch=described.epoch,
            pool=described.pool if described.HasField("pool") else None,
        )

    def describe(self) -> cluster_pb2.HandshakeResponse:
        """Return identity, the pool and, once a worker told its block size, the layout."""
        connector, layout = self._actor.connector, self._actor.layout
        return cluster_pb2.HandshakeResponse(
            protocol_version=PROTOCOL_VERSION,
            name=self._config.name,
            role=cluster_pb2.ROLE_KVSTORE,
            epoch=self._epoch,
            pool=None if connector is None else pool_to_proto(connector.pool),
            layout=None if layout is None else layout_to_proto(layout),
        )

    def load(self) -> cluster_pb2.LoadReport:
        """Return the load now; messages in the mailbox count as waiting."""
        view, connector = self._actor.view(), self._actor.connector
        transfers = TransferStats() if connector is None else connector.stats()
        reason = "draining" if self._is_draining else self.not_ready_reason
        report = cluster_pb2.LoadReport(
            name=self._config.name,
            epoch=self._epoch,
            num_waiting=view.mailbox.depth,
            num_transfers=transfers.num_inflight,
            num_tasks=num_tasks(),
            num_fds=num_fds(),
            num_steps=view.mailbox.num_handled - view.num_own_messages,
            is_ready=not reason,
            not_ready_reason=reason,
            is_draining=self._is_draining,
            transferred_bytes=transfers.written_bytes + transfers.read_bytes,
        )
        if view.counts is not None:
            report.ledger.total = view.counts.total
            report.ledger.free = view.counts.free
            report.ledger.cached = view.counts.cached
            report.ledger.leased = view.counts.leased
            report.ledger.num_leases = view.counts.num_leases
        report.store.CopyFrom(store_report(view, self._actor.layout, self._handover.num_blocks))
        return report

    async def meet(self, caller: cluster_pb2.HandshakeRequest) -> None:
        """Take note of a worker's epoch and block layout; the first layout opens the pool.

        Raises:
            PeerMismatch: its blocks have another size than the pool's.
        """
        layout = layout_from_proto(caller.layout) if caller.HasField("layout") else None
        await self._actor.mailbox.ask(
            lambda reply: Meet(worker=caller.name, epoch=caller.epoch, layout=layout, reply=reply)
        )
        if layout is not None and self._actor.index is not None:
            self._actor.index.feeds.meet(caller.model_fingerprint, layout.block_tokens)

    async def drain(self, grace_s: float) -> int:
        """Grant no lease any more and begin to leave; returns how many leases and writers are left."""
        self._is_draining = True
        num_leases = await self._actor.close_door()
        self._begin_drain(grace_s)
        return num_leases

    async def measure(self, peer_address: str) -> cluster_pb2.MeasureTransportResponse:
        """Move scratch blocks to and from a peer's scratch blocks."""
        connector = self._actor.connector
        if connector is None or self._actor.layout is None:
            raise NotReady("the kvstore has no pool yet: a worker must shake hands first")
        if self._peers is None:
            self._peers = Peers(connector, self._channels, self.introduce, "")
        peer = await self._peers.ensure(peer_address)
        own_end, end = connector.pool.num_blocks, peer.pool.num_blocks
        local = range(own_end - NUM_SCRATCH_BLOCKS, own_end)
        remote = range(end - NUM_SCRATCH_BLOCKS, end)
        found = await measure(connector, peer.pool.agent_name, local, remote, self._clock)
        return cluster_pb2.MeasureTransportResponse(
            peer_name=peer.name,
            lane=found.lane,
            write_bytes_per_s=found.write_bytes_per_s,
            read_bytes_per_s=found.read_bytes_per_s,
            latency_us=found.latency_us,
        )

    async def keep_ready(self, server: GrpcServer, canary: Canary) -> None:
        """Prove the store's path with a real block at start, for every new pool and every interval, until cancelled."""
        while True:
            self._actor.reopened.clear()
            self.not_ready_reason = await canary.try_once(server.address)
            await server.set_ready(is_ready=not self.not_ready_reason, reason=self.not_ready_reason)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CANARY_RETRY_S if self.not_ready_reason else CANARY_INTERVAL_S):
                    await self._actor.reopened.wait()
