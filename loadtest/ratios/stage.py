"""Single services of headrace on this machine, spoken to without a router: what benchmarks of tiers are played on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import grpc

from headrace.cli.layout import SPIN_BRIEFLY, STAY_LOCAL, bundled_model
from headrace.cli.ports import Ports, default_folder
from headrace.core.block import BlockHash, KvLayout, block_hashes, root_hash
from headrace.core.cost import CostModel
from headrace.core.request import PROTOCOL_VERSION, CachedPrefix, SamplingParams, SequenceId, SequenceSpec
from headrace.core.wire import layout_from_proto, spec_to_proto
from headrace.testing.cluster import wait_until
from headrace.v1 import cluster_pb2, cluster_pb2_grpc, decode_pb2, decode_pb2_grpc

HOST = "127.0.0.1"
FIRST_PORT = 51_000
START_S = 60.0
REQUEST_S = 120.0
LOAD_S = 5.0
QUIET_S = 0.15
"""A worker that has stored nothing new for as long stores nothing any more."""
SERVE = ("-m", "headrace.cli.serve")
PACED = Path(__file__).with_name("paced_worker.py")
"""A worker with slow lanes; takes latency and time per byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of one prompt.

    Attributes:
        seconds: From sending it to its first token.
        num_cached: Its tokens that were not computed.
    """

    seconds: float
    num_cached: int


class Service:
    """One process; a context manager.

    Args:
        role: As `headrace serve` takes it.
        address: host:port of its gRPC server.
        settings: Values of `--set`.
        log: File for its output.
        env: Further environment variables.
        program: What Python runs in front of the role; None is `headrace serve`.
    """

    def __init__(  # noqa: PLR0913 a command line
        self,
        role: str,
        address: str,
        settings: Mapping[str, object],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        program: Sequence[str] = SERVE,
    ) -> None:
        host, _, port = address.partition(":")
        self.address = address
        self._log = log
        self._command = [sys.executable, *program, role]
        for name, value in {"host": host, "grpc_port": port, "exit_with_parent": "true", **settings}.items():
            self._command += ["--set", f"{name}={value}"]
        self._env = {**SPIN_BRIEFLY, **STAY_LOCAL, **os.environ, **(env or {})}

    def __enter__(self) -> "Service":
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=self._env)
        self._channel = grpc.insecure_channel(self.address)
        try:
            wait_until(self._is_ready, START_S, lambda: f"not ready:\n{self._log.read_text()[-3000:]}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        self.signal(signal.SIGCONT)
        self._process.terminate()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def restart(self) -> None:
        """Kill the process and start another one."""
        self._process.kill()
        self.__exit__()
        self.__enter__()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        if self._process.poll() is None:
            os.kill(self._process.pid, number)

    def load(self) -> cluster_pb2.LoadReport:
        """Return what the process reports of itself now."""
        stub = cluster_pb2_grpc.ClusterServiceStub(self._channel)
        reports = stub.WatchLoad(cluster_pb2.WatchLoadRequest(), timeout=LOAD_S)
        try:
            first: cluster_pb2.WatchLoadResponse = next(iter(reports))
            return first.load
        finally:
            reports.cancel()

    def _is_ready(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"{self._command} ended:\n{self._log.read_text()[-3000:]}")
        try:
            return self.load().is_ready
        except grpc.RpcError:
            return False


class Worker(Service):
    """A worker that computes prompts itself; it is told where their blocks are, as a router would."""

    def __enter__(self) -> "Worker":
        super().__enter__()
        described = cluster_pb2_grpc.ClusterServiceStub(self._channel).Handshake(
            cluster_pb2.HandshakeRequest(
                protocol_version=PROTOCOL_VERSION, name="bench", role=cluster_pb2.ROLE_ROUTER, epoch="bench"
            )
        )
        self.fingerprint = described.model_fingerprint
        self.layout: KvLayout = layout_from_proto(described.layout)
        self._model = described.model
        return self

    def ask(self, prompt: Sequence[int], sources: Sequence[CachedPrefix] = ()) -> Answer:
        """Return how long the first token of a prompt takes; asks again when its blocks are lost, as routers do."""
        begun_s = time.perf_counter()
        while True:
            try:
                return self._ask(prompt, sources, begun_s)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.ABORTED or time.perf_counter() - begun_s > REQUEST_S:
                    raise

    def _ask(self, prompt: Sequence[int], sources: Sequence[CachedPrefix], begun_s: float) -> Answer:
        spec = SequenceSpec(
            sequence_id=SequenceId(uuid.uuid4().hex),
            model=self._model,
            prompt=tuple(prompt),
            sampling=SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True),
            deadline_unix_ms=int(1000 * (time.time() + REQUEST_S)),
            sources=tuple(sources),
        )
        request = decode_pb2.DecodeRequest(sequence=spec_to_proto(spec), mode=decode_pb2.PREFILL_MODE_LOCAL)
        stub = decode_pb2_grpc.DecodeServiceStub(self._channel)
        stream = stub.Decode(request, timeout=REQUEST_S)
        first = next(iter(stream))
        took_s = time.perf_counter() - begun_s
        for _ in stream:
            pass
        return Answer(seconds=took_s, num_cached=first.tokens.cached_tokens)

    def settle(self) -> None:
        """Wait until what the last prompt left to do, storing its blocks above all, is done."""
        last, since_s = -1, time.monotonic()
        while time.monotonic() - since_s < QUIET_S:
            load = self.load()
            done = load.reuse.num_stored_blocks + load.reuse.num_dropped_blocks
            if done != last or load.num_transfers or load.num_running:
                last, since_s = done, time.monotonic()
            time.sleep(QUIET_S / 5)

    def hashes(self, prompt: Sequence[int]) -> tuple[BlockHash, ...]:
        """Return the names of a prompt's full blocks."""
        return block_hashes(root_hash(self.fingerprint), prompt, self.layout.block_tokens)

    def cost(self) -> CostModel:
        """Return what steps cost this worker by its own measurement.

        Raises:
            RuntimeError: it has not measured it.
        """
        load = self.load()
        if not load.HasField("cost"):
            raise RuntimeError("the worker has no cost model")
        found = load.cost
        return CostModel(**{field.name: getattr(found, field.name) for field in fields(CostModel)})


class Stage(contextlib.ExitStack):
    """A folder, ports, and the processes that run there; ends them all.

    Args:
        folder: For logs, disks and what workers keep for the next start.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._ports = Ports(HOST, default_folder())
        self.callback(self._ports.close)

    def store(self, name: str, settings: Mapping[str, object], *, env: Mapping[str, str] | None = None) -> Service:
        """Start a kvstore."""
        all_settings = {"name": name, **settings}
        return self.enter_context(Service("kvstore", self._address(), all_settings, self._log(name), env=env))

    def worker(
        self,
        name: str,
        stores: Sequence[Service],
        settings: Mapping[str, object],
        *,
        env: Mapping[str, str] | None = None,
        program: Sequence[str] = SERVE,
    ) -> Worker:
        """Start a worker of the bundled model in front of kvstores."""
        all_settings = {
            "name": name,
            "model": bundled_model(),
            "kvstores": ",".join(store.address for store in stores),
            **settings,
        }
        service = Worker("hybrid", self._address(), all_settings, self._log(name), env=env, program=program)
        self.enter_context(service)
        return service

    def _address(self) -> str:
        return f"{HOST}:{self._ports.take(FIRST_PORT)}"

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"
