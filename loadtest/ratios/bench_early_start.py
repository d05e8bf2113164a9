"""Start a prompt with the first layers of its fetched blocks, against starting it when all of them have landed.

Lanes: the default one of this machine and tcp, in whole clusters, where copying takes cores from computing; and one
that is slowed to `--rate` by pauses, as another machine's network would be, in single processes.
"""

import argparse
import contextlib
import tempfile
from functools import partial
from pathlib import Path

from bench_kvstore_hit import BLOCK_BYTES, BLOCK_TOKENS, OWN_TOKENS, WORKER, Bench, settings_for
from feeder import Feeder
from harness import Ratio, compare, report
from measure import fresh_tokens
from stage import PACED, Stage, Worker

from headrace.testing.cluster import LocalCluster

PREFIXES = (512, 2048, 4096)
SLOW = "slow"
LANES = ("default", "tcp", SLOW)
LATENCY_S = 1e-3
STORE_BYTES = 1 << 30
NUM_PROMPTS = 3
"""For which the worker has room: after as many its pages have all been touched, which takes as long as reading them."""


def bench(num_prefix: int, lane: str, pairs: int, seed: int) -> Ratio:
    """Compare both ways for one length, in two clusters side by side of which one is idle at a time."""
    env = {"UCX_TLS": lane} if lane != "default" else {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runs = [
            Bench(
                stack.enter_context(
                    LocalCluster(
                        folder / early,
                        dtype="auto",
                        settings=(*settings_for(num_prefix), f"{WORKER}.early_start={early}"),
                        env=env,
                    )
                ),
                num_prefix,
            )
            for early in ("false", "true")
        ]
        for run in runs:
            for warm in range(3):  # Lanes are measured by the first fetches.
                run.hit(seed - 10 + warm)
        return compare(
            f"first token after {num_prefix} fetched and {OWN_TOKENS} own tokens, lane {lane}",
            baseline=("whole blocks", runs[0].hit),
            candidate=("layer by layer", runs[1].hit),
            pairs=pairs,
            seed=seed,
            work=lambda: runs[1].work,
        )


def bench_slow(num_prefix: int, bytes_per_s: float, pairs: int, seed: int) -> Ratio:
    """Compare both ways over a lane that waits instead of copying."""
    with tempfile.TemporaryDirectory() as folder, Stage(Path(folder)) as stage:
        store = stage.store("store", {"memory_bytes": STORE_BYTES})
        num_bytes = NUM_PROMPTS * (num_prefix + OWN_TOKENS + BLOCK_TOKENS) // BLOCK_TOKENS * BLOCK_BYTES
        settings = {"cache_dir": stage.folder / "cache", "kv_memory_bytes": num_bytes, "store_blocks": "false"}
        program = (str(PACED), str(LATENCY_S), str(1 / bytes_per_s))
        workers = [
            stage.worker(f"early-{early}", (store,), settings | {"early_start": early}, program=program)
            for early in ("false", "true")
        ]
        feeder = stage.enter_context(Feeder(workers[0], "bench-feeder"))
        work: dict[str, float] = {"tokens of the prompt": num_prefix + OWN_TOKENS}

        def hit(worker: Worker, number: int) -> float:
            prompt = fresh_tokens(number, num_prefix + OWN_TOKENS)
            answer = feeder.hit(worker, store, prompt, num_prefix)
            work["tokens not computed"] = answer.num_cached
            return answer.seconds

        if not all(worker.cost().is_sound for worker in workers):
            raise SystemExit("the machine is too noisy: a worker found no sound cost of its steps, so it hides nothing")
        for worker in workers:
            for warm in range(2 * NUM_PROMPTS):
                hit(worker, seed + warm)
        return compare(
            f"first token after {num_prefix} fetched and {OWN_TOKENS} own tokens, lane {bytes_per_s / 1e6:.0f} MB/s",
            baseline=("whole blocks", partial(hit, workers[0])),
            candidate=("layer by layer", partial(hit, workers[1])),
            pairs=pairs,
            seed=seed + 100,
            work=lambda: work,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prefixes", type=int, nargs="*", default=PREFIXES)
    parser.add_argument("--lanes", nargs="*", choices=LANES, default=LANES)
    parser.add_argument("--rate", type=float, default=400e6, help="bytes per second of the slow lane")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    for length in options.prefixes:
        for name in options.lanes:
            if name == SLOW:
                found = bench_slow(length, options.rate, options.pairs, options.seed)
            else:
                found = bench(length, name, options.pairs, options.seed)
            report(found, options.results)
