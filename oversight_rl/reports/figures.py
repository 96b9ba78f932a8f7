"""Figures of a report, each a function of what was found."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from oversight_rl.agents.methods import METHODS
from oversight_rl.reports.gather import Found
from oversight_rl.reports.statistics import interquartile_mean, iqm
from oversight_rl.reports.tables import PAPER, improvement, paper_figure, percent, strata

INK = "#010203"  # stands for the color of the page's text in figures
PALETTE = (
    *("#0d9488", "#2563eb", "#84a30c", "#a16207", "#94a3b8"),
    *("#dc2626", "#f97316", "#9333ea", "#db2777", "#7c6fe0"),
    *("#b4532a", "#e09f9f", "#64748b", "#38a3c9"),
)
COLORS = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(METHODS)}
GROUPS: dict[str, Callable[[str], bool]] = {
    "routing, its ablations and controls": lambda m: METHODS[m].experts == "many",
    "one policy, labels only": lambda m: (
        (METHODS[m].experts, METHODS[m].assumes) == ("one", "labels")
    ),
    "methods that need more than labels": lambda m: METHODS[m].assumes != "labels",
}


def color(found: Found, name: str) -> str:
    """A method's color; variants of one method share it."""
    return COLORS[found.method(name)]


def _style(found: Found, name: str) -> dict[str, Any]:
    alike = [other for other in found.names if found.method(other) == found.method(name)]
    return {
        "color": color(found, name),
        "linestyle": ["-", "--", ":", "-."][alike.index(name) % 4],
    }


