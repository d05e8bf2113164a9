"""The servers that are compared: each behind the OpenAI API, started for a workload and silent while others run."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path
from typing import Protocol

import httpx
from workloads import Workload

from headrace.cli.layout import SPIN_BRIEFLY
from headrace.testing.cluster import LocalCluster

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 20.0
MODEL = "smollm2"


class Server(Protocol):
    """A server with an OpenAI API on loopback."""

    @property
    def name(self) -> str:
        """What the tables call it, with its precision."""
        ...

    @property
    def model(self) -> str:
        """What requests must call the model."""
        ...

    def start(self, workload: Workload) -> str:
        """Make it ready for a workload and return its address; a running one is kept if it fits."""
        ...

    def pause(self) -> None:
        """Take no more CPU until the next start."""
        ...

    def stop(self) -> None:
        """End it."""
        ...


class Headrace:
    """`headrace up`: router, prefill, decode and kvstore as processes of their own.

    Args:
        dtype: As for `headrace up --dtype`.
        workers: As for `headrace up --workers`.
    """

    def __init__(self, dtype: str = "auto", workers: str = "prefill=1,decode=1") -> None:
        self._dtype = dtype
        self._workers = workers
        self._stack = ExitStack()
        self._cluster: LocalCluster | None = None

    @property
    def name(self) -> str:
        """`headrace`, its workers and its precision."""
        return f"headrace {self._workers}, {self._dtype}"

    @property
    def model(self) -> str:
        """The default of `headrace up`."""
        if self._cluster is None:
            raise RuntimeError("not started")
        return str(httpx.get(f"{self._cluster.http}/v1/models", trust_env=False).json()["data"][0]["id"])

    def start(self, workload: Workload) -> str:
        """Start once: it serves all workloads with its defaults."""
        if self._cluster is None:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            self._cluster = self._stack.enter_context(LocalCluster(folder, workers=self._workers, dtype=self._dtype))
        return self._cluster.http

    def pause(self) -> None:
        """Its processes sleep when there is nothing to do; stopping them would look like their death."""

    def stop(self) -> None:
        """Stop the cluster."""
        self._cluster = None
        self._stack.close()


class Process:
    """A peer: one process group, stopped by signal while it has nothing to do.

    Args:
        name: With its precision.
        env: Further environment variables.
        log: Where its output goes.
    """

    model = MODEL

    def __init__(self, name: str, log: Path, env: dict[str, str] | None = None) -> None:
        self.name = name
        self._log = log
        self._env = {**os.environ, **(env or {})}
        self._command: Sequence[str] = ()
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def command(self, workload: Workload) -> list[str]:
        """Return the command line, without the port, that serves a workload best."""
        raise NotImplementedError

    def start(self, workload: Workload) -> str:
        """Start it, or go on with the running one if its command line is the same."""
        command = self.command(workload)
        if self._process is None or command != self._command:
            self.stop()
            self._launch(command)
        elif self._process is not None:
            os.killpg(self._process.pid, signal.SIGCONT)
        return f"http://127.0.0.1:{self._port}"

    def pause(self) -> None:
        """Stop all its processes by signal."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGSTOP)

    def stop(self) -> None:
        """End all its processes."""
        if self._process is None:
            return
        for number in (signal.SIGCONT, signal.SIGTERM):
            os.killpg(self._process.pid, number)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None

    def _launch(self, command: list[str]) -> None:
        self._port, self._command = _free_port(), command
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(self._port)],
                stdout=log,
                stderr=log,
                env=self._env,
                start_new_session=True,
            )
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self.stop()
                raise RuntimeError(f"{self.name} did not start; see {self._log}")
            time.sleep(0.2)

    def _is_ready(self) -> bool:
        try:
            found = httpx.get(f"http://127.0.0.1:{self._port}/health", timeout=2.0, trust_env=False)
        except httpx.HTTPError:
            return False
        return found.status_code == HTTPStatus.OK


class Vllm(Process):
    """vLLM's own server, with the weights of the same file dequantised.

    Args:
        folder: Where `install.sh` put the peers.
        dtype: `bfloat16` or `float32`.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        env = {
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        super().__init__(f"vLLM {dtype}", folder / f"vllm-{dtype}.log", env)
        self._folder = folder
        self._dtype = dtype

    def command(self, workload: Workload) -> list[str]:
        """Return the same for all workloads: it takes a minute to start."""
        program, weights = str(self._folder / "vllm/bin/vllm"), str(self._folder / "weights")
        return [
            *(program, "serve", weights, "--dtype", self._dtype),
            *("--max-model-len", "8192", "--served-model-name", MODEL),
        ]


class LlamaServer(Process):
    """llama.cpp's own server on the file itself.

    Args:
        folder: Where `install.sh` put the peers.
        weights: The GGUF file.
    """

    def __init__(self, folder: Path, weights: Path) -> None:
        super().__init__(f"llama-server {weights.stem.rsplit('.', 1)[-1]}", folder / "llama-server.log")
        self._program = str(folder / "llama.cpp/bin/llama-server")
        self._weights = str(weights)

    def command(self, workload: Workload) -> list[str]:
        """Return a server with a slot per user."""
        return [
            *(self._program, "-m", self._weights, "-t", str(os.cpu_count() or 1), "--alias", MODEL),
            *("-np", str(workload.users), "-c", str(workload.users * workload.context_tokens)),
        ]


class Library(Process):
    """A library without a server of its own, behind `inproc_server.py`.

    Its threads wait for each other as those of headrace do: with the usual spinning, transformers took four times as
    long beside another program.

    Args:
        name: With its precision.
        engine: As `inproc_server.py` calls it.
        python: Where the library is installed.
        weights: What it loads.
        log: Where its output goes.
    """

    def __init__(self, name: str, engine: str, *, python: Path, weights: Path, log: Path) -> None:
        super().__init__(name, log, SPIN_BRIEFLY)
        self._start = [str(python), str(Path(__file__).with_name("inproc_server.py")), engine, str(weights)]

    def command(self, workload: Workload) -> list[str]:
        """Return the same for all workloads."""
        return self._start


def openvino(folder: Path, weights: Path) -> Library:
    """Return OpenVINO GenAI as `install.sh` put it into `folder`, on a GGUF file."""
    return Library(
        "OpenVINO GenAI u4",
        "openvino",
        python=folder / "openvino/bin/python",
        weights=weights,
        log=folder / "openvino.log",
    )


def onnxruntime(folder: Path, grid: str) -> Library:
    """Return ONNX Runtime GenAI as `install.sh` put it into `folder`, with weights on the grid `int4` or `uint4`."""
    return Library(
        f"ONNX Runtime GenAI {grid}",
        "ort",
        python=folder / "ort/bin/python",
        weights=folder / "ort" / grid,
        log=folder / f"ort-{grid}.log",
    )


def transformers(folder: Path) -> Library:
    """Return transformers of this environment, on the weights that `install.sh` dequantised into `folder`."""
    return Library(
        "transformers float32",
        "transformers",
        python=Path(sys.executable),
        weights=folder / "weights",
        log=folder / "transformers.log",
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
