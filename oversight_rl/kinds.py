"""The table of what can be trained: experiments with their learners, a line each."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from oversight_rl.agents.ppo.config import DEFAULT_METHOD
from oversight_rl.envs.settings import UserError, nearest
from oversight_rl.settings import RunConfig, as_asked, read_yaml

OVERSIGHT = "oversight_rl.experiments.oversight"
UNLEARNING = "oversight_rl.experiments.unlearning"
PARTITION = "oversight_rl.experiments.partition"


@dataclass(frozen=True)
class Kind:
    """What can be trained. Classes are named as `module:Class`, and loaded when they are used."""

    settings: str
    """Its settings, a `RunConfig`, which load no torch."""
    experiment: str
    """How it is trained, judged and shown, an `Experiment`."""
    default_method: str
    stacks: bool = False
    """Whether runs of it train side by side, as one stack."""
    one_environment: bool = False
    """Whether it trains in the default environment only, by methods that may need that one."""


KINDS: dict[str, Kind] = {
    "reinforce": Kind(
        f"{OVERSIGHT}.config:Config", f"{OVERSIGHT}.grid:GridRuns", "routing", True, True
    ),
    "ppo": Kind(f"{OVERSIGHT}.config:Config", f"{OVERSIGHT}.environments:PPORuns", DEFAULT_METHOD),
    "stories": Kind(f"{UNLEARNING}.config:Config", f"{UNLEARNING}.runs:UnlearningRuns", "routing"),
    "partition": Kind(
        f"{PARTITION}.config:PartitionConfig", f"{PARTITION}.runs:Partition", "routed"
    ),
}
"""By the setting `algo`; the first is the default."""


def kind_of(content: Mapping[str, Any]) -> Kind:
    """The kind that settings are of; `UserError` if there is no such kind."""
    algo = content.get("algo", next(iter(KINDS)))
    if not isinstance(algo, str) or algo not in KINDS:
        hint = nearest(str(algo), KINDS)
        raise UserError(f"algo: must be one of {', '.join(KINDS)}, got {algo!r}{hint}")
    return KINDS[algo]


def settings_of(content: Mapping[str, Any]) -> type[RunConfig]:
    """The model of settings that a file's or a command line's are of."""
    return resolve_name(kind_of(content).settings)  # type: ignore[no-any-return]


def as_config(content: Mapping[str, Any], written: bool = False) -> RunConfig:
    """Check settings, nested as in a file; `UserError` if one is unknown or bad.

    If `written` by this program, they may be version 0.1's, by other names.
    """
    model = settings_of(content)
    settings = copy.deepcopy(dict(content))
    for old, new in model.renamed.items():
        value = _pop(settings, old)
        if value is None:
            continue
        if not written:
            raise UserError(f"{old}: is called {new} since version 0.2")
        if old in model.gone:
            raise UserError(f"{old}: {new} cannot say {value!r}; use version 0.1 for this run")
        _put(settings, new, value)
    return model.model_validate(settings)


def _pop(content: dict[str, Any], name: str) -> Any:
    """Take a setting out of nested ones, by its dotted name; None where it is not there."""
    *path, last = name.split(".")
    for part in path:
        content = content.get(part)  # type: ignore[assignment]
        if not isinstance(content, dict):
            return None
    return content.pop(last, None)


def _put(content: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    for part in path:
        content = content.setdefault(part, {})
    content[last] = value


def load_config(path: Path, **others: str) -> RunConfig:
    """Read a configuration file; `others` are settings that stand above it."""
    content = read_yaml(path)
    if "grid" in content:
        command = f"oversight-rl sweep {as_asked(path)} --out DIR"
        raise UserError(f"{path}: is a sweep; run it with {command}")
    # a run folder's says how the run came about
    written = content.pop("provenance", None) is not None
    try:
        return as_config(content | others, written)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
