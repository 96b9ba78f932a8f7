"""What reports on the oversight experiments show beside what all do."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from functools import cache, partial
from importlib.resources import files
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from oversight_rl.agents.methods import METHODS
from oversight_rl.reports.colors import TIMEOUT, UNLABELED, UNWANTED, WANTED
from oversight_rl.reports.figures import (
    IMPROVEMENT,
    LEARNING,
    draw_bands,
    draw_levels,
    draw_scores,
    hover,
    label_lines,
    learning,
    legend_above,
    level_axis,
    look,
    new_panels,
    one_scale,
    short,
)
from oversight_rl.reports.gather import Found, Part, Report, percent
from oversight_rl.reports.statistics import interquartile_mean

RETURN = "ground-truth return"
PAPER = {"routing": "gradient_routing", "filtering": "data_filtering", "naive": "naive"}
"""Columns of the paper's figure 6a, by method."""


def behaviors(found: Found) -> list[str]:
    """Names of what episodes can end in, the wanted one first."""
    shares = [column for column in map(str, found.results) if column.startswith("p_")]
    return [share.removeprefix("p_") for share in shares if f"{share}_flagged" in shares]


@cache
def paper_figure() -> dict[str, dict[float, float]]:
    """The paper's figure 6a by method and oversight level, in window returns."""
    source = files("oversight_rl").joinpath("data/paper_figure_6a.csv").read_text()
    table = pd.read_csv(io.StringIO(source), comment="#")
    levels = (table["oversight_percent"] / 100).round(6)
    return {
        method: dict(zip(levels, table[column], strict=True)) for method, column in PAPER.items()
    }


def groups(found: Found) -> dict[str, list[str]]:
    """Names of methods by what they assume, those with several experts apart from the others."""
    grouped: dict[str, list[str]] = {}
    for assumed, names in found.classes.items():
        for name in names:
            kind = f"{METHODS[found.methods[name]].policy.experts} expert"
            title = f"assume {assumed}, {kind.replace('many expert', 'several experts')}"
            grouped.setdefault(title, []).append(name)
    return grouped


def columns(found: Found, rows: pd.DataFrame) -> dict[str, Any]:
    """Columns of the summary: the paper's metric, how episodes end, their length."""
    shown: dict[str, Any] = {}
    method, level = rows[["method", "level"]].iloc[0]
    if "window_return" in rows:
        window = interquartile_mean(rows["window_return"]).value
        # what the paper has is of the grid, as is the window return
        known = paper_figure().get(method, {}) if math.isfinite(window) else {}
        shown |= {"window_return": window, "paper_window_return": known.get(round(level, 6))}
    shown["optimal_return"] = rows["optimal_return"].iloc[0]
    endings = [f"p_{name}" for name in (*behaviors(found), "ghost_on_path", "timeout")]
    means = [column for column in (*endings, "episode_length") if column in rows]
    return shown | {column: rows[column].mean() for column in means}


def returns(found: Found) -> Figure:
    """Return against oversight level by group of methods; the paper's points in its own units."""
    grouped, published = groups(found), _published(found)
    figure, panels = new_panels(len(grouped) + bool(published), 2, 5.4, 3.6)
    own = panels[: len(grouped)]
    for axes, (title, names) in zip(own, grouped.items(), strict=True):
        draw_scores(found, axes, names)
        axes.set_title(title)
        axes.set_ylabel(f"{RETURN} per episode")
        axes.set_ylim(top=1.0)
    one_scale(own)
    if published:
        axes, paper = panels[-1], paper_figure()
        place = level_axis(axes, found.levels)
        for name in published:
            draw_levels(found, axes, name, "window_return")
            points = paper[found.methods[name]]
            known = [level for level in found.levels if round(level, 6) in points]
            values = [points[round(level, 6)] for level in known]
            places, drawn = [place(level) for level in known], look(found, name)
            (line,) = axes.plot(
                places, values, color=drawn.color, linestyle=":", marker=drawn.marker,
                markerfacecolor="none", label=f"{name}, as published",
            )  # fmt: skip
            hover(line, *(
                f"{name}, as published, at {percent(level)}: {value:.2f}"
                for level, value in zip(known, values, strict=True)
            ))  # fmt: skip
        axes.set_title("next to the paper's figure 6a")
        axes.set_ylabel("window return (the paper's metric)")
    for axes in panels:
        label_lines(axes)
    return figure


def _published(found: Found) -> list[str]:
    """Names of methods that the paper has, and whose window returns are known."""
    if "window_return" not in found.deployed:
        return []
    windows = found.deployed.groupby("name")["window_return"].count()
    return [name for name in found.names if found.methods[name] in PAPER and windows[name]]


