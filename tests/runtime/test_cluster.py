"""Every process answers the same questions, and refuses peers it would misread."""

from contextlib import aclosing

import pytest

from headrace.core.request import PROTOCOL_VERSION
from headrace.errors import InvalidRequest, PeerMismatch
from headrace.runtime import cluster
from headrace.runtime.channels import Channels, translate_errors
from headrace.runtime.cluster import ClusterServicer, check_peer
from headrace.runtime.server import GrpcServer
from headrace.v1 import cluster_pb2, cluster_pb2_grpc


class Worker:
    """A member that notes what it was asked."""

    def __init__(self):
        self.met = []
        self.grace_s = None
        self.num_steps = 0

    def describe(self):
        return cluster_pb2.HandshakeResponse(
            protocol_version=PROTOCOL_VERSION, model_fingerprint="f00d", name="decode-0", epoch="e1"
        )

    def load(self):
        self.num_steps += 1
        return cluster_pb2.LoadReport(name="decode-0", num_steps=self.num_steps)

    async def meet(self, caller):
        self.met.append(caller.name)

    async def drain(self, grace_s):
        self.grace_s = grace_s
        return 3

    async def measure(self, peer_address):
        return cluster_pb2.MeasureTransportResponse(peer_name=peer_address)


class Idle(Worker):
    """A member whose counters move at every look, and nothing else until the test changes it."""

    def __init__(self):
        super().__init__()
        self.num_looks = 0
        self.num_running = 0

    def load(self):
        self.num_looks += 1
        return cluster_pb2.LoadReport(name="decode-0", num_running=self.num_running, num_steps=self.num_looks)


@pytest.fixture
def worker():
    return Worker()


@pytest.fixture
async def stub(worker):
    server = GrpcServer("decode-0", "127.0.0.1", 0)
    server.add(cluster_pb2_grpc.add_ClusterServiceServicer_to_server, ClusterServicer(worker))
    await server.start()
    async with Channels() as channels:
        yield cluster_pb2_grpc.ClusterServiceStub(channels.get(server.address))
    await server.stop()


def hello(**changes):
    said = {"protocol_version": PROTOCOL_VERSION, "model_fingerprint": "f00d", "name": "prefill-0"} | changes
    return cluster_pb2.HandshakeRequest(**said)


@pytest.mark.parametrize("fingerprint", ["f00d", ""])
async def test_a_peer_of_the_same_model_or_of_none_is_met(stub, worker, fingerprint):
    answered = await stub.Handshake(hello(model_fingerprint=fingerprint), timeout=5)
    assert (answered.name, answered.epoch) == ("decode-0", "e1")
    assert worker.met == ["prefill-0"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"protocol_version": PROTOCOL_VERSION + 1}, "protocol_version"),
        ({"model_fingerprint": "bad"}, "model_fingerprint"),
    ],
)
async def test_a_peer_that_would_be_misread_is_refused_and_not_met(stub, worker, changes, field):
    with pytest.raises(PeerMismatch) as caught:
        async with translate_errors("decode-0"):
            await stub.Handshake(hello(**changes), timeout=5)
    assert caught.value.field == field
    assert worker.met == []


async def test_load_is_reported_again_and_again(stub):
    reports = stub.WatchLoad(cluster_pb2.WatchLoadRequest(interval_ms=1), timeout=5)
    assert [(await reports.read()).load.num_steps for _ in range(3)] == [1, 2, 3]
    reports.cancel()


async def test_counters_are_reported_once_per_interval_and_the_rest_when_it_changes(monkeypatch):
    monkeypatch.setattr(cluster, "LOOK_MS", 3)
    idle = Idle()
    async with aclosing(ClusterServicer(idle).WatchLoad(cluster_pb2.WatchLoadRequest(interval_ms=20), None)) as reports:
        looks = [((await anext(reports)).load, idle.num_looks)[1] for _ in range(3)]
        assert looks == [1, 8, 15]
        idle.num_running = 1
        changed = await anext(reports)
    assert (changed.load.num_running, idle.num_looks) == (1, 16)


async def test_a_request_to_drain_reaches_the_member_in_seconds(stub, worker):
    assert (await stub.Drain(cluster_pb2.DrainRequest(grace_ms=1500), timeout=5)).num_running == 3
    assert worker.grace_s == 1.5


@pytest.mark.parametrize("kind", [cluster_pb2.HandshakeRequest, cluster_pb2.HandshakeResponse])
def test_a_refusal_says_who_spoke_what_and_what_was_wanted(kind):
    with pytest.raises(PeerMismatch, match=r"decode-7 .*fingerprint theirs.*ours"):
        check_peer(kind(protocol_version=PROTOCOL_VERSION, name="decode-7", model_fingerprint="theirs"), "ours")
    with pytest.raises(PeerMismatch, match=r"decode-7 speaks protocol 99"):
        check_peer(kind(protocol_version=99, name="decode-7"), "ours")


@pytest.mark.parametrize(("theirs", "ours"), [("", "f00d"), ("f00d", ""), ("", ""), ("f00d", "f00d")])
def test_a_process_without_a_model_pairs_with_any(theirs, ours):
    check_peer(cluster_pb2.HandshakeRequest(protocol_version=PROTOCOL_VERSION, model_fingerprint=theirs), ours)


async def test_unknown_fields_of_a_newer_peer_are_tolerated(worker):
    """Field 4001 stands for what a later version adds; a process in the middle of a roll-out must not mind."""
    newer_field = bytes.fromhex("8afa01") + b"\x05later"
    server = GrpcServer("decode-0", "127.0.0.1", 0)
    server.add(cluster_pb2_grpc.add_ClusterServiceServicer_to_server, ClusterServicer(worker))
    await server.start()
    async with Channels() as channels:
        call = channels.get(server.address).unary_unary(
            "/headrace.v1.ClusterService/Handshake",
            request_serializer=lambda message: message.SerializeToString() + newer_field,
            response_deserializer=lambda data: cluster_pb2.HandshakeResponse.FromString(data + newer_field),
        )
        answered = await call(hello(), timeout=5)
    await server.stop()
    assert (answered.name, worker.met) == ("decode-0", ["prefill-0"])
    check_peer(answered, "f00d")


async def test_a_member_may_refuse_whoever_passed_the_checks(stub, worker):
    async def refuse(caller):
        raise InvalidRequest("not you", field="name")

    worker.meet = refuse
    with pytest.raises(InvalidRequest, match="not you"):
        async with translate_errors("decode-0"):
            await stub.Handshake(hello(), timeout=5)
