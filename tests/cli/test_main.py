import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace import catalog
from headrace.cli import state
from headrace.cli.serve import WORKERS, Role


def headrace(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "headrace.cli.main", *arguments],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_lists_every_command(tmp_path: Path) -> None:
    found = headrace("--help", cwd=tmp_path).stdout
    for command in ("serve", "up", "down", "status", "systems", "doctor", "version", "chat", "complete", "models"):
        assert f"\n  {command} " in found


def test_version_is_the_version_of_the_package(tmp_path: Path) -> None:
    assert headrace("version", cwd=tmp_path).stdout == "0.1.0\n"


def test_systems_shows_each_technique_in_a_line_with_its_paper(tmp_path: Path) -> None:
    head, *lines = headrace("systems", cwd=tmp_path).stdout.splitlines()
    assert head.split()[:4] == ["name", "seams", "tokens", "paper,"]
    assert [line.split()[0] for line in lines] == list(catalog.names())
    [sarathi] = [line for line in lines if line.startswith("sarathi ")]
    assert sarathi.split()[1:3] == ["shape", "lossless"]
    manifest = catalog.load("sarathi")
    for fact in (manifest.paper, "https://arxiv.org/abs/2403.02310", manifest.measured):
        assert fact in sarathi


def test_status_without_a_cluster_says_so_and_fails(tmp_path: Path) -> None:
    found = headrace("status", "--json", cwd=tmp_path)
    assert found.returncode == 1
    assert json.loads(found.stdout) == {"http": None, "grpc": None, "processes": []}


def test_down_without_a_cluster_is_no_error(tmp_path: Path) -> None:
    found = headrace("down", cwd=tmp_path)
    assert (found.returncode, found.stdout) == (0, "nothing runs in .run\n")


def test_the_run_directory_comes_from_the_environment(tmp_path: Path) -> None:
    assert "nothing runs in elsewhere" in headrace("down", cwd=tmp_path, HEADRACE_RUN_DIR="elsewhere").stdout


@pytest.mark.parametrize("question", ["transport", "leases"])
def test_the_doctor_needs_a_cluster(tmp_path: Path, question: str) -> None:
    found = headrace("doctor", question, cwd=tmp_path)
    assert found.returncode == 1
    assert "start it with `headrace up`" in found.stderr


