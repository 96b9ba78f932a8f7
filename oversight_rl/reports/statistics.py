"""Statistics of runs: interquartile means, bootstrap intervals, probability of improvement.

After "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (arXiv 2108.13264).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Samples = NDArray[np.float64]
RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95% interval, which is nan where there is nothing to resample."""

    value: float
    low: float
    high: float


def iqm(samples: ArrayLike, axis: int = -1) -> Samples:
    """Interquartile mean: the mean without the lowest and the highest quarter."""
    return np.asarray(stats.trim_mean(samples, 0.25, axis=axis))


def interquartile_mean(samples: ArrayLike) -> Estimate:
    """IQM of at least one sample, with a percentile bootstrap interval.

    The stream of random numbers is fixed: the same samples give the same interval.
    """
    values = np.asarray(samples, dtype=float)
    if len(values) < 2:
        return Estimate(float(iqm(values)), np.nan, np.nan)
    generator = np.random.default_rng(0)
    resampled = values[generator.integers(len(values), size=(RESAMPLES, len(values)))]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(iqm(resampled), [tail, 1 - tail])
    return Estimate(float(iqm(values)), float(low), float(high))


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


def differ(ours: ArrayLike, theirs: ArrayLike, level: float = 0.05) -> bool:
    """Whether a two-sided Mann-Whitney test tells samples apart; three against three never can."""
    if not np.size(ours) or not np.size(theirs):
        return False
    return bool(stats.mannwhitneyu(ours, theirs).pvalue < level)
