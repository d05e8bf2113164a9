import dataclasses
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from headrace.cli import layout, state
from headrace.cli import up as local
from headrace.cli.layout import Layout, RunConfig
from headrace.errors import ConfigError, HeadraceError, NotReady

pytestmark = pytest.mark.cluster

STANDIN = (sys.executable, str(Path(__file__).with_name("standin.py")))
Plan = Callable[..., Layout]


@pytest.fixture
def plan(tmp_path: Path) -> Iterator[Plan]:
    run_dirs = []

    def make(*assignments: str, name: str = "run", workers: str = "prefill=1,decode=1") -> Layout:
        config = RunConfig(
            dir=tmp_path / name, workers=tuple(workers.split(",")), model=tmp_path, http_port=18000, grpc_port=18050
        )
        run_dirs.append(config.dir)
        return dataclasses.replace(layout.plan(config, assignments), program=STANDIN)

    yield make
    for run_dir in run_dirs:
        local.down(run_dir)


def wait_until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.02)


def pids(run_dir: Path) -> dict[str, int | None]:
    cluster = state.read(run_dir)
    assert cluster is not None
    return {process.name: process.pid for process in cluster.processes}


def is_gone(pid: int | None) -> bool:
    return pid is None or state.start_of(pid) is None


def test_up_starts_every_service_and_waits_until_the_router_is_ready(plan: Plan) -> None:
    cluster, ran_before = local.up(plan(workers="prefill=2,decode=1"), timeout_s=30)
    assert not ran_before
    assert [process.name for process in cluster.processes] == [
        "router",
        "kvstore",
        "ingestor",
        "prefill-0",
        "prefill-1",
        "decode-0",
        "redis",
    ]
    assert all(state.is_alive(process.pid, process.started_s) for process in cluster.processes)
    assert len({process.grpc for process in cluster.processes if process.grpc is not None}) == 6
    assert local.ask_ready(cluster.http, 5)[0] == 200


def test_what_up_leaves_for_the_supervisor_is_read_by_nobody_else(plan: Plan) -> None:
    planned = dataclasses.replace(plan(), redis_url="redis://:secret@127.0.0.1:1")
    local.up(planned, timeout_s=30)
    files = [file for file in Path(planned.run_dir).rglob("*") if file.is_file()]
    told = [file for file in files if b"secret" in file.read_bytes()]
    assert told
    assert {stat.S_IMODE(file.stat().st_mode) for file in told} == {0o600}


def test_a_second_up_finds_the_first(plan: Plan) -> None:
    first, _ = local.up(plan(), timeout_s=30)
    second, ran_before = local.up(plan(), timeout_s=30)
    assert ran_before
    assert second == first


def test_down_ends_every_process_and_forgets_the_cluster(plan: Plan) -> None:
    cluster, _ = local.up(plan(), timeout_s=30)
    assert local.down(Path(plan().run_dir))
    assert all(is_gone(process.pid) for process in cluster.processes)
    assert is_gone(cluster.supervisor)
    assert state.read(Path(plan().run_dir)) is None
    assert not local.down(Path(plan().run_dir))


def test_the_ports_are_free_again_after_down(plan: Plan) -> None:
    first, _ = local.up(plan(), timeout_s=30)
    local.down(Path(plan().run_dir))
    second, _ = local.up(plan(), timeout_s=30)
    assert second.http == first.http


def test_a_killed_service_starts_again_under_its_name_and_address(plan: Plan) -> None:
    run_dir = Path(plan().run_dir)
    before, _ = local.up(plan(), timeout_s=30)
    old = pids(run_dir)["decode-0"]
    assert old is not None
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: pids(run_dir)["decode-0"] not in (None, old))
    after = state.read(run_dir)
    assert after is not None
    reborn = next(process for process in after.processes if process.name == "decode-0")
    assert (reborn.restarts, reborn.last_exit) == (1, -signal.SIGKILL)
    assert [process.grpc for process in after.processes] == [process.grpc for process in before.processes]


def test_the_services_die_with_a_killed_supervisor_and_up_cleans_what_it_left(plan: Plan) -> None:
    cluster, _ = local.up(plan(), timeout_s=30)
    os.kill(cluster.supervisor, signal.SIGKILL)
    wait_until(lambda: all(is_gone(process.pid) for process in cluster.processes))
    again, ran_before = local.up(plan(), timeout_s=30)
    assert not ran_before
    assert again.supervisor != cluster.supervisor


@pytest.mark.parametrize(
    ("mode", "error", "reason"),
    [
        ("refuse", ConfigError, "prefill-0 refuses its configuration(?s:.*)standin will refuse"),
        ("crash", NotReady, "prefill-0 ends with status 1"),
    ],
)
def test_a_service_that_cannot_start_fails_up_by_name_and_stops_the_rest(
    plan: Plan, mode: str, error: type[HeadraceError], reason: str
) -> None:
    broken = plan(f"prefill-0.mode={mode}", "router.mode=unready")
    with pytest.raises(error, match=reason):
        local.up(broken, timeout_s=30)
    assert state.read(Path(broken.run_dir)) is None


def test_up_gives_up_after_its_timeout_and_shows_what_the_router_said(plan: Plan) -> None:
    with pytest.raises(NotReady, match="not ready after 1 s: standin says so"):
        local.up(plan("router.mode=unready"), timeout_s=1)
    assert state.read(Path(plan().run_dir)) is None


def test_two_clusters_that_start_together_share_no_port(plan: Plan) -> None:
    layouts = [plan(name="a"), plan(name="b")]
    with ThreadPoolExecutor(2) as threads:
        clusters = [cluster for cluster, _ in threads.map(lambda each: local.up(each, timeout_s=30), layouts)]
    addresses = [process.grpc for cluster in clusters for process in cluster.processes if process.grpc is not None]
    addresses += [cluster.http.removeprefix("http://") for cluster in clusters]
    assert len(set(addresses)) == len(addresses)
