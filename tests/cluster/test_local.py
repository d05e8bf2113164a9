"""What a cluster on one machine promises beside answers: loopback only, and a doctor that finds it well."""

import ipaddress

import httpx
import psutil
import pytest

from headrace.cli.doctor import measure_lanes
from headrace.cli.leases import list_leases
from headrace.testing.cluster import LocalCluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def blocks_movers(cluster: LocalCluster) -> dict[str, str]:
    others = ("router", "ingestor", "redis")
    return {each.name: each.grpc for each in cluster.state().processes if each.role not in others}


def test_every_server_listens_on_loopback_only(cluster):
    names = {process.name: process.pid for process in cluster.state().processes}
    assert set(names) == {"router", "kvstore", "ingestor", "prefill-0", "decode-0", "redis"}
    for name, pid in names.items():
        listening = [found for found in psutil.Process(pid).net_connections("inet") if found.status == "LISTEN"]
        assert listening, name
        for socket in listening:
            address = ipaddress.ip_address(socket.laddr.ip)
            mapped = getattr(address, "ipv4_mapped", None)
            assert (mapped or address).is_loopback, f"{name} listens on {socket.laddr}"


def test_the_doctor_lists_the_blocks_of_every_process(cluster):
    pools = blocks_movers(cluster)
    reports = {report.process: report for report in list_leases(pools)}
    assert reports.keys() == pools.keys()
    for report in reports.values():
        ledger = report.ledger
        assert report.error is None
        assert ledger.free + ledger.cached + ledger.leased == ledger.total > 0


def test_the_doctor_measures_every_pair_also_after_the_kvstore_was_reborn(cluster):
    lanes = list(measure_lanes(blocks_movers(cluster)))
    assert len(lanes) == 6
    assert [lane.error for lane in lanes] == [None] * 6
    old = cluster.kill("kvstore")
    cluster.wait_restarted("kvstore", old)

    def errors() -> list[str | None]:
        return [lane.error for lane in measure_lanes(blocks_movers(cluster))]

    # Workers look for a reborn kvstore every few seconds.
    wait_until(lambda: errors() == [None] * 6, 30.0, lambda: f"lanes: {errors()}")
    cluster.wait_quiet()


def test_workers_measure_what_their_steps_cost_before_they_are_ready(cluster):
    others = ("router", "kvstore", "ingestor")
    workers = {name: member for name, member in cluster.members().items() if name not in others}
    assert set(workers) == {"prefill-0", "decode-0"}
    for member in workers.values():
        cost, ledger = member.load.cost, member.load.ledger
        assert cost.step_s + cost.prompt_s > 0
        assert cost.token_s > 0
        assert 0 < cost.r2 <= 1
        assert ledger.free + ledger.cached == ledger.total
    shown = httpx.get(f"{cluster.http}/metrics", timeout=5.0).text
    for name, role in (("prefill-0", "prefill"), ("decode-0", "decode")):
        assert f'headrace_worker_cost_r2{{role="{role}",worker="{name}"}} {workers[name].load.cost.r2}\n' in shown
    assert 'headrace_worker_cost_r2{role="kvstore"' not in shown
