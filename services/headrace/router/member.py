"""The router as the cluster sees it, and the cluster as the router sees it."""

import asyncio

from headrace.core.request import PROTOCOL_VERSION
from headrace.errors import InvalidRequest
from headrace.router.actor import LiveRequests
from headrace.router.config import RouterConfig
from headrace.router.workers import Worker, WorkerTable
from headrace.runtime.footprint import num_fds, num_tasks
from headrace.runtime.lifecycle import Lifecycle
from headrace.runtime.server import GrpcServer
from headrace.runtime.telemetry import MemberLoad
from headrace.v1 import cluster_pb2, router_pb2

PUBLISH_INTERVAL_S = 0.25


class RouterMember:
    """Identity and load of a router; implements `runtime.cluster.Member`.

    Args:
        config: Name and address.
        epoch: Lifetime of this process.
        live: Its requests.
        table: The processes it knows.
        lifecycle: Asked to stop when the router drains.
    """

    def __init__(
        self, config: RouterConfig, epoch: str, live: LiveRequests, table: WorkerTable, lifecycle: Lifecycle
    ) -> None:
        self._config = config
        self._epoch = epoch
        self._live = live
        self._table = table
        self._lifecycle = lifecycle

    def describe(self) -> cluster_pb2.HandshakeResponse:
        """Return the router's identity; it has no model of its own and no pool."""
        return cluster_pb2.HandshakeResponse(
            protocol_version=PROTOCOL_VERSION,
            name=self._config.name,
            role=cluster_pb2.ROLE_ROUTER,
            epoch=self._epoch,
        )

    def load(self) -> cluster_pb2.LoadReport:
        """Return the load now."""
        reason = self._live.not_ready_reason()
        return cluster_pb2.LoadReport(
            name=self._config.name,
            epoch=self._epoch,
            num_running=self._live.num_live,
            ledger=cluster_pb2.LedgerReport(),
            num_tasks=num_tasks(),
            num_fds=num_fds(),
            is_ready=reason is None,
            not_ready_reason=reason or "",
            is_draining=self._live.is_draining,
        )

    async def meet(self, caller: cluster_pb2.HandshakeRequest) -> None:
        """Nothing to note of callers."""

    async def drain(self, grace_s: float) -> int:
        """Begin to leave."""
        self._live.is_draining = True
        self._lifecycle.stop("drain", grace_s)
        return self._live.num_live

    async def measure(self, peer_address: str) -> cluster_pb2.MeasureTransportResponse:
        """Refuse: a router moves no blocks."""
        raise InvalidRequest("the router moves no blocks; ask a worker", field="peer_address")

    def cluster(self) -> router_pb2.GetClusterResponse:
        """List this router and every configured process."""
        own = router_pb2.ClusterMember(
            name=self._config.name,
            role=cluster_pb2.ROLE_ROUTER,
            address=f"{self._config.host}:{self._config.grpc_port}",
            is_connected=True,
            load=self.load(),
        )
        return router_pb2.GetClusterResponse(members=[own, *map(_member, self._table.members.values())])

    def loads(self) -> list[MemberLoad]:
        """Return the last report of every process met, for the metrics."""
        return [
            MemberLoad(role=role_name(worker.identity.role), load=worker.load)
            for worker in self._table.members.values()
            if worker.identity is not None
        ]

    async def publish(self, server: GrpcServer) -> None:
        """Keep gRPC health current until cancelled."""
        while True:
            reason = self._live.not_ready_reason()
            await server.set_ready(is_ready=reason is None, reason=reason or "")
            await asyncio.sleep(PUBLISH_INTERVAL_S)


def role_name(role: "cluster_pb2.Role.ValueType") -> str:
    """Return a role as settings and labels spell it."""
    return cluster_pb2.Role.Name(role).removeprefix("ROLE_").lower()


def _member(worker: Worker) -> router_pb2.ClusterMember:
    role = worker.identity.role if worker.identity is not None else cluster_pb2.ROLE_UNSPECIFIED
    return router_pb2.ClusterMember(
        name=worker.name, role=role, address=worker.address, is_connected=worker.is_connected, load=worker.load
    )
