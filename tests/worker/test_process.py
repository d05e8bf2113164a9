"""What a worker says of itself, and when it calls itself ready."""

import asyncio
from dataclasses import replace

import pytest

from headrace.core.cost import CostModel
from headrace.errors import PeerFailed
from headrace.testing.fleet import open_fleet
from headrace.v1 import cluster_pb2, cluster_pb2_grpc
from headrace.worker import process
from headrace.worker.config import WorkerRole

PROMPT = range(10, 28)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(process, "PEER_RETRY_S", 0.005)
    monkeypatch.setattr(process, "CANARY_INTERVAL_S", 0.01)


@pytest.fixture
async def fleet(tmp_path):
    async with open_fleet(tmp_path, {"h0": WorkerRole.HYBRID, "h1": WorkerRole.HYBRID}) as fleet:
        yield fleet


def health(worker):
    return worker.server.is_ready, worker.member.not_ready_reason


async def test_a_worker_describes_its_model_pool_and_role(fleet):
    worker = fleet.workers["h0"]
    said = worker.member.describe()
    assert (said.name, said.role, said.epoch) == ("h0", cluster_pb2.ROLE_HYBRID, worker.epoch)
    assert said.pool.agent_name == worker.connector.pool.agent_name
    assert said.layout.block_tokens == worker.runner.layout.block_tokens
    assert said.max_context_tokens == worker.runner.max_context_tokens


async def test_the_report_says_what_steps_cost_if_that_was_measured(fleet):
    member = fleet.workers["h0"].member
    assert not member.load().HasField("cost")
    member._cost = CostModel(
        step_s=1e-2, prompt_s=2e-2, token_s=3e-3, pair_s=4e-7, decode_s=5e-3, context_s=6e-6, r2=0.97
    )
    assert member.load().cost == cluster_pb2.StepCost(
        step_s=1e-2, prompt_s=2e-2, token_s=3e-3, pair_s=4e-7, decode_s=5e-3, context_s=6e-6, r2=0.97
    )


async def test_the_report_adds_up_and_moves_with_the_work(fleet):
    worker = fleet.workers["h0"]
    before = worker.member.load()
    held = fleet.hold_at("h0 Sampled", 2)
    fleet.table.suspect("h1")
    fleet.table._note = lambda member, load: None
    asking = asyncio.ensure_future(fleet.tokens(fleet.spec(PROMPT)))
    await held.wait()
    during = worker.member.load()
    assert during.num_running == 1
    assert during.ledger.leased >= 5
    worker.runner.gate.set()
    await asking
    await fleet.at_rest("h0")
    after = worker.member.load()
    for load in (before, during, after):
        assert load.ledger.free + load.ledger.cached + load.ledger.leased == load.ledger.total == 64
    assert after.num_steps > during.num_steps > before.num_steps
    assert (after.num_running, after.ledger.leased, after.ledger.num_leases) == (0, 0, 0)
    assert after.computed_tokens == 18 + 7


async def test_readiness_needs_a_token_of_the_own_engine(fleet):
    worker = fleet.workers["h0"]
    worker.member.not_ready_reason = "starting"
    worker.runner.gate.clear()
    keeping = fleet.tasks.create_task(worker.member.keep_ready(worker.server))
    await fleet.until(worker.runner.entered.is_set, "no canary")
    assert health(worker) == (False, "starting")
    worker.runner.gate.set()
    await fleet.until(lambda: health(worker) == (True, ""), "never ready")
    keeping.cancel()
    await fleet.at_rest("h0")


async def test_an_engine_that_fails_takes_readiness_away_and_gives_it_back(fleet):
    worker = fleet.workers["h0"]
    keeping = fleet.tasks.create_task(worker.member.keep_ready(worker.server))
    await fleet.until(lambda: health(worker) == (True, ""), "never ready")
    worker.runner.failure = ValueError("a bug in the model")
    reasons = []
    set_ready = worker.server.set_ready

    async def note(*, is_ready, reason=""):
        reasons.append(reason)
        await set_ready(is_ready=is_ready, reason=reason)

    worker.server.set_ready = note
    await fleet.until(lambda: any("canary token failed: internal" in reason for reason in reasons), "still ready")
    await fleet.until(lambda: health(worker) == (True, ""), "never ready again")
    keeping.cancel()


async def test_a_stuck_engine_takes_readiness_away(fleet, monkeypatch):
    monkeypatch.setattr(process, "CANARY_TIMEOUT_S", 0.05)
    worker = fleet.workers["h0"]
    keeping = fleet.tasks.create_task(worker.member.keep_ready(worker.server))
    await fleet.until(lambda: health(worker) == (True, ""), "never ready")
    worker.runner.gate.clear()
    await fleet.until(lambda: health(worker) == (False, "the canary token did not come in time"), "still ready")
    worker.runner.gate.set()
    await fleet.until(lambda: health(worker) == (True, ""), "never ready again")
    keeping.cancel()
    await fleet.at_rest("h0")


async def test_peers_are_met_before_the_first_readiness(fleet):
    worker, peer = fleet.workers["h0"], fleet.workers["h1"]
    worker.member._config = replace(worker.config, peers=(peer.lane.address,))
    keeping = fleet.tasks.create_task(worker.member.keep_ready(worker.server))
    await fleet.until(lambda: worker.server.is_ready, "never ready")
    assert worker.peers._known[peer.lane.address].epoch == peer.epoch
    keeping.cancel()


@pytest.mark.parametrize("stalls", [False, True])
async def test_a_dead_or_silent_peer_delays_readiness_and_does_not_end_the_worker(fleet, monkeypatch, stalls):
    monkeypatch.setattr(process, "CANARY_TIMEOUT_S", 0.2)
    monkeypatch.setattr("headrace.worker.peers.HANDSHAKE_TIMEOUT_S", 0.05)
    worker, peer = fleet.workers["h0"], fleet.workers["h1"]
    if stalls:
        peer.lane.stall()
    else:
        await peer.lane.cut()
    worker.member._config = replace(worker.config, peers=(peer.lane.address,))
    keeping = fleet.tasks.create_task(worker.member.keep_ready(worker.server))
    await fleet.until(lambda: worker.server.is_ready, "never ready")
    keeping.cancel()
    peer.lane.resume()


async def test_a_request_to_drain_begins_to_leave_and_says_what_still_runs(fleet):
    worker, left = fleet.workers["h0"], []
    worker.member._begin_drain = left.append
    stub = cluster_pb2_grpc.ClusterServiceStub(fleet.channels.get(worker.lane.address))
    answer = await stub.Drain(cluster_pb2.DrainRequest(grace_ms=1500), timeout=5)
    assert (answer.num_running, left, worker.member.load().is_draining) == (0, [1.5], True)
    await fleet.until(lambda: [each.name for each in fleet.table.usable()] == ["h1"], "still gets work")


async def test_measuring_a_peer_that_is_gone_is_a_failed_peer(fleet):
    worker, peer = fleet.workers["h0"], fleet.workers["h1"]
    await peer.kill()
    with pytest.raises(PeerFailed):
        await worker.member.measure(peer.lane.address)