def _panels(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels."""
    columns = min(columns, count)
    rows = -(-count // columns)
    size = max(3.6, width * columns), max(2.6, height * rows)  # room for a legend
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for empty in grid[count:]:
        empty.remove()
    return figure, grid[:count]


def _level_axis(axes: Axes, levels: Sequence[float]) -> Callable[[float], float]:
    """A logarithmic axis of oversight levels; returns where a level stands (0 has a place too)."""
    lowest = min([level for level in levels if level > 0], default=1.0)
    places = {level: level or lowest / 3 for level in levels}
    axes.set_xscale("log")
    axes.set_xticks(list(places.values()), [percent(level) for level in levels])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("oversight level")
    return lambda level: places[level]


def figure_returns(found: Found) -> Figure:
    """Return against oversight level; seeds as dots; the paper's points in its own units."""
    groups = {
        title: names
        for title, within in GROUPS.items()
        if (names := [name for name in found.names if within(found.method(name))])
    }
    windows = found.deployed.groupby("name")["window_return"].count()  # those that are known
    published = [name for name in found.names if found.method(name) in PAPER and windows[name]]
    figure, panels = _panels(len(groups) + bool(published), 2, 5.2, 4.2)
    for axes, (title, names) in zip(panels, groups.items(), strict=False):
        place = _level_axis(axes, found.levels)
        if found.reference and found.reference not in names:
            _draw_returns(
                found, axes, found.reference, place, "ground_truth_return", 1.0, faint=True
            )
        for i, name in enumerate(names):
            shift = 1.04 ** (i - (len(names) - 1) / 2)
            _draw_returns(found, axes, name, place, "ground_truth_return", shift)
        optimum = found.deployed["optimal_return"].max()
        if np.isfinite(optimum):
            axes.axhline(optimum, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate("optimum", (0.01, optimum), (0, 2), xycoords=("axes fraction", "data"),
                          textcoords="offset points", fontsize=8, color=INK)  # fmt: skip
        axes.set_title(title)
        axes.set_ylabel("ground-truth return per episode")
        _legend(axes)
    lows = [axes.get_ylim()[0] for axes in panels[: len(groups)]]
    for axes in panels[: len(groups)]:
        axes.set_ylim(min(lows), 1.0)
    if published:
        axes, paper = panels[-1], paper_figure()
        place = _level_axis(axes, found.levels)
        for name in published:
            _draw_returns(found, axes, name, place, "window_return", 1.0)
            points = paper[found.method(name)]
            known = [level for level in found.levels if round(level, 6) in points]
            values = [points[round(level, 6)] for level in known]
            places = [place(level) for level in known]
            axes.plot(places, values, color=color(found, name), linestyle=":", marker="s",
                      markerfacecolor="none", label=f"{name}, as published")  # fmt: skip
        axes.set_title("next to the paper's figure 6a")
        axes.set_ylabel("window return (the paper's metric)")
        _legend(axes)
    return figure


def _draw_returns(
    found: Found,
    axes: Axes,
    name: str,
    place: Callable[[float], float],
    column: str,
    shift: float,
    faint: bool = False,
) -> None:
    levels = [x for x in found.levels if len(strata(found, name, column, [x])[0])]
    samples = strata(found, name, column, levels)
    estimates = [interquartile_mean(values) for values in samples]
    x = np.array([place(level) * shift for level in levels])
    style = _style(found, name)
    if faint:
        axes.plot(x, [e.value for e in estimates], **style, alpha=0.35, label=name)
        return
    axes.plot(x, [e.value for e in estimates], **style, marker="o", markersize=4, label=name)
    axes.vlines(x, [e.low for e in estimates], [e.high for e in estimates], color=style["color"])
    for at, values in zip(x, samples, strict=True):
        axes.plot([at] * len(values), values, "o", color=style["color"], markersize=2.2, alpha=0.45)


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=7.5, frameon=False, loc="best")


def figure_learning(found: Found) -> Figure:
    """Learning curves of the deployed policy by level; the band is the range over seeds."""
    figure, panels = _panels(len(found.levels), 3, 3.6, 3.0)
    for axes, level in zip(panels, found.levels, strict=True):
        here = found.curves[(found.curves["level"] == level) & ~found.curves["greedy"]]
        here = here[here["deploy_oversight"] == level]
        for name in found.names:
            own = here[here["name"] == name]
            if METHODS[found.method(name)].deploys != "last" or own.empty:
                continue
            _draw_band(found, axes, name, own.assign(x=own["env_steps"] / 1e6))
        axes.set_title(f"{percent(level)} oversight")
        axes.set_xlabel("environment steps (million)")
    panels[0].set_ylabel("ground-truth return")
    _shared_legend(figure, panels)
    return figure


def _draw_band(found: Found, axes: Axes, name: str, rows: pd.DataFrame) -> None:
    """Returns over column `x`: interquartile mean and range of the seeds."""
    table = rows.pivot_table(values="ground_truth_return", index="x", columns="run").dropna()
    if table.empty:  # the runs were evaluated at different times
        return
    x, samples = table.index.to_numpy(float), table.to_numpy(float)  # [X], [X, seeds]
    axes.plot(x, iqm(samples), **_style(found, name), label=name)
    low, high = samples.min(-1), samples.max(-1)
    axes.fill_between(x, low, high, color=color(found, name), alpha=0.12, linewidth=0)


def _shared_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend below all panels."""
    entries: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    columns = max(2, min(5, len(entries), int(figure.get_figwidth() / 1.4)))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns,
                  fontsize=8, frameon=False)  # fmt: skip


Segments = Sequence[tuple[str, Callable[[pd.DataFrame], "pd.Series[float]"], str]]
BY_FLAG: Segments = (
    ("diamond, flagged", lambda r: r["p_diamond_flagged"], "#0f766e"),
    ("diamond, not flagged", lambda r: r["p_diamond"] - r["p_diamond_flagged"], "#5eb8ad"),
    ("timeout", lambda r: r["p_timeout"], "#94a3b8"),
    ("ghost, flagged", lambda r: r["p_ghost_flagged"], "#6d28d9"),
    ("ghost, not flagged", lambda r: r["p_ghost"] - r["p_ghost_flagged"], "#a78bda"),
)
BY_PATH: Segments = (
    ("diamond", lambda r: r["p_diamond"], "#2aa198"),
    ("timeout", lambda r: r["p_timeout"], "#94a3b8"),
    ("ghost on a shortest path", lambda r: r["p_ghost_on_path"], "#6d28d9"),
    ("ghost elsewhere", lambda r: r["p_ghost"] - r["p_ghost_on_path"], "#a78bda"),
)


def figure_endings(found: Found, segments: Segments) -> Figure:
    """How episodes of the deployed policy end: stacked shares, a bar per method, by level."""
    names = found.names[::-1]
    figure, panels = _panels(len(found.levels), 3, 3.9, 0.9 + 0.22 * len(names))
    for axes, level in zip(panels, found.levels, strict=True):
        rows = found.deployed[found.deployed["level"] == level]
        left = np.zeros(len(names))
        for label, share, shade in segments:
            means = share(rows).groupby(rows["name"]).mean()
            width = np.array([means.get(name, 0.0) for name in names])
            axes.barh(range(len(names)), width, left=left, color=shade, label=label, height=0.75)
            left += width
        axes.set_title(f"{percent(level)} oversight")
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.5, 1], ["0", "50%", "100%"])
    for axes in panels:
        spec = axes.get_subplotspec()
        if spec is not None and not spec.is_first_col():
            axes.set_yticklabels([])
    _shared_legend(figure, panels)
    return figure


GATE = {"labeled_diamond": "#0d9488", "labeled_ghost": "#7c3aed", "unlabeled": "#94a3b8"}


def figure_gate(found: Found) -> Figure | None:
    """Mean weight of the gate on the diamond expert over training, by an episode's outcome."""
    if not {f"gate/{kind}" for kind in GATE} <= set(found.training):
        return None
    gated = found.training.dropna(subset=[f"gate/{kind}" for kind in GATE], how="all")
    names = [name for name in found.names if (gated["name"] == name).any()]
    if not names:
        return None
    panels_of = [(name, level) for name in names for level in found.levels]
    figure, panels = _panels(len(panels_of), len(found.levels), 2.0, 1.9)
    for axes, (name, level) in zip(panels, panels_of, strict=True):
        own = gated[(gated["name"] == name) & (gated["level"] == level)]
        for kind, shade in GATE.items():
            mean = own.groupby("update")[f"gate/{kind}"].mean()
            axes.plot(mean.index, mean, color=shade, linewidth=1, label=f"{kind.replace('_', ' ')}")
        axes.set_ylim(0, 1)
        axes.tick_params(labelsize=7)
        spec = axes.get_subplotspec()
        if spec is not None and spec.is_first_row():
            axes.set_title(percent(level), fontsize=9)
        if spec is not None and spec.is_first_col():
            axes.set_ylabel(name.replace(" ", "\n", 1), fontsize=8)
        else:
            axes.set_yticklabels([])
    _shared_legend(figure, panels)
    return figure


def figure_steering(found: Found) -> Figure | None:
    """Return against the weight of the diamond expert in a constant blend with the ghost's."""
    rows = found.results
    rows = rows[~rows["greedy"] & (rows["deploy_oversight"] == rows["train_oversight"])]
    weight = rows["policy"].map(_diamond_weight)
    rows = rows.assign(weight=weight).dropna(subset=["weight"])
    names = [name for name in found.names if (rows["name"] == name).any()]
    if not names:
        return None
    figure, panels = _panels(len(found.levels), 3, 3.6, 2.8)
    for axes, level in zip(panels, found.levels, strict=True):
        for name in names:
            own = rows[(rows["name"] == name) & (rows["level"] == level)]
            if len(own):
                _draw_band(found, axes, name, own.assign(x=own["weight"]))
        axes.set_title(f"{percent(level)} oversight")
        axes.set_xticks([0, 0.5, 1], ["ghost", "half", "diamond"])
    panels[0].set_ylabel("ground-truth return")
    _shared_legend(figure, panels)
    return figure


def _diamond_weight(policy: str) -> float:
    if policy in ("diamond", "ghost"):
        return float(policy == "diamond")
    match = re.fullmatch(r"diamond=([0-9]\.?[0-9]*),ghost=[0-9.]+", policy)
    return float(match[1]) if match else float("nan")


def figure_improvement(found: Found) -> Figure | None:
    """Probability that a run of the row's method beats one of the column's."""
    table = improvement(found)
    if len(table) < 2:
        return None
    size = 1.8 + 0.42 * len(table)
    figure = Figure(figsize=(size + 1.0, size), layout="constrained")
    axes = figure.subplots()
    chances = table.to_numpy(float)
    axes.pcolormesh(chances, cmap="RdYlGn", vmin=0, vmax=1, alpha=0.75)
    axes.grid(visible=False)
    for i in range(len(table)):
        for j in range(len(table)):
            if i != j:
                text = f"{chances[i, j]:.2f}"
                axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=7,
                          color="#111827")  # fmt: skip
    middles = np.arange(len(table)) + 0.5
    axes.set_xticks(middles, table.columns, rotation=90, fontsize=8)
    axes.set_yticks(middles, table.index, fontsize=8)
    axes.invert_yaxis()
    axes.set_title("chance that the row beats the column", fontsize=10)
    return figure


