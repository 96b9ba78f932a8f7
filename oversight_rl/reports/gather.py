"""Gathering: what the run folders below a directory hold, and what a kind of report asks of it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from oversight_rl.envs.settings import UserError
from oversight_rl.files import as_text, check_there, read_text
from oversight_rl.kinds import KINDS
from oversight_rl.runs.experiment import Experiment, experiment_of
from oversight_rl.runs.folder import CONFIG, METRICS, TRAINING, RunFolder
from oversight_rl.runs.rows import deployed_row
from oversight_rl.settings import flat
from oversight_rl.sweeps.plan import SWEEP, load_sweep, plan

MOST_TABLE = 2**28  # bytes of a CSV file that is read
TEXT, TRUTH = ("method", "policy", "evaluator"), ("greedy", "deployed")  # columns, others: numbers
CURVES = {"update", "method", "policy", "greedy", "deploy_oversight", "env_steps"}
ALONE = "labels"  # what methods that assume no more than others say that they assume
ELSEWHERE = {"method", "oversight", "seeds", "device", "threads", "pictures", "evaluation"}
"""Settings that do not tell runs of a method apart."""


@dataclass(frozen=True)
class Part:
    """A figure or a table of a report, under its title."""

    name: str
    """Of the files of a figure."""
    title: str
    caption: str
    draw: Callable[[Found], Figure | pd.DataFrame | None]
    """From what was found; a table has text in its cells; None where there is nothing to show."""


@dataclass(frozen=True)
class Report:
    """What reports on one kind of experiments hold; an experiment names its own as `report`."""

    parts: Sequence[Part]
    """Figures and tables, in order."""
    columns: Callable[[Found, pd.DataFrame], Mapping[str, Any]]
    """More columns of the summary, from the rows of a method's deployed policies at a level."""
    score: str | None = None
    """What the score is called, if not as the figure is."""
    about: str = ""
    """What is scored, in a sentence."""
    reference: str | None = None
    """The method that figures show beside others."""
    question: str = "What does best, by how much is labeled?"
    """What the report answers, in a sentence."""


@dataclass
class Found:
    """What is below a directory. A *name* is a method, with the settings that its runs vary."""

    kind: type[Experiment]
    """The kind of experiment that the runs are."""
    results: pd.DataFrame
    """Rows of every result.json: facts and figures, and columns `name`, `level` (training
    oversight) and `run`."""
    curves: pd.DataFrame
    """The deployed policy's rows of every metrics.csv, with the same columns."""
    training: pd.DataFrame
    """Every training.csv, with the same columns."""
    missing: list[str]
    """What is missing, unreadable or uneven, in sentences."""
    versions: list[str]
    """Commits and versions that made the runs."""

    @cached_property
    def report(self) -> Report:
        return resolve_name(self.kind.report)  # type: ignore[no-any-return]

    @property
    def score(self) -> str:
        return self.report.score or self.kind.score.replace("_", " ")

    @cached_property
    def deployed(self) -> pd.DataFrame:
        """One row per finished run: its deployed policy at the training level."""
        rows = self.results
        own = rows["deploy_oversight"] == rows["train_oversight"]
        return rows[own & rows["deployed"] & ~rows["greedy"]]

    @cached_property
    def methods(self) -> dict[str, str]:
        """The method behind each name, in the order of the experiment's methods."""
        order = list(self.kind.methods)
        pairs = self.deployed[["name", "method"]].drop_duplicates().itertuples(index=False)
        return dict(sorted(pairs, key=lambda pair: (order.index(pair[1]), pair[0])))

    @property
    def names(self) -> list[str]:
        """Names of methods, in the same order."""
        return list(self.methods)

    @cached_property
    def classes(self) -> dict[str, list[str]]:
        """Names of methods by what they assume."""
        classes: dict[str, list[str]] = {}
        for name in self.names:
            classes.setdefault(self.assumes(name), []).append(name)
        return classes

    @cached_property
    def levels(self) -> list[float]:
        """Training oversight levels."""
        return sorted(self.deployed["level"].unique())

    @cached_property
    def optimum(self) -> float:
        """The best score there can be, nan if it is not known."""
        return float(self.deployed[self.kind.optimum].max()) if self.kind.optimum else np.nan

    @property
    def reference(self) -> str | None:
        """Name of the method that figures show beside others, if its runs are all alike."""
        alike = [name for name, other in self.methods.items() if other == self.report.reference]
        return alike[0] if len(alike) == 1 else None

    def assumes(self, name: str) -> str:
        """What a method needs."""
        return str(getattr(self.kind.methods[self.methods[name]], "assumes", ALONE))

    def samples(self, name: str, level: float, figure: str | None = None) -> NDArray[np.float64]:
        """A figure (the score) of a method's deployed policy at a level, over seeds."""
        rows = self.deployed
        own = rows[(rows["name"] == name) & (rows["level"] == level)]
        return own[figure or self.kind.score].to_numpy(float)


