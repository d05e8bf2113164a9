"""Measure the payload lane between each pair of processes that hold KV blocks."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations

import grpc

from headrace.core.status import CLIENT_OPTIONS
from headrace.v1 import cluster_pb2, cluster_pb2_grpc

TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One measured direction, or why it could not be measured.

    Attributes:
        source: Name of the process that read and wrote.
        target: Name of the peer.
        lane: What the transfer library chose; empty when it failed.
        write_bytes_per_s: Bandwidth of large writes.
        read_bytes_per_s: Bandwidth of large reads.
        latency_us: Median of a one-block transfer.
        error: What went wrong; None when all is well.
    """

    source: str
    target: str
    lane: str = ""
    write_bytes_per_s: float = 0.0
    read_bytes_per_s: float = 0.0
    latency_us: float = 0.0
    error: str | None = None

    def row(self) -> str:
        """Return the line that `headrace doctor transport` prints."""
        pair = f"{self.source:<12} -> {self.target:<12}"
        if self.error is not None:
            return f"{pair} failed: {self.error}"
        write, read = self.write_bytes_per_s / 1e9, self.read_bytes_per_s / 1e9
        return f"{pair} {self.lane:<8} {write:>11.2f} {read:>10.2f} {self.latency_us:>10.1f}"


HEADER = f"{'from':<12}    {'to':<12} {'lane':<8} {'write GB/s':>11} {'read GB/s':>10} {'latency us':>10}"


def measure_lanes(addresses: Mapping[str, str], timeout_s: float = TIMEOUT_S) -> Iterator[Lane]:
    """Ask each process to measure its lane to each other one, one pair at a time.

    Args:
        addresses: host:port of the gRPC server by name.
        timeout_s: Longest time for one pair.
    """
    for source, target in permutations(addresses, 2):
        yield _measure(source, target, addresses, timeout_s)


def _measure(source: str, target: str, addresses: Mapping[str, str], timeout_s: float) -> Lane:
    request = cluster_pb2.MeasureTransportRequest(peer_address=addresses[target])
    with grpc.insecure_channel(addresses[source], options=CLIENT_OPTIONS) as channel:
        try:
            answer = cluster_pb2_grpc.ClusterServiceStub(channel).MeasureTransport(request, timeout=timeout_s)
        except grpc.RpcError as error:
            return Lane(source=source, target=target, error=f"{error.code().name} {error.details()}")
    return Lane(
        source=source,
        target=target,
        lane=answer.lane,
        write_bytes_per_s=answer.write_bytes_per_s,
        read_bytes_per_s=answer.read_bytes_per_s,
        latency_us=answer.latency_us,
    )
