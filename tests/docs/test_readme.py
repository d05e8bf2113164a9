"""The README does what it says: its code blocks run against a real cluster, its paths and targets exist."""

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.testing.cluster import LocalCluster

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
COMMAND = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("readme") / "run", dtype="auto") as running:
        yield running


def shown(language: str, text: str) -> str:
    return f"{language}: {text.strip().splitlines()[0][:60]}"


@pytest.mark.cluster
@pytest.mark.parametrize(("language", "text"), BLOCKS, ids=[shown(*block) for block in BLOCKS])
def test_a_code_block_runs_and_shows_something(cluster: LocalCluster, language: str, text: str) -> None:
    text = text.replace("http://127.0.0.1:8000", cluster.http).replace("127.0.0.1:50051", cluster.grpc)
    scripts = sysconfig.get_path("scripts")
    env = os.environ | {"HEADRACE_RUN_DIR": str(cluster.run_dir), "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    found = subprocess.run([*COMMAND[language], text], env=env, capture_output=True, text=True, timeout=90, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.strip()


def test_the_readme_has_blocks_of_every_kind() -> None:
    assert {language for language, _ in BLOCKS} == {"bash", "python"}
    assert len(BLOCKS) == README.count("```bash") + README.count("```python")


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:^\$ |`)make ([a-z-]+)", README, flags=re.MULTILINE))
    assert named
    assert named <= targets


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([a-z_]+/[a-z_0-9/.]*)`", README))))
def test_every_path_of_the_readme_exists(path: str) -> None:
    assert (ROOT / path).exists()
