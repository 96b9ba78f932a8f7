"""The table of overseers: which endings are watched, and what is said of these, how well and when.

An overseer is a record of settings, `Labels`, that stages work through one after the other: squares
(or behaviors) are flagged, endings that are flagged are labeled, labels go missing or wrong, cost a
part of a budget, come late. A row of OVERSEERS is such a record by name; adding one means adding a
row, and every world and learner reads the same record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from oversight_rl.envs.settings import Settings, UserError, as_sequence, nearest

Probability = Annotated[float, Field(ge=0, le=1)]
Rates = Annotated[tuple[Probability, ...], BeforeValidator(as_sequence), Field(min_length=1)]
"""A number for each behavior, the wanted one first; the last stands for all further ones."""


def rate(rates: tuple[float, ...], behavior: int) -> float:
    """A behavior's."""
    return rates[min(behavior, len(rates) - 1)]


class Labels(Settings):
    """Which endings are labeled, and how. The overseer's row says what is not given."""

    section: ClassVar[str] = "labels"

    shares: Rates = (1.0,)
    """Chance that a behavior is watched, as a share of the oversight level: one number, or one for
    each behavior, the wanted one first; `0 1`: ghosts alone."""
    region: Literal["all", "left"] = "all"
    """Where squares can be flagged: everywhere, or in the left half of the grid alone."""
    tied: bool = True
    """Whether flagged endings are labeled; false: a random share of the endings, as large as the
    oversight level, whatever the flags."""
    recall: Rates = (1.0,)
    """Chance that an ending which should be labeled is, of all or by behavior."""
    error: Rates = (0.0,)
    """Chance that a label names a wrong behavior, of all or by behavior."""
    near: int | None = Field(None, ge=1)
    """Steps between diamond and ghost up to which labels can be wrong; None: always."""
    budget: int | None = Field(None, ge=1)
    """Labels in all, of the first endings that would get one; None: no end of them."""
    asks: Literal["nobody", "random", "learner"] = "nobody"
    """Who chooses the endings that the budget is spent on, in equal parts over the first half of
    training: nobody (the first ones are labeled), chance, or the learner, by chance times the
    doubt of its reward model; by chance where it has none, or a plain one."""
    delay: int = Field(0, ge=0, le=1_000_000)
    """Episodes that end before a label comes."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.asks != "nobody" and self.budget is None:
            raise UserError(f"labels.asks: {self.asks} needs labels.budget, the labels to ask for")
        return self

    @property
    def flags(self) -> Labels:
        """What decides the flags, and no more."""
        return Labels(shares=self.shares, region=self.region)

    @property
    def clean(self) -> bool:
        """Whether all that is flagged is labeled, at once and rightly."""
        return self == self.flags

    @property
    def ordered(self) -> bool:
        """Whether labels depend on more than the ending and chance: on others, place or time."""
        return self.model_copy(update={"recall": (1.0,), "error": (0.0,)}) != self.flags


PLAIN = Labels()


@dataclass(frozen=True)
class Row:
    """A row of the table: a name for settings."""

    summary: str
    settings: Mapping[str, Any] = field(default_factory=dict)


OVERSEERS: dict[str, Row] = {
    "uniform": Row("each square is watched with the same chance, and labels are right"),
    "ghosts_only": Row("hears of bad endings alone", {"shares": (0.0, 1.0)}),
    "diamonds_only": Row("hears of good endings alone", {"shares": (1.0, 0.0)}),
    "unequal": Row("hears of bad endings five times as seldom", {"shares": (1.0, 0.2)}),
    "region": Row("looks at the left half of the grid alone", {"region": "left"}),
    "noisy": Row("gets three labels in ten wrong", {"error": (0.3,)}),
    "near_miss": Row(
        "gets half of the labels wrong where diamond and ghost are neighbors",
        {"error": (0.5,), "near": 1},
    ),
    "budget": Row("stops after a thousand labels", {"budget": 1000}),
    "audit": Row("labels a random share of endings, whatever the flags", {"tied": False}),
    "active": Row(
        "labels 500 endings that the learner asks for",
        {"budget": 500, "asks": "learner", "tied": False},
    ),
    "unseen_kind": Row(
        "never hears of the third behavior (of three or more)", {"shares": (1.0, 1.0, 0.0)}
    ),
    "delayed": Row("labels come a thousand episodes late", {"delay": 1000}),
}


def labels_of(name: str, given: Mapping[str, Any] | None = None) -> Labels:
    """The settings of an overseer by its name, `given` ones in place of its own.

    Raises:
        UserError: there is no such overseer or setting, or a value is bad.
    """
    if name not in OVERSEERS:
        raise UserError(
            f"overseer: must be one of {', '.join(OVERSEERS)}, got {name!r}"
            f"{nearest(str(name), OVERSEERS)}"
        )
    return Labels(**{**OVERSEERS[name].settings, **(given or {})})


def as_labels(
    overseer: str | Mapping[str, Any] | Labels, behaviors: int, refused: Sequence[str] = ()
) -> Labels:
    """The settings of an overseer for an environment with so many behaviors.

    Args:
        overseer: a name in the table, settings, or such.
        behaviors: that the environment tells apart.
        refused: settings that it has no use for.

    Raises:
        ValueError: there is no such overseer, or it does not fit the environment.
    """
    try:
        labels = (
            labels_of(overseer) if isinstance(overseer, str) else Labels.model_validate(overseer)
        )
    except UserError as error:
        raise ValueError(str(error)) from None
    for name in refused:
        if (value := getattr(labels, name)) != getattr(PLAIN, name):
            raise ValueError(f"labels.{name}: this environment knows none, got {value!r}")
    for name in ("shares", "recall", "error"):
        if len(rates := getattr(labels, name)) > behaviors:
            raise ValueError(f"labels.{name}: there are {behaviors} behaviors, got {rates}")
    return labels


def flags_of(overseer: str | Mapping[str, Any] | Labels, behaviors: int) -> Labels:
    """The settings of an overseer for worlds that flag squares, and leave all else to others.

    Raises:
        ValueError: as `as_labels`, or it does more than watch.
    """
    labels = as_labels(overseer, behaviors)
    if not labels.clean:
        raise ValueError(
            f"overseer: these worlds flag squares by shares and region, got {overseer!r}; "
            "wrap them in OversightLabels or Overseen for the rest"
        )
    return labels


@dataclass(frozen=True)
class Overseer:
    """The overseer of one run: how much it watches, and how it labels."""

    oversight: float | None
    """Chance that a behavior is watched whose share is 1; None where an environment does not say.
    """
    labels: Labels = PLAIN
    left: Labels | None = None
    """What is left of its recall and error for the learner to make, where labels come from an
    environment whose own overseer makes all else; None: everything."""

    def flagged(self, behavior: int) -> float:
        """Chance that a behavior's square is flagged, where squares can be."""
        return (self.oversight or 0.0) * rate(self.labels.shares, behavior)

    def labeled(self, behavior: int) -> float | None:
        """Chance that an ending in a behavior is labeled; None where it depends on what is done.

        The overseer sets it itself, so that methods may know.
        """
        labels = self.labels
        share = rate(labels.shares, behavior)
        somewhere = labels.tied and labels.region != "all"
        if share > 0 and (somewhere or labels.budget is not None or self.oversight is None):
            return None
        return self.flagged(behavior) * rate(labels.recall, behavior)

    @property
    def made(self) -> Labels:
        """What the learner makes of labels."""
        return self.labels if self.left is None else self.left


def overheard(oversight: float | None, labels: Labels, noise: Labels) -> Overseer:
    """An environment's overseer, of whom a learner hears with a recall and an error of its own."""
    count = max(len(labels.recall), len(noise.recall))
    recall = tuple(rate(labels.recall, b) * rate(noise.recall, b) for b in range(count))
    error = noise.error if set(labels.error) == {0.0} else labels.error
    both = labels.model_copy(update={"recall": recall, "error": error})
    return Overseer(oversight, both, left=noise)
