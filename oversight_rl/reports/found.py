"""What a report is made of: the runs that were found, and the parts that a kind of report has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from oversight_rl.runs.experiment import Experiment


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
    reference: tuple[str, str] | None = None
    """The method that others are compared with, and what the verdict calls it."""


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
        """What reports on these runs hold."""
        return resolve_name(self.kind.report)  # type: ignore[no-any-return]

    @property
    def score(self) -> str:
        """What the score is called."""
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
    def levels(self) -> list[float]:
        """Training oversight levels."""
        return sorted(self.deployed["level"].unique())

    @cached_property
    def optimum(self) -> float:
        """The best score there can be, nan if it is not known."""
        return float(self.deployed[self.kind.optimum].max()) if self.kind.optimum else np.nan

    @property
    def reference(self) -> str | None:
        """Name of the method that others are compared with, if its runs are all alike."""
        method = self.report.reference and self.report.reference[0]
        alike = [name for name, other in self.methods.items() if other == method]
        return alike[0] if len(alike) == 1 else None

    def samples(self, name: str, level: float, figure: str | None = None) -> NDArray[np.float64]:
        """A figure (the score) of a method's deployed policy at a level, over seeds."""
        rows = self.deployed
        own = rows[(rows["name"] == name) & (rows["level"] == level)]
        return own[figure or self.kind.score].to_numpy(float)


def listed(words: Sequence[str]) -> str:
    """Words with commas, the last after `and`."""
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]


def percent(level: float) -> str:
    """An oversight level as text."""
    return f"{100 * level:.3g}%"
