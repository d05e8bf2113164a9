"""The router's table: who may get work, what was just sent there, who is gone."""

import pytest

from headrace.clock import VirtualClock
from headrace.errors import PeerFailed
from headrace.router.workers import CHARGE_S, REPORT_INTERVAL_MS, WorkerTable
from headrace.runtime.channels import Channels
from headrace.testing.fleet import open_fleet
from headrace.v1 import cluster_pb2

ADDRESS = "127.0.0.1:1"


@pytest.fixture
async def table():
    async with Channels() as channels:
        table = WorkerTable(
            name="router", addresses=(ADDRESS,), channels=channels, clock=VirtualClock(10.0), report_timeout_s=1.0
        )
        identity = cluster_pb2.HandshakeResponse(name="w", role=cluster_pb2.ROLE_DECODE, epoch="e1")
        table.members[ADDRESS].identity = identity
        yield table


def report(**changes):
    return cluster_pb2.LoadReport(**({"name": "w", "epoch": "e1", "is_ready": True} | changes))


def note(table, **changes):
    table._note(table.members[ADDRESS], report(**changes))


async def test_a_worker_gets_work_from_its_first_report_on(table):
    assert table.usable() == []
    note(table)
    assert [worker.name for worker in table.usable()] == ["w"]


@pytest.mark.parametrize("changes", [{"is_ready": False}, {"is_draining": True}])
async def test_a_worker_that_is_not_ready_or_drains_gets_none(table, changes):
    note(table, **changes)
    assert table.usable() == []


@pytest.mark.parametrize("role", [cluster_pb2.ROLE_KVSTORE, cluster_pb2.ROLE_ROUTER, cluster_pb2.ROLE_INGESTOR])
async def test_only_workers_get_work(table, role):
    table.members[ADDRESS].identity.role = role
    note(table)
    assert table.usable() == []


@pytest.mark.parametrize(
    ("role", "is_listed"), [(cluster_pb2.ROLE_INGESTOR, True), (cluster_pb2.ROLE_DECODE, False)], ids=["ingestor", "d"]
)
async def test_only_ingestors_take_contexts_in(table, role, is_listed):
    table.members[ADDRESS].identity.role = role
    note(table)
    assert [member.name for member in table.ingestors()] == (["w"] if is_listed else [])


@pytest.mark.parametrize("changes", [{"is_ready": False}, {"is_draining": True}])
async def test_an_ingestor_that_is_not_ready_or_drains_gets_no_context(table, changes):
    table.members[ADDRESS].identity.role = cluster_pb2.ROLE_INGESTOR
    note(table, **changes)
    assert table.ingestors() == []


async def test_a_charge_counts_until_a_report_that_is_younger_than_it_by_the_time_it_takes_to_show(table):
    note(table)
    table.reserve("w", "s1", 30)
    table.reserve("w", "s2", 12)
    view = table.members[ADDRESS].view()
    assert (view.reserved_sequences, view.reserved_tokens) == (2, 42)
    note(table)
    assert table.members[ADDRESS].view().reserved_sequences == 2
    table._clock.advance(CHARGE_S + 0.001)
    assert table.members[ADDRESS].view().reserved_sequences == 2, "no report has come: nobody else knows of them"
    note(table, num_running=2)
    view = table.members[ADDRESS].view()
    assert (view.reserved_sequences, view.num_sequences) == (0, 2)


async def test_a_charge_is_taken_back_and_unknown_ones_are_ignored(table):
    table.reserve("w", "s1", 30)
    table.release("w", "s1")
    table.release("w", "s1")
    table.release("nobody", "s1")
    assert table.members[ADDRESS].view().reserved_tokens == 0


async def test_charging_somebody_unknown_is_a_failed_peer(table):
    with pytest.raises(PeerFailed):
        table.reserve("nobody", "s1", 1)


async def test_a_report_of_another_life_is_refused(table):
    with pytest.raises(PeerFailed, match="restarted"):
        note(table, epoch="e2")


async def test_a_suspect_gets_no_work_until_it_reports_again(table):
    note(table)
    table.suspect("w")
    assert table.usable() == []
    note(table)
    assert len(table.usable()) == 1


async def test_the_share_of_free_blocks_counts_cached_ones(table):
    assert table.members[ADDRESS].view().free_share == 1.0
    note(table, ledger=cluster_pb2.LedgerReport(total=10, free=1, cached=4, leased=5))
    assert table.members[ADDRESS].view().free_share == 0.5


async def test_a_silent_worker_counts_as_dead_and_comes_back(tmp_path, roles):
    async with open_fleet(tmp_path, roles("h0 h1")) as fleet:
        fleet.table._report_timeout_s = 2 * REPORT_INTERVAL_MS / 1000
        fleet.workers["h0"].lane.stall()
        await fleet.until(lambda: [each.name for each in fleet.table.usable()] == ["h1"], "not noticed", 2.0)
        fleet.workers["h0"].lane.resume()
        await fleet.until(lambda: len(fleet.table.usable()) == 2, "does not come back")


async def test_a_worker_with_another_model_gets_no_work(tmp_path, roles):
    async with open_fleet(tmp_path, roles("h0 h1")) as fleet:
        await fleet.workers["h1"].kill()
        await fleet.until(lambda: len(fleet.table.usable()) == 1, "not noticed")
        await fleet.revive("h1", fingerprint="another model")
        met = []
        fleet.table.on_meet = met.append
        await fleet.workers["h0"].kill()
        await fleet.until(lambda: not fleet.table.members[fleet.workers["h0"].lane.address].is_connected, "alive")
        await fleet.until(lambda: [each.name for each in fleet.table.usable()] == ["h1"], "never met")
        await fleet.revive("h0")
        fleet.table.members[fleet.workers["h0"].lane.address].reserved["x"] = (0.0, 1)
        await fleet.until(lambda: not fleet.table.members[fleet.workers["h0"].lane.address].reserved, "not tried")
        assert [each.name for each in fleet.table.usable()] == ["h1"]
        assert {peer.name for peer in met} == {"h1"}
