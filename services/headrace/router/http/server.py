"""The HTTP server of the router's process."""

import asyncio
import contextlib
import math
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from headrace.errors import ConfigError
from headrace.router.http.errors import head_too_large

TICK_S = 1.0
MAX_HEAD_BYTES = 64 << 10
"""Longest head of a request that comes in several pieces; the parser keeps it all, and is slow with long ones."""


class _Connection(HttpToolsProtocol):
    """A connection whose heads are bounded."""

    _is_in_head = False
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Parse what arrived; of a head that becomes too long no more is taken."""
        super().data_received(data)
        if not self._is_in_head:
            self._head_bytes = 0
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(head_too_large(MAX_HEAD_BYTES))
            self.transport.close()

    def on_message_begin(self) -> None:
        """Take note that a head begins."""
        self._is_in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Take note that it is complete."""
        self._is_in_head = False
        super().on_headers_complete()


class WebServer(uvicorn.Server):
    """uvicorn without its signal handlers: the process's own lifecycle decides when to leave.

    It looks at its clock once a second, for the date in answers and for connections that keep it waiting; uvicorn's
    own look, ten times a second, only finds out sooner that it is to leave.

    Args:
        app: The application.
        host: Address to bind.
        port: Port to bind.
        receive_timeout_s: Connections that have sent no head of a request for so long, after the first or after an
            answer, are closed. uvicorn by itself waits without end for one that it has got a byte of.
    """

    def __init__(self, app: FastAPI, host: str, port: int, receive_timeout_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app, host=host, port=port, http=_Connection, log_config=None, access_log=False, lifespan="off"
            )
        )
        self._receive_timeout_s = receive_timeout_s
        self._waiting: dict[HttpToolsProtocol, tuple[object, float]] = {}
        self._leaving = asyncio.Event()

    def leave(self, grace_s: float) -> None:
        """Take no connection any more, and end when those that are open do, or in about so many seconds."""
        self.config.timeout_graceful_shutdown = max(1, math.ceil(grace_s))
        self.should_exit = True
        self._leaving.set()

    async def main_loop(self) -> None:
        """Keep the date current, and connections few, until told to leave."""
        while not await self.on_tick(0):
            self._close_idle(asyncio.get_running_loop().time())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._leaving.wait()

    def _close_idle(self, now_s: float) -> None:
        """Close the connections whose next request has not begun for too long."""
        before, self._waiting = self._waiting, {}
        for connection in tuple(self.server_state.connections):
            if not isinstance(connection, HttpToolsProtocol):
                continue
            cycle = connection.cycle
            if cycle is not None and not cycle.response_complete:
                continue
            last, since_s = before.get(connection, (cycle, now_s))
            if last is not cycle:
                since_s = now_s
            self._waiting[connection] = (cycle, since_s)
            if now_s >= since_s + self._receive_timeout_s:
                connection.shutdown()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture nothing."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """Bind here: uvicorn would end the process with a code that a supervisor takes for a crash.

    Raises:
        ConfigError: the port is taken or the host is not an address of this machine.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = f"cannot listen on {host}:{port}: {error.strerror}; choose a free port"
        raise ConfigError(reason, field="http_port") from None
