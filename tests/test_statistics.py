"""Statistics against scipy, known answers and coverage by simulation."""

import numpy as np
import pytest
from scipy import stats

from oversight_rl.reports.statistics import (
    differ,
    interquartile_mean,
    iqm,
    probability_of_improvement,
)


def test_iqm_is_the_mean_of_the_middle_half():
    assert iqm([0, 1, 2, 100]) == pytest.approx(1.5)
    assert iqm([5.0]) == 5.0
    rng = np.random.default_rng(0)
    for n in (4, 8, 40):  # where a quarter is a whole number, quartiles say the same
        x = rng.normal(size=n)
        inner = np.sort(x)[n // 4 : n - n // 4]
        assert iqm(x) == pytest.approx(inner.mean())
        assert iqm(x) == pytest.approx(stats.trim_mean(x, 0.25))


def test_the_interval_agrees_with_scipys_bootstrap():
    x = np.random.default_rng(1).normal(size=25)
    ours = interquartile_mean(x)
    theirs = stats.bootstrap(
        (x,), lambda x, axis: iqm(x, axis), method="percentile", n_resamples=20_000, rng=3
    ).confidence_interval
    assert ours.value == pytest.approx(stats.trim_mean(x, 0.25))
    assert ours.low == pytest.approx(theirs.low, abs=0.03)
    assert ours.high == pytest.approx(theirs.high, abs=0.03)
    assert interquartile_mean(x) == ours  # the same samples, the same interval


@pytest.mark.parametrize(("n", "least"), [(5, 0.75), (10, 0.87), (40, 0.92)])
def test_the_interval_covers_the_truth(n, least):
    """Percentile intervals of few samples are too narrow, and the report says so."""
    rng = np.random.default_rng(2)
    trials = 300
    hits = 0
    for _ in range(trials):
        found = interquartile_mean(rng.normal(loc=0.5, size=n))
        hits += found.low <= 0.5 <= found.high
    assert least <= hits / trials <= 0.99


def test_one_sample_has_no_interval():
    found = interquartile_mean([0.7])
    assert found.value == 0.7
    assert np.isnan([found.low, found.high]).all()


def test_probability_of_improvement():
    a, b = [1.0, 2.0, 3.0], [0.0, 2.0]
    u = stats.mannwhitneyu(a, b).statistic / 6  # U over pairs is the same, ties counting half
    assert probability_of_improvement([a], [b]) == pytest.approx(u)
    assert probability_of_improvement([a], [a]) == 0.5
    assert probability_of_improvement([[5, 6, 7]], [[1, 2, 3]]) == 1
    assert probability_of_improvement([[5, 6], [0, 0]], [[1, 2], [1, 1]]) == 0.5


def test_samples_are_told_apart_at_the_stated_rate():
    """One in twenty of equals at most; five seeds that do not overlap always."""
    rng = np.random.default_rng(4)
    claims = [differ(rng.normal(size=5), rng.normal(size=5)) for _ in range(1000)]
    assert 0.01 < np.mean(claims) <= 0.05
    assert differ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10])
    assert not differ([1, 2, 3], [6, 7, 8])  # three cannot tell
    assert not differ([1, 2, 3, 4, 5], [9])
    assert not differ([], [1, 2])
