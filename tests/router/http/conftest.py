import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from headrace.clock import VirtualClock
from headrace.core.tenancy import Tenancy
from headrace.router.frontend import ServedModel
from headrace.router.http.app import create_app
from headrace.router.http.context import HttpSettings
from headrace.testing.frontend import ScriptedFrontend, say
from headrace.testing.text import byte_text_model
from headrace.text.model import TextModel


class Counter:
    """Entropy that a test can foresee: 1, 2, 3, ..."""

    def __init__(self) -> None:
        self.value = 0

    def __call__(self) -> int:
        self.value += 1
        return self.value


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return byte_text_model(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def frontend(text: TextModel) -> ScriptedFrontend:
    model = ServedModel(name="tiny", max_context_tokens=200, fingerprint="f" * 32, text=text)
    return ScriptedFrontend([model], say("Hel", "lo"))


@pytest.fixture
def settings() -> HttpSettings:
    return HttpSettings(
        max_body_bytes=20_000, max_prompts=4, tenancy=Tenancy(secret=b"secret", public_tenants=("open",))
    )


@pytest.fixture
def app(frontend: ScriptedFrontend, settings: HttpSettings) -> FastAPI:
    return create_app(
        frontend,
        clock=VirtualClock(1000.0),
        metrics=lambda: b"headrace_up 1\n",
        settings=settings,
        entropy=Counter(),
    )


@pytest.fixture
async def http(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[str]:
    """Serve on a free loopback port; yield the base URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=5))
    task = asyncio.create_task(server.serve([listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        listener.close()


@pytest.fixture
async def base_url(app: FastAPI) -> AsyncIterator[str]:
    async with serving(app) as url:
        yield url