def gather(directory: Path) -> Found:
    """Read every run folder below a directory; `UserError` if none is of a finished run."""
    check_there(directory, "folder")
    if not directory.is_dir():
        raise UserError(f"{directory}: is not a folder")
    missing: list[str] = []
    unfinished: dict[str, list[str]] = {}
    runs: list[_Run] = []
    for path in _find(directory):
        where = as_text(path.relative_to(directory))
        try:
            run = _read(path, where)
        except (UserError, ValueError, OSError) as error:
            missing.append(f"{where} cannot be read and is left out ({error}).")
            continue
        if run is None:
            unfinished.setdefault(str(Path(where).parent), []).append(Path(where).name)
        else:
            runs.append(run)
    for parent, names in unfinished.items():
        below = f" in {parent}" if parent != "." else ""
        missing.append(f"Not finished and left out: {listed(names)}{below}.")
    missing += _not_begun(directory)
    if not runs:
        more = f": {missing[0]}" if missing else ""
        raise UserError(f"{directory}: no finished run below it{more}")
    kind = runs[0].kind
    runs = _named(_alike(runs, missing), missing)
    versions = sorted({run.made_by for run in runs})
    found = Found(kind, **_together(runs), missing=missing, versions=versions)
    _look_for_gaps(found)
    if len(versions) > 1:
        missing.append(f"The runs were made by {len(versions)} different versions, see below.")
    return found


@dataclass
class _Run:
    where: str
    kind: type[Experiment]
    key: tuple[str, float, int]  # method, oversight level, seed
    settings: dict[str, Any]
    made_by: str
    tables: dict[str, pd.DataFrame]
    name: str = ""


def _read(path: Path, where: str) -> _Run | None:
    """A run folder, if the run is finished; if it is damaged, what `gather` catches is raised."""
    folder = RunFolder.open(path)
    config = folder.config()
    if not folder.finished:
        return None
    kind, rows = experiment_of(config), folder.result()
    curves = _read_table(path / METRICS, CURVES | {kind.score}, kind)
    if len(curves):  # version 0.1 did not say there which policy is deployed
        named = curves["policy"] == deployed_row(rows).policy
        curves = curves[curves.get("deployed", named)]
    others = set(KINDS) - {config.algo}  # sections of the learners not in use
    return _Run(
        where,
        kind,
        key=(config.method, config.oversight, config.seeds[0]),
        settings=flat(config.model_dump(mode="json", exclude=ELSEWHERE | others)),
        made_by=", ".join(f"{k} {v}" for k, v in folder.provenance.items()) or "unknown",
        tables={
            "results": pd.DataFrame([row.record for row in rows]),
            "curves": curves,
            "training": _read_table(path / TRAINING, {"update"}, kind),
        },
    )


def _alike(runs: Sequence[_Run], missing: list[str]) -> list[_Run]:
    """The runs that are judged as the first is: one report cannot compare others with them."""

    def judged(run: _Run) -> tuple[Any, ...]:
        return run.kind.score, run.kind.optimum, run.kind.report, list(run.kind.methods)

    if others := [run.where for run in runs if judged(run) != judged(runs[0])]:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        missing.append(
            f"Left out: {others[0]}{more}, of another kind of experiment than {runs[0].where}; "
            "report on a folder that holds them alone."
        )
    return [run for run in runs if judged(run) == judged(runs[0])]


def _together(runs: Sequence[_Run]) -> dict[str, pd.DataFrame]:
    tables = {}
    for part in ("results", "curves", "training"):
        frames = [
            run.tables[part].assign(name=run.name, level=run.key[1], run=run.where)
            for run in runs
            if len(run.tables[part])
        ]
        tables[part] = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    return tables


def _find(directory: Path) -> list[Path]:
    """Every run folder below a directory; links to folders are followed, none twice."""
    found, met = [], set()
    for folder, below, names in os.walk(directory, followlinks=True):
        where = os.path.realpath(folder)
        if where in met:
            below.clear()
            continue
        met.add(where)
        below.sort()
        if CONFIG in names:
            found.append(Path(folder))
    return sorted(found)


def _read_table(path: Path, needed: set[str], kind: type[Experiment]) -> pd.DataFrame:
    """A CSV file, empty if there is none; `ValueError` if columns miss or hold what they cannot."""
    if not path.is_file() or not path.stat().st_size:
        return pd.DataFrame()
    table = pd.read_csv(io.StringIO(read_text(path, MOST_TABLE)))
    if not needed <= set(table):
        raise ValueError(f"{path.name} has no column {', '.join(sorted(needed - set(table)))}")
    if "method" in table and not table["method"].isin(list(kind.methods)).all():
        raise ValueError(f"{path.name} names a method that is none")
    for column in table:
        dtype = table[column].dtype
        fits = pd.api.types.is_numeric_dtype(dtype) != (column in TEXT)
        if column in TRUTH:
            fits = pd.api.types.is_bool_dtype(dtype)
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
    whole = [parent for parent in absent if not (directory / parent).is_dir()]
    parts = [f"{listed(absent[parent])} in {parent}" for parent in absent if parent not in whole]
    parts += [f"all of {listed(whole)}"] if whole else []
    return [f"Planned and not begun: {part}." for part in parts]


def _named(runs: Sequence[_Run], missing: list[str]) -> list[_Run]:
    """Name runs by method and whatever else differs among runs of the method; drop repeats."""
    for method in {run.key[0] for run in runs}:
        own = [run for run in runs if run.key[0] == method]
        settings = pd.DataFrame([run.settings for run in own]).astype(str)
        varied = [str(column) for column in settings if settings[column].nunique() > 1]
        for run in own:
            extra = ", ".join(f"{k}={run.settings.get(k)}" for k in varied)
            run.name = f"{method} ({extra})" if extra else method
    kept: dict[tuple[Any, ...], _Run] = {}
    for run in runs:
        first = kept.setdefault((run.name, *run.key), run)
        if first is not run:
            missing.append(f"{run.where} repeats {first.where}; it is left out.")
    return list(kept.values())


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


def listed(words: Sequence[str]) -> str:
    """Words with commas, the last after `and`."""
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]


def percent(level: float) -> str:
    """An oversight level as text."""
    return f"{100 * level:.3g}%"
