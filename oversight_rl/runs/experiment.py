"""What an experiment is to the loop, the commands, sweeps and reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pkgutil import resolve_name
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

from oversight_rl.agents.learner import Learner
from oversight_rl.envs.settings import UserError, nearest
from oversight_rl.kinds import KINDS
from oversight_rl.runs.rows import Facts, Row, check_row, deployed_row
from oversight_rl.settings import RunConfig

LOG_EVERY = 10  # updates between points of the training curves


View: TypeAlias = bytes | dict[str, list[tuple[str, str]]]
"""Of a page: a PNG file, or texts by heading, each how it begins and how it goes on."""


class Experiment(ABC):
    """Runs of one kind: how they are trained, judged and shown.

    A kind of experiment is a subclass, and a line in `kinds.KINDS`.

    Args:
        configs: one per run that trains in the stack, with one seed each.
    """

    score: ClassVar[str] = "score"
    """The figure that policies are ranked by; more is better."""
    optimum: ClassVar[str | None] = None
    """The figure that says the best score that there can be, if one does."""
    error: ClassVar[str | None] = None
    """The figure that says the score's standard error, if one does."""
    methods: ClassVar[Mapping[str, Any]]
    """What can be trained with, by name: what has a `summary`, and `assumes` (labels, if not)."""
    report: ClassVar[str] = "oversight_rl.reports.figures:STANDARD"
    """What its reports hold, a `reports.gather.Report` as `module:NAME`, loaded when it is used."""
    panel: ClassVar[str | None] = None
    """The setting by whose values a report has a page each, if there is one."""
    panels: ClassVar[Sequence[str]] = ()
    """These values, in order."""
    charts: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    """Charts of several curves on TensorBoard's page, by group and title: a pattern of tags."""
    forgets: ClassVar[bool] = False
    """Whether its runs learn to forget: `evaluate` has a policy before and one after, and `texts`
    shows them."""

    looks: ClassVar[str] = ""
    """Flags of `evaluate` that show what its runs are about."""
    page: ClassVar[tuple[str, str, str]] = "A trained network", "What it does", "Shown"
    """Of a page with `views`: its title, their heading, what they are."""

    configs: Sequence[RunConfig]
    learner: Learner

    @abstractmethod
    def __init__(self, configs: Sequence[Any]) -> None: ...

    @abstractmethod
    def evaluate(self, facts: Sequence[Facts]) -> list[list[Row]]:
        """The table of each run as it is now, each policy at the training oversight level."""

    def final(self, facts: Sequence[Facts]) -> list[list[Row]]:
        """The last table of each run."""
        return self.evaluate(facts)

    def pictures(self, run: int) -> dict[str, bytes]:
        """PNG and GIF files of a run as it is now, by name."""
        return {}

    def texts(self, run: int) -> dict[str, str]:
        """Texts about a run as it is now, Markdown by name."""
        return {}

    def views(self, run: int) -> dict[str, View]:
        """What a page shows of a run as it was last evaluated, one at a time, by name."""
        return {}

    def snapshot(self, run: int) -> dict[str, Tensor]:
        """What is kept of a run as it is now, to be looked at later, by name; if anything is."""
        return {}

    def close(self) -> None:  # noqa: B027, most have nothing to close
        """Let go of what is held."""

    @classmethod
    def has_page(cls) -> bool:
        """Whether `oversight-rl play` makes a page of its runs; of `views`, by default."""
        return cls.views is not Experiment.views

    @classmethod
    def try_out(cls, config: Any) -> None:
        """Refuse, by `UserError`, what cannot be trained here, before anything is written."""
        if (name := config.method) not in cls.methods:
            known = f"must be one of {', '.join(cls.methods)}, got {name!r}"
            raise UserError(f"method: {known}{nearest(name, cls.methods)}")
        if not hasattr(getattr(config, "learner", None), "updates"):
            raise UserError(f"{config.algo}: must be settings that say how many updates there are")
        config.torch_device()

    @classmethod
    def check(cls, rows: Sequence[Row]) -> None:
        """Refuse, by `ValueError`, a table that says what cannot be."""
        others = {figure for figure in (cls.optimum, cls.error) if figure}
        for row in rows:
            check_row(row, cls.methods, cls.score)
            if row.figures.keys() != rows[0].figures.keys() or not row.figures.keys() >= others:
                raise ValueError(f"rows of other figures: {', '.join(row.figures)}")
        deployed_row(rows)

    @classmethod
    def shown(cls, figures: Sequence[str], details: bool = False) -> dict[str, str]:
        """Which of the figures that there are tables and curves show, each by a short name.

        With `details`, a policy is looked at by itself.
        """
        return {figure: figure for figure in figures}

    @classmethod
    def shown_of(cls, row: Row) -> dict[str, float]:
        """The figures of a row that are shown, by their short names."""
        return {s: row.figures[name] for s, name in cls.shown(list(row.figures)).items()}

    @classmethod
    def notes(cls, rows: Sequence[Row]) -> list[str]:
        """What to say of a table's figures below it, in lines."""
        return []

    @classmethod
    def describe(cls, config: Any) -> str:
        """What to say of a run on its page in TensorBoard, as Markdown."""
        return ""


def experiment_of(config: RunConfig) -> type[Experiment]:
    """The kind of experiment that a configuration is of."""
    return resolve_name(KINDS[config.algo].experiment)  # type: ignore[no-any-return]
