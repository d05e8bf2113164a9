"""What the path costs: router, prefill and decode as processes behind HTTP, over the bare engine in this process.

The bare engine has the same model, precision, chunks and cores, and no text, network or event loop; its users send
their next prompt between two steps. The client of the path shares the machine with it. With --threads below the number
of cores the path has cores that neither engine uses, as beside an accelerator.
"""

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx
from drive import Answer, Figures, drive, summarise
from harness import compare, report
from workloads import WORKLOADS, Ask, Workload

from headrace.cli.layout import bundled_model
from headrace.cli.worker import build_engine, build_machine
from headrace.core.request import SamplingParams, SequenceId, SequenceSpec
from headrace.engine.engine import Engine
from headrace.engine.messages import Admitted, Begin, Close, EngineEvent, Failed, Goal, Open, Sampled
from headrace.testing.cluster import LocalCluster
from headrace.worker.config import Dtype, WorkerConfig, WorkerRole

MINUTE_MS = 60_000
WORK = ("W1", "W2@8")


class BareEngine:
    """An engine alone on its cores, stepped by its caller."""

    def __init__(self, dtype: str, threads: int) -> None:
        self._config = WorkerConfig(
            name="bare",
            role=WorkerRole.HYBRID,
            model=bundled_model(),
            dtype=Dtype(dtype),
            calibrate_s=0.0,
            threads=threads,
        )
        self._machine = build_machine(self._config)
        self._numbers = itertools.count()

    def drive(self, asks: Sequence[Ask], users: int) -> Figures:
        """Answer all of them, `users` at a time."""
        engine = self._engine()
        waiting, times, begun = list(reversed(asks)), dict[SequenceId, list[float]](), dict[SequenceId, float]()
        events: list[EngineEvent] = []

        def send() -> None:
            ask, number = waiting.pop(), SequenceId(str(next(self._numbers)))
            begun[number], times[number] = time.perf_counter(), []
            engine.apply(Open(spec=self._spec(ask, number), goal=Goal.ANSWER, sink=events.append))

        begun_s = time.perf_counter()
        for _ in range(min(users, len(waiting))):
            send()
        while engine.step() or events:
            for event in events[:]:
                match event:
                    case Admitted(sequence_id=number, num_cached_tokens=present):
                        engine.apply(Begin(sequence_id=number, num_present=present))
                    case Sampled(sequence_id=number, token=token):
                        times[number].append(time.perf_counter() - begun[number])
                        if token.finish is not None:
                            engine.apply(Close(sequence_id=number))
                            if waiting:
                                send()
                    case Failed(error=error):
                        raise error
                    case _:
                        pass
                events.remove(event)
        answers = [Answer(first_s=each[0], last_s=each[-1], num_tokens=len(each)) for each in times.values()]
        return summarise(answers, time.perf_counter() - begun_s)

    def _engine(self) -> Engine:
        """Return a new engine on the same machine: nothing is cached from the last run."""
        return build_engine(self._config, self._machine, lambda _: None)

    def _spec(self, ask: Ask, number: SequenceId) -> SequenceSpec:
        return SequenceSpec(
            sequence_id=number,
            model=self._config.served_name,
            prompt=tuple(ask.prompt),
            sampling=SamplingParams(temperature=0.0, max_tokens=ask.num_tokens, ignore_eos=True),
            deadline_unix_ms=int(time.time() * 1000) + 60 * MINUTE_MS,
        )


class Way:
    """One way to answer a workload, and what it took each time."""

    def __init__(self, workload: Workload, drive_all: Callable[[list[Ask], int], Figures]) -> None:
        self._workload = workload
        self._drive_all = drive_all
        self.found: list[Figures] = []

    def __call__(self, seed: int) -> float:
        """Run the workload once and return its figure."""
        self.found.append(self._drive_all(self._workload.asks(seed), self._workload.users))
        return float(getattr(self.found[-1], self._workload.figure))


def bench(pairs: int, seed: int, dtype: str, threads: int, results: Path | None) -> None:
    """Print a ratio per workload: time per token of one stream, seconds per token of a crowd."""
    bare = BareEngine(dtype, threads)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cluster = stack.enter_context(LocalCluster(folder, dtype=dtype, settings=(f"worker.threads={threads}",)))
        model = str(httpx.get(f"{cluster.http}/v1/models", trust_env=False).json()["data"][0]["id"])

        def over_http(asks: list[Ask], users: int) -> Figures:
            return asyncio.run(drive(cluster.http, model, asks, users))

        for workload in (WORKLOADS[name] for name in WORK):
            ways = {"bare engine": Way(workload, bare.drive), "headrace over HTTP": Way(workload, over_http)}
            for way in ways.values():
                way(seed - 1)
            baseline, candidate = ways.items()
            name = f"{workload.name} {workload.figure}, {dtype}, {threads or 'all'} threads"
            report(compare(name, baseline=baseline, candidate=candidate, pairs=pairs, seed=seed), results)
            for way_name, way in ways.items():
                first_s = statistics.median(run.ttft_p50_s for run in way.found[1:])
                print(f"  {way_name}: first token p50 {first_s:.3f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="0 takes all cores")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    bench(options.pairs, options.seed, options.dtype, options.threads, options.results)
