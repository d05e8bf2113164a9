"""Start one worker of the bundled model again and again, and time each start until it says that it is ready."""

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from harness import commit, machine

from headrace.cli.layout import HOST, SERVE, SPIN_BRIEFLY, STAY_LOCAL, bundled_model

READY = b'"is_ready": true'
"""In the log, once the worker has computed a token of its own and answers health checks with SERVING."""
LONGEST_S = 120.0
POLL_S = 0.01


def bench(role: str, starts: int) -> None:
    """Print seconds and CPU seconds of each start; the first one keeps what the others find, and is left out."""
    start(role)
    figures = []
    for number in range(1, starts + 1):
        figures.append(start(role))
        print(f"start {number}: {figures[-1][0]:.2f} s, {figures[-1][1]:.2f} s of CPU", flush=True)
    taken_s, cpu_s = (statistics.median(column) for column in zip(*figures, strict=True))
    print(f"warm start, {role}: median {taken_s:.2f} s, {cpu_s:.2f} s of CPU; {machine()}; commit {commit()}")


def start(role: str) -> tuple[float, float]:
    """Start a worker alone and end it; return the seconds until it was ready and those of CPU that it took.

    Raises:
        RuntimeError: it did not become ready; the message is what it said.
    """
    options = ("name=start", f"host={HOST}", "grpc_port=0", f"model={bundled_model()}", "exit_with_parent=true")
    command = [*SERVE, role, *(part for option in options for part in ("--set", option))]
    with tempfile.NamedTemporaryFile() as log:
        begun_s = time.perf_counter()
        with subprocess.Popen(
            command, stdout=log, stderr=log, env={**SPIN_BRIEFLY, **STAY_LOCAL, **os.environ}
        ) as worker:
            try:
                wait_ready(worker, Path(log.name))
                taken_s = time.perf_counter() - begun_s
                ticks = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
                return taken_s, sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
            finally:
                worker.terminate()


def wait_ready(worker: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until a worker has written that it is ready; raises as `start`."""
    end_s = time.monotonic() + LONGEST_S
    while READY not in log.read_bytes():
        if worker.poll() is not None or time.monotonic() > end_s:
            raise RuntimeError(log.read_text())
        time.sleep(POLL_S)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", choices=("decode", "prefill", "hybrid"), default="decode")
    parser.add_argument("--starts", type=int, default=5)
    options = parser.parse_args()
    bench(options.role, options.starts)
