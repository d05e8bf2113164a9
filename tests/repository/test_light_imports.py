"""Front-door processes and the SDK stay small: heavy packages must not come along with an import."""

import subprocess
import sys

import pytest

WALK = """
import importlib, pkgutil, sys
for name in {packages!r}:
    module = importlib.import_module(name)
    for found in pkgutil.walk_packages(getattr(module, "__path__", ()), name + "."):
        importlib.import_module(found.name)
print(*sorted({unwanted!r} & {{name.partition(".")[0] for name in sys.modules}}))
"""


def came_along(packages: list[str], unwanted: set[str]) -> str:
    code = WALK.format(packages=packages, unwanted=unwanted)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_headrace_brings_nothing_heavy() -> None:
    code = "import sys, headrace; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "triton", "kubernetes", "redis", "fastapi"} & set(found)


def test_the_command_line_shows_help_without_the_wire_or_the_model() -> None:
    code = "import headrace.cli.main, sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "grpc", "fastapi", "rich", "numpy"} & set(found)


@pytest.mark.parametrize("package", ["core", "runtime", "text", "client", "seams", "router", "ingestor"])
def test_a_part_that_computes_nothing_imports_no_torch(package: str) -> None:
    assert came_along([f"headrace.{package}"], {"torch", "triton", "transformers"}) == ""


def test_a_service_starts_without_the_commands_that_it_does_not_run() -> None:
    assert came_along(["headrace.cli.serve"], {"typer", "pydantic", "torch", "grpc", "fastapi", "numpy"}) == ""


def test_a_worker_opens_its_transport_before_torch_is_there() -> None:
    assert came_along(["headrace.cli.begin_worker"], {"torch", "gguf", "safetensors"}) == ""


def test_a_worker_waits_for_nothing_that_only_others_need() -> None:
    unwanted = {"typer", "pydantic", "fastapi", "uvicorn", "prometheus_client", "transformers", "tokenizers", "rich"}
    assert came_along(["headrace.cli.worker"], unwanted) == ""


def test_the_probe_sees_what_came_along() -> None:
    assert came_along(["headrace.settings"], {"yaml", "torch"}) == "yaml"
