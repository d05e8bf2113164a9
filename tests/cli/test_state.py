import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.cli import state
from headrace.cli.state import ClusterState, ProcessState
from headrace.errors import ConfigError


def cluster() -> ClusterState:
    process = ProcessState(
        name="decode-0",
        role="decode",
        grpc="127.0.0.1:1",
        http=None,
        pid=7,
        started_s=1.5,
        restarts=2,
        last_exit=-9,
        log="l",
    )
    return ClusterState(http="http://h:1", grpc="h:2", supervisor=8, supervisor_started_s=2.5, processes=(process,))


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    state.write(tmp_path, cluster())
    assert state.read(tmp_path) == cluster()
    assert [path.name for path in tmp_path.iterdir()] == [state.FILE]


def test_a_directory_without_a_cluster_has_none(tmp_path: Path) -> None:
    assert state.read(tmp_path) is None
    assert state.read(tmp_path / "absent") is None


@pytest.mark.parametrize("text", ["", "{", "{}", '{"http": 1}'])
def test_a_broken_state_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / state.FILE).write_text(text)
    with pytest.raises(ConfigError, match=r"cannot read .*cluster\.json"):
        state.read(tmp_path)


def test_a_process_is_alive_only_with_its_own_start_time() -> None:
    started_s = state.start_of(os.getpid())
    assert started_s is not None
    assert state.is_alive(os.getpid(), started_s)
    assert not state.is_alive(os.getpid(), started_s - 60)
    assert not state.is_alive(None, None)


def test_a_process_that_ended_is_not_alive() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started_s = state.start_of(process.pid)
        process.communicate(b"\n")
    assert not state.is_alive(process.pid, started_s)
