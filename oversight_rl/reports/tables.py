"""Tables of a report: a summary, and chances of improvement."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from oversight_rl.reports.gather import Found
from oversight_rl.reports.statistics import interquartile_mean, iqm, probability_of_improvement
from oversight_rl.runs.rows import FACTS


def summary(found: Found) -> pd.DataFrame:
    """A line for each method and level: the score of the deployed policy, and more."""
    lines = []
    for name, level in itertools.product(found.names, found.levels):
        rows = found.deployed
        rows = rows[(rows["name"] == name) & (rows["level"] == level)]
        if rows.empty:
            continue
        scores = rows[found.kind.score]
        estimate = interquartile_mean(scores)
        lines.append(
            {
                "method": name,
                "assumes": found.assumes(name),
                "train_oversight": level,
                "n_seeds": len(rows),
                "iqm": estimate.value,
                "ci_low": estimate.low,
                "ci_high": estimate.high,
                "lowest": scores.min(),
                "highest": scores.max(),
                **found.report.columns(found, rows),
                "env_steps": rows["env_steps"].mean(),
                "wall_seconds": rows["wall_seconds"].mean(),
                "evaluator": " and ".join(sorted(rows["evaluator"].unique())),
            }
        )
    return pd.DataFrame(lines)


def ranked(found: Found) -> dict[str, list[str]]:
    """Names of methods by what they assume, those of the highest mean IQM over levels first."""

    def mean(name: str) -> float:
        samples = (found.samples(name, level) for level in found.levels)
        return float(np.mean([iqm(values) for values in samples if len(values)]))

    return {
        assumed: sorted(names, key=mean, reverse=True) for assumed, names in found.classes.items()
    }


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
