"""Reports: tables, statistics and figures from the run folders below a directory.

`gather` reads what is there and says what is missing; each figure and table is a function of what
it found; `write` puts them together.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from oversight_rl.agents.methods import METHODS
from oversight_rl.config import flat, read_yaml
from oversight_rl.envs.settings import UserError
from oversight_rl.files import as_text, check_there, read_text, write_atomically, writing
from oversight_rl.statistics import (
    differ,
    interquartile_mean,
    iqm,
    probability_of_improvement,
)
from oversight_rl.sweeps.plan import SWEEP, load_sweep, plan
from oversight_rl.tracking import CONFIG, METRICS, TRAINING, RunFolder, deployed_policy

REFERENCE = "routing"  # what the others are compared with
PAPER = {"routing": "gradient_routing", "filtering": "data_filtering", "naive": "naive"}
"""Columns of the paper's figure 6a, by method."""
INK = "#010203"  # stands for the color of the page's text in figures
PALETTE = (
    *("#0d9488", "#2563eb", "#84a30c", "#a16207", "#94a3b8"),
    *("#dc2626", "#f97316", "#9333ea", "#db2777", "#7c6fe0"),
    *("#b4532a", "#e09f9f", "#64748b", "#38a3c9"),
)
COLORS = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(METHODS)}
GROUPS: dict[str, Callable[[str], bool]] = {
    "routing, its ablations and controls": lambda m: METHODS[m].policy.experts == "many",
    "one policy, labels only": lambda m: (
        (METHODS[m].policy.experts, METHODS[m].assumes) == ("one", "labels")
    ),
    "methods that need more than labels": lambda m: METHODS[m].assumes != "labels",
}


@dataclass
class Found:
    """What is below a directory. A *name* is a method, with the settings that its runs vary."""

    results: pd.DataFrame
    """Rows of every result.json, with columns `name`, `level` (training oversight) and `run`."""
    curves: pd.DataFrame
    """The deployed policy's rows of every metrics.csv, with the same columns."""
    training: pd.DataFrame
    """Every training.csv, with the same columns."""
    missing: list[str] = field(default_factory=list)
    """What is missing, unreadable or uneven, in sentences."""
    versions: list[str] = field(default_factory=list)
    """Commits and versions that made the runs."""

    @cached_property
    def deployed(self) -> pd.DataFrame:
        """One row per finished run: its deployed policy at the training level."""
        rows = self.results
        own = rows["deploy_oversight"] == rows["train_oversight"]
        deployed = rows["is_deployed"]
        return rows[own & deployed & ~rows["greedy"]]

    @cached_property
    def names(self) -> list[str]:
        """Names of methods, in the order of the table of methods."""
        order = list(METHODS)
        found = self.deployed[["name", "method"]].drop_duplicates()
        return sorted(found["name"], key=lambda n: (order.index(self.method(n)), n))

    @cached_property
    def levels(self) -> list[float]:
        """Training oversight levels."""
        return sorted(self.deployed["level"].unique())

    @property
    def reference(self) -> str | None:
        """Name of the method that others are compared with, if its runs are all alike."""
        alike = [name for name in self.names if self.method(name) == REFERENCE]
        return alike[0] if len(alike) == 1 else None

    def method(self, name: str) -> str:
        """The method behind a name."""
        return name.split(" ")[0]


def gather(directory: Path) -> Found:
    """Read every run folder below a directory.

    Raises:
        UserError: there is no finished run.
    """
    check_there(directory, "folder")
    if not directory.is_dir():
        raise UserError(f"{directory}: is not a folder")
    missing: list[str] = []
    unfinished: dict[str, list[str]] = {}
    runs: list[dict[str, Any]] = []
    for path in _find(directory):
        where = as_text(path.parent.relative_to(directory))
        folder = RunFolder.open(path.parent)
        try:
            config = folder.config()
            provenance = read_yaml(path).get("provenance")
            if not folder.finished:
                unfinished.setdefault(str(Path(where).parent), []).append(Path(where).name)
                continue
            result = pd.DataFrame([vars(row) for row in folder.result()])
            name = deployed_policy(config.method, result["policy"])
            parts = {"results": result.assign(is_deployed=result["policy"] == name)}
            for part, file in (("curves", METRICS), ("training", TRAINING)):
                table = path.parent / file
                parts[part] = _read_table(table, NEEDED[part])
            if len(parts["curves"]):
                own = parts["curves"]["policy"] == name
                parts["curves"] = parts["curves"].assign(is_deployed=own)
        except (UserError, ValueError, OSError) as error:
            missing.append(f"{where} cannot be read and is left out ({error}).")
            continue
        hidden = {"method", "oversight", "seeds", "device", "threads", "pictures", "evaluation"}
        hidden.add("training" if config.algo == "ppo" else "ppo")  # the learner not in use
        settings = flat(config.model_dump(mode="json", exclude=hidden))
        key = (config.method, config.oversight, config.seeds[0])
        runs.append(
            {
                "where": where,
                "key": key,
                "settings": settings,
                "provenance": provenance if isinstance(provenance, dict) else {},
                **parts,
            }
        )
    missing += [
        f"Not finished and left out: {_list(names)}{f' in {parent}' if parent != '.' else ''}."
        for parent, names in unfinished.items()
    ]
    missing += _not_begun(directory)
    if not runs:
        more = f": {missing[0]}" if missing else ""
        raise UserError(f"{directory}: no finished run below it{more}")
    _name(runs, missing)
    tables: dict[str, pd.DataFrame] = {}
    for part in ("results", "curves", "training"):
        frames = [
            run[part].assign(name=run["name"], level=run["key"][1], run=run["where"])
            for run in runs
            if len(run[part])
        ]
        tables[part] = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    curves = tables["curves"]
    if len(curves):
        tables["curves"] = curves[curves["is_deployed"]]
    found = Found(tables["results"], tables["curves"], tables["training"], missing)
    _look_for_gaps(found)
    made_by = {
        ", ".join(f"{k} {v}" for k, v in flat(run["provenance"]).items()) or "unknown"
        for run in runs
    }
    found.versions = sorted(made_by)
    if len(made_by) > 1:
        found.missing.append(f"The runs were made by {len(made_by)} different versions, see below.")
    return found


