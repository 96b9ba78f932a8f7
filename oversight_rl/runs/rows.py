"""Rows: what a policy of a run was found to do, in named figures, as tables and files have them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from oversight_rl.envs.settings import UserError
from oversight_rl.files import read_json, write_atomically

MOST_RESULT = 2**26  # bytes of a result.json that is read
LARGEST = 1e15  # of a figure


@dataclass(frozen=True)
class Facts:
    """A run, and how far it has come."""

    method: str
    seed: int
    train_oversight: float
    """Share of the episodes (or of the data) that was labeled in training."""
    env_steps: int = 0
    """Steps taken in training, over all worlds of the run, looks that select an agent included."""
    wall_seconds: float = 0.0
    """Training time of the stack, evaluation left out, over its number of runs."""


@dataclass(frozen=True, kw_only=True)
class Row(Facts):
    """One line of a result table: a policy of a run at a deployment oversight level."""

    deploy_oversight: float
    policy: str
    deployed: bool = True
    """Whether it is the policy that the method deploys."""
    greedy: bool = False
    temperature: float = 1.0
    figures: Mapping[str, float]
    """What it was found to do, by name; nan where that is not known."""
    evaluator: str = "exact"
    """`exact` (dynamic programming) or `rollout` (sampled episodes)."""

    @classmethod
    def of(cls, facts: Facts, policy: str, figures: Mapping[str, float], **others: Any) -> Row:
        """A row of a run, at its training level if `others` name none."""
        known = vars(facts) | {"deploy_oversight": facts.train_oversight} | others
        return cls(policy=policy, figures={k: float(v) for k, v in figures.items()}, **known)

    @property
    def record(self) -> dict[str, Any]:
        """The row as files have it: one level of names, figures among them."""
        first, last = ({name: getattr(self, name) for name in part} for part in (BEFORE, AFTER))
        return first | dict(self.figures) | last


# in the order of files, before the figures and after them
BEFORE = ("method", "seed", "train_oversight", "deploy_oversight", "policy", "deployed", "greedy",
          "temperature")  # fmt: skip
AFTER = ("evaluator", "env_steps", "wall_seconds")
FACTS = BEFORE + AFTER
TAKEN = {*FACTS, "update", "name", "level", "run", "panel"}  # columns of tables beside the figures
_ROW = TypeAdapter(Row)  # checks the types of what is read


def deployed_row(rows: Sequence[Row]) -> Row:
    """The row of the deployed policy, sampled, at the training oversight level."""
    as_trained = (row for row in rows if row.deploy_oversight == row.train_oversight)
    found = [row for row in as_trained if row.deployed and not row.greedy]
    if len(found) != 1:
        raise ValueError(f"one row must be of the deployed policy as trained, got {len(found)}")
    return found[0]


def deployed_before(policies: Sequence[str]) -> str | None:
    """The deployed one among the policies of a table of version 0.1, which does not say so.

    There, a mixture came first, then its experts, the wanted behavior's before others.
    """
    names = list(dict.fromkeys(policies))
    place = int(names[:1] == ["mixture"])
    return names[place] if place < len(names) else None


def read_rows(path: Path, check: Callable[[Sequence[Row]], None]) -> list[Row]:
    """The rows of a JSON file; `UserError` if it is no list of rows, or they fail the check."""
    records = read_json(path, MOST_RESULT)
    try:
        before = deployed_before([record["policy"] for record in records])
        rows = [_row(record, before) for record in records]
        check(rows)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path}: not a readable result ({error})") from None
    return rows


def _row(record: Mapping[str, Any], deployed: str | None) -> Row:
    known = {name: math.nan if value is None else value for name, value in record.items()}
    facts = {name: known.pop(name) for name in FACTS if name in known}
    facts.setdefault("deployed", facts["policy"] == deployed)
    return _ROW.validate_python(facts | {"figures": known})


def check_row(row: Row, methods: Container[str], score: str) -> None:
    """Refuse, by `ValueError`, what cannot be, of runs of these methods with a known score."""
    if odd := [name for name in row.figures if name in TAKEN or not name.isprintable()]:
        raise ValueError(f"a figure cannot be called {odd[0]!r}")
    if score not in row.figures:
        raise ValueError(f"{score} is missing")
    for name, value in row.record.items():
        if name == "method":
            fine = value in methods
        elif isinstance(value, float) and math.isnan(value):
            fine = name in row.figures and name != score
        elif name.startswith("p_") or name.endswith("oversight"):
            fine = -1e-6 <= value <= 1 + 1e-6  # sums of chances round
        else:
            fine = not isinstance(value, int | float) or not abs(value) > LARGEST
        if not fine:
            raise ValueError(f"{name} cannot be {value!r}")


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Rows as a JSON list; nan is written as null."""
    records = [
        {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.record.items()}
        for row in rows
    ]
    write_atomically(path, (json.dumps(records, indent=1) + "\n").encode())
