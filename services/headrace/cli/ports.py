"""Ports of this machine, taken so that two clusters that start together never share one.

A test bind alone cannot tell: gRPC servers set SO_REUSEPORT, so two of them on one port both
start and share its connections in silence. Every taken port is therefore a locked file too.
"""

import fcntl
import os
import socket
import tempfile
from pathlib import Path

from headrace.errors import ConfigError

HIGHEST = 65535


def default_folder() -> Path:
    """Return this user's folder of port locks, the same for every run directory."""
    return Path(tempfile.gettempdir()) / f"headrace-ports-{os.getuid()}"


class Ports:
    """Ports held by this process until `close` or its end."""

    def __init__(self, host: str, folder: Path) -> None:
        self._host = host
        self._folder = folder
        self._locks: list[int] = []
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def take(self, first: int) -> int:
        """Return the first free port from `first` up and hold it.

        Raises:
            ConfigError: there is none.
        """
        for port in range(first, HIGHEST + 1):
            lock = os.open(self._folder / str(port), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if _lock(lock) and self._is_free(port):
                self._locks.append(lock)
                return port
            os.close(lock)
        raise ConfigError(f"no free port on {self._host} from {first} up")

    def close(self) -> None:
        """Give all ports back."""
        for lock in self._locks:
            os.close(lock)
        self._locks.clear()

    def _is_free(self, port: int) -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            # Without it, connections that ended a minute ago still hold the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self._host, port))
            except OSError:
                return False
            return True


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
