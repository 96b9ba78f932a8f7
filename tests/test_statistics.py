"""Statistics against scipy, known answers, coverage and false claims by simulation."""

from itertools import pairwise, permutations

import numpy as np
import pytest
from scipy import stats

from oversight_rl.reports.statistics import (
    holm,
    interquartile_mean,
    iqm,
    p_value,
    probability_of_improvement,
    smallest_p_value,
)
from oversight_rl.reports.verdict import compare


def test_iqm_is_the_mean_of_the_middle_half():
    assert iqm([0, 1, 2, 100]) == pytest.approx(1.5)
    assert iqm([5.0]) == 5.0
    rng = np.random.default_rng(0)
    for n in (4, 8, 40):  # where a quarter is a whole number, quartiles say the same
        x = rng.normal(size=n)
        inner = np.sort(x)[n // 4 : n - n // 4]
        assert iqm(x) == pytest.approx(inner.mean())
        assert iqm(x) == pytest.approx(stats.trim_mean(x, 0.25))


def failing(share):
    """Returns of which a share are failures, far below the others."""

    def draw(rng, size):
        good = rng.normal(0.8, 0.02, size)
        return np.where(rng.random(size) < share, rng.normal(0.0, 0.1, size), good)

    return draw


RETURNS = {
    "normal": lambda rng, size: rng.normal(size=size),
    "skewed": lambda rng, size: 1 - rng.exponential(size=size),
    "more skewed": lambda rng, size: 1 - rng.lognormal(size=size),
    "one in ten fails": failing(0.1),
    "one in five fails": failing(0.2),
}


def coverage(draw, n, trials=3000):
    """How often intervals of n samples hold the IQM of all that could be drawn."""
    rng = np.random.default_rng(2)
    truth = iqm(draw(rng, 1_000_000))
    found = [interquartile_mean(samples) for samples in draw(rng, (trials, n))]
    return np.mean([estimate.low <= truth <= estimate.high for estimate in found])


@pytest.mark.parametrize("n", [5, 8, 10])
@pytest.mark.parametrize("returns", RETURNS)
def test_the_interval_holds_the_truth(returns, n):
    assert 0.93 <= coverage(RETURNS[returns], n) <= 0.97


def test_no_interval_holds_where_a_third_of_the_runs_fails():
    """So the report shows their range and every seed, and says so."""
    assert coverage(failing(1 / 3), 5) < 0.9


def test_the_interval_is_between_ranks():
    """Known coverage of order statistics (binomial tables), and what lies between them."""
    five = interquartile_mean([5, 1, 2, 8, 3])
    assert (five.low, five.high) == (1, 8)
    eight = interquartile_mean(np.arange(8))  # ranks 1 and 2 have 254 / 256 and 238 / 256
    excess = (254 - 0.95 * 256) / 16
    assert eight.low == pytest.approx(7 * excess / (1 + 6 * excess))
    assert eight.high == pytest.approx(7 - eight.low)
    widths = [np.subtract(e.high, e.low) for e in map(interquartile_mean, (
        stats.norm.ppf((np.arange(n) + 0.5) / n) for n in (8, 20, 80, 320)
    ))]  # fmt: skip
    for wider, narrower in pairwise(widths):
        assert narrower < 0.75 * wider


@pytest.mark.parametrize("n", [2, 3, 4])
def test_few_samples_have_no_interval(n):
    assert np.isnan([interquartile_mean(range(n)).low, interquartile_mean(range(n)).high]).all()


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


def test_p_values_are_those_of_all_ways_to_part_the_samples():
    ours, theirs = [0.1, 0.5, 0.9, 0.95], [0.2, 0.3, 0.4, 0.45, 0.6]
    pool = np.array(ours + theirs)
    shares = {tuple(sorted(order[:4])) for order in permutations(range(9), 4)}

    def gap(ours):
        rest = [i for i in range(9) if i not in ours]
        return abs(probability_of_improvement([pool[list(ours)]], [pool[rest]]) - 0.5)

    gaps = np.array([gap(share) for share in shares])
    assert p_value(ours, theirs) == pytest.approx(np.mean(gaps >= gap(range(4)) - 1e-9))
    assert p_value(range(8), range(8, 16)) == pytest.approx(smallest_p_value(8, 8))
    assert smallest_p_value(8, 8) == pytest.approx(0.00016, abs=5e-6)
    assert smallest_p_value(5, 5) == pytest.approx(0.008, abs=1e-4)
    assert smallest_p_value(1, 1) == 1


def test_ties_and_many_samples_keep_tests_on_the_safe_side():
    rng = np.random.default_rng(4)
    rounded = rng.normal(size=(1000, 2, 8)).round()
    assert np.mean([p_value(a, b) <= 0.05 for a, b in rounded]) <= 0.05
    assert p_value(np.zeros(8), np.zeros(8)) == 1
    many = rng.normal(size=(2, 300))
    assert p_value(*many) == pytest.approx(stats.ttest_ind(*many).pvalue, abs=0.1)


def test_holms_correction():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1, 1])
    assert len(holm([])) == 0


def test_equals_are_seldom_ranked():
    """At most one family in twenty has a false claim, though the best is found in the same data."""
    drawn = np.random.default_rng(5).normal(size=(100, 8, 8))
    claims = ["loss" in compare(dict(enumerate(x))).outcomes.values() for x in drawn]
    assert np.mean(claims) <= 0.05


def test_methods_are_compared_with_the_best():
    apart = {"a": np.arange(8) + 20.0, "b": np.arange(8) + 10.0, "c": np.arange(8.0)}
    assert compare(apart).outcomes == {"a": "win", "b": "loss", "c": "loss"}
    standing = compare(apart | {"d": np.arange(8) + 19.5})
    assert (standing.best, standing.score) == ("a", pytest.approx(23.5))
    assert standing.outcomes == {"a": "tie", "b": "loss", "c": "loss", "d": "tie"}
    few = {name: samples[:3] for name, samples in apart.items()}
    assert set(compare(few).outcomes.values()) == {"too few"}
    assert compare({"a": np.ones(1)}).outcomes == {"a": "sole"}
    # four against four can tell, if there is no third: 2 / 70 is below 0.05, three times it not
    assert compare({"a": np.arange(4), "b": np.arange(4) + 9}).outcomes["a"] == "loss"
    assert compare({k: v[:4] for k, v in apart.items()}).outcomes["c"] == "too few"