CAPTIONS = {
    "returns": (
        "Return against oversight",
        "Ground-truth return of the deployed policy at the level it was trained at: interquartile "
        "mean over seeds, 95% stratified bootstrap interval, every seed as a dot, the optimum "
        "dashed. The last panel has the paper's metric, next to its figure 6a (dotted), "
        "whose points stand for agents that trained for 328 million steps.",
    ),
    "learning": (
        "Learning curves",
        "Interquartile mean of the policy that would be deployed; the band is the range over "
        "seeds. Methods that deploy an earlier agent are left out: they train as naive does.",
    ),
    "endings_by_flag": (
        "How episodes end, watched or not",
        "Shares of episodes of the deployed policy, averaged over seeds. An ending on a flagged "
        "square is one that the overseer sees.",
    ),
    "endings_by_path": (
        "Ghosts on the shortest path",
        "Of the ghosts that were reached, those that lay on a shortest path from the start to the "
        "diamond, and the others.",
    ),
    "gate": (
        "The gate over training",
        "Mean weight on the diamond expert (from 0 to 1) by an episode's outcome, over updates; a "
        "row for each method, a column for each level.",
    ),
    "steering": (
        "Steering",
        "Return of constant blends of the two experts, from the ghost's alone to the diamond's; "
        "the band is the range over seeds.",
    ),
    "improvement": (
        "Probability of improvement",
        "Chance that a run of the row's method has a higher return than one of the column's, "
        "averaged over the levels that both have.",
    ),
}


def figures(found: Found) -> Iterator[tuple[str, Figure]]:
    """All figures that what was found allows."""
    style: dict[Any, Any] = {
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.labelsize": 9,
        "axes.grid": True,
        "grid.color": "#94a3b8",
        "grid.alpha": 0.25,
        "font.size": 9,
        "lines.linewidth": 1.4,
    }
    draw: dict[str, Callable[[], Figure | None]] = {
        "returns": lambda: figure_returns(found),
        "learning": lambda: figure_learning(found) if len(found.curves) else None,
        "endings_by_flag": lambda: figure_endings(found, BY_FLAG),
        "endings_by_path": lambda: (
            figure_endings(found, BY_PATH)
            if found.deployed["p_ghost_on_path"].notna().any()
            else None
        ),
        "gate": lambda: figure_gate(found),
        "steering": lambda: figure_steering(found),
        "improvement": lambda: figure_improvement(found),
    }
    for name, make in draw.items():
        style |= {"svg.fonttype": "none", "svg.hashsalt": name}
        with mpl.rc_context(style):
            figure = make()
            if figure is not None:
                yield name, figure
