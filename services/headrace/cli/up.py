"""Start, stop and describe the cluster of a run directory."""

import contextlib
import fcntl
import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from headrace.cli import state, supervisor
from headrace.cli.layout import Layout
from headrace.cli.private_file import write_private
from headrace.cli.state import ClusterState, ProcessState
from headrace.errors import ConfigError, NotReady

POLL_S = 0.1
ANSWER_S = 15.0
"""Longest time for one answer of /ready: it may compute a token first."""

MOST_DEATHS = 3
"""Deaths of one service before the start counts as failed."""

CONFIG_EXIT = 2
"""Exit status of a service that refuses its configuration; starting it again does not help."""

STOP_S = supervisor.GRACE_S + 5.0
LOG_LINES = 15


def up(layout: Layout, timeout_s: float) -> tuple[ClusterState, bool]:
    """Start the cluster of a layout and wait until it answers.

    Returns:
        The cluster, and whether it ran before.

    Raises:
        ConfigError: a service refuses its configuration; everything is stopped again.
        NotReady: it did not answer in time or a service keeps dying; everything is stopped again.
    """
    run_dir = prepare(layout)
    with _exclusive(run_dir):
        running = state.read(run_dir)
        if running is not None and running.is_running:
            return running, True
        _sweep(run_dir)
        pid = _launch(layout)
        try:
            return wait_ready(run_dir, pid, timeout_s), False
        except BaseException:  # the cluster must not stay behind, whatever ended the wait
            _stop(run_dir, pid)
            raise


def prepare(layout: Layout) -> Path:
    """Make the run directory and return it."""
    run_dir = Path(layout.run_dir)
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the run directory {run_dir}: {error}", field="run.dir") from error
    return run_dir


def foreground(layout: Layout) -> int:
    """Supervise a cluster in this process until Ctrl-C; return the exit status.

    Raises:
        ConfigError: a cluster runs in this directory already.
    """
    run_dir = prepare(layout)
    with _exclusive(run_dir):
        running = state.read(run_dir)
        if running is not None and running.is_running:
            raise ConfigError(f"a cluster runs in {run_dir} already, process {running.supervisor}", field="run.dir")
        _sweep(run_dir)
        _write_layout(layout)
    return supervisor.run(run_dir)


def down(run_dir: Path) -> bool:
    """Stop the cluster of a run directory; return whether there was one."""
    if not run_dir.is_dir():
        return False
    with _exclusive(run_dir):
        running = state.read(run_dir)
        if running is None or not running.is_running:
            _sweep(run_dir)
            return False
        _stop(run_dir, running.supervisor)
        return True


def wait_ready(run_dir: Path, pid: int, timeout_s: float) -> ClusterState:
    """Wait until the router of the cluster under supervisor `pid` answers /ready with 200.

    Raises:
        ConfigError: a service refuses its configuration; the message ends with the last lines of its log.
        NotReady: it does not; the message ends so too.
    """
    deadline_s = time.monotonic() + timeout_s
    reason = "nothing was started"
    while time.monotonic() < deadline_s:
        started_s = state.start_of(pid)
        if started_s is None:
            raise NotReady(f"the supervisor ended\n{_tail(run_dir / 'logs' / 'supervisor.log')}")
        cluster = state.read(run_dir)
        if cluster is not None and cluster.supervisor == pid:
            culprit = _culprit(cluster)
            if culprit is not None:
                is_refused = culprit.last_exit == CONFIG_EXIT
                raise (ConfigError if is_refused else NotReady)(_accusation(culprit))
            status, reason = ask_ready(cluster.http, min(ANSWER_S, deadline_s - time.monotonic()))
            if status == http.HTTPStatus.OK:
                return state.read(run_dir) or cluster
        time.sleep(POLL_S)
    raise NotReady(f"not ready after {timeout_s:g} s: {reason}\n{_tails(run_dir)}")


def ask_ready(url: str, timeout_s: float) -> tuple[int | None, str]:
    """Ask a router whether it is ready; return the HTTP status, None when nobody answers, and the text."""
    where = urlsplit(url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=max(0.1, timeout_s))
    try:
        connection.request("GET", "/ready")
        answer = connection.getresponse()
        return answer.status, answer.read(4096).decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException) as error:
        return None, f"{url} does not answer: {error}"
    finally:
        connection.close()


def _culprit(cluster: ClusterState) -> ProcessState | None:
    for process in cluster.processes:
        num_deaths = process.restarts + (process.pid is None and process.last_exit is not None)
        if process.last_exit == CONFIG_EXIT or num_deaths >= MOST_DEATHS:
            return process
    return None


def _accusation(culprit: ProcessState) -> str:
    end = f"ends with status {culprit.last_exit}"
    if culprit.last_exit == CONFIG_EXIT:
        end = "refuses its configuration"
    return f"{culprit.name} {end}\n{_tail(Path(culprit.log))}"


def _launch(layout: Layout) -> int:
    """Start the supervisor in a session of its own and return its process id."""
    run_dir = Path(layout.run_dir)
    for old in (run_dir / "logs").glob("*.log"):
        old.unlink()
    _write_layout(layout)
    command = [sys.executable, "-m", "headrace.cli.supervisor", layout.run_dir]
    started = subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    return int(started.stdout)


def _write_layout(layout: Layout) -> None:
    # It holds the URL of Redis, with its password.
    write_private(Path(layout.run_dir) / supervisor.LAYOUT_FILE, msgspec.json.encode(layout).decode())


def _stop(run_dir: Path, pid: int) -> None:
    """Stop a supervisor, by force if it does not leave; its services die with it."""
    cluster = state.read(run_dir)
    started_s = state.start_of(pid)
    for number, patience_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, 1.0)):
        if not state.is_alive(pid, started_s):
            break
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline_s = time.monotonic() + patience_s
        while state.is_alive(pid, started_s) and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
    _kill_services(cluster)
    (run_dir / state.FILE).unlink(missing_ok=True)


def _sweep(run_dir: Path) -> None:
    """Remove what a supervisor left that was killed."""
    _kill_services(state.read(run_dir))
    (run_dir / state.FILE).unlink(missing_ok=True)


def _kill_services(cluster: ClusterState | None) -> None:
    for process in cluster.processes if cluster else ():
        if process.pid is not None and state.is_alive(process.pid, process.started_s):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _exclusive(run_dir: Path) -> Iterator[None]:
    """Let one `up` or `down` at a time work in a run directory."""
    with (run_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _tails(run_dir: Path) -> str:
    return "\n".join(_tail(path) for path in sorted((run_dir / "logs").glob("*.log")))


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return f"-- no log: {error}"
    return "\n".join([f"-- end of {path}:", *lines[-LOG_LINES:]])