@pytest.mark.parametrize("question", ["transport", "leases"])
def test_the_doctor_asks_nobody_of_blocks_who_has_none(tmp_path: Path, question: str) -> None:
    """They would not answer, which the doctor tells by its status."""
    processes = tuple(
        state.ProcessState(
            name=role.value,
            role=role.value,
            grpc="127.0.0.1:1",
            http=None,
            pid=None,
            started_s=None,
            restarts=0,
            last_exit=None,
            log="",
        )
        for role in (Role.ROUTER, Role.INGESTOR)
    )
    own_start_s = state.start_of(os.getpid())
    assert own_start_s is not None
    cluster = state.ClusterState(
        http="", grpc="", supervisor=os.getpid(), supervisor_started_s=own_start_s, processes=processes
    )
    state.write(tmp_path, cluster)
    found = headrace("doctor", question, cwd=tmp_path, HEADRACE_RUN_DIR=str(tmp_path))
    assert (found.returncode, found.stdout.count("\n")) == (0, 1), found.stderr


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("up", "--workers", "prefill=1"), "workers wants a prefill and a decode worker"),
        (("up", "--dtype", "fp8"), "run.dtype wants one of auto, fp32, bf16, int8, int4, found str 'fp8'"),
        (("up", "--model", "absent.gguf"), "absent.gguf does not exist"),
        (("up", "--set", "threads=1"), "--set wants SECTION.FIELD=VALUE"),
        (
            ("up", "--set", "worker.threads=many"),
            "worker.threads wants a whole number, found str 'many' (--set worker.threads)",
        ),
        (("up", "--set", "decode-0.thread=1"), "unknown key 'thread' in --set decode-0.thread"),
        (("up", "--set", "kvstore.siblings=foo"), "from 1 to 65535, found 'foo' (--set kvstore.siblings)"),
        (
            ("up", "--set", "prefill-0.name="),
            "in the cluster, found '' (--set prefill-0.name)",
        ),
        (
            ("up", "--set", "decode-0.threads=2", "--set", "worker.threads=1", "--set", "worker.block_tokens=many"),
            "(--set worker.block_tokens)",
        ),
        (("up", "--set", "router.ingestors=foo"), "from 1 to 65535, found 'foo' (--set router.ingestors)"),
        (("up", "--set", "ingestor.max_streams=0"), "(--set ingestor.max_streams)"),
        (("up", "--set", "ingestor.name=a.b"), "name must have no dot, found 'a.b' (--set ingestor.name)"),
        (("up", "--set", "ingestor.routers="), "an ingestor needs a router (--set ingestor.routers)"),
        (("up", "--set", "ingestor.grpc_port=0"), "--set ingestor.grpc_port: `headrace up` chooses ports itself"),
        (("up", "--set", "ingestor-1.idle_s=1"), "--set wants SECTION.FIELD=VALUE"),
        (("up", "--set", "kvstore.grpc_port=0"), "--set kvstore.grpc_port: `headrace up` chooses ports itself"),
        (("serve", "router", "--config", "absent.yaml"), "cannot read the configuration absent.yaml"),
        (("serve", "router", "--set", "max_moves"), "--set wants NAME=VALUE"),
    ],
)
def test_a_bad_option_ends_with_status_2_and_one_line(tmp_path: Path, arguments: tuple[str, ...], wanted: str) -> None:
    found = headrace(*arguments, cwd=tmp_path)
    assert found.returncode == 2
    assert found.stderr.startswith("headrace: ")
    assert wanted in found.stderr
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("variable", "value", "wanted"),
    [
        ("HEADRACE_RUN_REDIS_URL", "redis://:hunter2@host/-3", "HEADRACE_RUN_REDIS_URL is not understood"),
        ("HEADRACE_WORKER_KV_MEMORY_BYTES", "0", "(HEADRACE_WORKER_KV_MEMORY_BYTES)"),
        ("HEADRACE_KVSTORE_EVICTION", "fifo", "(HEADRACE_KVSTORE_EVICTION)"),
        ("HEADRACE_INGESTOR_COALESCE_S", "2", "(HEADRACE_INGESTOR_COALESCE_S)"),
        ("HEADRACE_INGESTOR_GRPC_PORT", "5000", "HEADRACE_INGESTOR_GRPC_PORT: `headrace up` chooses ports itself"),
        ("HEADRACE_RUN_INGESTORS", "65", "a whole number from 0 to 64, found str '65' (HEADRACE_RUN_INGESTORS)"),
        ("HEADRACE_WORKER_REDIS__URL", "redis://:hunter2@host/-3", "(HEADRACE_WORKER_REDIS__URL)"),
        ("HEADRACE_WORKER_GRPC_PORT", "5000", "HEADRACE_WORKER_GRPC_PORT: `headrace up` chooses ports itself"),
        ("HEADRACE_ROUTER_DRIFT", "1", "unknown key 'HEADRACE_ROUTER_DRIFT' in the environment"),
    ],
)
def test_up_starts_nothing_for_a_variable_that_a_service_would_refuse(
    tmp_path: Path, variable: str, value: str, wanted: str
) -> None:
    found = headrace("up", cwd=tmp_path, **{variable: value})
    assert found.returncode == 2
    assert wanted in found.stderr
    assert "hunter2" not in found.stderr
    assert not (tmp_path / ".run").exists()


@pytest.mark.parametrize("role", Role)
def test_every_role_shows_its_configuration_with_origins(tmp_path: Path, role: Role) -> None:
    options = ["--set", "grpc_port=50999"]
    if role is not Role.KVSTORE:
        options += ["--set", "model=m.gguf"]
    if role in WORKERS:
        options += ["--set", "name=w", "--dtype", "fp32"]
    found = headrace("serve", role.value, "--print-config", *options, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    lines = [" ".join(line.split()) for line in found.stdout.splitlines()]
    section = "worker" if role in WORKERS else role.value
    assert f"{section}.grpc_port = 50999 (command line)" in lines
    assert f"{section}.host = 127.0.0.1 (default)" in lines
    if section == "worker":
        assert f"worker.role = {role.value} (command line)" in lines


@pytest.mark.parametrize("role", Role)
def test_every_role_refuses_an_unknown_key(tmp_path: Path, role: Role) -> None:
    found = headrace("serve", role.value, "--print-config", "--set", "grpc_prot=1", cwd=tmp_path)
    assert found.returncode == 2
    assert "unknown key 'grpc_prot' in --set grpc_prot; did you mean 'grpc_port'" in found.stderr
