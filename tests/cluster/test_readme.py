"""The code blocks of the README run against a real cluster."""

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.testing.cluster import LocalCluster

pytestmark = pytest.mark.cluster

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
COMMAND = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}


@pytest.fixture(autouse=True)
def leaves_nothing_behind(cluster: LocalCluster) -> Iterator[None]:
    before = cluster.footprint()
    yield
    cluster.assert_no_leaks(before)


def shown(language: str, text: str) -> str:
    return f"{language}: {text.strip().splitlines()[0][:60]}"


@pytest.mark.parametrize(("language", "text"), BLOCKS, ids=[shown(*block) for block in BLOCKS])
def test_a_code_block_runs_and_shows_something(cluster: LocalCluster, language: str, text: str) -> None:
    text = text.replace("http://127.0.0.1:8000", cluster.http).replace("127.0.0.1:50051", cluster.grpc)
    scripts = sysconfig.get_path("scripts")
    env = os.environ | {"HEADRACE_RUN_DIR": str(cluster.run_dir), "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    found = subprocess.run([*COMMAND[language], text], env=env, capture_output=True, text=True, timeout=90, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.strip()
