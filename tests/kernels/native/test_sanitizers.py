"""The kernels' own tests again, built with the sanitizers of addresses and of undefined behaviour."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITES = ("test_pack.py", "test_linear.py", "test_attend.py")
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g"


def preloaded(name):
    found = subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    return found.stdout.strip()


def run_suites(tmp_path, *options):
    env = os.environ | {
        "HEADRACE_NATIVE_FLAGS": FLAGS,
        "HEADRACE_CACHE_DIR": str(tmp_path),
        "LD_PRELOAD": f"{preloaded('libasan.so')} {preloaded('libubsan.so')}",
        # The interpreter and torch free nothing at their end.
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(here / name) for name in SUITES)]
    return subprocess.run([*command, *options], env=env, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_the_kernels_read_and_write_only_their_own_memory(tmp_path):
    done = run_suites(tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert list(tmp_path.glob("native-*.so"))


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_the_sanitizers_would_notice(tmp_path, monkeypatch):
    """A buffer one row too short must be reported; else the test above proves nothing."""
    broken = tmp_path / "test_broken.py"
    broken.write_text(
        "import torch\n"
        "from headrace_kernels.native import Buffer\n"
        "from headrace_kernels.native.machine import Panels, Program\n"
        "def test_it(run):\n"
        "    program = Program()\n"
        "    program.linear(Panels(torch.randn(4096, 32)), Buffer.ATTENDED, Buffer.QKV)\n"
        "    run(program, {Buffer.ATTENDED: torch.randn(3, 32), Buffer.QKV: torch.zeros(2, 4096)}, num_rows=3)\n"
    )
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    monkeypatch.setitem(globals(), "SUITES", (str(broken),))
    done = run_suites(tmp_path, "-s", "-c", os.devnull)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stdout + done.stderr
