"""What an ingestor says of itself, and how it leaves: in this process, and as one of its own."""

import asyncio
import contextlib
import os
import signal
import socket
import sys

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace import AsyncClient
from headrace.clock import VirtualClock
from headrace.core.request import PROTOCOL_VERSION
from headrace.errors import DeadlineExceeded, Draining, InvalidRequest
from headrace.ingestor.__main__ import serve as serve_root
from headrace.ingestor.config import IngestorConfig
from headrace.ingestor.member import IngestorMember
from headrace.runtime.lifecycle import Lifecycle
from headrace.runtime.server import GrpcServer
from headrace.testing.context_call import ContextCaller, replaced, updated
from headrace.testing.frontend import ScriptedFrontend, say
from headrace.testing.ingestor import serve_frontend
from headrace.testing.text import write_byte_tokenizer
from headrace.v1 import cluster_pb2, cluster_pb2_grpc, ingestor_pb2

PATIENCE_S = 20.0


async def until(condition, what):
    """Wait for what only another task tells."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 what is waited for is asked of others, who set no event here
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(what) from None


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch):
    monkeypatch.setattr("headrace.ingestor.member.LOOK_S", 0.01)
    monkeypatch.setattr("headrace.ingestor.member.RETRY_S", 0.01)


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# -- Its word ---------------------------------------------------------------------


def member_of(ingestor):
    return IngestorMember("e1", ingestor.sessions, ingestor.parts, Lifecycle())


async def test_it_is_an_ingestor_without_a_model_or_a_pool(serve):
    described = member_of(await serve(name="i7")).describe()
    assert described == cluster_pb2.HandshakeResponse(
        protocol_version=PROTOCOL_VERSION, name="i7", role=cluster_pb2.ROLE_INGESTOR, epoch="e1"
    )


async def test_it_moves_no_blocks(serve):
    with pytest.raises(InvalidRequest, match="ask a worker"):
        await member_of(await serve()).measure("127.0.0.1:1")


async def test_contexts_count_as_running_while_their_client_is_there_and_as_waiting_without(serve, caller):
    ingestor, call = await caller()
    member = member_of(ingestor)
    attended, left = await call().open(), await call().open()
    assert (member.load().num_running, member.load().num_waiting) == (2, 0)
    left.leave()
    await until(lambda: member.load().num_waiting == 1, "the one that left still runs")
    assert member.load().num_running == 1
    await attended.abandon(1)
    assert (member.load().num_running, member.load().num_waiting) == (0, 1)
    await (await call().resume(left.opened.context_id)).abandon(1)
    assert (member.load().num_running, member.load().num_waiting) == (0, 0)


async def test_a_context_that_is_answered_counts_until_its_answer_is_complete(caller, frontend):
    ingestor, call = await caller()
    member, may_end = member_of(ingestor), asyncio.Event()
    frontend.script = lambda request: [may_end, *say("a")(request)]
    context = await (await call().open()).close(1, "?")
    assert member.load().num_running == 1
    may_end.set()
    await context.finish()
    assert member.load().num_running == 0


async def test_what_happened_is_counted(caller, frontend):
    ingestor, call = await caller()
    member = member_of(ingestor)
    context = await (await call().open(mode=ingestor_pb2.CONTEXT_MODE_UPDATE)).append(1, "one two ", "a")
    await frontend.seen(lambda contexts: contexts)
    assert member.load().ingest.text_chars == len("one two ")
    await context.operate(2, replace=replaced("nobody"))
    await context.operate(3, update=updated(("b", "three ")))
    await frontend.seen(lambda contexts: len(contexts[0].versions) == 2)
    context.leave()
    again = await call().resume(context.opened.context_id)
    await again.close(4, "?")
    await again.finish()
    ingest = member.load().ingest
    assert (ingest.num_opened, ingest.num_resumed, ingest.num_expired, ingest.text_chars) == (1, 1, 0, 0)
    assert ingest.num_kept == 1
    assert (ingest.num_operations, ingest.num_refused) == (4, 1)
    assert ingest.num_revisions == len(frontend.contexts[0].versions) - 1 == 2
    num_left = len(frontend.contexts[0].versions[-1])
    assert ingest.sent_tokens - ingest.dropped_tokens == num_left == len("three ?")


async def test_contexts_that_were_given_up_are_counted(caller):
    clock = VirtualClock(1000.0)
    ingestor, call = await caller(clock=clock)
    context = await call().open()
    clock.advance(ingestor.parts.config.idle_s)
    ingestor.sessions.sweep()
    with pytest.raises(DeadlineExceeded):
        await context.finish()
    assert member_of(ingestor).load().ingest.num_expired == 1


# -- Readiness --------------------------------------------------------------------


@contextlib.asynccontextmanager
async def keeping_ready(ingestor):
    """Run what keeps an ingestor's health current; yield its member and the server that shows it."""
    member, server = member_of(ingestor), GrpcServer("ingestor", "127.0.0.1", 0)
    await server.start()
    keeping = asyncio.ensure_future(member.keep_ready(server))
    try:
        yield member, server
    finally:
        keeping.cancel()
        await asyncio.wait([keeping])
        await server.stop()


