"""Gathering: what the run folders below a directory hold, and what is missing."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from oversight_rl.agents.methods import METHODS
from oversight_rl.config import flat, read_yaml
from oversight_rl.envs.settings import UserError
from oversight_rl.files import as_text, check_there, read_text
from oversight_rl.sweep import SWEEP, load_sweep, plan
from oversight_rl.tracking import CONFIG, METRICS, TRAINING, RunFolder, deployed_policy

REFERENCE = "routing"  # what the others are compared with


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
    missing += [
        f"Not finished and left out: {listed(names)}{f' in {parent}' if parent != '.' else ''}."
        for parent, names in unfinished.items()
    ]
    missing += _not_begun(directory)
    if not runs:
        more = f": {missing[0]}" if missing else ""
        raise UserError(f"{directory}: no finished run below it{more}")
    runs = _named(runs, missing)
    versions = sorted({run.made_by for run in runs})
    found = Found(**_together(runs), missing=missing, versions=versions)
    _look_for_gaps(found)
    if len(versions) > 1:
        missing.append(f"The runs were made by {len(versions)} different versions, see below.")
    return found


@dataclass
class _Run:
    where: str
    key: tuple[str, float, int]  # method, oversight level, seed
    settings: dict[str, Any]
    made_by: str
    tables: dict[str, pd.DataFrame]
    name: str = ""


def _read(path: Path, where: str) -> _Run | None:
    """A run folder, if the run is finished.

    Raises:
        UserError, ValueError, OSError: it is damaged.
    """
    folder = RunFolder.open(path)
    config = folder.config()
    provenance = read_yaml(path / CONFIG).get("provenance")
    if not folder.finished:
        return None
    results = pd.DataFrame([vars(row) for row in folder.result()])
    name = deployed_policy(config.method, results["policy"])
    curves = _read_table(path / METRICS, NEEDED["curves"])
    if len(curves):
        curves = curves[curves["policy"] == name]
    hidden = {"method", "oversight", "seeds", "device", "threads", "pictures", "evaluation"}
    hidden.add("training" if config.algo == "ppo" else "ppo")  # the learner not in use
    facts = flat(provenance) if isinstance(provenance, dict) else {}
    return _Run(
        where,
        key=(config.method, config.oversight, config.seeds[0]),
        settings=flat(config.model_dump(mode="json", exclude=hidden)),
        made_by=", ".join(f"{k} {v}" for k, v in facts.items()) or "unknown",
        tables={
            "results": results.assign(is_deployed=results["policy"] == name),
            "curves": curves,
            "training": _read_table(path / TRAINING, NEEDED["training"]),
        },
    )


def _together(runs: Sequence[_Run]) -> dict[str, pd.DataFrame]:
    """The tables of all runs, each as one."""
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
        f"{listed(names)} in {parent}" for parent, names in absent.items() if parent not in whole
    ]
    lines = [f"Planned and not begun: {part}." for part in parts]
    return lines + ([f"Planned and not begun: all of {listed(whole)}."] if whole else [])


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
