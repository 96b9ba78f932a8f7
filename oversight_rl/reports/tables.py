"""Tables of a report: a summary, chances of improvement; and a verdict in words."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from oversight_rl.reports.gather import Found, listed, percent
from oversight_rl.reports.statistics import differ, interquartile_mean, probability_of_improvement
from oversight_rl.runs.rows import FACTS

ALONE = "labels"  # what methods that assume no more than others say that they assume


def summary(found: Found) -> pd.DataFrame:
    """A line for each method and level: the score of the deployed policy, and more."""
    lines = []
    for name, level in itertools.product(found.names, found.levels):
        rows = found.deployed
        rows = rows[(rows["name"] == name) & (rows["level"] == level)]
        if rows.empty:
            continue
        estimate = interquartile_mean(rows[found.kind.score])
        lines.append(
            {
                "method": name,
                "assumes": getattr(found.kind.methods[found.methods[name]], "assumes", ALONE),
                "train_oversight": level,
                "n_seeds": len(rows),
                "iqm": estimate.value,
                "ci_low": estimate.low,
                "ci_high": estimate.high,
                **found.report.columns(found, rows),
                "env_steps": rows["env_steps"].mean(),
                "wall_seconds": rows["wall_seconds"].mean(),
                "evaluator": " and ".join(sorted(rows["evaluator"].unique())),
            }
        )
    return pd.DataFrame(lines)


def means(found: Found, rows: pd.DataFrame) -> dict[str, float]:
    """The mean of each figure but the score, which the summary has already."""
    known = {*FACTS, found.kind.score, "name", "level", "run"}
    return {str(column): rows[column].mean() for column in rows if column not in known}


def improvement(found: Found) -> pd.DataFrame:
    """Chance that a run of the row's method beats one of the column's, over common levels."""
    names = found.names
    table = pd.DataFrame(np.nan, index=names, columns=names)
    scores = {name: [found.samples(name, level) for level in found.levels] for name in names}
    for ours, theirs in itertools.permutations(names, 2):
        both = zip(scores[ours], scores[theirs], strict=True)
        pairs = [(a, b) for a, b in both if len(a) and len(b)]
        if pairs:
            table.loc[ours, theirs] = probability_of_improvement(*zip(*pairs, strict=True))
    return table


def verdict(found: Found, table: pd.DataFrame) -> str:
    """One plain sentence: who leads among methods that need labels alone, who beats the reference.

    A method beats another at a level where a two-sided Mann-Whitney test of their seeds has
    p < 0.05, each comparison by itself.
    """
    fair = table[table["assumes"] == ALONE]
    if fair.empty:
        return "No method here makes do with labels alone."
    leaders: dict[str, list[str]] = {}
    for level in found.levels:
        rows = fair[fair["train_oversight"] == level].nlargest(1, "iqm")
        for best in rows.to_dict("records"):
            place = f"{percent(level)} ({best['iqm']:.2f})"
            leaders.setdefault(str(best["method"]), []).append(place)
    led = "; ".join(f"{name} at {listed(levels)}" for name, levels in leaders.items())
    text = f"Of the methods that need labels alone, the best {found.score} (IQM) has {led}"
    if found.report.reference is None or found.reference is None:
        return text + "."
    assumes = dict(zip(table["method"], table["assumes"], strict=True))
    above: dict[str, list[str]] = {}
    below: dict[str, list[str]] = {}
    for name, level in itertools.product(found.names, found.levels):
        theirs, ours = found.samples(name, level), found.samples(found.reference, level)
        if name != found.reference and differ(theirs, ours):
            better = theirs.mean() > ours.mean()
            (above if better else below).setdefault(name, []).append(percent(level))

    def told(at: dict[str, list[str]], alone: bool) -> str:
        parts = [
            f"{name} at {'every level' if len(levels) == len(found.levels) else listed(levels)}"
            for name, levels in at.items()
            if (assumes[name] == ALONE) == alone
        ]
        return "; ".join(parts) or "none"

    return (
        f"{text}; of them, {found.report.reference[1]} is beaten by {told(above, True)}, and beats "
        f"{told(below, True)}; of the methods that assume more, it is beaten by "
        f"{told(above, False)}, and beats {told(below, False)}."
    )
