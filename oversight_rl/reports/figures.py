"""Figures of a report, each a function of what was found, and the pieces that they are drawn of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from oversight_rl.reports.gather import Found, Part, Report, percent
from oversight_rl.reports.statistics import interquartile_mean, iqm
from oversight_rl.reports.tables import improvement, means

INK = "#010203"  # stands for the color of the page's text in figures
PALETTE = (
    *("#0d9488", "#2563eb", "#84a30c", "#a16207", "#94a3b8"),
    *("#dc2626", "#f97316", "#9333ea", "#db2777", "#7c6fe0"),
    *("#b4532a", "#e09f9f", "#64748b", "#38a3c9"),
)
STYLE: dict[Any, Any] = {
    **{f"{what}.color": INK for what in ("text", "xtick", "ytick")},
    **{f"axes.{what}color": INK for what in ("label", "edge")},
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.grid": True,
    "grid.color": "#94a3b8",
    "grid.alpha": 0.25,
    "font.size": 9,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",
}
MANY_STEPS = 1e5  # are counted in millions


def color(found: Found, name: str) -> str:
    """A method's color; variants of one method share it."""
    place = list(found.kind.methods).index(found.methods[name])
    return PALETTE[place % len(PALETTE)]


def style(found: Found, name: str) -> dict[str, Any]:
    """Color and line of a method."""
    alike = [other for other in found.names if found.methods[other] == found.methods[name]]
    dashes = ["-", "--", ":", "-."][alike.index(name) % 4]
    return {"color": color(found, name), "linestyle": dashes}


