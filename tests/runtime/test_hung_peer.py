"""A process that lives but no longer answers: the connection ends calls to it, whoever waits for them."""

import asyncio
import signal
import subprocess
import sys

import grpc
import pytest

from headrace.core.status import CONNECTION_OPTIONS, KEEPALIVE_MS

FASTER = 20
OPTIONS = [
    (name, value // FASTER if value in (KEEPALIVE_MS, KEEPALIVE_MS // 2) else value)
    for name, value in CONNECTION_OPTIONS
]
SERVER = """
import asyncio, grpc

async def talk(request, context):
    while True:
        yield b"word"
        await asyncio.sleep(0.02)

async def serve():
    server = grpc.aio.server()
    method = grpc.unary_stream_rpc_method_handler(talk)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("peer", {"Talk": method}),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()

asyncio.run(serve())
"""


@pytest.fixture
def peer():
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE) as process:
        yield process
        process.kill()


async def read_on(stream):
    async with asyncio.timeout(10 * KEEPALIVE_MS / FASTER / 1000):
        while await stream.read():
            pass


async def test_a_stream_from_a_peer_that_hangs_ends_as_if_it_were_gone(peer):
    address = f"127.0.0.1:{int(peer.stdout.readline())}"
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        stream = channel.unary_stream("/peer/Talk")(b"")
        assert [await stream.read() for _ in range(3)] == [b"word"] * 3
        peer.send_signal(signal.SIGSTOP)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_on(stream)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