def _find(directory: Path) -> list[Path]:
    """The settings of every run below a directory; links to folders are followed, none twice."""
    found, met = [], set()
    for folder, below, names in os.walk(directory, followlinks=True):
        where = os.path.realpath(folder)
        if where in met:
            below.clear()
            continue
        met.add(where)
        below.sort()
        if CONFIG in names:
            found.append(Path(folder) / CONFIG)
    return sorted(found)


MOST_TABLE = 2**28  # bytes of a CSV file that is read
TEXT = ("method", "policy", "evaluator")  # columns that hold words, the others numbers
NEEDED = {
    "curves": {
        *("update", "method", "policy", "greedy"),
        *("deploy_oversight", "env_steps", "ground_truth_return"),
    },
    "training": {"update"},
}


def _read_table(path: Path, needed: set[str]) -> pd.DataFrame:
    """A CSV file, empty if there is none.

    Raises:
        ValueError: columns are missing, or hold what they cannot.
        UserError: the file is too long, or no text.
    """
    if not path.is_file() or not path.stat().st_size:
        return pd.DataFrame()
    table = pd.read_csv(io.StringIO(read_text(path, MOST_TABLE)))
    if not needed <= set(table):
        raise ValueError(f"{path.name} has no column {', '.join(sorted(needed - set(table)))}")
    if "method" in table and not table["method"].isin(list(METHODS)).all():
        raise ValueError(f"{path.name} names a method that is none")
    for column in table:
        kind = table[column].dtype
        fits = (
            pd.api.types.is_bool_dtype(kind)
            if column == "greedy"
            else pd.api.types.is_numeric_dtype(kind) != (column in TEXT)
        )
        known = column not in needed or not table[column].isin([np.nan, np.inf, -np.inf]).any()
        if not (fits and known):
            raise ValueError(f"{path.name} is damaged in its column {column}")
    return table


def _not_begun(directory: Path) -> list[str]:
    """Runs that a sweep in this folder plans and has not begun, in sentences."""
    if not (directory / SWEEP).is_file():
        return []
    try:
        runs = plan(load_sweep(directory / SWEEP), directory)
    except UserError as error:
        return [f"The sweep cannot be read ({error})."]
    absent: dict[str, list[str]] = {}
    for run in runs:
        if not (run.path / CONFIG).is_file():
            absent.setdefault(run.path.parent.name, []).append(run.path.name)
    whole = [parent for parent, names in absent.items() if not (directory / parent).is_dir()]
    parts = [
        f"{_list(names)} in {parent}" for parent, names in absent.items() if parent not in whole
    ]
    lines = [f"Planned and not begun: {part}." for part in parts]
    return lines + ([f"Planned and not begun: all of {_list(whole)}."] if whole else [])


def _name(runs: list[dict[str, Any]], missing: list[str]) -> None:
    """Name runs by method and whatever else differs among runs of the method; drop repeats."""
    for method in {run["key"][0] for run in runs}:
        own = [run for run in runs if run["key"][0] == method]
        settings = pd.DataFrame([run["settings"] for run in own]).astype(str)
        varied = [column for column in settings if settings[column].nunique() > 1]
        for run in own:
            extra = ", ".join(f"{k}={run['settings'].get(k)}" for k in varied)
            run["name"] = f"{method} ({extra})" if extra else method
    seen: dict[tuple[Any, ...], str] = {}
    for run in list(runs):
        key = (run["name"], *run["key"])
        if key in seen:
            missing.append(f"{run['where']} repeats {seen[key]}; it is left out.")
            runs.remove(run)
        seen.setdefault(key, run["where"])


