"""Keep the services of a local cluster running; run as `python -m headrace.cli.supervisor RUN_DIR`.

The supervisor owns the run directory's state file and the ports. A service that dies is started
again with the same name and ports, after a pause that doubles from 0.2 s to 5 s. The services die
with the supervisor, whatever kills it.
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from headrace.cli import state
from headrace.cli.layout import Layout, Service, arrange
from headrace.cli.ports import Ports, default_folder
from headrace.cli.state import ClusterState, ProcessState
from headrace.clock import Clock, WallClock
from headrace.errors import ConfigError, HeadraceError
from headrace.settings import environment

LAYOUT_FILE = "layout.json"
GRACE_S = 10.0
"""Time for all services together to drain after SIGTERM; then SIGKILL."""

STAGES = (
    (("router", "ingestor"), 0.55),
    (("prefill", "decode", "hybrid"), 0.8),
    (("kvstore",), 0.9),
    (("redis",), 1.0),
)
"""Order of the stop and the share of the grace that is spent when each stage ends at the latest: the front
door closes first, the stores are there until the workers have left, and Redis until all have."""

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
HEALTHY_S = 30.0
"""A service that lived this long starts again after the first pause."""

PR_SET_PDEATHSIG = 1

log = logging.getLogger(__name__)


class _Child:
    """One service over all its processes."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.process: asyncio.subprocess.Process | None = None
        self.started_s: float | None = None
        self.restarts = 0
        self.last_exit: int | None = None

    def state(self) -> ProcessState:
        return ProcessState(
            name=self.service.name,
            role=self.service.role,
            grpc=self.service.grpc,
            http=self.service.http,
            pid=self.process.pid if self.process else None,
            started_s=self.started_s if self.process else None,
            restarts=self.restarts,
            last_exit=self.last_exit,
            log=str(self.service.log),
        )

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)


class Supervisor:
    """Run services until told to stop.

    Args:
        services: What to run.
        on_change: Called with the state of all services after every start and every death.
        clock: Tells how long a service lived.
        grace_s: Time for all services together to leave on their own.
    """

    def __init__(
        self,
        services: Sequence[Service],
        on_change: Callable[[tuple[ProcessState, ...]], None],
        clock: Clock,
        grace_s: float = GRACE_S,
    ) -> None:
        self._children = [_Child(service) for service in services]
        self._on_change = on_change
        self._clock = clock
        self._grace_s = grace_s
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Ask `run` to end; it stops the services first."""
        self._stopping.set()

    async def run(self) -> None:
        """Start the services, keep them running, and stop them when asked.

        Raises:
            OSError: a service could not be started at all.
        """
        async with asyncio.TaskGroup() as group:
            keepers = {child.service.name: group.create_task(self._keep(child)) for child in self._children}
            await self._stopping.wait()
            begun_s = self._clock.now()
            for roles, share in STAGES:
                stage = [child for child in self._children if child.service.role in roles]
                await self._stop(stage, keepers, begun_s + share * self._grace_s)

    async def _stop(
        self, children: Sequence[_Child], keepers: dict[str, asyncio.Task[None]], deadline_s: float
    ) -> None:
        for child in children:
            child.signal(signal.SIGTERM)
        tasks = [keepers[child.service.name] for child in children]
        if tasks:
            await asyncio.wait(tasks, timeout=max(0.0, deadline_s - self._clock.now()))
        for child in children:
            if child.process is not None:
                log.warning("service did not leave in time", extra={"worker": child.service.name})
                child.signal(signal.SIGKILL)
        if tasks:
            await asyncio.wait(tasks)

    async def _keep(self, child: _Child) -> None:
        num_early_deaths = 0
        while not self._stopping.is_set():
            begun_s = self._clock.now()
            await self._run_once(child)
            is_early = self._clock.now() - begun_s < HEALTHY_S
            num_early_deaths = num_early_deaths + 1 if is_early else 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_before_restart_s(num_early_deaths)):
                    await self._stopping.wait()
            child.restarts += 1

    async def _run_once(self, child: _Child) -> None:
        child.process = await _start(child.service)
        child.started_s = state.start_of(child.process.pid)
        if self._stopping.is_set():
            child.signal(signal.SIGKILL)
        self._publish()
        child.last_exit = await child.process.wait()
        child.process = None
        log.info("service ended", extra={"worker": child.service.name, "status": child.last_exit})
        self._publish()

    def _publish(self) -> None:
        self._on_change(tuple(child.state() for child in self._children))


def pause_before_restart_s(num_early_deaths: int) -> float:
    """Return how long to wait after that many deaths in a row, 1 or more, that came soon after the start."""
    return min(FIRST_PAUSE_S * 2.0 ** min(num_early_deaths - 1, 16), LONGEST_PAUSE_S)


async def _start(service: Service) -> asyncio.subprocess.Process:
    """Start a service in its own session, so that a Ctrl-C in the terminal reaches the supervisor alone."""
    service.log.parent.mkdir(parents=True, exist_ok=True)
    with service.log.open("ab") as output:
        return await asyncio.create_subprocess_exec(
            *service.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**service.env, **environment()},
            start_new_session=True,
            preexec_fn=partial(_die_with, os.getpid()),
        )


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends; runs between fork and exec."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


async def supervise(layout: Layout, ports: Ports) -> None:
    """Run the cluster of a layout until SIGTERM or SIGINT.

    Raises:
        ConfigError: no port is free.
    """
    run_dir = Path(layout.run_dir)
    services = arrange(layout, ports)
    router = services[0]
    own_start_s = state.start_of(os.getpid()) or 0.0

    def publish(processes: tuple[ProcessState, ...]) -> None:
        cluster = ClusterState(
            http=router.http or "",
            grpc=router.grpc or "",
            supervisor=os.getpid(),
            supervisor_started_s=own_start_s,
            processes=processes,
        )
        state.write(run_dir, cluster)

    supervisor = Supervisor(services, publish, WallClock())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.stop)
    try:
        await supervisor.run()
    finally:
        (run_dir / state.FILE).unlink(missing_ok=True)


def run(run_dir: Path) -> int:
    """Supervise the cluster that `headrace up` laid out in a run directory; return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    layout = msgspec.json.decode((run_dir / LAYOUT_FILE).read_bytes(), type=Layout)
    ports = Ports("127.0.0.1", default_folder())
    try:
        asyncio.run(supervise(layout, ports))
    except HeadraceError as error:
        log.error("cannot run the cluster", extra={"reason": str(error)})
        return 2 if isinstance(error, ConfigError) else 1
    finally:
        ports.close()
    return 0


def detach(run_dir: Path) -> int:
    """Supervise in a process of its own; its id is written to stdout before this one returns."""
    child = os.fork()
    if child:
        sys.stdout.write(f"{child}\n")
        return 0
    os.setsid()
    output = os.open(run_dir / "logs" / "supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, output), (2, output)):
        os.dup2(source, target)
    return run(run_dir)


if __name__ == "__main__":
    sys.exit(detach(Path(sys.argv[1])))
