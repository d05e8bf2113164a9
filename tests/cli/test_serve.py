import importlib
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.cli.layout import SERVE, bundled_model
from headrace.cli.serve import ROOTS, Role


def serve(*arguments: str, program: tuple[str, ...] = SERVE) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*program, *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("role", Role)
def test_every_role_has_a_program(role: Role) -> None:
    module, _, name = ROOTS[role].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("arguments", [("--set", "no-equals"), ("--set", "no_such_option=1")])
def test_bad_settings_end_a_service_with_2_and_one_line(arguments: tuple[str, ...]) -> None:
    found = serve("router", *arguments)
    assert found.returncode == 2
    assert found.stderr.startswith("headrace: ")
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize("taken", ["grpc_port", "http_port"])
def test_a_router_whose_port_is_taken_ends_with_2_and_says_so(taken: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ports = {"grpc_port": 0, "http_port": 0} | {taken: listener.getsockname()[1]}
        options = {
            "name": "router",
            "host": "127.0.0.1",
            "workers": "127.0.0.1:1",
            "model": str(bundled_model()),
            **ports,
        }
        found = serve("router", *(part for name, value in options.items() for part in ("--set", f"{name}={value}")))
    assert found.returncode == 2
    assert f"127.0.0.1:{ports[taken]}" in found.stderr
    assert "choose a free port" in found.stderr


def test_a_service_takes_a_file_and_what_overrides_it_as_the_command_does(tmp_path: Path) -> None:
    file = tmp_path / "worker.yaml"
    file.write_text("worker:\n  name: filed\n  grpc_port: 1\n  model: /a\n")
    arguments = ("decode", "--config", str(file), "--set", "grpc_port=7")
    command = (sys.executable, "-m", "headrace.cli.main", "serve")
    shown = serve(*arguments, "--print-config", program=command)
    assert shown.returncode == 0
    assert shown.stdout
    assert serve(*arguments, "--print-config").stdout == shown.stdout
