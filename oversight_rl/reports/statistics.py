"""Statistics of runs: interquartile means with intervals, tests corrected for their number.

After "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (arXiv 2108.13264), but
for the intervals: its bootstrap needs more seeds than there are. docs/statistics.md says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Samples = NDArray[np.float64]
CONFIDENCE = 0.95
FEWEST = 5  # samples with an interval: their range holds the median in 1 - 2 / 2^5 = 94% of cases
MOST_EXACT = 2500  # pairs of samples; beyond, exact tests take seconds and the normal limit serves


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95% interval, which is nan where samples are too few for one."""

    value: float
    low: float
    high: float


def iqm(samples: ArrayLike, axis: int = -1) -> Samples:
    """Interquartile mean: the mean without the lowest and the highest quarter."""
    return np.asarray(stats.trim_mean(samples, 0.25, axis=axis))


def interquartile_mean(samples: ArrayLike) -> Estimate:
    """IQM of at least one sample, with an interval between samples of low and of high rank.

    The interval is the median's, which holds for any distribution; it has the IQM as often, unless
    more than a quarter of the runs are of another kind, such as failures
    (`benchmarks/intervals.py`).

    Source: Hettmansperger and Sheather (1986), "Confidence intervals based on interpolated order
    statistics", Statistics & Probability Letters 4.
    """
    ranked = np.sort(np.asarray(samples, dtype=float))
    value, n = float(iqm(ranked)), len(ranked)
    if n < FEWEST:
        return Estimate(value, np.nan, np.nan)
    rank, ends = _rank(n), np.arange(1, n + 1)
    low, high = np.interp([rank, n + 1 - rank], ends, ranked)
    return Estimate(value, float(low), float(high))


@cache
def _rank(n: int) -> float:
    """From which rank on, between two, and up to which from above, a median's interval goes."""
    # how often the median is between the k-th lowest and the k-th highest, k = 1, 2, ...
    covers = 1 - 2 * stats.binom.cdf(np.arange((n + 1) // 2), n, 0.5)
    k = int((covers >= CONFIDENCE).sum())
    if not k:  # of five: all, at 94%
        return 1.0
    excess = (covers[k - 1] - CONFIDENCE) / (covers[k - 1] - covers[k])
    return float(k + (n - k) * excess / (k + (n - 2 * k) * excess))


def probability_of_improvement(ours: Sequence[ArrayLike], theirs: Sequence[ArrayLike]) -> float:
    """Chance that a run of ours beats one of theirs, a tie counting half, averaged over strata.

    Args:
        ours: samples of each *stratum* (an oversight level), at least one in each.
        theirs: strata in the same order.
    """
    chances = []
    for a, b in zip(ours, theirs, strict=True):
        difference = np.subtract.outer(np.asarray(a, dtype=float), np.asarray(b, dtype=float))
        chances.append(np.mean((np.sign(difference) + 1) / 2))
    return float(np.mean(chances))


def p_value(ours: ArrayLike, theirs: ArrayLike) -> float:
    """Of a two-sided Mann-Whitney test; exact for few samples, on the safe side where they tie."""
    exact = np.size(ours) * np.size(theirs) <= MOST_EXACT
    method = "exact" if exact else "asymptotic"
    return float(stats.mannwhitneyu(ours, theirs, method=method).pvalue)


def smallest_p_value(ours: int, theirs: int) -> float:
    """The least that so many samples against so many can have, where they do not overlap."""
    return 2 / math.comb(ours + theirs, ours)


def holm(p_values: Sequence[float]) -> Samples:
    """P-values of a family of tests, corrected so that all claims are right at once.

    Source: Holm (1979), "A simple sequentially rejective multiple test procedure".
    """
    values = np.asarray(p_values, dtype=float)
    order = np.argsort(values)
    corrected = np.empty_like(values)
    steps = values[order] * np.arange(len(values), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(steps))
    return corrected
