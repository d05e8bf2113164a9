from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from headrace.cli.leases import HEADER, PoolReport, list_leases
from headrace.v1 import cluster_pb2, cluster_pb2_grpc, pool_pb2, pool_pb2_grpc

READ = pool_pb2.LeaseReport(
    lease="pin 4f2a", owner="read", reader="prefill-1", epoch="77aa01", remaining_ms=9_400, num_blocks=12
)
OWN = pool_pb2.LeaseReport(lease="sequence", owner="cmpl-8-0", num_blocks=31)
WRITER = pool_pb2.LeaseReport(lease="w-33", num_blocks=7, is_writer=True)


class Pool(pool_pb2_grpc.PoolServiceServicer):
    def ListLeases(self, request, context):
        return pool_pb2.ListLeasesResponse(leases=[READ, OWN, WRITER])


class Member(cluster_pb2_grpc.ClusterServiceServicer):
    def WatchLoad(self, request, context):
        ledger = cluster_pb2.LedgerReport(total=100, free=40, cached=17, leased=43, num_leases=3)
        while context.is_active():
            yield cluster_pb2.WatchLoadResponse(load=cluster_pb2.LoadReport(ledger=ledger))


@pytest.fixture
def address() -> Iterator[str]:
    with ThreadPoolExecutor(4) as threads:
        server = grpc.server(threads)
        pool_pb2_grpc.add_PoolServiceServicer_to_server(Pool(), server)
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(Member(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None).wait()


def test_each_holder_has_a_line_and_each_process_a_total(address: str) -> None:
    [report] = list_leases({"prefill-0": address})
    read, own, writer, total = report.rows()
    assert read.split() == "prefill-0 pin 4f2a read prefill-1 77aa01 12 9.4 s".split()
    assert own.split() == "prefill-0 sequence cmpl-8-0 - - 31 its owner".split()
    assert writer.split() == "prefill-0 w-33 - - - 7 writer".split()
    assert total.split(None, 1) == ["prefill-0", "total of 100 blocks: 40 free, 17 cached, 43 leased"]
    assert {len(row) for row in (read, own, writer)} == {len(HEADER)}


def test_a_process_that_does_not_answer_is_shown_as_such_and_does_not_hide_the_others(address: str) -> None:
    gone, well = list_leases({"gone": "127.0.0.1:1", "prefill-0": address}, timeout_s=5)
    [row] = gone.rows()
    assert row.startswith("gone         does not answer: UNAVAILABLE")
    assert well.error is None
    assert len(well.leases) == 3


def test_a_name_that_a_peer_chose_cannot_steer_the_terminal() -> None:
    lease = pool_pb2.LeaseReport(lease="l", reader="\x1b[2Jeve\n", num_blocks=1)
    row, _ = PoolReport(process="p", leases=(lease,)).rows()
    assert "?[2Jeve?" in row
    assert row.isprintable()
