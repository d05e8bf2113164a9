"""From which length on a fetch is worth it: what cost model and meter predict, over what is measured.

The lane to the store is slowed by pauses, a latency and a time per byte, chosen by the measured cost of steps so that
fetching and computing should meet at `--target` tokens. Three real workers of the bundled model:

- one without tiers and one that fetches whatever it can: where their first tokens take the same, by a straight line
  through the logarithms over some lengths, is the *measured* break-even;
- one as it is, which has learnt the lane by a few fetches of other lengths: by bisection, the shortest prompt that it
  fetches is the *predicted* break-even.

`cost model alone` is where the line of the pauses, rather than what the meter learnt, meets the cost model. Steps are
measured when workers start: `computed / cost model` says whether the machine is still as fast, and is near 1 if it is.

Where steps of many rows are computed another way, time does not grow steadily with the length, and no one line meets
all lengths. `fetch / compute at 1.15 of predicted` holds there too: below 1 a hit wins 15 % above what is predicted.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from feeder import Feeder
from harness import Ratio, compare, report
from measure import fresh_tokens
from stage import PACED, Stage, Worker

from headrace.core.bandwidth import LaneSpeed
from headrace.core.cost import CostModel

STORE_BYTES = 2 << 30
WORKER_BYTES = 256 << 20
CHUNK_TOKENS = 512
"""Of a worker's steps by default."""
LEARNT = (3.0, 1.5, 2.0, 1.2)
MEASURED = (0.5, 0.7, 1.0, 1.4, 2.0)
"""Lengths in times of the target."""
WIDEST, NUM_HALVINGS = 3.0, 6
"""The bisection looks between a third and three times the target, down to 4 % of a length."""
BEYOND, NUM_BEYOND = 1.15, 3
PER_BYTE = 0.4
"""Share of the time per byte in a fetch of the target's length; the rest is latency."""


def lane_for(cost: CostModel, target: int, token_bytes: int) -> LaneSpeed:
    """Return a lane over which fetching a prompt but for its last block takes as long as computing it."""
    gained_s = _compute_s(cost, target) - cost.prefill(16, target - 16)
    return LaneSpeed(latency_s=(1 - PER_BYTE) * gained_s, byte_s=PER_BYTE * gained_s / (target * token_bytes))