def learning_curves(found: Found) -> Figure | None:
    """Learning curves of methods that deploy the agent of the moment."""
    latest = {
        title: own
        for title, names in groups(found).items()
        if (own := [name for name in names if METHODS[found.methods[name]].deploys == "last"])
    }
    return learning(found, latest) if latest else None


def endings(found: Found, segments: dict[str, tuple[pd.Series[float], str]]) -> Figure:
    """How episodes of the deployed policy end: stacked shares, a bar per method, by level.

    Segments are, by label, the share of each row of `found.deployed`, and its shade.
    """
    names = found.names[::-1]
    figure, panels = new_panels(len(found.levels), 3, 3.9, 0.9 + 0.22 * len(names))
    for axes, level in zip(panels, found.levels, strict=True):
        axes.set_title(f"{percent(level)} oversight")
        here = found.deployed["level"] == level
        left = np.zeros(len(names))
        for label, (share, shade) in segments.items():
            means = share[here].groupby(found.deployed["name"][here]).mean()
            width = np.nan_to_num([means.get(name, 0.0) for name in names])
            bars = axes.barh(range(len(names)), width, left=left, color=shade, label=label,
                             height=0.75)  # fmt: skip
            for name, bar, share_of in zip(names, bars, width, strict=True):
                hover(bar, f"{name} at {percent(level)}: {label} {share_of:.1%}")
            left += width
        axes.set_yticks(range(len(names)), [short(name) for name in names], fontsize=8)
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.5, 1], ["0", "50%", "100%"])
    legend_above(figure, panels)
    return figure


def endings_by_flag(found: Found) -> Figure | None:
    """How episodes end, and whether the overseer sees it."""
    rows, names = found.deployed, behaviors(found)
    if not names or "p_timeout" not in rows:
        return None
    wanted, *others = names

    def halves(name: str, shades: tuple[str, str]) -> dict[str, tuple[pd.Series[float], str]]:
        whole, flagged = rows[f"p_{name}"], rows[f"p_{name}_flagged"]
        return {
            f"{name}, flagged": (flagged, shades[0]),
            f"{name}, not flagged": (whole - flagged, shades[1]),
        }

    segments = halves(wanted, WANTED) | {"timeout": (rows["p_timeout"], TIMEOUT)}
    for i, name in enumerate(others):
        segments |= halves(name, UNWANTED[i % len(UNWANTED)])
    return endings(found, segments)


def endings_by_path(found: Found) -> Figure | None:
    """How episodes on the grid end, and whether a ghost lay on a shortest path."""
    rows = found.deployed
    needed = {"p_diamond", "p_ghost", "p_timeout", "p_ghost_on_path"}
    if not needed <= set(rows) or rows["p_ghost_on_path"].isna().all():
        return None
    on_path = rows["p_ghost_on_path"]
    segments = {
        "diamond": (rows["p_diamond"], WANTED[0]),
        "timeout": (rows["p_timeout"], TIMEOUT),
        "ghost on a shortest path": (on_path, UNWANTED[0][0]),
        "ghost elsewhere": (rows["p_ghost"] - on_path, UNWANTED[0][1]),
    }
    return endings(found, segments)


def gate(found: Found) -> Figure | None:
    """Mean weight of the gate on the first expert over training, by an episode's outcome."""
    labeled = [column for column in map(str, found.training) if column.startswith("gate/labeled_")]
    shades = [WANTED[0], *[dark for dark, _ in UNWANTED] * len(labeled)]
    lines = {**dict(zip(labeled, shades, strict=False)), "gate/unlabeled": UNLABELED}
    if not set(lines) <= set(found.training):
        return None
    gated = found.training.dropna(subset=list(lines), how="all")
    names = [name for name in found.names if (gated["name"] == name).any()]
    if not names:
        return None
    panels_of = list(product(names, found.levels))
    figure, panels = new_panels(len(panels_of), len(found.levels), 2.3, 1.9)
    for axes, (name, level) in zip(panels, panels_of, strict=True):
        own = gated[(gated["name"] == name) & (gated["level"] == level)]
        for column, shade in lines.items():
            mean = own.groupby("update")[column].mean()
            label = column.removeprefix("gate/").replace("_", " ")
            axes.plot(mean.index, mean, color=shade, linewidth=1, label=label)
        axes.set_ylim(0, 1)
        axes.tick_params(labelsize=7)
        axes.set_title(f"{short(name)}, {percent(level)}", fontsize=8)
    legend_above(figure, panels)
    return figure


