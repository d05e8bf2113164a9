"""Both clients behind one asynchronous face, so that one suite holds for both."""

import asyncio
import socket
from contextlib import asynccontextmanager

import pytest

from headrace import AsyncClient, Client


class ThreadedStream:
    """A synchronous stream, each step of it in a thread."""

    def __init__(self, stream):
        self.stream = stream

    def __aiter__(self):
        return self

    async def __anext__(self):
        piece = await asyncio.to_thread(next, self.stream, None)
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def answer(self):
        return await asyncio.to_thread(self.stream.answer)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await asyncio.to_thread(self.stream.close)


class ThreadedClient:
    """A synchronous client, each call of it in a thread."""

    def __init__(self, client):
        self.client = client

    def __getattr__(self, name):
        async def call(*args, **options):
            return await asyncio.to_thread(getattr(self.client, name), *args, **options)

        return call

    def stream(self, *args, **options):
        return ThreadedStream(self.client.stream(*args, **options))

    def stream_chat(self, *args, **options):
        return ThreadedStream(self.client.stream_chat(*args, **options))


@asynccontextmanager
async def threaded(address, **patience):
    client = Client(address, **patience)
    try:
        yield ThreadedClient(client)
    finally:
        await asyncio.to_thread(client.close)


@pytest.fixture(params=[AsyncClient, threaded], ids=["aio", "sync"])
def connect(request):
    """Return what connects a client to an address: a context manager."""
    return request.param


@pytest.fixture
def free_port():
    """Return a port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
