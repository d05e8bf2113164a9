"""What runs in a run directory, as a file that every command reads and only the supervisor writes."""

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from headrace.errors import ConfigError

FILE = "cluster.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessState:
    """One service of a local cluster.

    Attributes:
        name: Unique in the cluster.
        role: As `headrace serve` takes it, or "redis".
        grpc: host:port of its gRPC server; None for Redis.
        http: Base URL of its HTTP server; None for all but the router.
        pid: Its process; None between a death and the restart.
        started_s: Unix time at which that process started; tells it from a later one of the same id.
        restarts: How often the supervisor started it again.
        last_exit: Exit status of the last death, negative for a signal; None while it never died.
        log: File that holds its output.
    """

    name: str
    role: str
    grpc: str | None
    http: str | None
    pid: int | None
    started_s: float | None
    restarts: int
    last_exit: int | None
    log: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterState:
    """A local cluster.

    Attributes:
        http: Base URL of the router.
        grpc: host:port of the router.
        supervisor: Process that started the others.
        supervisor_started_s: Unix time of its start.
    """

    http: str
    grpc: str
    supervisor: int
    supervisor_started_s: float
    processes: tuple[ProcessState, ...]

    @property
    def is_running(self) -> bool:
        """Whether the supervisor lives; its children do not outlive it."""
        return is_alive(self.supervisor, self.supervisor_started_s)


def read(run_dir: Path) -> ClusterState | None:
    """Return the cluster of a run directory, or None when there is none.

    Raises:
        ConfigError: the file is there and makes no sense.
    """
    try:
        return msgspec.json.decode((run_dir / FILE).read_bytes(), type=ClusterState)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"cannot read {run_dir / FILE}: {error}; remove it if nothing runs") from error


def write(run_dir: Path, state: ClusterState) -> None:
    """Replace the file in one move, so that no reader sees half of it."""
    fresh = run_dir / f".{FILE}.{os.getpid()}"
    fresh.write_bytes(msgspec.json.format(msgspec.json.encode(state)) + b"\n")
    fresh.replace(run_dir / FILE)


def start_of(pid: int) -> float | None:
    """Return the Unix time at which a process started, or None when it does not run."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def is_alive(pid: int | None, started_s: float | None) -> bool:
    """Tell whether that very process runs, and not a later one of the same id."""
    if pid is None or started_s is None:
        return False
    found = start_of(pid)
    return found is not None and abs(found - started_s) < 1.0