def steering(found: Found) -> Figure | None:
    """Return against the weight of the first expert in a constant blend with the second."""
    rows = found.results
    rows = rows[~rows["greedy"] & (rows["deploy_oversight"] == rows["train_oversight"])]
    if len(behaviors(found)) < 2:
        return None
    first, second = behaviors(found)[:2]
    weight = rows["policy"].map(partial(_weight, first, second))
    rows = rows.assign(x=weight).dropna(subset=["x"])
    names = [name for name in found.names if (rows["name"] == name).any()]
    if not names:
        return None
    figure, panels = new_panels(len(found.levels), 3, 4.2, 2.8)
    for axes, level in zip(panels, found.levels, strict=True):
        draw_bands(found, axes, names, rows[rows["level"] == level])
        axes.set_xticks([0, 0.5, 1], [second, "half", first])
        axes.set_title(f"{percent(level)} oversight")
        axes.set_ylabel(RETURN)
    one_scale(panels)
    for axes in panels:
        label_lines(axes)
    return figure


def _weight(first: str, second: str, policy: str) -> float:
    """Weight of the first expert in a policy that blends two, nan if it does not."""
    if policy in (first, second):
        return float(policy == first)
    parts = dict(part.partition("=")[::2] for part in policy.split(","))
    return float(parts[first]) if list(parts) == [first, second] else math.nan


REWARD_MODEL = {
    "right, labeled": ("reward_model/accuracy_labeled", "{:.1%}"),
    "right, unlabeled": ("reward_model/accuracy_unlabeled", "{:.1%}"),
    "error, labeled": ("reward_model/calibration_error_labeled", "{:.3f}"),
    "error, unlabeled": ("reward_model/calibration_error_unlabeled", "{:.3f}"),
}


def reward_models(found: Found) -> pd.DataFrame | None:
    """Reward models against the truth over the last tenth of training."""
    figures = [column for column, _ in REWARD_MODEL.values()]
    if not set(figures) <= set(found.training):
        return None
    rows = found.training.dropna(subset="reward_model/accuracy_unlabeled")
    if rows.empty:
        return None
    late = rows[rows["update"] > 0.9 * rows.groupby("run")["update"].transform("max")]
    means = late.groupby(["name", "level"])[figures].mean().reset_index()
    table = {"method": means["name"], "oversight": means["level"].map(percent)}
    shown = {
        title: means[column].map(text.format, na_action="ignore").fillna("none")
        for title, (column, text) in REWARD_MODEL.items()
    }
    return pd.DataFrame(table | shown)


PARTS = (
    Part(
        "returns",
        "Return against oversight",
        "Ground-truth return of the deployed policy at the level it was trained at: interquartile "
        "mean over seeds, 95% interval, every seed as a dot, the optimum dashed. The last panel "
        "has the paper's metric, next to its figure 6a (dotted; arXiv 2410.04332 v2, read off to "
        "about 0.01), whose points stand for agents that trained for 328 million steps.",
        returns,
    ),
    replace(
        LEARNING,
        caption=f"{LEARNING.caption} Methods that deploy an earlier agent are left out: they train "
        "as naive does.",
        draw=learning_curves,
    ),
    Part(
        "endings_by_flag",
        "How episodes end, watched or not",
        "Shares of episodes of the deployed policy, averaged over seeds. An ending on a flagged "
        "square is one that the overseer sees.",
        endings_by_flag,
    ),
    Part(
        "endings_by_path",
        "Ghosts on the shortest path",
        "Of the ghosts that were reached, those that lay on a shortest path from the start to the "
        "diamond, and the others.",
        endings_by_path,
    ),
    Part(
        "gate",
        "The gate over training",
        "Mean weight on the wanted behavior's expert (from 0 to 1) by an episode's outcome, over "
        "updates; a panel for each method and level.",
        gate,
    ),
    Part(
        "steering",
        "Steering",
        "Return of constant blends of the first two experts, from the second's alone to the wanted "
        "behavior's; the band is the range over seeds.",
        steering,
    ),
    replace(IMPROVEMENT, caption=IMPROVEMENT.caption.replace("score", "return")),
    Part(
        "reward_models",
        "Reward models against the truth",
        "How often they are right about an ending, and their expected calibration error (mean gap "
        "between foretold and actual rates over ten bins), over the last tenth of training. They "
        "learn from labeled endings and are used on unlabeled ones. Where a window holds only a "
        "handful of labeled endings, their error is exaggerated.",
        reward_models,
    ),
)
REPORT = Report(
    PARTS,
    columns,
    score="return",
    about="Ground truth: +1 diamond, -1 ghost, discounted by the steps taken; per episode from a "
    "fresh start.",
    reference="routing",
    question="Which method makes an agent go to the diamond also where nobody watches, if an "
    "overseer labels only a share of its episodes?",
)