def break_even(is_worth_it: Callable[[int], bool], target: int) -> float:
    """Return the shortest length that is worth it, if all longer ones are too."""
    low, high = target / WIDEST, target * WIDEST
    for _ in range(NUM_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if is_worth_it(int(middle)) else (middle, high)
    return float((low * high) ** 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """Who plays."""

    none: Worker
    eager: Worker
    planner: Worker


class Bench:
    """Both break-evens.

    Args:
        stage: Where the processes run.
        target: Tokens at which they should lie.
    """

    def __init__(self, stage: Stage, target: int) -> None:
        self._target = target
        self._store = stage.store("store", {"memory_bytes": STORE_BYTES})
        settings = {"cache_dir": stage.folder / "cache", "kv_memory_bytes": WORKER_BYTES, "store_blocks": "false"}
        none = stage.worker("none", (), settings)
        self.cost = none.cost()
        if not self.cost.is_sound:
            raise SystemExit(
                "the machine is too noisy: a worker found no sound cost of its steps, so it fetches anything"
            )
        token_bytes = none.layout.block_bytes // none.layout.block_tokens
        self.lane = lane_for(self.cost, target, token_bytes)
        program = (str(PACED), str(self.lane.latency_s), str(self.lane.byte_s))
        self._cast = Cast(
            none=none,
            eager=stage.worker("eager", (self._store,), settings | {"calibrate_s": 0}, program=program),
            planner=stage.worker("planner", (self._store,), settings, program=program),
        )
        self._feeder = stage.enter_context(Feeder(none, "bench-feeder"))
        self.alone = break_even(
            lambda length: (
                self.lane.seconds(length * token_bytes) + self.cost.prefill(16, length - 16)
                < _compute_s(self.cost, length)
            ),
            target,
        )
        self.work: dict[str, float] = {}
        self._beyond: list[float] = []

    def measured(self, seed: int) -> float:
        """Return the length at which a worker that fetches is as fast as one that computes."""
        lengths = [int(self._target * times) for times in MEASURED]
        fetched: list[float] = []
        computed: list[float] = []
        for number, length in enumerate(lengths):
            prompt = fresh_tokens(100 * seed + number, length)
            if (seed + number) % 2:
                computed.append(self._cast.none.ask(prompt).seconds)
                fetched.append(self._fetch(self._cast.eager, prompt)[0])
            else:
                fetched.append(self._fetch(self._cast.eager, prompt)[0])
                computed.append(self._cast.none.ask(prompt).seconds)
        predicted = [_compute_s(self.cost, length) for length in lengths]
        self.work["computed / cost model"] = round(float(np.median(np.divide(computed, predicted))), 3)
        slope, level = np.polyfit(np.log(lengths), np.log(np.array(fetched) / np.array(computed)), 1)
        for length, slow_s, fast_s in zip(lengths, computed, fetched, strict=True):
            self.work[f"fetch / compute at {length}"] = round(fast_s / slow_s, 3)
        return float(np.exp(-level / slope))

    def predicted(self, seed: int) -> float:
        """Return the shortest length that a worker fetches after a few other fetches."""
        for number, times in enumerate(LEARNT):
            self._fetch(self._cast.planner, fresh_tokens(10_000 + 100 * seed + number, int(self._target * times)))

        def is_fetched(length: int) -> bool:
            return self._fetch(self._cast.planner, fresh_tokens(100_000 * seed + length, length))[1] > 0

        found = break_even(is_fetched, self._target)
        self._beyond.append(self._ratio_at(int(BEYOND * found), 1_000_000 * seed))
        for name, figure in (("", statistics.median), (", least", min), (", most", max)):
            self.work[f"fetch / compute at {BEYOND} of predicted{name}"] = round(figure(self._beyond), 3)
        return found

    def _ratio_at(self, length: int, seed: int) -> float:
        """Return the time of fetching a prompt over that of computing it, by medians of a few."""
        prompts = [fresh_tokens(seed + number, length) for number in range(NUM_BEYOND)]
        fetched = [self._fetch(self._cast.eager, prompt)[0] for prompt in prompts]
        return statistics.median(fetched) / statistics.median(self._cast.none.ask(prompt).seconds for prompt in prompts)

    def _fetch(self, worker: Worker, prompt: list[int]) -> tuple[float, int]:
        """Return the seconds to the first token of a prompt that the store holds, and its fetched tokens."""
        answer = self._feeder.hit(worker, self._store, prompt, len(prompt) - 1)
        return answer.seconds, answer.num_cached


def _compute_s(cost: CostModel, num_tokens: int) -> float:
    return cost.prefill(num_tokens, chunk_tokens=CHUNK_TOKENS)


def bench(target: int, pairs: int, seed: int) -> Ratio:
    """Compare predicted and measured break-evens."""
    with tempfile.TemporaryDirectory() as folder, Stage(Path(folder)) as stage:
        run = Bench(stage, target)
        print(f"steps cost {run.cost}", file=sys.stderr)
        rate = 1e-6 / run.lane.byte_s
        return compare(
            f"break-even length over a lane of {run.lane.latency_s:.2f} s and {rate:.0f} MB/s",
            baseline=("measured", run.measured),
            candidate=("predicted", run.predicted),
            pairs=pairs,
            seed=seed,
            unit="tokens",
            work=lambda: {"cost model alone": round(run.alone)} | run.work,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", type=int, nargs="*", default=(384, 768))
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    for tokens in options.targets:
        report(bench(tokens, options.pairs, options.seed), options.results)
