"""Every contract of pyproject.toml is violated once in a copy of the tree; import-linter must name module and line."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINT = Path(sysconfig.get_path("scripts")) / "lint-imports"
VIOLATION = "services/headrace/{}/violation.py"


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LINT, "--no-logo", "--no-cache"],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": f"{tree / 'services'}{os.pathsep}{tree / 'kernels'}", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for folder in ("services", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_tree_keeps_every_contract(tree: Path) -> None:
    found = lint(tree)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "5 kept, 0 broken" in found.stdout


@pytest.mark.parametrize(
    ("contract", "files", "finding"),
    [
        (
            "Layers point down",
            {VIOLATION.format("core"): "import headrace.engine\n"},
            "headrace.core.violation -> headrace.engine (l.1)",
        ),
        (
            "Layers point down",
            {VIOLATION.format("prefill"): "\nimport headrace.decode\n"},
            "headrace.prefill.violation -> headrace.decode (l.2)",
        ),
        (
            "Layers point down",
            {VIOLATION.format("ingestor"): "import headrace.router\n"},
            "headrace.ingestor.violation -> headrace.router (l.1)",
        ),
        (
            "Techniques do not import each other",
            {
                "services/headrace/techniques/alpha/__init__.py": "import headrace.techniques.beta\n",
                "services/headrace/techniques/beta/__init__.py": "",
            },
            "headrace.techniques.alpha -> headrace.techniques.beta (l.1)",
        ),
        (
            "Kernels import nothing of headrace",
            {"kernels/headrace_kernels/violation.py": "import headrace.errors\n"},
            "headrace_kernels.violation -> headrace.errors (l.1)",
        ),
        (
            "Policies, core and seams do no I/O",
            {VIOLATION.format("seams"): "import asyncio\n"},
            "headrace.seams.violation -> asyncio (l.1)",
        ),
        (
            "Policies, core and seams do no I/O",
            {"services/headrace/worker/policy.py": "import grpc\n"},
            "headrace.worker.policy -> grpc (l.1)",
        ),
        (
            "Only composition roots import the catalog",
            {VIOLATION.format("worker"): "import headrace.catalog\n"},
            "headrace.worker.violation -> headrace.catalog (l.1)",
        ),
    ],
)
def test_a_violated_contract_is_named_with_module_and_line(
    tree: Path, contract: str, files: dict[str, str], finding: str
) -> None:
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    found = lint(tree)
    assert found.returncode == 1
    assert f"{contract} BROKEN" in found.stdout
    assert finding in found.stdout
