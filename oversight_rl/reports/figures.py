"""Figures of a report, each a function of what was found, and the pieces that they are drawn of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from oversight_rl.reports.colors import DIVERGING, INK, Style, style_of
from oversight_rl.reports.gather import Found, Part, Report, percent
from oversight_rl.reports.statistics import interquartile_mean, iqm
from oversight_rl.reports.tables import improvement, means, ranked

STYLE: dict[Any, Any] = {
    **{f"{what}.color": INK for what in ("text", "xtick", "ytick")},
    **{f"axes.{what}color": INK for what in ("label", "edge")},
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#94a3b8",
    "grid.alpha": 0.25,
    "font.size": 9,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "svg.fonttype": "none",
}
HOVER = "hover:"  # begins the id of what says something where a pointer rests on it
MANY_STEPS = 1e5  # are counted in millions
WIDEST, LINES = 26, 2  # characters of a line of a name, and lines of it
LABEL = 7.5  # points
MARKS = 8  # on a long curve


def look(found: Found, name: str) -> Style:
    """How a method is drawn; variants of one method differ by dash."""
    alike = [other for other in found.names if found.methods[other] == found.methods[name]]
    return style_of(found.methods[name]).variant(alike.index(name))


def style(found: Found, name: str) -> dict[str, Any]:
    """Color, line and marker of a method."""
    own = look(found, name)
    return {"color": own.color, "linestyle": own.dash, "marker": own.marker}


def short(name: str) -> str:
    """A name as figures have it: short lines, two at most, nothing that is more than text."""
    plain = "".join(c if c.isprintable() else "?" for c in name).replace("$", r"\$")
    return fill(plain, WIDEST, max_lines=LINES, placeholder="...")


def hover(artist: Artist, *texts: str) -> None:
    """Say something where a pointer rests on an artist: a text, or one for each marker."""
    artist.set_gid(HOVER + json.dumps(texts))


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


def one_scale(panels: Sequence[Axes]) -> None:
    """Give panels the same vertical axis."""
    lows, highs = zip(*(axes.get_ylim() for axes in panels), strict=True)
    for axes in panels:
        axes.set_ylim(min(lows), max(highs))


def level_axis(axes: Axes, levels: Sequence[float]) -> Callable[[float], float]:
    """A logarithmic axis of oversight levels; returns where a level stands (0 has a place too)."""
    lowest = min([level for level in levels if level > 0], default=1.0)
    places = {level: level or lowest / 3 for level in levels}
    axes.set_xscale("log")
    if len(places) == 1:  # in the middle, however marks are shifted
        (only,) = places.values()
        axes.set_xlim(only / 2, only * 2)
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
    at = [f"{name} at {percent(level)}" for level in known]
    (line,) = axes.plot(x, middle, **own, label=name, alpha=0.35 if faint else 1)
    hover(line, *(
        f"{where}: {e.value:.3f}" + (f" ({e.low:.3f} to {e.high:.3f})" if e.low == e.low else "")
        for where, e in zip(at, estimates, strict=True)
    ))  # fmt: skip
    if faint:
        line.set_marker("")
        return
    axes.vlines(x, [e.low for e in estimates], [e.high for e in estimates], color=own["color"])
    for place_x, where, values in zip(x, at, known.values(), strict=True):
        seeds = axes.plot([place_x] * len(values), values, "o", color=own["color"], markersize=2.2,
                          alpha=0.45)  # fmt: skip
        hover(seeds[0], *(f"{where}, one seed: {value:.3f}" for value in values))


def draw_scores(found: Found, axes: Axes, names: Sequence[str]) -> None:
    """Scores of some methods by level, beside the reference and the optimum."""
    if found.reference and found.reference not in names:
        draw_levels(found, axes, found.reference, faint=True)
    for i, name in enumerate(names):
        draw_levels(found, axes, name, shift=1.04 ** (i - (len(names) - 1) / 2))
    draw_optimum(found, axes)
    axes.set_ylabel(found.score)


def draw_optimum(found: Found, axes: Axes) -> None:
    """The best score that there can be, where it is known."""
    if np.isfinite(found.optimum):
        axes.axhline(found.optimum, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate("optimum", (0.01, found.optimum), (0, 2), xycoords=("axes fraction", "data"),
                      textcoords="offset points", fontsize=8, color=INK)  # fmt: skip


def label_lines(axes: Axes) -> None:
    """The name of each line at its end, right of the panel; to be called when all is drawn."""
    ends = []
    for line in axes.get_lines():
        x, y = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
        last = np.flatnonzero(np.isfinite(y))
        if len(last) and not str(line.get_label()).startswith("_"):
            ends.append((float(y[last[-1]]), float(x[last[-1]]), line))
    if not ends:
        return
    ends.sort(key=lambda end: end[0])
    names = [short(str(line.get_label())) for *_, line in ends]
    bottom, top = axes.get_ylim()
    figure: Any = axes.figure
    places_of: Any = axes.get_subplotspec()
    points = 72 * figure.get_figheight() / places_of.get_gridspec().nrows - 45  # less the titles
    line_height = (top - bottom) * LABEL * 1.25 / points
    heights = [line_height * (name.count("\n") + 1) for name in names]
    places = spread([y for y, *_ in ends], heights, bottom, top)
    for (end, x_end, line), name, place in zip(ends, names, places, strict=True):
        tie = {"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.5, "alpha": 0.6}
        axes.annotate(name, (x_end, end), (1.03, place), va="center", fontsize=LABEL,
                      textcoords=("axes fraction", "data"), color=line.get_color(),
                      arrowprops=tie | {"shrinkA": 1, "shrinkB": 3})  # fmt: skip


def spread(
    wanted: Sequence[float], heights: Sequence[float], bottom: float, top: float
) -> list[float]:
    """Places near the wanted ones (in rising order) for things so high, none over another.

    They lie between `bottom` and `top` if they fit.
    """
    places: list[float] = []
    floor = bottom
    for want, height in zip(wanted, heights, strict=True):
        places.append(max(want, floor + height / 2))
        floor = places[-1] + height / 2
    ceiling = max(top, bottom + sum(heights))
    for i in reversed(range(len(places))):
        places[i] = min(places[i], ceiling - heights[i] / 2)
        ceiling = places[i] - heights[i] / 2
    return places


def legend_above(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend above all panels."""
    entries: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    columns = max(2, min(3, len(entries)))
    figure.legend(entries.values(), [short(name) for name in entries], fontsize=8, frameon=False,
                  loc="outside upper center", ncols=columns)  # fmt: skip


