"""Calls fail with our errors, whatever broke."""

import asyncio

import grpc.aio
import pytest

from headrace.core.status import error_of
from headrace.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Overloaded,
    PeerFailed,
    PeerMismatch,
    Saturated,
)
from headrace.runtime.channels import Channels, translate_errors
from headrace.testing.router import Act, ScriptedRouter, answer, serve_router
from headrace.v1 import decode_pb2, decode_pb2_grpc, router_pb2, router_pb2_grpc

TOKENIZE = router_pb2.TokenizeRequest(text="hi")
REQUEST = router_pb2.GenerateRequest(text="hi")


async def tokenize(channels, address):
    async with translate_errors(address):
        return await router_pb2_grpc.RouterServiceStub(channels.get(address)).Tokenize(TOKENIZE, timeout=5)


async def test_one_channel_serves_all_calls_to_an_address():
    async with Channels() as channels:
        assert channels.get("127.0.0.1:1") is channels.get("127.0.0.1:1")
        assert channels.get("127.0.0.1:1") is not channels.get("127.0.0.1:2")


async def test_the_channel_that_was_idle_longest_makes_room_for_another():
    async with Channels(max_channels=2) as channels:
        one, two = channels.get("127.0.0.1:1"), channels.get("127.0.0.1:2")
        assert channels.get("127.0.0.1:1") is one
        channels.get("127.0.0.1:3")
        assert channels.get("127.0.0.1:1") is one
        assert channels.get("127.0.0.1:2") is not two


async def test_many_more_addresses_than_allowed_come_and_go():
    async with Channels(max_channels=4) as channels:
        for port in range(1, 200):
            channels.get(f"127.0.0.1:{port}")
            assert len(channels._channels) <= 4
        async with asyncio.timeout(5):
            while channels._closing:  # noqa: ASYNC110 what is waited for is a set that empties
                await asyncio.sleep(0.002)


async def test_a_stub_of_a_channel_that_made_room_is_a_failed_peer_and_a_new_one_works():
    async with serve_router(ScriptedRouter([])) as server, Channels(max_channels=1) as channels:
        kept = router_pb2_grpc.RouterServiceStub(channels.get(server.address))
        channels.get("127.0.0.1:1")
        await asyncio.gather(*channels._closing)
        with pytest.raises(PeerFailed):
            async with translate_errors("router"):
                await kept.Tokenize(TOKENIZE, timeout=5)
        await tokenize(channels, server.address)


async def test_a_channel_with_a_call_in_flight_never_makes_room_and_does_again_when_it_ended():
    router = ScriptedRouter([*answer("a", is_last=False), Act.HANG])
    async with serve_router(router) as server, Channels(max_channels=1) as channels:
        call = router_pb2_grpc.RouterServiceStub(channels.get(server.address)).Generate(REQUEST, timeout=5)
        with pytest.raises(Saturated):
            channels.get("127.0.0.1:2")
        assert (await call.read()).text == "a"
        with pytest.raises(Saturated):
            channels.get("127.0.0.1:2")
        call.cancel()
        async with asyncio.timeout(5):
            while not call.done():  # noqa: ASYNC110 gRPC tells of the end by itself
                await asyncio.sleep(0.002)
        await asyncio.sleep(0)
        channels.get("127.0.0.1:2")


async def test_a_call_that_failed_or_was_answered_is_not_in_flight(free_port):
    async with serve_router(ScriptedRouter([])) as server, Channels(max_channels=1) as channels:
        await tokenize(channels, server.address)
        with pytest.raises(PeerFailed):
            await tokenize(channels, f"127.0.0.1:{free_port}")
        await tokenize(channels, server.address)


async def test_a_dropped_address_makes_room_too():
    async with Channels(max_channels=1) as channels:
        channels.get("127.0.0.1:1")
        await channels.drop("127.0.0.1:1")
        channels.get("127.0.0.1:2")


async def test_a_closed_pool_makes_no_channel():
    channels = Channels()
    await channels.close()
    with pytest.raises(PeerFailed):
        channels.get("127.0.0.1:1")


async def test_nobody_listening_is_a_failed_peer(free_port):
    async with Channels() as channels:
        with pytest.raises(PeerFailed) as caught:
            await tokenize(channels, f"127.0.0.1:{free_port}")
    assert caught.value.worker == f"127.0.0.1:{free_port}"


