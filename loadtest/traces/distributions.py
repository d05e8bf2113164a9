"""Distributions that traces are drawn from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.645
"""Standard deviations above the mean that 95 % of a normal distribution are below."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogNormal:
    """Values whose logarithm is normally distributed: positive, with a heavy tail.

    Attributes:
        median: Half of the values are below.
        sigma: Standard deviation of the logarithm; 0 makes all values the median.
    """

    median: float
    sigma: float

    @property
    def mean(self) -> float:
        """Mean of the values."""
        return self.median * math.exp(self.sigma**2 / 2)

    @property
    def p95(self) -> float:
        """95 % of the values are below."""
        return self.median * math.exp(Z95 * self.sigma)

    def draw(self, random: np.random.Generator) -> float:
        """Return a value."""
        return float(self.median * np.exp(self.sigma * random.standard_normal()))


def arrivals(random: np.random.Generator, number: int, per_s: float) -> list[float]:
    """Return the times in seconds of a Poisson process's first events.

    Raises:
        ValueError: the rate is not positive.
    """
    if per_s <= 0:
        raise ValueError(f"a rate of arrivals must be above 0, found {per_s}")
    return [float(at_s) for at_s in np.cumsum(random.exponential(1 / per_s, number))]


def mean_and_percentiles(name: str, values: Sequence[float], percents: Sequence[int]) -> dict[str, float]:
    """Return the mean of values by a name and their percentiles by "name p50" and so on; NaN without values."""
    found = {name: float(np.mean(values)) if values else math.nan}
    for percent in percents:
        found[f"{name} p{percent}"] = float(np.percentile(values, percent)) if values else math.nan
    return found
