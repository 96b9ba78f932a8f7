"""Statistics of runs: interquartile means, bootstrap intervals, probability of improvement.

After "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (arXiv 2108.13264).
Samples come as *strata*: the returns of one method at one oversight level are a stratum, which is
resampled on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def interquartile_mean(strata: Sequence[ArrayLike]) -> Estimate:
    """IQM of each stratum, averaged over strata, with a stratified bootstrap interval.

    Args:
        strata: at least one, of at least one sample each.
    """
    return _bootstrap(
        [np.asarray(stratum, dtype=float) for stratum in strata],
        lambda parts: np.asarray(np.mean([iqm(part) for part in parts], axis=0)),
    )


def probability_of_improvement(ours: Sequence[ArrayLike], theirs: Sequence[ArrayLike]) -> float:
    """Chance that a run of ours beats one of theirs, a tie counting half, averaged over strata.

    Args:
        ours: strata of at least one sample each.
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


def _bootstrap(
    strata: Sequence[Samples], statistic: Callable[[Sequence[Samples]], Samples]
) -> Estimate:
    """Percentile bootstrap of a statistic of strata, each resampled on its own.

    The stream of random numbers is fixed: the same samples give the same interval.
    """
    value = float(statistic(strata))
    if max(len(stratum) for stratum in strata) < 2:
        return Estimate(value, np.nan, np.nan)
    generator = np.random.default_rng(0)
    resampled = [
        stratum[generator.integers(len(stratum), size=(RESAMPLES, len(stratum)))]
        for stratum in strata
    ]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(statistic(resampled), [tail, 1 - tail])
    return Estimate(value, float(low), float(high))
