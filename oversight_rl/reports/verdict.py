"""The verdict of a report: who wins, what more assumptions buy, where it flips; and a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import pandas as pd

from oversight_rl.reports.gather import ALONE, Found, listed, percent
from oversight_rl.reports.statistics import (
    Samples,
    holm,
    iqm,
    p_value,
    probability_of_improvement,
    smallest_p_value,
)
from oversight_rl.terminal import fixed

WIN, TIE, LOSS, FEW, SOLE = "win", "tie", "loss", "too few", "sole"
SIGNIFICANT = 0.05
NAMED = 3  # methods at most in a list of them
MANY = 3  # neighboring levels that are told together
HARDLY = 0.005  # a loss that is not seen in two digits


@dataclass(frozen=True)
class Standing:
    """How methods of one class stand at a level."""

    best: str
    """The method of the highest IQM."""
    score: float
    """Its IQM."""
    outcomes: dict[str, str]
    """WIN: it beats all others; LOSS: the best beats it; TIE: neither; FEW: it has too few seeds
    for any claim; SOLE: there is no other."""


@dataclass(frozen=True)
class Verdict:
    """Three lines, and a grid of outcomes as text: method, assumes, a column for each level."""

    lines: list[str]
    grid: pd.DataFrame


def compare(samples: Mapping[str, Samples]) -> Standing:
    """Methods of a class at a level, each with at least one sample, against the best of them.

    Mann-Whitney tests with Holm's correction for all pairs: which method is the best says the same
    data, and counting only the pairs with it would err too often (`benchmarks/intervals.py`).
    """
    best = max(samples, key=lambda name: float(iqm(samples[name])))
    pairs = list(combinations(samples, 2))
    corrected = holm([p_value(samples[a], samples[b]) for a, b in pairs])
    told = {pair for pair, p in zip(pairs, corrected, strict=True) if p <= SIGNIFICANT}
    outcomes = {}
    for name, theirs in samples.items():
        if name == best:
            continue
        ours = samples[best]
        apart = (name, best) in told or (best, name) in told
        possible = smallest_p_value(len(ours), len(theirs)) * len(pairs) <= SIGNIFICANT
        if apart and probability_of_improvement([ours], [theirs]) > 0.5:
            outcomes[name] = LOSS
        else:
            outcomes[name] = TIE if possible else FEW
    others = set(outcomes.values())
    if len(others) > 1:
        outcomes[best] = TIE
    else:  # all others alike, if there are any
        outcomes[best] = {LOSS: WIN, TIE: TIE, FEW: FEW}[others.pop()] if others else SOLE
    return Standing(best, float(iqm(samples[best])), outcomes)


def verdict(found: Found) -> Verdict:
    """Compare the methods of each class of assumptions at each level."""
    standings: dict[str, dict[float, Standing]] = {}
    for assumed, names in found.classes.items():
        for level in found.levels:
            samples = {name: found.samples(name, level) for name in names}
            known = {name: values for name, values in samples.items() if len(values)}
            if known:
                standings.setdefault(assumed, {})[level] = compare(known)
    grid = [
        {"method": name, "assumes": assumed}
        | {
            percent(level): at[level].outcomes.get(name, "") if level in at else ""
            for level in found.levels
        }
        for assumed, at in standings.items()
        for name in found.classes[assumed]
    ]
    alone, more = standings.get(ALONE), {k: v for k, v in standings.items() if k != ALONE}
    first = "No method here makes do with labels alone."
    if alone:
        first = f"With labels alone, by IQM of the {found.score}: {_winners(alone)}."
    second = "; ".join(f"{assumed}, {_winners(at, alone)}" for assumed, at in more.items())
    flips = [
        _flips(assumed, at) for assumed, at in standings.items() if len(found.classes[assumed]) > 1
    ]
    return Verdict(
        [
            first,
            f"With more: {second}." if second else "No method here assumes more.",
            f"Where it flips: {'; '.join(flips) or 'there is nothing to compare'}.",
        ],
        pd.DataFrame(grid),
    )


def _winners(
    standings: Mapping[float, Standing], fewer: Mapping[float, Standing] | None = None
) -> str:
    """Who is best at which levels, and (+) how far above the best of those who assume less."""
    gains = {
        level: at.score - fewer[level].score
        for level, at in standings.items()
        if fewer and level in fewer
    }
    groups: dict[str, list[list[float]]] = {}  # by who leads, neighboring levels together
    before = None
    for level, at in standings.items():
        leader = _leader(at)
        alike = leader, level in gains, gains.get(level, 0.0) < -HARDLY
        if alike != before:
            groups.setdefault(leader, []).append([])
        groups[leader][-1].append(level)
        before = alike

    def told(levels: Sequence[float]) -> str:
        numbers = _range([standings[level].score for level in levels], ".2f")
        if levels[0] in gains:
            numbers += f", {_range([gains[level] for level in levels], '+.2f')}"
        where = [percent(level) for level in levels]
        return f"{' to '.join([where[0], *where[1:][-1:]])} ({numbers})"

    found = []
    for leader, neighbors in groups.items():
        parts = [
            part
            for levels in neighbors
            for part in ([levels] if len(levels) >= MANY else [[level] for level in levels])
        ]
        found.append(f"{leader} at {listed([told(levels) for levels in parts])}")
    return "; ".join(found)


def _range(numbers: Sequence[float], spec: str) -> str:
    """The lowest and the highest of numbers, or the one there is."""
    ends = dict.fromkeys(fixed(end, spec) for end in (min(numbers), max(numbers)))
    return " to ".join(ends)


def _leader(standing: Standing) -> str:
    best, outcomes = standing.best, standing.outcomes
    if outcomes[best] == TIE:
        rivals = [name for name in outcomes if name != best and outcomes[name] != LOSS]
        return f"{best} leads, not told apart from {_some(rivals)},"
    return {
        WIN: f"{best} wins",
        FEW: f"too few seeds to rank, {best} leads",
        SOLE: f"{best} has no rival",
    }[outcomes[best]]


def _flips(assumed: str, standings: Mapping[float, Standing]) -> str:
    """Between which levels no method is left that none had beaten since the last flip."""
    where = "with labels alone" if assumed == ALONE else f"with {assumed}"
    names = dict.fromkeys(name for at in standings.values() for name in at.outcomes)
    unbeaten, before, flips = list(names), "", []
    for level, at in standings.items():
        left = [name for name in unbeaten if at.outcomes.get(name) != LOSS]
        if not left:
            left = [name for name, outcome in at.outcomes.items() if outcome != LOSS]
            change = f"from {_some(unbeaten)} to {_some(left)}"
            flips.append(f"{change} between {before} and {percent(level)}")
        unbeaten, before = left, percent(level)
    if flips:
        return f"{where} {listed(flips)}"
    if len(unbeaten) == len(names):
        few = all(FEW in at.outcomes.values() for at in standings.values())
        return f"{where} nothing is told apart" + (", for want of seeds" if few else "")
    return f"{where} nowhere (never beaten: {_some(unbeaten)})"


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return listed([*names[:NAMED], f"{more} more"] if more > 0 else names)