def new_panels(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels of a size in inches, in so many columns."""
    columns = min(columns, count)
    rows = -(-count // columns)
    size = max(3.6, width * columns), max(2.6, height * rows)  # room for a legend
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for empty in grid[count:]:
        empty.remove()
    return figure, grid[:count]


def level_panels(found: Found, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of a panel for each oversight level, three in a row."""
    figure, panels = new_panels(len(found.levels), 3, width, height)
    for axes, level in zip(panels, found.levels, strict=True):
        axes.set_title(f"{percent(level)} oversight")
    return figure, panels


def level_axis(axes: Axes, levels: Sequence[float]) -> Callable[[float], float]:
    """A logarithmic axis of oversight levels; returns where a level stands (0 has a place too)."""
    lowest = min([level for level in levels if level > 0], default=1.0)
    places = {level: level or lowest / 3 for level in levels}
    axes.set_xscale("log")
    axes.set_xticks(list(places.values()), [percent(level) for level in levels])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("oversight level")
    return lambda level: places[level]


def draw_levels(
    found: Found,
    axes: Axes,
    name: str,
    figure: str | None = None,
    shift: float = 1.0,
    faint: bool = False,
) -> None:
    """A figure (the score) of a method by level: interval, seeds as dots; `faint`: a mere line."""
    place = level_axis(axes, found.levels)
    sampled = {level: found.samples(name, level, figure) for level in found.levels}
    known = {level: samples for level, samples in sampled.items() if len(samples)}
    estimates = [interquartile_mean(samples) for samples in known.values()]
    x = np.array([place(level) * shift for level in known])
    middle, own = [e.value for e in estimates], style(found, name)
    if faint:
        axes.plot(x, middle, **own, alpha=0.35, label=name)
        return
    axes.plot(x, middle, **own, marker="o", markersize=4, label=name)
    axes.vlines(x, [e.low for e in estimates], [e.high for e in estimates], color=own["color"])
    for at, values in zip(x, known.values(), strict=True):
        axes.plot([at] * len(values), values, "o", color=own["color"], markersize=2.2, alpha=0.45)


def draw_scores(found: Found, axes: Axes, names: Sequence[str]) -> None:
    """Scores of some methods by level, beside the reference and the optimum."""
    if found.reference and found.reference not in names:
        draw_levels(found, axes, found.reference, faint=True)
    for i, name in enumerate(names):
        draw_levels(found, axes, name, shift=1.04 ** (i - (len(names) - 1) / 2))
    if np.isfinite(found.optimum):
        axes.axhline(found.optimum, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate("optimum", (0.01, found.optimum), (0, 2), xycoords=("axes fraction", "data"),
                      textcoords="offset points", fontsize=8, color=INK)  # fmt: skip
    axes.set_ylabel(found.score)
    legend(axes)


def legend(axes: Axes) -> None:
    """A panel's own legend."""
    axes.legend(fontsize=7.5, frameon=False, loc="best")


def shared_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend below all panels."""
    entries: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    columns = max(2, min(5, len(entries), int(figure.get_figwidth() / 1.4)))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns,
                  fontsize=8, frameon=False)  # fmt: skip


def draw_bands(found: Found, axes: Axes, names: Sequence[str], rows: pd.DataFrame) -> None:
    """Scores of methods over column `x`: interquartile mean and range of the seeds."""
    for name in names:
        own = rows[rows["name"] == name]
        table = own.pivot_table(values=found.kind.score, index="x", columns="run").dropna()
        if table.empty:  # there are no runs, or they were evaluated at different times
            continue
        x, samples = table.index.to_numpy(float), table.to_numpy(float)  # [X], [X, seeds]
        axes.plot(x, iqm(samples), **style(found, name), label=name)
        low, high = samples.min(-1), samples.max(-1)
        axes.fill_between(x, low, high, color=color(found, name), alpha=0.12, linewidth=0)


def scores(found: Found) -> Figure:
    """Score against oversight level; seeds as dots."""
    figure, (axes,) = new_panels(1, 1, 5.2, 4.2)
    draw_scores(found, axes, found.names)
    return figure


def learning(found: Found, names: Sequence[str] | None = None) -> Figure | None:
    """Scores of the deployed policy over training, by level; of all methods, or of some."""
    if found.curves.empty:
        return None
    rows = found.curves[~found.curves["greedy"]]
    unit = 1e6 if rows["env_steps"].max() >= MANY_STEPS else 1
    rows = rows.assign(x=rows["env_steps"] / unit)
    figure, panels = level_panels(found, 3.6, 3.0)
    for axes, level in zip(panels, found.levels, strict=True):
        here = rows[(rows["level"] == level) & (rows["deploy_oversight"] == level)]
        draw_bands(found, axes, found.names if names is None else names, here)
        axes.set_xlabel("environment steps" + (" (million)" if unit > 1 else ""))
    panels[0].set_ylabel(found.score)
    shared_legend(figure, panels)
    return figure


def chances(found: Found) -> Figure | None:
    """Probability that a run of the row's method beats one of the column's."""
    table = improvement(found)
    if len(table) < 2:
        return None
    size = 1.8 + 0.42 * len(table)
    figure = Figure(figsize=(size + 1.0, size), layout="constrained")
    axes = figure.subplots()
    values = table.to_numpy(float)
    axes.pcolormesh(values, cmap="RdYlGn", vmin=0, vmax=1, alpha=0.75)
    axes.grid(visible=False)
    for i, j in permutations(range(len(table)), 2):
        text = f"{values[i, j]:.2f}"
        axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=7, color="#111827")
    middles = np.arange(len(table)) + 0.5
    axes.set_xticks(middles, table.columns, rotation=90, fontsize=8)
    axes.set_yticks(middles, table.index, fontsize=8)
    axes.invert_yaxis()
    axes.set_title("chance that the row beats the column", fontsize=10)
    return figure


SCORES = Part(
    "scores",
    "Score against oversight",
    "Score of the deployed policy at the level it was trained at: interquartile mean over seeds, "
    "95% interval, every seed as a dot; the optimum, where it is known, dashed.",
    scores,
)
LEARNING = Part(
    "learning",
    "Learning curves",
    "Interquartile mean of the policy that would be deployed; the band is the range over seeds.",
    learning,
)
IMPROVEMENT = Part(
    "improvement",
    "Probability of improvement",
    "Chance that a run of the row's method has a higher score than one of the column's, averaged "
    "over the levels that both have.",
    chances,
)
STANDARD = Report((SCORES, LEARNING, IMPROVEMENT), means)
"""What a report holds that an experiment has no wishes for."""
