"""The programs that `make check` runs find what they look for."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def sizes(root: Path) -> subprocess.CompletedProcess[str]:
    return python(ROOT / "deploy/check/sizes.py", root)


def function(lines: int) -> str:
    return "\n".join(["def long() -> None:", *["    pass"] * (lines - 1), ""])


@pytest.mark.parametrize(
    ("path", "text", "finding"),
    [
        ("services/a.py", "\n" * 601, "over the limit of 600 lines: services/a.py has 601"),
        ("tests/a.py", "\n" * 601, "over the limit of 600 lines: tests/a.py has 601"),
        ("services/a.py", function(61), "over the limit of 60 lines: services/a.py:1 long has 61"),
        ("kernels/a.py", function(151), "over the limit of 150 lines: kernels/a.py:1 long has 151"),
    ],
)
def test_code_over_a_hard_limit_fails_by_name(tmp_path: Path, path: str, text: str, finding: str) -> None:
    (tmp_path / path).parent.mkdir()
    (tmp_path / path).write_text(text)
    found = sizes(tmp_path)
    assert found.returncode == 1
    assert finding in found.stdout


@pytest.mark.parametrize("use", ["import asyncio\nasyncio.wait_for", "import pickle", "import random"])
def test_what_is_banned_is_refused_by_name(use: str) -> None:
    name = "services/headrace/runtime/new.py"
    found = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename", name, "-"],
        input=use,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert found.returncode == 1
    assert "is banned" in found.stdout


@pytest.mark.parametrize(
    ("path", "text"),
    [("services/a.py", function(60)), ("kernels/a.py", function(150)), ("services/headrace/v1/a.py", "\n" * 900)],
)
def test_code_within_the_limits_and_generated_code_passes(tmp_path: Path, path: str, text: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text)
    assert sizes(tmp_path).returncode == 0


def test_the_table_shows_number_median_and_largest(tmp_path: Path) -> None:
    (tmp_path / "services").mkdir()
    for lines in (1, 2, 9):
        (tmp_path / f"services/f{lines}.py").write_text("\n" * lines)
    row = next(line.split() for line in sizes(tmp_path).stdout.splitlines() if line.startswith("files"))
    assert row == ["files", "3", "2", "9", "9", "services/f9.py"]


@pytest.fixture
def generated(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "services/headrace/v1", tmp_path / "headrace/v1")
    return tmp_path


def compare(services: Path) -> subprocess.CompletedProcess[str]:
    return python(ROOT / "proto/generate.py", "--check", services)


def test_fresh_generated_code_passes(generated: Path) -> None:
    assert compare(generated).returncode == 0


@pytest.mark.parametrize("name", ["block_pb2.py", "cluster_pb2.pyi", "stray_pb2.py"])
def test_generated_code_that_was_edited_or_added_is_named(generated: Path, name: str) -> None:
    with (generated / "headrace/v1" / name).open("a") as file:
        file.write("# edited\n")
    found = compare(generated)
    assert found.returncode == 1
    assert found.stdout == f"headrace/v1/{name} differs from its .proto; run `make proto`\n"
