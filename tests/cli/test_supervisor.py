import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.cli import state
from headrace.cli.layout import Service
from headrace.cli.state import ProcessState
from headrace.cli.supervisor import FIRST_PAUSE_S, Supervisor, pause_before_restart_s
from headrace.clock import WallClock

pytestmark = pytest.mark.cluster

DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"
POLITE = "import time; print('up', flush=True); time.sleep(60)"
NOTES_ITS_END = """
import pathlib, signal, sys
def leave(*_):
    with open(sys.argv[1], 'a') as order: order.write(sys.argv[2] + '\\n')
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
print('up', flush=True)
signal.pause()
"""


def service(tmp_path: Path, role: str, code: str, *arguments: str) -> Service:
    return Service(
        name=role,
        role=role,
        command=(sys.executable, "-c", code, *arguments),
        grpc="127.0.0.1:1",
        http=None,
        log=tmp_path / f"{role}.log",
    )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.02)


def are_up(services: list[Service]) -> bool:
    return all(each.log.exists() and "up" in each.log.read_text() for each in services)


async def run_until_up(supervisor: Supervisor, services: list[Service]) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(supervisor.run())
        try:
            await asyncio.to_thread(wait_until, lambda: are_up(services))
        finally:
            supervisor.stop()


async def test_a_service_deaf_to_sigterm_is_killed_when_the_grace_is_over(tmp_path: Path) -> None:
    services = [service(tmp_path, "kvstore", DEAF), service(tmp_path, "router", POLITE)]
    seen: list[tuple[ProcessState, ...]] = []
    await run_until_up(Supervisor(services, seen.append, WallClock(), grace_s=0.5), services)
    assert [process.last_exit for process in seen[-1]] == [-9, -15]
    pids = {process.pid for snapshot in seen for process in snapshot if process.pid}
    assert [state.start_of(pid) for pid in pids] == [None, None]


@pytest.mark.parametrize("first", ["router", "ingestor"])
async def test_the_front_door_leaves_first_and_the_store_last(tmp_path: Path, first: str) -> None:
    order = tmp_path / "order"
    roles = ("kvstore", "prefill", first)
    services = [service(tmp_path, role, NOTES_ITS_END, str(order), role) for role in roles]
    await run_until_up(Supervisor(services, lambda _: None, WallClock()), services)
    assert order.read_text().split() == [first, "prefill", "kvstore"]


async def test_every_start_and_death_is_published_and_a_restart_waits(tmp_path: Path) -> None:
    services = [service(tmp_path, "decode", "print('up', flush=True)")]
    seen: list[tuple[ProcessState, ...]] = []
    seen_s: list[float] = []

    def note(processes: tuple[ProcessState, ...]) -> None:
        seen.append(processes)
        seen_s.append(time.monotonic())

    supervisor = Supervisor(services, note, WallClock())
    async with asyncio.TaskGroup() as group:
        group.create_task(supervisor.run())
        try:
            await asyncio.to_thread(wait_until, lambda: len(seen) >= 4)
        finally:
            supervisor.stop()
    first, dead, second, *_ = (snapshot[0] for snapshot in seen)
    assert first.pid is not None
    assert (first.restarts, first.last_exit) == (0, None)
    assert (dead.pid, dead.restarts, dead.last_exit) == (None, 0, 0)
    assert second.pid not in (None, first.pid)
    assert second.restarts == 1
    assert seen_s[2] - seen_s[1] >= FIRST_PAUSE_S


async def test_a_cancellation_that_meets_the_end_of_the_pause_is_not_lost(tmp_path: Path) -> None:
    pausing = asyncio.Event()

    def note(processes: tuple[ProcessState, ...]) -> None:
        if processes[0].last_exit is not None:
            pausing.set()

    supervisor = Supervisor([service(tmp_path, "decode", "")], note, WallClock())
    [child] = supervisor._children
    keeping = asyncio.create_task(supervisor._keep(child))
    await pausing.wait()
    # It goes on from the death to the pause, and from there to waiting.
    for _ in range(3):
        await asyncio.sleep(0)
    supervisor.stop()
    keeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await keeping


def test_the_pause_before_a_restart_doubles_up_to_five_seconds() -> None:
    pauses = [pause_before_restart_s(num_deaths) for num_deaths in (1, 2, 3, 4, 5, 6, 1_000_000)]
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
