from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from headrace.cli.doctor import HEADER, Lane, measure_lanes
from headrace.v1 import cluster_pb2, cluster_pb2_grpc


class Worker(cluster_pb2_grpc.ClusterServiceServicer):
    """Reports a lane to every peer but one."""

    unreachable = ""

    def MeasureTransport(self, request, context):
        if request.peer_address == self.unreachable:
            context.abort(grpc.StatusCode.UNAVAILABLE, "peer is gone")
        return cluster_pb2.MeasureTransportResponse(
            lane="cma", write_bytes_per_s=2e9, read_bytes_per_s=1e9, latency_us=12.5
        )


@pytest.fixture
def address() -> Iterator[str]:
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(Worker(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None).wait()


def test_every_ordered_pair_is_measured_once(address: str) -> None:
    lanes = list(measure_lanes({"a": address, "b": address, "c": address}))
    assert [(lane.source, lane.target) for lane in lanes] == [
        ("a", "b"),
        ("a", "c"),
        ("b", "a"),
        ("b", "c"),
        ("c", "a"),
        ("c", "b"),
    ]
    assert {(lane.lane, lane.error) for lane in lanes} == {("cma", None)}


def test_a_pair_that_fails_says_why_and_does_not_stop_the_others(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = "127.0.0.1:1"
    monkeypatch.setattr(Worker, "unreachable", gone)
    to_gone, from_gone = measure_lanes({"a": address, "gone": gone}, timeout_s=5)
    assert to_gone.error == "UNAVAILABLE peer is gone"
    assert from_gone.error is not None
    assert from_gone.error.startswith("UNAVAILABLE")
    assert "gone" in from_gone.row()


def test_a_row_shows_lane_bandwidth_and_latency_below_its_header() -> None:
    row = Lane(
        source="prefill-0",
        target="decode-0",
        lane="cma",
        write_bytes_per_s=2.5e9,
        read_bytes_per_s=1e9,
        latency_us=12.5,
    ).row()
    assert row.split() == ["prefill-0", "->", "decode-0", "cma", "2.50", "1.00", "12.5"]
    assert len(row) == len(HEADER)
