"""Show who holds KV blocks in each process that has a pool."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import grpc

from headrace.core.status import CLIENT_OPTIONS
from headrace.v1 import cluster_pb2, cluster_pb2_grpc, pool_pb2, pool_pb2_grpc

TIMEOUT_S = 10.0
"""An engine answers between two steps."""

_ROW = "{:<12} {:<9} {:<28} {:<12} {:<12} {:>7} {:>10}"
HEADER = _ROW.format("process", "lease", "owner", "reader", "epoch", "blocks", "ends in")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolReport:
    """Who holds blocks of one process, or why it did not say.

    Attributes:
        process: Its name.
        ledger: Its blocks by state.
        leases: All holders.
        error: What went wrong; None when all is well.
    """

    process: str
    ledger: cluster_pb2.LedgerReport = field(default_factory=cluster_pb2.LedgerReport)
    leases: tuple[pool_pb2.LeaseReport, ...] = ()
    error: str | None = None

    def rows(self) -> list[str]:
        """Return the lines that `headrace doctor leases` prints: one per holder, then the total."""
        if self.error is not None:
            return [f"{self.process:<12} does not answer: {self.error}"]
        ledger = self.ledger
        total = f"{ledger.total} blocks: {ledger.free} free, {ledger.cached} cached, {ledger.leased} leased"
        return [*(self._row(lease) for lease in self.leases), f"{self.process:<12} total of {total}"]

    def _row(self, lease: pool_pb2.LeaseReport) -> str:
        names = map(shown, (lease.lease, lease.owner, lease.reader, lease.epoch))
        return _ROW.format(self.process, *names, lease.num_blocks, _end(lease))


def list_leases(addresses: Mapping[str, str], timeout_s: float = TIMEOUT_S) -> Iterator[PoolReport]:
    """Ask each process who holds its blocks.

    Args:
        addresses: host:port of the gRPC server by name.
        timeout_s: Longest time for one process.
    """
    for process, address in addresses.items():
        yield _ask(process, address, timeout_s)


def _ask(process: str, address: str, timeout_s: float) -> PoolReport:
    with grpc.insecure_channel(address, options=CLIENT_OPTIONS) as channel:
        try:
            listed = pool_pb2_grpc.PoolServiceStub(channel).ListLeases(pool_pb2.ListLeasesRequest(), timeout=timeout_s)
            reports = cluster_pb2_grpc.ClusterServiceStub(channel).WatchLoad(
                cluster_pb2.WatchLoadRequest(), timeout=timeout_s
            )
            load = next(iter(reports)).load
            reports.cancel()
        except grpc.RpcError as error:
            return PoolReport(process=process, error=f"{error.code().name} {error.details()}")
    return PoolReport(process=process, ledger=load.ledger, leases=tuple(listed.leases))


def _end(lease: pool_pb2.LeaseReport) -> str:
    if lease.is_writer:
        return "writer"
    return f"{lease.remaining_ms / 1000:.1f} s" if lease.HasField("remaining_ms") else "its owner"


def shown(name: str) -> str:
    """Return a name that a peer chose, as a terminal may show it."""
    return "".join(char if char.isprintable() else "?" for char in name) or "-"
