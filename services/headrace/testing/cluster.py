"""A real cluster on this machine for tests and benchmarks, and the oracle that it leaks nothing."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import grpc

from headrace.cli import state
from headrace.testing.child import following
from headrace.v1 import cluster_pb2, router_pb2, router_pb2_grpc

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
QUIET_TIMEOUT_S = 15.0
POLL_S = 0.05
FD_SLACK = 4
"""Descriptors that may differ: a reconnecting channel holds its old socket for a moment."""
TASK_SLACK = 2
"""Tasks that may differ: a report or a canary may be under way when the snapshot is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What each process holds when nothing is running, by name."""

    tasks: Mapping[str, int]
    fds: Mapping[str, int]
    shared_memory: frozenset[str]


class LocalCluster:
    """Processes started by `headrace up`, stopped by `headrace down`; a context manager.

    Args:
        run_dir: Where it keeps its files.
        workers: As for `headrace up --workers`.
        dtype: "auto", "fp32" or "bf16".
        settings: Further `--set` assignments.
        env: Further environment variables.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        workers: str = "prefill=1,decode=1",
        dtype: str = "fp32",
        settings: tuple[str, ...] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.run_dir = run_dir
        self._options = ["--workers", workers, "--dtype", dtype]
        for setting in settings:
            self._options += ["--set", setting]
        self._env = {**os.environ, **(env or {})}
        self._channel: grpc.Channel | None = None

    def __enter__(self) -> "LocalCluster":
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with (self.run_dir / "up.log").open("wb") as log:
            # In the foreground and bound to this process: a test run that is killed leaves nothing behind.
            self._process = subprocess.Popen(
                following(self._command("up", "--foreground", *self._options), signal.SIGTERM),
                stdout=log,
                stderr=log,
                env=self._env,
            )
        try:
            wait_until(self._is_ready, START_TIMEOUT_S, lambda: f"cluster not ready:\n{self.logs()}")
            self._channel = grpc.insecure_channel(self.grpc)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._channel is not None:
            self._channel.close()
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _is_ready(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"headrace up ended with {self._process.returncode}:\n{self.logs()}")
        found = state.read(self.run_dir)
        if found is None:
            return False
        try:
            with urllib.request.urlopen(f"{found.http}/ready", timeout=5.0) as answer:
                return bool(answer.status == HTTPStatus.OK)
        except OSError:
            return False

    def state(self) -> state.ClusterState:
        """Return what `headrace status` shows.

        Raises:
            RuntimeError: nothing runs.
        """
        found = state.read(self.run_dir)
        if found is None:
            raise RuntimeError(f"no cluster runs in {self.run_dir}")
        return found

    @property
    def http(self) -> str:
        """Base URL of the OpenAI-compatible server."""
        return self.state().http

    @property
    def grpc(self) -> str:
        """host:port of the router's gRPC server."""
        return self.state().grpc

    def pid(self, name: str) -> int | None:
        """Return the process id of a service; None between its death and its restart."""
        return next(process.pid for process in self.state().processes if process.name == name)

    def wait_restarted(self, name: str, old_pid: int, timeout_s: float = 30.0) -> None:
        """Wait until a killed service runs again under another process id."""
        wait_until(lambda: self.pid(name) not in (None, old_pid), timeout_s, lambda: f"{name} was not restarted")

    def kill(self, name: str, sig: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to a service this cluster started; returns its process id."""
        pid = self.pid(name)
        if pid is None:
            raise RuntimeError(f"{name} does not run")
        os.kill(pid, sig)
        return pid

    def logs(self, num_chars: int = 3000) -> str:
        """Return the end of every log file."""
        paths = sorted(self.run_dir.glob("logs/*.log"))
        paths = [self.run_dir / "up.log", *paths]
        return "\n".join(f"== {path.name}\n{path.read_text()[-num_chars:]}" for path in paths if path.exists())

    def members(self) -> dict[str, router_pb2.ClusterMember]:
        """Return the processes as the router sees them, the router itself included."""
        if self._channel is None:
            raise RuntimeError("the cluster was not started")
        stub = router_pb2_grpc.RouterServiceStub(self._channel)
        answer = stub.GetCluster(router_pb2.GetClusterRequest(), timeout=5.0)
        return {member.name: member for member in answer.members}

    def wait_connected(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until the router may send work to every process, and every kvstore has met a worker."""
        wait_until(lambda: self._num_disconnected() == 0, timeout_s, lambda: f"not connected: {self.members()}")

    def footprint(self) -> Footprint:
        """Wait until nothing runs and return what the processes hold then."""
        self.wait_quiet()
        loads = {name: member.load for name, member in self.members().items()}
        return Footprint(
            tasks={name: load.num_tasks for name, load in loads.items()},
            fds={name: load.num_fds for name, load in loads.items()},
            shared_memory=frozenset(os.listdir("/dev/shm")),  # noqa: PTH208
        )

    def wait_quiet(self, timeout_s: float = QUIET_TIMEOUT_S) -> None:
        """Wait until no sequence, lease or transfer is left anywhere and every ledger adds up.

        Raises:
            AssertionError: something is left, named.
        """
        wait_until(lambda: not self._unrest(), timeout_s, lambda: "left over: " + "; ".join(self._unrest()))

    def assert_no_leaks(self, before: Footprint) -> None:
        """Assert that blocks, leases, transfers, tasks, sockets and shared memory are back where they were."""
        self.wait_quiet()
        wait_until(
            lambda: not self._growth(before), QUIET_TIMEOUT_S, lambda: "leaked: " + "; ".join(self._growth(before))
        )

    def _growth(self, before: Footprint) -> list[str]:
        grown: list[str] = []
        for name, member in self.members().items():
            load = member.load
            if name in before.tasks and load.num_tasks > before.tasks[name] + TASK_SLACK:
                grown.append(f"{name} tasks {before.tasks[name]} -> {load.num_tasks}")
            if name in before.fds and load.num_fds > before.fds[name] + FD_SLACK:
                grown.append(f"{name} descriptors {before.fds[name]} -> {load.num_fds}")
        new = frozenset(os.listdir("/dev/shm")) - before.shared_memory  # noqa: PTH208
        return grown + [f"shared memory {name}" for name in new]

    def _unrest(self) -> list[str]:
        found: list[str] = []
        for name, member in self.members().items():
            load, ledger = member.load, member.load.ledger
            if ledger.free + ledger.cached + ledger.leased != ledger.total:
                found.append(f"{name} ledger does not add up: {ledger}")
            counts = {
                "leased": ledger.leased,
                "leases": ledger.num_leases,
                "running": load.num_running,
                "waiting": load.num_waiting,
                "transfers": load.num_transfers,
            }
            found += [f"{name} {what}={count}" for what, count in counts.items() if count]
            if not member.is_connected:
                found.append(f"{name} not connected")
        return found

    def _num_disconnected(self) -> int:
        return sum(not _is_usable(member) for member in self.members().values())

    def _command(self, verb: str, *args: str) -> list[str]:
        return [sys.executable, "-m", "headrace.cli.main", verb, "--run-dir", str(self.run_dir), *args]


def _is_usable(member: router_pb2.ClusterMember) -> bool:
    # A kvstore that was born again has no pool before a worker, which looks every few seconds, meets it.
    has_pool = member.role != cluster_pb2.ROLE_KVSTORE or member.load.ledger.total > 0
    return member.is_connected and member.load.is_ready and has_pool


def wait_until(is_true: Callable[[], bool], timeout_s: float, explain: Callable[[], str]) -> None:
    """Poll until a condition holds.

    Raises:
        AssertionError: it did not hold in time; `explain` says what was found.
    """
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline_s:
            raise AssertionError(explain())
        time.sleep(POLL_S)


def members_by_role(members: Mapping[str, router_pb2.ClusterMember], role: "cluster_pb2.Role.ValueType") -> list[str]:
    """Return the names of the processes of one role."""
    return sorted(name for name, member in members.items() if member.role == role)