def draw_bands(found: Found, axes: Axes, names: Sequence[str], rows: pd.DataFrame) -> None:
    """Scores of methods over column `x`: interquartile mean and range of the seeds."""
    for name in names:
        own = rows[rows["name"] == name]
        table = own.pivot_table(values=found.kind.score, index="x", columns="run").dropna()
        if table.empty:  # there are no runs, or they were evaluated at different times
            continue
        x, samples = table.index.to_numpy(float), table.to_numpy(float)  # [X], [X, seeds]
        low, high, middle = samples.min(-1), samples.max(-1), iqm(samples)
        marks = list(range(0, len(x), -(-len(x) // MARKS)))
        look_of = style(found, name) | {"markersize": 3, "markevery": marks}
        (line,) = axes.plot(x, middle, **look_of, label=name)
        hover(line, *(
            f"{name} at {x[i]:.3g}: {middle[i]:.3f} (seeds {low[i]:.3f} to {high[i]:.3f})"
            for i in marks
        ))  # fmt: skip
        axes.fill_between(x, low, high, color=look_of["color"], alpha=0.12, linewidth=0)


def headline(found: Found) -> Figure:
    """Score against oversight level: the best of each class of assumption, all others faint."""
    best = [names[0] for names in ranked(found).values()]
    figure, (axes,) = new_panels(1, 1, 5.4, 3.6)
    for name in found.names:
        if name not in best and name != found.reference:
            draw_levels(found, axes, name, faint=True)
            axes.get_lines()[-1].set_label(f"_{name}")  # unnamed
    draw_scores(found, axes, best)
    bottom, top = axes.get_ylim()
    if np.isfinite(found.optimum):  # room for its name
        axes.set_ylim(top=max(top, found.optimum + 0.08 * (found.optimum - bottom)))
    label_lines(axes)
    return figure


def scores(found: Found) -> Figure:
    """Score against oversight level by class of assumption; seeds as dots."""
    figure, panels = new_panels(len(found.classes), 2, 5.2, 3.6)
    for axes, (assumed, names) in zip(panels, found.classes.items(), strict=True):
        draw_scores(found, axes, names)
        axes.set_title(assumed)
    one_scale(panels)
    for axes in panels:
        label_lines(axes)
    return figure


def learning(found: Found, groups: Mapping[str, Sequence[str]] | None = None) -> Figure | None:
    """Scores of the deployed policy over training, a panel for each level and group of methods."""
    if found.curves.empty:
        return None
    rows = found.curves[~found.curves["greedy"]]
    unit = 1e6 if rows["env_steps"].max() >= MANY_STEPS else 1
    rows = rows.assign(x=rows["env_steps"] / unit)
    groups = found.classes if groups is None else groups
    drawn = [(title, names, level) for title, names in groups.items() for level in found.levels]
    figure, panels = new_panels(len(drawn), min(3, len(found.levels)), 3.9, 2.6)
    for axes, (title, names, level) in zip(panels, drawn, strict=True):
        here = rows[(rows["level"] == level) & (rows["deploy_oversight"] == level)]
        draw_bands(found, axes, names, here)
        axes.set_title(f"{percent(level)} oversight\n{title}", fontsize=8)
        axes.set_xlabel("environment steps" + (" (million)" if unit > 1 else ""))
        axes.set_ylabel(found.score)
    one_scale(panels)
    for axes in panels:
        label_lines(axes)
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
    axes.pcolormesh(values, cmap=DIVERGING, vmin=0, vmax=1)
    axes.grid(visible=False)
    for i, j in permutations(range(len(table)), 2):
        dark = abs(values[i, j] - 0.5) > 0.35
        text = axes.text(j + 0.5, i + 0.5, f"{values[i, j]:.2f}", ha="center", va="center",
                         fontsize=7, color="#ffffff" if dark else "#111827")  # fmt: skip
        hover(text, f"{table.index[i]} beats {table.columns[j]}: {values[i, j]:.2f}")
    middles = np.arange(len(table)) + 0.5
    names = [short(name) for name in table.index]
    axes.set_xticks(middles, names, rotation=90, fontsize=8)
    axes.set_yticks(middles, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_title("chance that the row beats the column", fontsize=10)
    return figure


HEADLINE = Part(
    "headline",
    "The best of each class of assumption",
    "Score of the deployed policy by how much is labeled: interquartile mean over seeds, 95% "
    "interval, every seed as a dot. Thin lines are the other methods.",
    headline,
)
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
