"""How often intervals of few seeds hold the truth, and how often equal methods are ranked.

`python benchmarks/intervals.py` prints two tables, in a minute or two. docs/statistics.md has them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import tyro
from scipy import stats

from oversight_rl.reports.statistics import Samples, interquartile_mean, iqm, p_value
from oversight_rl.reports.verdict import LOSS, SIGNIFICANT, compare

Bounds = tuple[Samples, Samples]


def failing(share: float) -> Callable[[np.random.Generator, tuple[int, ...]], Samples]:
    """Returns of which a share are failures, far below the others."""

    def draw(rng: np.random.Generator, size: tuple[int, ...]) -> Samples:
        good, bad = rng.normal(0.8, 0.02, size), rng.normal(0.0, 0.1, size)
        return np.where(rng.random(size) < share, bad, good)

    return draw


RETURNS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Samples]] = {
    "normal": lambda rng, size: rng.normal(size=size),
    "uniform": lambda rng, size: rng.uniform(size=size),
    "skewed (exponential)": lambda rng, size: -rng.exponential(size=size),
    "more skewed (log-normal)": lambda rng, size: -rng.lognormal(size=size),
    "1 in 10 fails": failing(0.1),
    "1 in 5 fails": failing(0.2),
    "3 in 10 fail": failing(0.3),
}


def of_ranks(samples: Samples) -> Bounds:
    """What reports show."""
    found = [interquartile_mean(row) for row in samples]
    return np.array([e.low for e in found]), np.array([e.high for e in found])


def bootstrap(samples: Samples) -> Bounds:
    """Percentile bootstrap of the IQM (arXiv 2108.13264)."""
    rng, n = np.random.default_rng(0), samples.shape[-1]
    means = np.array([iqm(samples[:, rng.integers(n, size=n)]) for _ in range(1000)])
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return low, high


def around(middle: Samples, error: Samples, freedom: int) -> Bounds:
    """Student's interval."""
    reach = stats.t.ppf(0.975, freedom) * error
    return middle - reach, middle + reach


def trimmed(samples: Samples) -> Bounds:
    """Tukey and McLaughlin's, of the trimmed mean with the Winsorized variance."""
    n = samples.shape[-1]
    cut = n // 4
    kept, ranked = n - 2 * cut, np.sort(samples)
    pulled = np.clip(ranked, ranked[:, [cut]], ranked[:, [n - 1 - cut]])
    return around(iqm(samples), pulled.std(-1, ddof=1) * n**0.5 / kept, kept - 1)


def student(samples: Samples) -> Bounds:
    """Student's around the IQM, with the error of the mean."""
    n = samples.shape[-1]
    return around(iqm(samples), samples.std(-1, ddof=1) / n**0.5, n - 1)


CANDIDATES = (of_ranks, bootstrap, trimmed, student)


def main(trials: int = 4000, families: int = 300) -> None:
    """Simulate.

    Args:
        trials: Sets of seeds for each kind of returns.
        families: Sets of equal methods.
    """
    rng = np.random.default_rng(0)
    print("holds the IQM of all runs (median width)", *(c.__name__ for c in CANDIDATES), sep=" | ")
    for name, draw in RETURNS.items():
        truth = iqm(draw(rng, (2_000_000,)))
        for n in (5, 8, 10):
            samples = draw(rng, (trials, n))
            cells = []
            for candidate in CANDIDATES:
                low, high = candidate(samples)
                held = ((low <= truth) & (truth <= high)).mean()
                cells.append(f"{held:.3f} ({np.median(high - low):.2f})")
            print(f"{name}, {n} seeds", *cells, sep=" | ", flush=True)
    print("\nequal methods, seeds | ranked | if pairs with the best were counted | if none were")
    for methods, seeds in ((3, 5), (3, 8), (5, 8), (8, 8), (8, 10)):
        drawn = rng.normal(size=(families, methods, seeds))
        claims = np.mean([LOSS in compare(dict(enumerate(x))).outcomes.values() for x in drawn])
        least = np.array([_least(x) for x in drawn])
        counted = [np.mean(least * tests <= SIGNIFICANT) for tests in (methods - 1, 1)]
        shares = (f"{share:.3f}" for share in (claims, *counted))
        print(f"{methods}, {seeds}", *shares, sep=" | ", flush=True)


def _least(samples: Samples) -> float:
    """Smallest p-value of the best against the others."""
    best = int(iqm(samples).argmax())
    return min(p_value(samples[a], samples[b]) for a, b in combinations(range(len(samples)), 2)
               if best in (a, b))  # fmt: skip


if __name__ == "__main__":
    tyro.cli(main)
