"""Fixtures of the kvstore's tests."""

import socket
from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest

from headrace.testing.connector import Fabric
from headrace.testing.indexed_store import serve_indexed
from headrace.testing.redis import redis_server


@pytest.fixture
def free_port() -> int:
    """Return a port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
async def serve(tmp_path) -> AsyncIterator[Callable[..., object]]:
    """Yield what starts stores by their names, all on one Redis."""
    with redis_server(tmp_path / "redis") as redis:
        yield partial(serve_indexed, Fabric(), redis.url)