async def test_it_is_not_ready_before_a_router_has_answered(serve):
    load = member_of(await serve()).load()
    assert (load.is_ready, load.not_ready_reason) == (False, "starting: no router has answered")


async def test_it_is_ready_as_long_as_a_router_answers(serve, frontend, free_port):
    ingestor = await serve([f"127.0.0.1:{free_port}"])
    async with keeping_ready(ingestor) as (member, server):
        await until(lambda: "no router can be reached" in server.not_ready_reason, "it says nothing")
        for _ in range(2):
            async with serve_frontend(frontend, free_port):
                await until(lambda: server.is_ready, "it does not become ready")
                assert (member.load().is_ready, member.load().not_ready_reason) == (True, "")
            await until(lambda: not server.is_ready, "it stays ready without a router")
            assert not member.load().is_ready
            assert "no router can be reached" in member.load().not_ready_reason


async def test_it_is_not_ready_while_routers_have_met_no_worker(serve):
    async with serve_frontend(ScriptedFrontend([], say("a"))) as router:
        async with keeping_ready(await serve([router.address])) as (member, server):
            await until(lambda: "no worker has been met" in server.not_ready_reason, "it says nothing")
            assert not member.load().is_ready


async def test_one_router_of_several_is_enough(serve, frontend, free_port):
    async with serve_frontend(frontend) as router:
        async with keeping_ready(await serve([f"127.0.0.1:{free_port}", router.address])) as (_, server):
            await until(lambda: server.is_ready, "it does not become ready")


# -- Leaving ----------------------------------------------------------------------


async def test_told_to_drain_it_says_so_and_how_many_contexts_are_there(serve, caller):
    ingestor, call = await caller()
    context, lifecycle = await call().open(), Lifecycle()
    member = IngestorMember("e1", ingestor.sessions, ingestor.parts, lifecycle)
    assert await member.drain(7.0) == 1
    load = member.load()
    assert (load.is_draining, load.is_ready, load.not_ready_reason) == (True, False, "draining")
    assert (lifecycle.is_stopping, lifecycle.grace_s(1.0)) == (True, 7.0)
    await context.abandon(1)


class Root:
    """The whole ingestor, which leaves when its lifecycle says so."""

    def __init__(self, port, running, lifecycle):
        self.address, self.running, self.lifecycle = f"127.0.0.1:{port}", running, lifecycle

    def client(self):
        return AsyncClient(self.address, timeout_s=PATIENCE_S, retries=0)

    async def left(self):
        """Wait until it has left."""
        async with asyncio.timeout(PATIENCE_S):
            await self.running


async def wait_ready(address):
    """Wait until a process says that it can do its work."""
    async with grpc.aio.insecure_channel(address) as channel, asyncio.timeout(PATIENCE_S):
        health = health_pb2_grpc.HealthStub(channel)
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=1.0)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            await asyncio.sleep(0.02)


@pytest.fixture
async def root(tmp_path, free_port, frontend):
    lifecycle = Lifecycle()
    async with serve_frontend(frontend) as router:
        model = write_byte_tokenizer(tmp_path / "model")
        config = IngestorConfig(model=model, grpc_port=free_port, routers=(router.address,))
        running = asyncio.ensure_future(serve_root(config, lifecycle))
        await wait_ready(f"127.0.0.1:{free_port}")
        yield Root(free_port, running, lifecycle)
        lifecycle.stop("the test is over", 0.0)
        await asyncio.wait([running])


