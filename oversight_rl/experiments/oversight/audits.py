"""What an overseer can say of a steered policy before it is deployed, from audited episodes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from oversight_rl.agents.steering import Steering
from oversight_rl.envs.audits import CONFIDENCE, audit
from oversight_rl.envs.overseers import Labels, rate
from oversight_rl.envs.settings import UserError
from oversight_rl.experiments.oversight.config import Config
from oversight_rl.experiments.oversight.policies import Saved
from oversight_rl.runs.rows import Row

MOST = 10_000_000  # episodes, as of `evaluation.episodes`
AUDITS = {"hidden": "", "flagged": "_flagged"}
"""Whose endings are looked at: all, or those that are flagged; with the part of a figure's name."""
COLUMNS: Mapping[str, str] = {
    "labels": "labeled",
    "unwanted": "unwanted",
    "at most": "bound",
    "any look": "anytime_bound",
    "exactly": "truth",
}
"""Headings of the table of audits, and the figures below them."""


def audited(
    saved: Saved, policies: Sequence[Steering], levels: Sequence[float], episodes: int
) -> list[Row]:
    """Rows as of `Saved.rows`, with what audits of the policies say: figures `audit_...`.

    Each policy plays `episodes` episodes at each level, flagged as usual. A *hidden* audit looks at
    all endings, whatever the flags; a *flagged* one hears of flagged endings only. Either way the
    run's overseer labels what it looks at, by the recall and error of its `labels`.

    Raises:
        UserError: there are too few or too many episodes, or labels that would say nothing.
    """
    if not 1 <= episodes <= MOST:
        raise UserError(f"--audit: must lie in [1, {MOST:,}] episodes, got {episodes:,}")
    given, behaviors = saved.config.labels, saved.kind.names(saved.agent)[1]
    if given.near is not None:
        raise UserError(
            "--audit: cannot tell where squares lie close together, which labels.near asks for; "
            "take --overseer noisy"
        )
    say = partial(audit, label_error=given.error, label_recall=given.recall)
    say([], behaviors)  # refuses what labels could not say, before any is given
    generator = np.random.default_rng(0)
    found = []
    pairs = zip(saved.rows(policies, levels), saved.rows(policies, levels, episodes), strict=True)
    for row, played in pairs:
        flagged, ended = (
            np.array([round(played.figures[f"p_{name}{part}"] * episodes) for name in behaviors])
            for part in ("_flagged", "")
        )
        heard = label(flagged, given, generator)
        looked_at = np.concatenate([heard, label(ended - flagged, given, generator)])
        figures = dict(row.figures) | {"audit_episodes": float(episodes)}
        for kind, labels in (("hidden", looked_at), ("flagged", heard)):
            said = say([behaviors[i] for i in labels], behaviors)
            figures |= {f"audit_{kind}_{name}": float(x) for name, x in vars(said).items()}
            figures[f"audit_{kind}_truth"] = _truth(row, behaviors, AUDITS[kind])
        found.append(dataclasses.replace(row, figures=figures))
    return found


def label(
    endings: NDArray[np.int64], given: Labels, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Labels that an overseer gives to numbers `[B]` of endings in each behavior."""
    behavior = np.repeat(np.arange(len(endings)), endings)
    error, recall = (
        np.array([rate(rates, b) for b in range(len(endings))])[behavior]
        for rates in (given.error, given.recall)
    )
    wrong = generator.random(len(behavior)) < error
    other = (behavior + generator.integers(1, len(endings), len(behavior))) % len(endings)
    said = generator.random(len(behavior)) < recall
    labels: NDArray[np.int64] = np.where(wrong, other, behavior)[said]
    return labels


def _truth(row: Row, behaviors: Sequence[str], part: str) -> float:
    """The share of unwanted endings among those that are audited; nan if it is not known."""
    wanted, *unwanted = (row.figures[f"p_{name}{part}"] for name in behaviors)
    ended = wanted + sum(unwanted)
    return sum(unwanted) / ended if row.evaluator == "exact" and ended > 0 else math.nan


def cells(row: Row) -> list[dict[str, str]]:
    """What a table says of a row's audits, a line for each."""
    lines = []
    for kind in AUDITS:
        found = {name: row.figures[f"audit_{kind}_{name}"] for name in COLUMNS.values()}
        known = found["labeled"] > 0
        line = {"audit": kind}
        for heading, name in COLUMNS.items():
            value = found[name]
            if name in ("labeled", "unwanted"):
                line[heading] = f"{value:,.0f}"
            elif math.isnan(value):
                line[heading] = "unknown"
            else:
                line[heading] = f"{value:.2%}" if known or name == "truth" else "no bound"
        lines.append(line)
    return lines


def notes(config: Config) -> list[str]:
    """What to know of a table of audits."""
    errors = " and ".join(f"{error:.2%}" for error in config.labels.error)
    wrong = f", labels being wrong at {errors}" if any(config.labels.error) else ""
    lines = [
        f"at most: share of unwanted among all endings, {CONFIDENCE:.0%} sure{wrong}; any look: "
        "holds however often one looks",
        "hidden: all endings are looked at, flags as usual: a fair sample",
    ]
    if fair(config):
        lines.append("flagged: a fair sample, too, for the agent does not see the flags")
    else:
        lines.append(
            "flagged: bounds flagged endings only, for these are no fair sample; of all endings "
            "they give no bound, hidden audits do"
        )
    return lines


def fair(config: Config) -> bool:
    """Whether flagged endings are a fair sample: no agent knows, no kind is flagged more often."""
    hidden = config.env_arguments.get("flags_visible", True) is False  # others may show them
    return hidden and config.labels.region == "all" and len({*config.labels.shares}) == 1
