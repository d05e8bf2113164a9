"""The router passes contexts in text on to the ingestors: which one, and everything as it is said."""

import asyncio
import contextlib

import grpc.aio
import pytest

from headrace import AsyncClient
from headrace.clock import VirtualClock
from headrace.errors import (
    ContextOverflow,
    DeadlineExceeded,
    Draining,
    HeadraceError,
    InvalidRequest,
    NotReady,
    Overloaded,
    PeerFailed,
    UnknownContext,
    UnknownModel,
)
from headrace.router.frontend import ServedModel
from headrace.router.ingestors import IngestorForwarder, Ingestors
from headrace.router.workers import Worker, WorkerTable
from headrace.runtime.channels import Channels, translate_errors
from headrace.runtime.server import GrpcServer
from headrace.testing.frontend import ScriptedFrontend, say
from headrace.testing.ingestor import open_ingestor, serve_frontend
from headrace.testing.lane import FaultyLane
from headrace.testing.text import byte_text_model
from headrace.v1 import cluster_pb2, ingestor_pb2, ingestor_pb2_grpc

METHOD = "/headrace.v1.IngestorService/StreamContext"
MAX_BYTES = 2_000
PATIENCE_S = 10.0


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return byte_text_model(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def cuts(text):
    return text.cuts()


@pytest.fixture
def frontend(text):
    model = ServedModel(name="tiny", max_context_tokens=400, fingerprint="f" * 32, text=text)
    return ScriptedFrontend([model], say("a", "b", "c"))


class Door:
    """The router's front door for contexts, and real ingestors behind it, each behind a lane that can be cut."""

    def __init__(self, text, cuts, frontend, stack, channels, tasks):
        self._text, self._cuts, self._frontend, self._stack = text, cuts, frontend, stack
        self.table = WorkerTable(
            name="router", addresses=(), channels=channels, clock=VirtualClock(), report_timeout_s=1.0
        )
        self.configured = []
        self.ingestors = Ingestors(self.table, channels, self.configured)
        self.server = GrpcServer("router", "127.0.0.1", 0, new_work=(METHOD,))
        forwarder = IngestorForwarder(self.ingestors, tasks, MAX_BYTES)
        self.server.add(ingestor_pb2_grpc.add_IngestorServiceServicer_to_server, forwarder)

    def know(self, name, address, role=cluster_pb2.ROLE_INGESTOR, **load):
        """Put a process into the table."""
        self.table.members[address] = Worker(
            address=address,
            identity=cluster_pb2.HandshakeResponse(name=name, role=role),
            load=cluster_pb2.LoadReport(**({"is_ready": True} | load)),
            is_connected=True,
        )

    async def add(self, name="ingestor", *, load=None, **settings):
        """Start an ingestor, and put it into the table."""
        router = await self._stack.enter_async_context(serve_frontend(self._frontend))
        found = await self._stack.enter_async_context(
            open_ingestor(self._text, [router.address], name=name, cuts=self._cuts, **settings)
        )
        lane = FaultyLane()
        lane.connect(found.server.port)
        await lane.open()
        self._stack.push_async_callback(lane.cut)
        self.know(name, lane.address, **(load or {}))
        return found, lane

    async def client(self, **options):
        """Return a client of the door; it tries nothing again."""
        options = {"timeout_s": PATIENCE_S, "retries": 0} | options
        return await self._stack.enter_async_context(AsyncClient(self.server.address, **options))

    def stub(self):
        """Return what sends single messages to the door."""
        return ingestor_pb2_grpc.IngestorServiceStub(self.channel())

    def channel(self):
        channel = grpc.aio.insecure_channel(self.server.address)
        self._stack.push_async_callback(channel.close)
        return channel


@pytest.fixture
async def door(text, cuts, frontend):
    async with contextlib.AsyncExitStack() as stack:
        channels = await stack.enter_async_context(Channels())
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        door = Door(text, cuts, frontend, stack, channels, tasks)
        await door.server.start()
        stack.push_async_callback(door.server.stop)
        yield door


def opening(**fields):
    return ingestor_pb2.StreamContextRequest(open=ingestor_pb2.OpenContext(**fields))


def resuming(context_id):
    return ingestor_pb2.StreamContextRequest(resume=ingestor_pb2.ResumeContext(context_id=context_id))


def appending(sequence, text):
    operation = ingestor_pb2.ContextOperation(sequence=sequence)
    operation.append.text = text
    return ingestor_pb2.StreamContextRequest(operation=operation)


async def until(condition, what):
    """Wait for what only another task tells."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 calls that end far away set no event here
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(what) from None


async def failure_of(call, kind):
    """Read a call to its end and return the error that it ends with."""
    with pytest.raises(kind) as caught:
        await read_to_the_end(call)
    return caught.value


async def read_to_the_end(call):
    async with asyncio.timeout(PATIENCE_S), translate_errors("router"):
        async for _ in call:
            pass


async def opened_id(door, first=None):
    """Open a context or take one up, leave, and return its id."""
    call = door.stub().StreamContext(_then_silence(first or opening()))
    async with asyncio.timeout(PATIENCE_S), translate_errors("router"):
        response = await anext(aiter(call))
    call.cancel()
    return response.opened.context_id


async def _then_silence(*requests):
    for request in requests:
        yield request
    await asyncio.Event().wait()


# -- Which ingestor ---------------------------------------------------------------


async def test_a_new_context_goes_to_the_ingestor_with_the_fewest_contexts(door):
    await door.add("many", load={"num_running": 2, "num_waiting": 3})
    few, _ = await door.add("few", load={"num_running": 3, "num_waiting": 1})
    async with (await door.client()).context() as context:
        await context.append("x")
        [session] = few.sessions.live()
    assert session.opening.context_id.startswith("few.")


async def test_contexts_opened_between_two_reports_are_spread(door):
    each = [(await door.add(name))[0] for name in ("one", "other")]
    client = await door.client()
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(6):
            await stack.enter_async_context(client.context())
        assert [len(ingestor.sessions.live()) for ingestor in each] == [3, 3]


async def test_a_context_is_taken_up_at_the_ingestor_that_its_id_names(door):
    named, lane = await door.add("named")
    context_id = await opened_id(door)
    await door.add("idle")
    door.know("named", lane.address, num_running=9, is_ready=False, is_draining=True)
    assert await opened_id(door, resuming(context_id)) == context_id
    assert named.parts.counts.resumed == 1


async def test_a_router_that_has_not_met_all_cannot_say_that_a_context_is_unknown(door):
    await door.add("ingestor")
    door.table.members["127.0.0.1:1"] = Worker(address="127.0.0.1:1")
    door.configured.append("127.0.0.1:1")
    await failure_of(door.stub().StreamContext(iter([resuming("other.abc")])), NotReady)


@pytest.mark.parametrize("context_id", ["", "nobody", "nobody.abc", "ingestor", "ingestor.abc", ".abc", "ing\0estor.a"])
async def test_an_id_that_nobody_gave_out_is_an_unknown_context(door, context_id):
    await door.add("ingestor")
    await failure_of(door.stub().StreamContext(iter([resuming(context_id)])), UnknownContext)


async def test_an_id_does_not_lead_to_a_process_of_another_role(door):
    _, lane = await door.add("w")
    context_id = await opened_id(door)
    door.know("w", lane.address, cluster_pb2.ROLE_DECODE)
    await failure_of(door.stub().StreamContext(iter([resuming(context_id)])), UnknownContext)


@pytest.mark.parametrize(
    "changes", [{"is_ready": False}, {"is_draining": True}, {"role": cluster_pb2.ROLE_DECODE}], ids=str
)
async def test_without_an_ingestor_that_is_ready_no_context_is_opened(door, changes):
    _, lane = await door.add()
    door.know("ingestor", lane.address, **changes)
    error = await failure_of(door.stub().StreamContext(iter([opening()])), NotReady)
    assert error.retry_after_s


@pytest.mark.parametrize("requests", [[], [appending(1, b"x")], [ingestor_pb2.StreamContextRequest()]], ids=len)
async def test_a_call_that_does_not_say_what_it_is_for_is_refused(door, requests):
    await door.add()
    error = await failure_of(door.stub().StreamContext(iter(requests)), InvalidRequest)
    assert error.field == "request"


async def test_a_client_that_says_nothing_is_not_waited_for(door, monkeypatch):
    monkeypatch.setattr("headrace.runtime.incoming.FIRST_REQUEST_S", 0.05)
    await failure_of(door.stub().StreamContext(), DeadlineExceeded)


# -- Everything as it is said -----------------------------------------------------


async def test_operations_and_pieces_pass_as_they_are(door, frontend, text):
    await door.add()
    async with (await door.client()).context("Before: ", mode="update") as context:
        await context.append("first ")
        await context.update([("a", "one "), ("b", "two ")])
        assert (await context.checkpoint()).num_segments == 2
        answer = await context.close("?").answer()
    assert answer.text == "abc"
    assert [text.decode(request.prompt) for request in frontend.requests] == ["Before: one two ?"]


async def test_what_a_refused_operation_says_arrives_and_the_context_goes_on(door):
    await door.add()
    async with (await door.client()).context(max_tokens=5) as context:
        with pytest.raises(ContextOverflow, match="405 tokens"):
            await context.append("x" * 400)
        assert (await context.append("y" * 300)).num_tokens == 300


async def test_an_error_of_the_ingestor_keeps_its_type_and_its_facts(door):
    await door.add(max_tenant_streams=1)
    client = await door.client()
    with pytest.raises(UnknownModel):
        await client.context(model="another").__aenter__()
    async with client.context():
        with pytest.raises(Overloaded) as caught:
            await client.context().__aenter__()
    assert (caught.value.field, caught.value.limit, caught.value.worker) == ("x-tenant-id", "1", "ingestor")
    assert caught.value.retry_after_s == 1.0


async def test_an_ingestor_that_leaves_says_so_itself(door):
    ingestor, _ = await door.add()
    ingestor.sessions.is_draining = True
    await failure_of(door.stub().StreamContext(iter([opening()])), Draining)


async def test_the_tenant_is_told_to_the_ingestor(door):
    ingestor, _ = await door.add()
    async with (await door.client(tenant="team-a")).context() as context:
        await context.append("x")
        [session] = ingestor.sessions.live()
        assert session.opening.tenant == "team-a"
        await failure_of(door.stub().StreamContext(iter([resuming(session.opening.context_id)])), UnknownContext)


async def test_a_name_that_no_tenant_may_have_is_refused(door):
    ingestor, _ = await door.add()
    call = door.stub().StreamContext(iter([opening()]), metadata=(("x-tenant-id", "a b"),))
    assert (await failure_of(call, InvalidRequest)).field == "x-tenant-id"
    assert ingestor.sessions.live() == []


async def test_the_deadline_of_the_call_is_that_of_the_context(door):
    ingestor, _ = await door.add()
    async with (await door.client()).context(timeout_s=7.0) as context:
        await context.append("x")
        [session] = ingestor.sessions.live()
        remaining_s = (session.opening.deadline_unix_ms - ingestor.parts.clock.unix_ms()) / 1000
        assert 2.0 < remaining_s <= 7.0


async def test_a_call_that_is_over_its_deadline_ends(door):
    await door.add()
    await failure_of(door.stub().StreamContext(_then_silence(opening()), timeout=0.3), DeadlineExceeded)


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "later"])
async def test_a_request_that_is_too_large_is_refused_with_the_limit(door, is_first):
    ingestor, _ = await door.add()
    large = opening()
    large.open.request.text = "x" * MAX_BYTES
    requests = [large] if is_first else [opening(), appending(1, b"x" * MAX_BYTES)]
    error = await failure_of(door.stub().StreamContext(iter(requests)), InvalidRequest)
    assert (error.field, error.limit) == ("request", f"{MAX_BYTES} bytes")
    assert f"at most {MAX_BYTES} are allowed" in error.message
    assert ingestor.parts.counts.operations == 0


async def test_the_sdk_refuses_what_the_router_does_not_take_and_the_context_goes_on(door, frontend, text):
    ingestor, _ = await door.add()
    async with (await door.client()).context(mode="update") as context:
        await context.append("all ")
        large = [
            context.append(b"x" * MAX_BYTES),
            context.update([("a", "x" * MAX_BYTES)]),
            context.replace("0", [(f"segment {number}", "x") for number in range(200)]),
            context.close("x" * MAX_BYTES).answer(),
        ]
        for operation in large:
            with pytest.raises(InvalidRequest, match="send it in parts") as caught:
                await operation
            assert (caught.value.field, caught.value.limit) == ("operation", f"{MAX_BYTES} bytes")
        await context.append("is well")
        await context.close("?").answer()
    assert [text.decode(request.prompt) for request in frontend.requests] == ["all is well?"]
    assert ingestor.parts.counts.operations == 3


async def test_no_size_of_an_operation_loses_a_context_of_the_sdk(door):
    ingestor, _ = await door.add()
    refusals = []
    async with (await door.client()).context() as context:
        for size in range(MAX_BYTES - 60, MAX_BYTES + 1):
            with pytest.raises(InvalidRequest) as caught:
                await context.append(b"x" * size)
            refusals.append(type(caught.value))
        await context.close("well?").answer()
    # By the ingestor up to some size, from there on by the SDK.
    assert refusals == sorted(refusals, key=lambda kind: kind is InvalidRequest)
    assert set(refusals) == {ContextOverflow, InvalidRequest}
    assert ingestor.parts.counts.operations == refusals.count(ContextOverflow) + 1


async def test_a_request_of_the_largest_size_passes(door):
    ingestor, _ = await door.add(max_context_chars=1)
    request = appending(1, b"")
    request.operation.append.text = b"x" * (MAX_BYTES - 11)
    assert request.ByteSize() == MAX_BYTES
    call = door.stub().StreamContext(iter([opening(), request]))
    assert [each.WhichOneof("event") async for each in call].count("refused") == 1
    assert ingestor.parts.counts.operations == 1


# -- Ends -------------------------------------------------------------------------


async def test_a_client_that_has_no_more_to_say_of_an_open_context_is_let_go(door):
    ingestor, _ = await door.add()
    call = door.stub().StreamContext(iter([opening(), appending(1, b"x")]))
    async with asyncio.timeout(PATIENCE_S):
        events = [each async for each in call]
    assert events[-1].state.applied_sequence == 1
    [session] = ingestor.sessions.live()
    await until(lambda: session.num_calls == 0, "the ingestor's call goes on")


async def test_a_client_that_leaves_ends_the_ingestors_call_and_the_context_stays(door):
    ingestor, _ = await door.add()
    call = door.stub().StreamContext(_then_silence(opening()))
    await anext(aiter(call))
    [session] = ingestor.sessions.live()
    assert session.num_calls == 1
    call.cancel()
    await until(lambda: session.num_calls == 0, "the ingestor's call goes on")
    assert not session.has_ended


async def test_a_client_that_leaves_in_the_midst_of_the_answer_ends_the_ingestors_call(door, frontend):
    frontend.script = lambda request: [*list(say("a", "b")(request))[:1], asyncio.Event()]
    ingestor, _ = await door.add()
    close = ingestor_pb2.ContextOperation(sequence=1)
    close.close.query = "?"
    call = door.stub().StreamContext(_then_silence(opening(), ingestor_pb2.StreamContextRequest(operation=close)))
    async for each in call:
        if each.HasField("piece"):
            break
    [session] = ingestor.sessions.live()
    call.cancel()
    await until(lambda: session.num_calls == 0, "the ingestor's call goes on")


async def test_the_death_of_an_ingestor_is_a_failed_peer(door):
    _, lane = await door.add()
    call = door.stub().StreamContext(_then_silence(opening()))
    await anext(aiter(call))
    await lane.cut()
    await failure_of(call, PeerFailed)


async def test_an_ingestor_that_cannot_be_reached_is_a_failed_peer(door):
    _, lane = await door.add()
    await lane.cut()
    await failure_of(door.stub().StreamContext(_then_silence(opening())), PeerFailed)


@pytest.mark.parametrize("num_good", [0, 1], ids=["first", "later"])
async def test_bytes_that_are_no_message_hurt_only_their_own_call(door, num_good):
    ingestor, _ = await door.add()
    async with (await door.client()).context() as context:
        requests = [opening().SerializeToString()] * num_good + [b"\xff\xff"]
        await failure_of(door.channel().stream_stream(METHOD)(iter(requests)), HeadraceError)
        assert (await context.append("x")).applied == 1
        assert (await context.close().answer()).text == "abc"
    await until(lambda: all(not each.num_calls for each in ingestor.sessions.live()), "a call goes on")


async def test_a_router_that_leaves_opens_nothing_and_ends_what_runs_with_draining(door):
    await door.add()
    call = door.stub().StreamContext(_then_silence(opening()))
    await anext(aiter(call))
    assert await door.server.drain(0.0) == 1
    # Nothing is written: a call that ends under a message hides why.
    await failure_of(door.stub().StreamContext(), Draining)
    await door.server.stop()
    await failure_of(call, Draining)


async def test_no_call_leaves_a_task_behind(door):
    ingestor, _ = await door.add()
    client, stub = await door.client(), door.stub()

    async def all_ways():
        async with client.context() as context:
            await context.append("x")
            await context.close().answer()
        async with client.context():
            pass
        await failure_of(stub.StreamContext(iter([resuming("nobody.x")])), UnknownContext)
        await failure_of(stub.StreamContext(iter([opening(mode=7)])), InvalidRequest)
        await failure_of(stub.StreamContext(iter([opening(), appending(1, b"x" * MAX_BYTES)])), InvalidRequest)
        leaving = stub.StreamContext(_then_silence(opening()))
        await anext(aiter(leaving))
        leaving.cancel()
        await until(lambda: not any(each.num_calls for each in ingestor.sessions.live()), "a call goes on")
        ingestor.sessions.end_all(lambda: Draining("away with it"))
        await ingestor.sessions.idle()

    await all_ways()
    before = len(asyncio.all_tasks())
    for _ in range(3):
        await all_ways()
    await until(lambda: len(asyncio.all_tasks()) <= before, "tasks are left")