async def test_it_leaves_at_once_when_there_is_no_context(root):
    root.lifecycle.stop("test")
    await root.left()


async def test_told_to_leave_it_refuses_new_contexts_and_lets_those_that_are_there_finish(root):
    async with root.client() as client:
        async with client.context() as context:
            await context.append("one ")
            root.lifecycle.stop("test", PATIENCE_S)
            await check_refused(root.address)
            await context.append("two ")
            assert (await context.close("?").answer()).text == "abc"
        await root.left()


async def check_refused(address):
    """Wait until an ingestor is seen to leave, and check that it takes no context any more."""
    async with grpc.aio.insecure_channel(address) as channel, asyncio.timeout(PATIENCE_S):
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        async for answer in health:
            if answer.status != health_pb2.HealthCheckResponse.SERVING:
                break
        health.cancel()
    async with AsyncClient(address, timeout_s=PATIENCE_S, retries=0) as client:
        with pytest.raises(Draining):
            await client.context().__aenter__()


async def test_a_context_that_does_not_end_in_time_is_told_that_the_ingestor_leaves(root):
    async with grpc.aio.insecure_channel(root.address) as channel:
        context = await (await ContextCaller(channel).open()).append(1, "one ")
        root.lifecycle.stop("test", 0.05)
        with pytest.raises(Draining):
            await context.finish()
        await root.left()


async def test_a_context_whose_client_is_away_can_be_taken_up_while_the_ingestor_leaves(root):
    async with grpc.aio.insecure_channel(root.address) as channel:
        context = await ContextCaller(channel).open(is_unattended=True)
        await context.append(1, "one ")
        context.leave()
        root.lifecycle.stop("test", PATIENCE_S)
        await check_refused(root.address)
        again = await ContextCaller(channel).resume(context.opened.context_id)
        await again.close(2)
        assert (await again.finish()).text == "abc"
        async with asyncio.timeout(PATIENCE_S / 2):
            await root.running


async def test_the_cluster_sees_it_come_and_leave(root):
    async with grpc.aio.insecure_channel(root.address) as channel:
        cluster = cluster_pb2_grpc.ClusterServiceStub(channel)
        hello = cluster_pb2.HandshakeRequest(protocol_version=PROTOCOL_VERSION, name="r", role=cluster_pb2.ROLE_ROUTER)
        identity = await cluster.Handshake(hello)
        assert (identity.name, identity.role) == ("ingestor", cluster_pb2.ROLE_INGESTOR)
        reports = cluster.WatchLoad(cluster_pb2.WatchLoadRequest(interval_ms=10))
        load = (await reports.read()).load
        assert (load.epoch, load.is_ready, load.HasField("ingest")) == (identity.epoch, True, True)
        context = await ContextCaller(channel).open()
        answer = await cluster.Drain(cluster_pb2.DrainRequest(grace_ms=int(PATIENCE_S * 1000)))
        assert answer.num_running == 1
        while not load.is_draining:
            load = (await reports.read()).load
        assert not load.is_ready
        reports.cancel()
        await context.abandon(1)
    await root.left()


# -- A process of its own ---------------------------------------------------------


@pytest.fixture
async def process(tmp_path, free_port, frontend):
    """An ingestor as a process, which is ready; and its address."""
    async with serve_frontend(frontend) as router:
        env = os.environ | {
            "HEADRACE_INGESTOR_GRPC_PORT": str(free_port),
            "HEADRACE_INGESTOR_MODEL": str(write_byte_tokenizer(tmp_path / "model")),
            "HEADRACE_INGESTOR_ROUTERS": router.address,
        }
        started = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "headrace.ingestor", env=env, stderr=asyncio.subprocess.DEVNULL
        )
        try:
            await wait_ready(f"127.0.0.1:{free_port}")
            yield started, f"127.0.0.1:{free_port}"
        finally:
            if started.returncode is None:
                started.kill()
            await started.wait()


@pytest.mark.cluster
async def test_as_a_process_it_ends_its_contexts_after_sigterm_and_exits_with_0(process):
    started, address = process
    async with AsyncClient(address, timeout_s=PATIENCE_S, retries=0) as client, client.context() as context:
        await context.append("one ")
        started.send_signal(signal.SIGTERM)
        await check_refused(address)
        assert (await context.close("?").answer()).text == "abc"
        async with asyncio.timeout(PATIENCE_S):
            assert await started.wait() == 0
