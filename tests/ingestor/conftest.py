"""Ingestors before a router that plays a script and notes what it was sent; gRPC runs over loopback."""

import contextlib
import socket

import grpc.aio
import pytest

from headrace import AsyncClient
from headrace.core.status import CLIENT_OPTIONS
from headrace.router.frontend import ServedModel
from headrace.testing.arrivals import WatchedFrontend
from headrace.testing.context_call import ContextCaller
from headrace.testing.frontend import say
from headrace.testing.ingestor import open_ingestor, serve_frontend
from headrace.testing.text import byte_text_model

NUM_CONTEXT_TOKENS = 400


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("headrace.ingestor.run.PAUSE_S", 0.01)
    monkeypatch.setattr("headrace.ingestor.call.LINGER_S", 0.05)
    monkeypatch.setattr("headrace.client.attempts.FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("headrace.client.context.LINGER_S", 0.02)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """The model of bytes: token 3 + b's place in the alphabet is byte b."""
    return byte_text_model(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def cuts(text):
    return text.cuts()


@pytest.fixture
def make_frontend(text):
    """Returns a scripted router for a model: the byte model, unless it is given another."""

    def make(*answer, model=text, num_tokens=NUM_CONTEXT_TOKENS):
        served = ServedModel(name="tiny", max_context_tokens=num_tokens, fingerprint="f" * 32, text=model)
        return WatchedFrontend([served], say(*(answer or "abc")))

    return make


@pytest.fixture
def frontend(make_frontend):
    return make_frontend()


@pytest.fixture
def prompt_of(text):
    """The text of what the router was asked to answer."""
    return lambda request: text.decode(request.prompt, skip_special=False)


@pytest.fixture
async def serve(text, cuts, frontend):
    """Opens an ingestor before the scripted router; at the end nothing may be left of any context."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(routers=None, model=text, model_cuts=None, **settings):
            if routers is None:
                routers = [(await stack.enter_async_context(serve_frontend(frontend))).address]
            found = cuts if model is text else model_cuts
            ingestor = await stack.enter_async_context(open_ingestor(model, routers, cuts=found, **settings))
            stack.push_async_callback(ingestor.at_rest)
            return ingestor

        start.stack = stack
        yield start


@pytest.fixture
async def served(serve):
    """Opens an ingestor and a client of it."""

    async def start(tenant=None, **settings):
        ingestor = await serve(**settings)
        client = AsyncClient(ingestor.address, tenant=tenant, timeout_s=20.0)
        return ingestor, await serve.stack.enter_async_context(client)

    return start


@pytest.fixture
async def caller(serve):
    """Opens an ingestor; returns it and what makes calls to it."""

    async def start(**settings):
        ingestor = await serve(**settings)
        channel = grpc.aio.insecure_channel(ingestor.address, options=CLIENT_OPTIONS)
        await serve.stack.enter_async_context(channel)
        return ingestor, lambda tenant=None, timeout_s=None: ContextCaller(channel, tenant, timeout_s)

    return start


@pytest.fixture
def free_port():
    """Return a port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
