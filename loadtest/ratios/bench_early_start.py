"""Start a prompt with the first layers of its fetched blocks, against starting it when all of them have landed."""

import argparse
import contextlib
import tempfile
from pathlib import Path

from bench_kvstore_hit import OWN_TOKENS, WORKER, Bench, settings_for
from harness import Ratio, compare, report

from headrace.testing.cluster import LocalCluster

PREFIXES = (512, 2048, 4096)


def bench(num_prefix: int, lane: str, pairs: int, seed: int) -> Ratio:
    """Compare both ways for one length, in two clusters side by side of which one is idle at a time."""
    env = {"UCX_TLS": lane} if lane else {}
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
            f"first token after {num_prefix} fetched and {OWN_TOKENS} own tokens, lane {lane or 'default'}",
            baseline=("whole blocks", runs[0].hit),
            candidate=("layer by layer", runs[1].hit),
            pairs=pairs,
            seed=seed,
            work=lambda: runs[1].work,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prefixes", type=int, nargs="*", default=PREFIXES)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    for length in options.prefixes:
        for name in ("", "tcp"):
            report(bench(length, name, options.pairs, options.seed), options.results)
