"""Tables of a report: a summary, chances of improvement, a verdict."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd

from oversight_rl.agents.methods import METHODS
from oversight_rl.reports.gather import Found, listed
from oversight_rl.reports.statistics import differ, interquartile_mean, probability_of_improvement

PAPER = {"routing": "gradient_routing", "filtering": "data_filtering", "naive": "naive"}
"""Columns of the paper's figure 6a, by method."""


def strata(found: Found, name: str, column: str, levels: Sequence[float]) -> list[Any]:
    """A figure of a method's deployed policy: an array over seeds for each level."""
    rows = found.deployed
    return [
        rows[(rows["name"] == name) & (rows["level"] == level)][column].to_numpy(float)
        for level in levels
    ]


def summary(found: Found) -> pd.DataFrame:
    """A line for each method and level: the exact return of the deployed policy, and more."""
    paper = paper_figure()
    lines = []
    means = ("p_diamond", "p_ghost", "p_ghost_on_path", "p_timeout", "episode_length")
    for name, level in itertools.product(found.names, found.levels):
        rows = found.deployed
        rows = rows[(rows["name"] == name) & (rows["level"] == level)]
        if rows.empty:
            continue
        estimate = interquartile_mean(rows["ground_truth_return"])
        window = interquartile_mean(rows["window_return"])
        method = found.method(name)
        published = None  # what the paper has is of the grid, as is the window return
        if math.isfinite(window.value):
            published = paper.get(method, {}).get(round(level, 6))
        lines.append(
            {
                "method": name,
                "assumes": METHODS[method].assumes,
                "train_oversight": level,
                "n_seeds": len(rows),
                "iqm": estimate.value,
                "ci_low": estimate.low,
                "ci_high": estimate.high,
                "window_return": window.value,
                "paper_window_return": published,
                "optimal_return": rows["optimal_return"].iloc[0],
                **{column: rows[column].mean() for column in means},
                "env_steps": rows["env_steps"].mean(),
                "wall_seconds": rows["wall_seconds"].mean(),
                "evaluator": " and ".join(sorted(rows["evaluator"].unique())),
            }
        )
    return pd.DataFrame(lines)


def paper_figure() -> dict[str, dict[float, float]]:
    """The paper's figure 6a by method and oversight level, in window returns."""
    source = files("oversight_rl").joinpath("data/paper_figure_6a.csv").read_text()
    table = pd.read_csv(io.StringIO(source), comment="#")
    levels = (table["oversight_percent"] / 100).round(6)
    return {
        method: dict(zip(levels, table[column], strict=True)) for method, column in PAPER.items()
    }


def improvement(found: Found) -> pd.DataFrame:
    """Chance that a run of the row's method beats one of the column's, over common levels."""
    names = found.names
    table = pd.DataFrame(np.nan, index=names, columns=names)
    returns = {name: strata(found, name, "ground_truth_return", found.levels) for name in names}
    for ours, theirs in itertools.permutations(names, 2):
        pairs = [
            (a, b) for a, b in zip(returns[ours], returns[theirs], strict=True) if len(a) and len(b)
        ]
        if pairs:
            table.loc[ours, theirs] = probability_of_improvement(*zip(*pairs, strict=True))
    return table


def verdict(found: Found, table: pd.DataFrame) -> str:
    """One plain sentence: who leads among methods that need labels alone, and who beats routing.

    A method beats another at a level where a two-sided Mann-Whitney test of their seeds has
    p < 0.05, each comparison by itself.
    """
    fair = table[table["assumes"] == "labels"]
    if fair.empty:
        return "No method here makes do with labels alone."
    leaders: dict[str, list[str]] = {}
    for level in found.levels:
        rows = fair[fair["train_oversight"] == level].nlargest(1, "iqm")
        for best in rows.to_dict("records"):
            place = f"{percent(level)} ({best['iqm']:.2f})"
            leaders.setdefault(str(best["method"]), []).append(place)
    led = "; ".join(f"{name} at {listed(levels)}" for name, levels in leaders.items())
    text = f"Of the methods that need labels alone, the best return (IQM) has {led}"
    if found.reference is None:
        return text + "."
    assumes = dict(zip(table["method"], table["assumes"], strict=True))
    above: dict[str, list[str]] = {}
    below: dict[str, list[str]] = {}
    for name, level in itertools.product(found.names, found.levels):
        theirs, ours = (
            strata(found, x, "ground_truth_return", [level])[0] for x in (name, found.reference)
        )
        if name != found.reference and differ(theirs, ours):
            better = theirs.mean() > ours.mean()
            (above if better else below).setdefault(name, []).append(percent(level))

    def told(at: dict[str, list[str]], alone: bool) -> str:
        parts = [
            f"{name} at {'every level' if len(levels) == len(found.levels) else listed(levels)}"
            for name, levels in at.items()
            if (assumes[name] == "labels") == alone
        ]
        return "; ".join(parts) or "none"

    return (
        f"{text}; of them, gradient routing is beaten by {told(above, True)}, and beats "
        f"{told(below, True)}; of the methods that assume more, it is beaten by "
        f"{told(above, False)}, and beats {told(below, False)}."
    )


def percent(level: float) -> str:
    """An oversight level as text."""
    return f"{100 * level:.3g}%"


REWARD_MODEL = [
    f"reward_model/{figure}_{kind}"
    for figure in ("accuracy", "calibration_error")
    for kind in ("labeled", "unlabeled")
]


def reward_models(found: Found) -> list[dict[str, Any]]:
    """Reward models against the truth over the last tenth of training."""
    if not set(REWARD_MODEL) <= set(found.training):
        return []
    rows = found.training.dropna(subset=REWARD_MODEL[1])
    late = rows[rows["update"] > 0.9 * rows.groupby("run")["update"].transform("max")]
    means = late.groupby(["name", "level"])[REWARD_MODEL].mean().reset_index()
    return [{str(k): v for k, v in record.items()} for record in means.to_dict("records")]
