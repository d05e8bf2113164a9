"""Several ways to do one thing, timed in rounds."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness import Ratio, compare, record
from rates import Rates

FIGURE_S = 0.005
"""Calls that take less are repeated until a figure takes as long."""
LEAST_OF = 3
LONG_S = 0.1
"""Of calls that take longer a single one is a figure."""
PAUSE_S = 0.002
"""Before each figure: the threads of torch spin for about as long after their last call."""

Calls = Callable[[int], None]
"""Does the thing that many times."""


def seconds_of(calls: Callable[[int], object], count: int) -> float:
    """Return how long one of `count` calls takes."""
    begun_s = time.perf_counter()
    calls(count)
    return (time.perf_counter() - begun_s) / count


def time_rounds(ways: Mapping[str, Calls], num_rounds: int) -> dict[str, list[float]]:
    """Run all ways once a round, every second round backwards, and return the seconds per call of each round."""
    counts: dict[str, int] = {}
    for name, calls in ways.items():
        calls(1)
        counts[name] = max(1, int(FIGURE_S / seconds_of(calls, 1)))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(num_rounds):
        for name in list(ways) if turn % 2 == 0 else reversed(list(ways)):
            time.sleep(PAUSE_S)
            figures = [seconds_of(ways[name], counts[name])]
            while len(figures) < LEAST_OF and figures[0] < LONG_S:
                figures.append(seconds_of(ways[name], counts[name]))
            times[name].append(min(figures))
    return times


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Prints one line per kernel: its time, its distance from the floor, and its ratios to the baselines."""

    num_rounds: int
    seed: int
    rates: Rates
    results: Path | None

    def run(self, what: str, kernels: Mapping[str, tuple[Calls, dict[str, float]]], peers: Mapping[str, Calls]) -> None:
        """Time kernels and baselines in the same rounds.

        Args:
            what: What all of them compute.
            kernels: By name, each with the `flops` and `bytes` of one call.
            peers: The baselines by name.
        """
        times = time_rounds({**{name: calls for name, (calls, _) in kernels.items()}, **peers}, self.num_rounds)
        for name, (_, work) in kernels.items():
            ratios = [self._ratio(what, times, name, peer, work) for peer in peers]
            for ratio in ratios:
                if self.results is not None:
                    record(ratio, self.results)
            took_s = ratios[0].candidate
            floor_s = self.rates.floor_s(work["bytes"], work["flops"])
            print(
                f"{what:34} {name:12} {took_s * 1e6:10.1f} us {work['flops'] / took_s / 1e9:7.1f} GFLOP/s "
                f"{work['bytes'] / took_s / 1e9:6.1f} GB/s {took_s / floor_s:7.2f}x floor "
                + "".join(
                    f"  /{each.baseline_name} {each.ratio:.3f} [{each.low:.3f}, {each.high:.3f}]" for each in ratios
                ),
                flush=True,
            )

    def _ratio(
        self, what: str, times: Mapping[str, list[float]], name: str, peer: str, work: dict[str, float]
    ) -> Ratio:
        def figure(way: str, seed: int) -> float:
            return times[way][seed - self.seed]

        return compare(
            what,
            baseline=(peer, partial(figure, peer)),
            candidate=(name, partial(figure, name)),
            pairs=self.num_rounds,
            seed=self.seed,
            work=lambda: {**work, "floor_s": self.rates.floor_s(work["bytes"], work["flops"])},
        )
