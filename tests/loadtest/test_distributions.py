"""Distributions that traces are drawn from have the means and quantiles that they state."""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def distributions(traces):
    return traces("distributions")


def test_a_log_normal_has_its_median_mean_and_tail(distributions):
    shape = distributions.LogNormal(median=2.0, sigma=0.8)
    random = np.random.default_rng(1)
    drawn = [shape.draw(random) for _ in range(40_000)]
    assert np.median(drawn) == pytest.approx(2.0, rel=0.02)
    assert np.mean(drawn) == pytest.approx(shape.mean, rel=0.02)
    assert np.percentile(drawn, 95) == pytest.approx(shape.p95, rel=0.03)


def test_arrivals_are_a_poisson_process(distributions):
    times = distributions.arrivals(np.random.default_rng(1), 20_000, 4.0)
    gaps = np.diff(times)
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)


@pytest.mark.parametrize("per_s", [0.0, -1.0])
def test_a_rate_is_positive(distributions, per_s):
    with pytest.raises(ValueError, match="rate"):
        distributions.arrivals(np.random.default_rng(1), 1, per_s)