async def test_a_service_the_peer_does_not_know_is_a_mismatch():
    async with serve_router(ScriptedRouter([])) as server, Channels() as channels:
        stub = decode_pb2_grpc.DecodeServiceStub(channels.get(server.address))
        with pytest.raises(PeerMismatch):
            async with translate_errors("router"):
                await stub.BeginWrite(decode_pb2.BeginWriteRequest(), timeout=5)


async def test_a_restarted_server_is_found_again_within_a_second(free_port):
    async with Channels() as channels:
        address = f"127.0.0.1:{free_port}"
        async with serve_router(ScriptedRouter([]), port=free_port):
            await tokenize(channels, address)
        with pytest.raises(PeerFailed):
            await tokenize(channels, address)
        async with serve_router(ScriptedRouter([]), port=free_port), asyncio.timeout(2):
            while True:
                try:
                    await tokenize(channels, address)
                    break
                except PeerFailed:
                    await asyncio.sleep(0.02)


async def test_a_channel_that_was_dropped_is_a_failed_peer():
    async with serve_router(ScriptedRouter([])) as server, Channels() as channels:
        stub = router_pb2_grpc.RouterServiceStub(channels.get(server.address))
        await channels.drop(server.address)
        with pytest.raises(PeerFailed):
            async with translate_errors("router"):
                await stub.Tokenize(TOKENIZE, timeout=5)


async def test_closing_the_pool_under_a_call_is_a_failed_peer_and_no_cancellation():
    router = ScriptedRouter([Act.HANG])
    async with serve_router(router) as server, asyncio.TaskGroup() as tasks:
        channels = Channels()

        async def wait_for_answer():
            async with translate_errors("router"):
                call = router_pb2_grpc.RouterServiceStub(channels.get(server.address)).Generate(REQUEST, timeout=5)
                await call.read()

        waiting = tasks.create_task(_outcome(wait_for_answer()))
        await router.arrived.wait()
        await channels.close()
        assert isinstance(await waiting, PeerFailed)


async def test_cancelling_the_caller_stays_a_cancellation():
    router = ScriptedRouter([Act.HANG])
    async with serve_router(router) as server, Channels() as channels:

        async def wait_for_answer():
            async with translate_errors("router"):
                call = router_pb2_grpc.RouterServiceStub(channels.get(server.address)).Generate(REQUEST, timeout=5)
                await call.read()

        waiting = asyncio.ensure_future(wait_for_answer())
        await router.arrived.wait()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        async with asyncio.timeout(5):
            await router.left.wait()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("UNAVAILABLE", PeerFailed),
        ("DEADLINE_EXCEEDED", DeadlineExceeded),
        ("CANCELLED", Cancelled),
        ("INVALID_ARGUMENT", InvalidRequest),
        ("RESOURCE_EXHAUSTED", Overloaded),
        ("UNKNOWN", InternalError),
        ("DATA_LOSS", InternalError),
    ],
)
def test_a_status_without_our_detail_is_judged_by_its_code(code, kind):
    error = error_of(code, "text", (("other-bin", b"x"),), "peer:1")
    assert type(error) is kind
    assert ("text" in error.message) is (kind is not DeadlineExceeded)
    assert "peer:1" in error.message


def test_a_call_that_ended_under_a_message_is_a_failed_peer_and_not_a_bug():
    """What gRPC says then hides why it ended."""
    assert type(error_of("INTERNAL", "Internal error from Core", (), "peer:1")) is PeerFailed
    assert type(error_of("INTERNAL", "another text", (), "peer:1")) is InternalError


async def test_a_message_beyond_the_limit_is_the_callers_mistake():
    async with serve_router(ScriptedRouter([])) as server:
        options = [("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(server.address, options=options) as channel:
            stub = router_pb2_grpc.RouterServiceStub(channel)
            with pytest.raises(InvalidRequest):
                async with translate_errors("router"):
                    await stub.Tokenize(router_pb2.TokenizeRequest(text="x" * (65 << 20)), timeout=30)


async def _outcome(awaitable):
    try:
        return await awaitable
    except PeerFailed as error:
        return error
