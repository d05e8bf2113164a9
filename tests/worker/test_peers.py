"""One connection per peer and lifetime; what is forgotten is met anew."""

import asyncio

import pytest

from headrace.core.request import PROTOCOL_VERSION
from headrace.errors import PeerFailed, PeerMismatch
from headrace.runtime.channels import Channels
from headrace.runtime.server import GrpcServer
from headrace.transfer.connector import PoolDescriptor
from headrace.transfer.wire import pool_to_proto
from headrace.v1 import cluster_pb2, cluster_pb2_grpc
from headrace.worker.peers import Peers


class Remote(cluster_pb2_grpc.ClusterServiceServicer):
    """A process that says of itself what the test wants."""

    def __init__(self):
        self.epoch, self.fingerprint, self.version = "e1", "f", PROTOCOL_VERSION
        self.num_met = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def Handshake(self, request, context):
        await self.may_answer.wait()
        self.num_met += 1
        pool = PoolDescriptor(
            agent_name=f"agent-{self.epoch}",
            agent_metadata=b"x",
            base_address=0,
            block_bytes=1,
            num_blocks=1,
            device_id=0,
            epoch=self.epoch,
        )
        return cluster_pb2.HandshakeResponse(
            protocol_version=self.version,
            model_fingerprint=self.fingerprint,
            name="remote",
            epoch=self.epoch,
            pool=pool_to_proto(pool),
        )


class Agents:
    """Notes which agents are connected."""

    def __init__(self):
        self.connected = set()
        self.refuses = False
        self.may_remove = asyncio.Event()
        self.may_remove.set()

    async def add_peer(self, pool):
        if self.refuses:
            raise PeerFailed("metadata unusable")
        self.connected.add(pool.agent_name)

    async def remove_peer(self, name):
        await self.may_remove.wait()
        self.connected.discard(name)


class Desk:
    def __init__(self, channels, address):
        self.remote, self.address = Remote(), address
        self.agents = Agents()
        hello = cluster_pb2.HandshakeRequest(protocol_version=PROTOCOL_VERSION, name="own")
        self.peers = Peers(self.agents, channels, lambda: hello, "f")


@pytest.fixture
async def desk():
    async with Channels() as channels:
        desk = Desk(channels, "")
        server = GrpcServer("remote", "127.0.0.1", 0)
        server.add(cluster_pb2_grpc.add_ClusterServiceServicer_to_server, desk.remote)
        await server.start()
        desk.address = server.address
        yield desk
        await server.stop()


async def test_many_that_need_a_peer_at_once_meet_it_once(desk):
    await asyncio.gather(*(desk.peers.ensure(desk.address, "e1") for _ in range(10)))
    assert desk.remote.num_met == 1
    assert desk.agents.connected == {"agent-e1"}


async def test_a_reborn_peer_replaces_its_former_life(desk):
    await desk.peers.ensure(desk.address)
    desk.remote.epoch = "e2"
    assert (await desk.peers.ensure(desk.address, "e2")).epoch == "e2"
    assert desk.agents.connected == {"agent-e2"}


async def test_a_peer_of_another_life_than_wanted_is_a_failed_peer(desk):
    with pytest.raises(PeerFailed, match="restarted"):
        await desk.peers.ensure(desk.address, "e0")
    assert desk.agents.connected == set()


@pytest.mark.parametrize(("name", "value"), [("fingerprint", "other"), ("version", PROTOCOL_VERSION + 1)])
async def test_a_peer_that_would_be_misread_is_refused(desk, name, value):
    setattr(desk.remote, name, value)
    with pytest.raises(PeerMismatch):
        await desk.peers.ensure(desk.address)
    assert desk.agents.connected == set()


async def test_a_forgotten_peer_is_met_anew(desk):
    await desk.peers.ensure(desk.address)
    await desk.peers.forget(desk.address)
    assert desk.agents.connected == set()
    await desk.peers.ensure(desk.address)
    assert desk.remote.num_met == 2
    assert desk.agents.connected == {"agent-e1"}


async def test_forgetting_a_former_life_keeps_the_present_one(desk):
    await desk.peers.ensure(desk.address)
    desk.remote.epoch = "e2"
    await desk.peers.ensure(desk.address, "e2")
    await desk.peers.forget(desk.address, "e1")
    assert desk.agents.connected == {"agent-e2"}
    await desk.peers.forget(desk.address, "e2")
    assert desk.agents.connected == set()


async def test_forgetting_while_another_meets_the_peer_leaves_it_connected(desk):
    """Otherwise the pair is dead: known here, unknown to the transport."""
    await desk.peers.ensure(desk.address)
    desk.agents.may_remove.clear()
    forgetting = asyncio.ensure_future(desk.peers.forget(desk.address))
    await asyncio.sleep(0)
    meeting = asyncio.ensure_future(desk.peers.ensure(desk.address))
    await asyncio.wait([meeting], timeout=0.1)
    desk.agents.may_remove.set()
    await asyncio.gather(forgetting, meeting)
    assert desk.agents.connected == {"agent-e1"}


async def test_a_peer_that_the_transport_refuses_is_not_known(desk):
    await desk.peers.ensure(desk.address)
    desk.remote.epoch, desk.agents.refuses = "e2", True
    with pytest.raises(PeerFailed):
        await desk.peers.ensure(desk.address, "e2")
    desk.agents.refuses = False
    assert (await desk.peers.ensure(desk.address)).epoch == "e2"
    assert desk.agents.connected == {"agent-e2"}


async def test_a_peer_that_does_not_answer_is_a_failed_peer_and_no_deadline_of_a_request(desk, monkeypatch):
    monkeypatch.setattr("headrace.worker.peers.HANDSHAKE_TIMEOUT_S", 0.05)
    desk.remote.may_answer.clear()
    with pytest.raises(PeerFailed) as caught:
        await desk.peers.ensure(desk.address)
    assert caught.value.worker == desk.address
    desk.remote.may_answer.set()
    await desk.peers.ensure(desk.address)
