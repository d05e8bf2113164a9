"""Pairs of runs, alternating, and the ratio they give: every benchmark of headrace prints through this."""

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Outcome of a benchmark: candidate over baseline, below 1 is faster when seconds are compared.

    Attributes:
        name: What was compared.
        unit: Unit of the two medians.
        ratio: Median of the pairs' ratios.
        low: Smallest ratio of a pair.
        high: Largest.
        baseline: Median of the baseline's figures.
        candidate: Median of the candidate's.
        work: Counts that do not depend on the machine, for CI (tokens computed, bytes moved).
    """

    name: str
    unit: str
    baseline_name: str
    candidate_name: str
    ratio: float
    low: float
    high: float
    baseline: float
    candidate: float
    pairs: int
    seed: int
    machine: str
    commit: str
    date: str
    work: dict[str, float]


def compare(  # noqa: PLR0913 a pair and how it is run
    name: str,
    *,
    baseline: tuple[str, Callable[[int], float]],
    candidate: tuple[str, Callable[[int], float]],
    pairs: int,
    seed: int,
    unit: str = "s",
    work: Callable[[], dict[str, float]] = dict,
) -> Ratio:
    """Run baseline and candidate `pairs` times, alternating which goes first.

    Args:
        name: What is compared.
        baseline: Its name and a function from the pair's seed to a figure.
        candidate: Likewise.
        pairs: Number of pairs.
        seed: Seed of the first pair; the next ones count up.
        unit: Of the figures.
        work: Read once at the end.
    """
    figures: list[tuple[float, float]] = []
    for pair in range(pairs):
        pair_seed = seed + pair
        if pair % 2 == 0:
            first = baseline[1](pair_seed)
            figures.append((first, candidate[1](pair_seed)))
        else:
            second = candidate[1](pair_seed)
            figures.append((baseline[1](pair_seed), second))
    ratios = [candidate_figure / baseline_figure for baseline_figure, candidate_figure in figures]
    return Ratio(
        name=name,
        unit=unit,
        baseline_name=baseline[0],
        candidate_name=candidate[0],
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        baseline=statistics.median(figure for figure, _ in figures),
        candidate=statistics.median(figure for _, figure in figures),
        pairs=pairs,
        seed=seed,
        machine=machine(),
        commit=commit(),
        date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        work=work(),
    )


def report(ratio: Ratio, results: Path | None = None) -> None:
    """Print a ratio and, if asked, append it as a JSON line to a file."""
    print(
        f"{ratio.name}: {ratio.candidate_name} / {ratio.baseline_name} = {ratio.ratio:.3f} "
        f"[{ratio.low:.3f}, {ratio.high:.3f}] over {ratio.pairs} pairs "
        f"({ratio.candidate:.4g} / {ratio.baseline:.4g} {ratio.unit}); seed {ratio.seed}; "
        f"{ratio.machine}; commit {ratio.commit}; {ratio.date}; work {ratio.work}"
    )
    if results is not None:
        record(ratio, results)


def record(ratio: Ratio, results: Path) -> None:
    """Append a ratio as a JSON line to a file."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(asdict(ratio)) + "\n")


def machine() -> str:
    """Return the processor's name and the number of cores."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def commit() -> str:
    """Return the short commit, with a plus when the tree differs from it."""
    answer = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"