def _look_for_gaps(found: Found) -> None:
    cells = found.deployed.groupby(["name", "level"])["seed"].agg(set).to_dict()
    every = set.union(*cells.values())
    for name in found.names:
        absent = [f"{level:.3g}" for level in found.levels if (name, level) not in cells]
        if absent:
            found.missing.append(f"{name} has no run at oversight {', '.join(absent)}.")
        for level in found.levels:
            seeds = cells.get((name, level), every)
            if len(seeds) < len(every):
                lacks = ", ".join(str(seed) for seed in sorted(every - seeds))
                alone = "; one seed has no interval" if len(seeds) == 1 else ""
                found.missing.append(f"{name} at {level:.3g} lacks seeds {lacks}{alone}.")


# ---- tables


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
        estimate = interquartile_mean([rows["ground_truth_return"]])
        window = interquartile_mean([rows["window_return"]])
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
            place = f"{_percent(level)} ({best['iqm']:.2f})"
            leaders.setdefault(str(best["method"]), []).append(place)
    led = "; ".join(f"{name} at {_list(levels)}" for name, levels in leaders.items())
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
            (above if better else below).setdefault(name, []).append(_percent(level))

    def told(at: dict[str, list[str]], alone: bool) -> str:
        parts = [
            f"{name} at {'every level' if len(levels) == len(found.levels) else _list(levels)}"
            for name, levels in at.items()
            if (assumes[name] == "labels") == alone
        ]
        return "; ".join(parts) or "none"

    return (
        f"{text}; of them, gradient routing is beaten by {told(above, True)}, and beats "
        f"{told(below, True)}; of the methods that assume more, it is beaten by "
        f"{told(above, False)}, and beats {told(below, False)}."
    )


def _list(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]


def _percent(level: float) -> str:
    return f"{100 * level:.3g}%"


# ---- figures


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
    axes.set_xticks(list(places.values()), [_percent(level) for level in levels])
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
    estimates = [interquartile_mean([values]) for values in samples]
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
        axes.set_title(f"{_percent(level)} oversight")
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
        axes.set_title(f"{_percent(level)} oversight")
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
            axes.set_title(_percent(level), fontsize=9)
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
        axes.set_title(f"{_percent(level)} oversight")
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


# ---- the report


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


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, facecolor="white")
    return buffer.getvalue()


def write(directory: Path) -> tuple[Found, str]:
    """Write report.html, summary.csv and figures/ from the runs below a directory, into it.

    Returns:
        What was found, with what is missing; and the verdict.

    Raises:
        UserError: there is no finished run, or the directory cannot be written.
    """
    found = gather(directory)
    table = summary(found)
    sentence = verdict(found, table)
    drawn = []
    with writing(directory):
        (directory / "figures").mkdir(exist_ok=True)
        for name, kind in itertools.product(CAPTIONS, ("svg", "png")):
            (directory / "figures" / f"{name}.{kind}").unlink(missing_ok=True)
        for name, figure in figures(found):
            svg = _svg(figure)
            write_atomically(directory / "figures" / f"{name}.svg", svg.encode())
            write_atomically(directory / "figures" / f"{name}.png", _png(figure))
            inline = svg[svg.index("<svg") :].replace(INK, "currentColor")
            drawn.append((*CAPTIONS[name], Markup(inline)))
        write_atomically(directory / "summary.csv", table.to_csv(index=False).encode())
        page = _page(found, table, sentence, drawn, as_text(directory.resolve().name))
        write_atomically(directory / "report.html", page.encode())
    return found, sentence


def _page(
    found: Found, table: pd.DataFrame, sentence: str, drawn: Sequence[Any], title: str
) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["percent"] = _percent
    source = files("oversight_rl").joinpath("data/report.html.j2").read_text()
    cells = {(row["method"], row["train_oversight"]): row for row in table.to_dict("records")}
    return environment.from_string(source).render(
        title=title,
        found=found,
        methods={name: METHODS[found.method(name)] for name in found.names},
        colors={name: color(found, name) for name in found.names},
        cells=cells,
        best={
            level: max(
                (row["iqm"] for row in cells.values() if row["train_oversight"] == level), default=0
            )
            for level in found.levels
        },
        verdict=sentence,
        figures=drawn,
        reward_models=_reward_models(found),
        runs=len(found.deployed),
        cost=table.groupby("method", sort=False)[["env_steps", "wall_seconds"]].mean().T.to_dict(),
        optimum=float(found.deployed["optimal_return"].max()),
    )


REWARD_MODEL = [
    f"reward_model/{figure}_{kind}"
    for figure in ("accuracy", "calibration_error")
    for kind in ("labeled", "unlabeled")
]


def _reward_models(found: Found) -> list[dict[str, Any]]:
    """Reward models against the truth over the last tenth of training."""
    if not set(REWARD_MODEL) <= set(found.training):
        return []
    rows = found.training.dropna(subset=REWARD_MODEL[1])
    late = rows[rows["update"] > 0.9 * rows.groupby("run")["update"].transform("max")]
    means = late.groupby(["name", "level"])[REWARD_MODEL].mean().reset_index()
    return [{str(k): v for k, v in record.items()} for record in means.to_dict("records")]
