"""The prefix index against the radix index of ai-dynamo-runtime: the same blocks, announced and looked up.

That one runs in an environment of its own (`loadtest/peers/install.sh` makes it); its python is given by --peer or by
HEADRACE_BENCH_DYNAMO.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import compare, report

FILL_BLOCKS = {1: 1 << 15, 8: 1 << 17, 64: 1 << 18}
"""Blocks stored in a figure, by the blocks of an event."""
MEMORY_BLOCKS = 122 * 8192
"""A million, nearly, in whole chains."""
MATCH_CALLS = {64: 2000, 8192: 200}
PEER_VARIABLE = "HEADRACE_BENCH_DYNAMO"

Ask = Callable[..., dict[str, float]]


@contextmanager
def side(python: str, name: str) -> Iterator[Ask]:
    """Start a side and yield how it is asked."""
    script = Path(__file__).with_name("index_side.py")
    child = subprocess.Popen([python, str(script), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    stdin, stdout = child.stdin, child.stdout

    def ask(**question: object) -> dict[str, float]:
        stdin.write(json.dumps(question) + "\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"the side {name} of the comparison ended with {child.wait()}")
        answer: dict[str, float] = json.loads(line)
        return answer

    try:
        yield ask
    finally:
        stdin.close()
        child.wait()


class Bench:
    """Compares two pythons, and prints and records what comes out."""

    def __init__(self, peer: str, pairs: int, seed: int, results: Path | None) -> None:
        self._pythons = {"headrace": sys.executable, "dynamo": peer}
        self._pairs = pairs
        self._seed = seed
        self._results = results

    def compare(self, name: str, unit: str, figure: Callable[[str, int], float], work: dict[str, float]) -> None:
        """Print the ratio of a figure of both sides."""
        ratio = compare(
            name,
            baseline=("ai-dynamo-runtime", lambda seed: figure("dynamo", seed)),
            candidate=("headrace", lambda seed: figure("headrace", seed)),
            pairs=self._pairs,
            seed=self._seed,
            unit=unit,
            work=lambda: work,
        )
        report(ratio, self._results)

    def fills(self) -> None:
        """Seconds of a core per block stored, from bytes."""
        for event_blocks, num_blocks in FILL_BLOCKS.items():

            def figure(name: str, seed: int, event_blocks: int = event_blocks, num_blocks: int = num_blocks) -> float:
                with side(self._pythons[name], name) as ask:
                    return ask(do="fill", seed=seed, num_blocks=num_blocks, event_blocks=event_blocks)["cpu_s"]

            what = f"core seconds to read and apply {num_blocks} blocks, {event_blocks} an event"
            self.compare(what, "s", figure, {"blocks": num_blocks})

    def memory(self) -> None:
        """Resident bytes per block."""

        def figure(name: str, seed: int) -> float:
            with side(self._pythons[name], name) as ask:
                answer = ask(do="fill", seed=seed, num_blocks=MEMORY_BLOCKS, event_blocks=64)
            return answer["resident_bytes"] / MEMORY_BLOCKS

        self.compare("resident memory", "bytes per block", figure, {"blocks": MEMORY_BLOCKS})

    def matches(self) -> None:
        """Median and 99th percentile (of wall and of processor time) of a look-up in an index of a million blocks."""
        with side(self._pythons["headrace"], "headrace") as ours, side(self._pythons["dynamo"], "dynamo") as theirs:
            asks = {"headrace": ours, "dynamo": theirs}
            for ask in asks.values():
                ask(do="fill", seed=self._seed, num_blocks=MEMORY_BLOCKS, event_blocks=64)
            for length, calls in MATCH_CALLS.items():
                # One run gives all three.
                answers: dict[tuple[str, int], dict[str, float]] = {}
                for percentile in ("p50_s", "p99_s", "p99_cpu_s"):

                    def figure(
                        name: str, seed: int, length: int = length, calls: int = calls, key: str = percentile
                    ) -> float:
                        question = {"seed": self._seed, "num_blocks": MEMORY_BLOCKS, "length": length, "calls": calls}
                        answer = answers.get((name, seed)) or asks[name](do="match", **question)  # noqa: B023 same turn
                        return answers.setdefault((name, seed), answer)[key] * 1e6  # noqa: B023 same turn

                    what = f"match of {length} blocks among a million, {percentile.removesuffix('_s')}"
                    self.compare(what, "us", figure, {"calls": calls})


def main() -> None:
    """Run all comparisons, or say why not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", default=os.environ.get(PEER_VARIABLE, ""), help="python that has ai-dynamo-runtime")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    if not arguments.peer or not Path(arguments.peer).exists():
        print(f"skipped: no python with ai-dynamo-runtime at {arguments.peer!r}; give --peer or {PEER_VARIABLE}")
        return
    bench = Bench(arguments.peer, arguments.pairs, arguments.seed, arguments.results)
    bench.fills()
    bench.memory()
    bench.matches()


if __name__ == "__main__":
    main()
