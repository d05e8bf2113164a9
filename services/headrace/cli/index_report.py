"""Show every copy of the global prefix index: who is in it, how current and how right it is."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import grpc

from headrace.cli.leases import shown
from headrace.core.status import CLIENT_OPTIONS
from headrace.v1 import index_pb2, index_pb2_grpc

TIMEOUT_S = 10.0

_ROW = "  {:<14} {:<18} {:>9} {:>9} {:>9} {:>9} {:>8}"
HEADER = _ROW.format("location", "epoch", "device", "dram", "disk", "next", "age")


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexReport:
    """One process's copy of the index, or why it did not say.

    Attributes:
        process: Its name.
        index: What it says.
        error: What went wrong; None when it answered.
    """

    process: str
    index: index_pb2.DescribeIndexResponse = field(default_factory=index_pb2.DescribeIndexResponse)
    error: str | None = None

    @property
    def problems(self) -> tuple[str, ...]:
        """What somebody should look at; empty when all is well."""
        index = self.index
        if self.error is not None:
            return (f"does not answer: {self.error}",)
        found = [f"the log cannot be read, the last state is served: {index.problem}"] if index.problem else []
        if not index.problem and not index.is_synced:
            found.append("has not caught up with the log yet")
        found += [f"{shown(each.name)}: an event was missed" for each in index.locations if each.is_resyncing]
        if index.drift_alarm and index.drift >= index.drift_alarm:
            found.append(f"hits differ from what was promised by {index.drift:.0%}")
        return tuple(found)

    def rows(self) -> list[str]:
        """Return the lines that `headrace doctor index` prints."""
        index = self.index
        rows = [f"{self.process}: {problem}" for problem in self.problems]
        if self.error is not None:
            return rows
        per_block = index.memory_bytes / index.num_blocks if index.num_blocks else 0.0
        rows.append(
            f"{self.process}: {index.num_blocks} blocks in {index.memory_bytes / 1e6:.1f} of "
            f"{index.budget_bytes / 1e6:.0f} MB ({per_block:.0f} bytes each), {index.num_evicted} evicted; "
            f"{index.num_events} events, {index.num_gaps} gaps, {index.num_fenced} of ended lifetimes"
        )
        rows += [_row(location) for location in index.locations]
        if index.drift_alarm:
            rows.append(
                f"  hit tokens: {index.predicted_tokens} promised, {index.actual_tokens} found, "
                f"drift {index.drift:.1%} (alarm at {index.drift_alarm:.0%})"
            )
        return rows


def describe_indexes(addresses: Mapping[str, str], timeout_s: float = TIMEOUT_S) -> Iterator[IndexReport]:
    """Ask each process for its copy of the index.

    Args:
        addresses: host:port of the gRPC server by name.
        timeout_s: Longest time for one process.
    """
    for process, address in addresses.items():
        with grpc.insecure_channel(address, options=CLIENT_OPTIONS) as channel:
            stub = index_pb2_grpc.IndexServiceStub(channel)
            try:
                answer = stub.DescribeIndex(index_pb2.DescribeIndexRequest(), timeout=timeout_s)
            except grpc.RpcError as error:
                yield IndexReport(process=process, error=f"{error.code().name} {error.details()}")
            else:
                yield IndexReport(process=process, index=answer)


def _row(location: index_pb2.IndexLocation) -> str:
    numbers = (location.num_device_blocks, location.num_dram_blocks, location.num_disk_blocks, location.next_sequence)
    return _ROW.format(shown(location.name), shown(location.epoch)[:18], *numbers, f"{location.age_ms / 1000:.1f} s")
