"""How the shared log's Redis is reached: one URL for a server, a socket or Sentinels."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import SplitResult, unquote, urlsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from headrace.errors import ConfigError
from headrace.settings import Between

FORMS = (
    "redis://[user:password@]host[:port][/db], rediss:// for TLS, unix:///path/to/socket[?db=0] or "
    "redis+sentinel://[user:password@]host[:port],host[:port]/service[/db]"
)
_PORT = 6379
_SENTINEL_PORT = 26379
_SENTINEL_SCHEMES = ("redis+sentinel", "rediss+sentinel")


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisConfig:
    """Which Redis (7.0 or later) or Valkey (8 or later) holds what the cluster shares.

    Attributes:
        url: One of `FORMS`; none is a server that `headrace up` runs itself. Characters that mean something in a
            URL are percent-encoded in user and password.
        password_file: File that holds the password, in place of the URL.
        sentinel_password_file: File that holds the password of the Sentinels themselves.
        ca_file: Certificates of who may have signed the server's; none is what the system trusts.
        cert_file: Our own certificate, where the server asks for one.
        key_file: Its key.
        connect_timeout_s: Longest wait for a connection.
        timeout_s: Longest wait for an answer; readers of the log wait two seconds for news.
    """

    url: str | None = field(default=None, repr=False)
    password_file: Path | None = None
    sentinel_password_file: Path | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    connect_timeout_s: Annotated[float, Between(0.001)] = 2.0
    timeout_s: Annotated[float, Between(2.5)] = 5.0

    def __post_init__(self) -> None:
        if self.url is not None:
            _parse(self.url)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Address:
    """A parsed URL; one host and no service is a plain server."""

    is_tls: bool = False
    hosts: tuple[tuple[str, int], ...] = ()
    socket: str | None = None
    service: str | None = None
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)


def connect(config: RedisConfig) -> Redis:
    """Return a client; it connects when it is first used and never retries by itself.

    Raises:
        ConfigError: there is no URL, it is none of `FORMS`, or a file cannot be read. Passwords are not named.
    """
    if config.url is None:
        raise ConfigError(f"redis.url is not set; it wants {FORMS}", field="redis.url")
    address = _parse(config.url)
    options = _options(config, address)
    if address.service is None:
        if address.socket is not None:
            return Redis(unix_socket_path=address.socket, **options)
        host, port = address.hosts[0]
        return Redis(host=host, port=port, **options, **_tls(config, address))
    sentinel_options = _limits(config) | _tls(config, address)
    if config.sentinel_password_file is not None:
        sentinel_options["password"] = _secret(config.sentinel_password_file, "redis.sentinel_password_file")
    sentinels: Any = Sentinel  # its constructor has no types
    watch = sentinels(address.hosts, sentinel_kwargs=sentinel_options, **options, **_tls(config, address))
    client: Redis = watch.master_for(address.service)
    return client


async def disconnect(client: Redis) -> None:
    """Close a client of `connect`, and the connections to Sentinels that it found its server by."""
    await client.aclose()
    manager = getattr(client.connection_pool, "sentinel_manager", None)
    for sentinel in manager.sentinels if manager is not None else ():
        await sentinel.aclose()


def heed_cancellation() -> None:
    """Raise `CancelledError` if the task was asked to end.

    The client writes through `asyncio.wait_for`, which in Python 3.11 swallows a cancellation that meets the result
    (seen once in five stops): whoever calls it in a loop has to ask.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _options(config: RedisConfig, address: _Address) -> dict[str, Any]:
    password = address.password
    if config.password_file is not None:
        password = _secret(config.password_file, "redis.password_file")
    return _limits(config) | {"db": address.db, "username": address.username, "password": password}


def _limits(config: RedisConfig) -> dict[str, Any]:
    return {
        "socket_timeout": config.timeout_s,
        "socket_connect_timeout": config.connect_timeout_s,
        "protocol": 2,  # one shape of answers, on every server
        # Whoever uses the client steps back by itself; a second loop inside would multiply the waits.
        "retry": Retry(NoBackoff(), 0),
    }


def _tls(config: RedisConfig, address: _Address) -> dict[str, Any]:
    if not address.is_tls:
        return {}
    files = {"ssl_ca_certs": config.ca_file, "ssl_certfile": config.cert_file, "ssl_keyfile": config.key_file}
    for name, path in files.items():
        if path is not None and not path.is_file():
            option = {"ssl_ca_certs": "ca_file", "ssl_certfile": "cert_file", "ssl_keyfile": "key_file"}[name]
            raise ConfigError(f"redis.{option} names no file: {path}", field=f"redis.{option}")
    return {"ssl": True} | {name: str(path) for name, path in files.items() if path is not None}


def _secret(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {name} {path}: {type(error).__name__}", field=name) from error


def _parse(url: str) -> _Address:
    try:
        return _address(urlsplit(url))
    except ValueError:
        # The cause is dropped with its text: it may quote the part of the URL that holds the password.
        raise ConfigError(f"redis.url is not understood; it wants {FORMS}", field="redis.url") from None


def _address(parts: SplitResult) -> _Address:
    login, _, hosts = parts.netloc.rpartition("@")
    username, _, password = login.partition(":")
    who: dict[str, Any] = {"username": unquote(username) or None, "password": unquote(password) or None}
    if parts.fragment or (parts.query and parts.scheme != "unix"):
        raise ValueError("nothing may follow the path")
    if parts.scheme == "unix":
        key, _, db = (parts.query or "db=0").partition("=")
        if key != "db" or not parts.path or hosts:
            raise ValueError("a socket is a path and a db")
        return _Address(socket=unquote(parts.path), db=_db([db]), **who)
    path = [unquote(part) for part in parts.path.split("/")[1:] if part]
    is_tls = parts.scheme.startswith("rediss")
    if parts.scheme in _SENTINEL_SCHEMES:
        service, *rest = path
        return _Address(
            hosts=tuple(_host(host, _SENTINEL_PORT) for host in hosts.split(",")),
            service=service,
            is_tls=is_tls,
            db=_db(rest),
            **who,
        )
    if parts.scheme not in ("redis", "rediss"):
        raise ValueError("unknown scheme")
    return _Address(hosts=(_host(hosts, _PORT),), is_tls=is_tls, db=_db(path), **who)


def _host(text: str, default_port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname or "," in text:
        raise ValueError("no host")
    return parts.hostname, default_port if parts.port is None else parts.port


def _db(path: list[str]) -> int:
    if len(path) > 1:
        raise ValueError("only a db may follow")
    number = int(path[0]) if path else 0
    if number < 0:
        raise ValueError("databases are counted from 0")
    return number
