"""The kernels' own tests again, built with the sanitizers of addresses, of undefined behaviour and of threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SUITES = tuple(HERE / name for name in ("test_pack.py", "test_linear.py", "test_attend.py", "test_team.py"))
MEMORY, THREADS = "address,undefined", "thread"
LIBRARIES = {MEMORY: ("libasan.so", "libubsan.so"), THREADS: ("libtsan.so",)}
FLAGS = "-fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g"
OPTIONS = {
    # The interpreter and torch free nothing at their end.
    "ASAN_OPTIONS": "detect_leaks=0",
    # Naming the places in torch's libraries takes minutes; `addr2line -e native-*.so` names ours.
    "TSAN_OPTIONS": "halt_on_error=0 exitcode=66 symbolize=0",
}


def preloaded(name):
    found = subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    return found.stdout.strip()


def run_suites(sanitizer, tmp_path, suites, *options):
    env = os.environ | OPTIONS
    env |= {
        "HEADRACE_NATIVE_FLAGS": f"-fsanitize={sanitizer} {FLAGS}",
        "HEADRACE_CACHE_DIR": str(tmp_path),
        "LD_PRELOAD": " ".join(preloaded(name) for name in LIBRARIES[sanitizer]),
        # torch's own threads are built without the sanitizer, which would not see how they wait for each other.
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *map(str, suites)]
    return subprocess.run([*command, *options], env=env, capture_output=True, text=True, timeout=900, check=False)


def run_broken(sanitizer, tmp_path, text):
    """Run a test that does what it must not, with the fixtures of these tests."""
    broken = tmp_path / "test_broken.py"
    broken.write_text(text)
    (tmp_path / "conftest.py").write_text((HERE / "conftest.py").read_text())
    done = run_suites(sanitizer, tmp_path, (broken,), "-c", os.devnull)
    assert done.returncode != 0
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("sanitizer", [MEMORY, THREADS])
def test_the_kernels_keep_to_their_memory_and_to_their_turn(sanitizer, tmp_path):
    done = run_suites(sanitizer, tmp_path, SUITES)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert list(tmp_path.glob("native-*.so"))


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_buffer_one_row_too_short_is_noticed(tmp_path):
    """Else the test above proves nothing about memory."""
    said = run_broken(
        MEMORY,
        tmp_path,
        "import torch\n"
        "from headrace_kernels.native import Buffer\n"
        "from headrace_kernels.native.machine import Panels, Program\n"
        "def test_it(run):\n"
        "    program = Program()\n"
        "    program.linear(Panels(torch.randn(4096, 32)), Buffer.ATTENDED, Buffer.QKV)\n"
        "    run(program, {Buffer.ATTENDED: torch.randn(3, 32), Buffer.QKV: torch.zeros(2, 4096)}, num_rows=3)\n",
    )
    assert "heap-buffer-overflow" in said


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_rows_of_two_threads_in_one_place_are_noticed(tmp_path):
    """Else the test above proves nothing about threads: what one row adds to is what the next one normalises."""
    said = run_broken(
        THREADS,
        tmp_path,
        "import torch\n"
        "from headrace_kernels.native import Buffer, Machine, Program, abi\n"
        "from headrace_kernels.native.machine import buffers\n"
        "def test_it():\n"
        "    machine, program = Machine(2), Program()\n"
        "    x = torch.randn(2000, 32)\n"
        "    program.norm_add(Buffer.PROJECTED, Buffer.HIDDEN, torch.ones(32), 1e-5)\n"
        "    step = abi.Step(num_rows=2000, buffers=buffers(x[1:], x, x, x, x, x))\n"
        "    machine.run(program.operations(), 0, 1, step, 2)\n",
    )
    assert "data race" in said
