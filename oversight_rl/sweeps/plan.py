"""What a sweep trains: its settings, the runs that they combine to, the stacks of those."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from oversight_rl.envs.settings import Settings, UserError, as_sequence, nearest
from oversight_rl.kinds import as_config, kind_of
from oversight_rl.runs import checkpoint
from oversight_rl.runs.experiment import experiment_of
from oversight_rl.runs.folder import CHECKPOINTS, RESULT
from oversight_rl.settings import RunConfig, as_asked, read_yaml

SWEEP = "sweep.yaml"
MOST_RUNS = 100_000  # of a sweep

Values = Annotated[tuple[Any, ...], BeforeValidator(as_sequence), Field(min_length=1)]


Grid = dict[str, Values]


def as_grids(value: Any) -> Any:
    """Several grids where one may stand."""
    return value if isinstance(value, list | tuple) else (value,)


class SweepConfig(Settings):
    """A sweep: a run for every combination of the values in `grid`, or in each of several."""

    section: ClassVar[str] = "sweep"

    settings: dict[str, Any] = {}
    """What all runs share, as in a configuration file of one run."""
    grid: Annotated[
        tuple[Annotated[Grid, Field(min_length=1)], ...],
        BeforeValidator(as_grids),
        Field(min_length=1),
    ]
    """Values to combine, by setting: method, oversight, seeds, or any other by its dotted name; a
    list of such mappings is as many sweeps in one."""
    methods: dict[str, dict[str, Any]] = {}
    """What some methods do otherwise, by method, as in a configuration file of one run."""
    stack: int | None = Field(None, ge=1)
    """Most runs that train as one stack; None: 5 on CPUs, 96 on a GPU."""


@dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    path: Path
    config: RunConfig

    @property
    def finished(self) -> bool:
        return (self.path / RESULT).is_file()

    @property
    def update(self) -> int:
        """Update of its newest checkpoint, -1 if there is none."""
        return max(checkpoint.updates(self.path / CHECKPOINTS), default=-1)


def plan(sweep: SweepConfig, out: Path) -> list[Run]:
    """The runs of a sweep, a folder for each: `out/SETTINGS/seed_N`.

    A sweep that lies in `out` already may call settings as version 0.1 did.
    """
    for method, own in sweep.methods.items():
        if wrong := {"method", "oversight", "seeds"} & set(own):
            raise UserError(f"sweep.methods: {method} cannot set {', '.join(wrong)} of its own")
    own = as_sequence(sweep.settings.get("seeds", 0))
    grids = [{"seeds": own} | grid for grid in sweep.grid]
    planned = sum(math.prod(map(len, grid.values())) for grid in grids)
    if planned > MOST_RUNS:
        raise UserError(f"sweep.grid: combines to {planned:,} runs, more than {MOST_RUNS:,}")
    begun = (out / SWEEP).is_file() and load_sweep(out / SWEEP) == sweep
    runs = [run for grid in grids for run in _combined(sweep, grid, out, begun)]
    if len({run.path for run in runs}) < len(runs):
        raise UserError("sweep.grid: values of a setting must be distinct")
    if sweep.methods:
        known = {method for run in runs for method in experiment_of(run.config).methods}
        for method in set(sweep.methods) - known:
            raise UserError(f"sweep.methods: unknown method {method!r}{nearest(method, known)}")
    return runs


def _combined(sweep: SweepConfig, grid: Grid, out: Path, begun: bool) -> Iterator[Run]:
    """A run for every combination of values."""
    others = {name: values for name, values in grid.items() if name != "seeds"}
    for values in itertools.product(*others.values()):
        chosen = dict(zip(others, values, strict=True))
        config = as_config(_settings(sweep, chosen) | {"seeds": list(grid["seeds"])}, written=begun)
        config.refuse_words()
        name = "-".join(
            _text(value) if key in ("method", "oversight") else f"{key}={_text(value)}"
            for key, value in chosen.items()
        )
        for seed in config.seeds:
            yield Run(out / name / f"seed_{seed}", config.single(seed))


def _settings(sweep: SweepConfig, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one combination of values; those of the grid have the last word."""
    settings: dict[str, Any] = {}
    _merge(settings, sweep.settings)
    for name, value in chosen.items():
        for part in reversed(name.split(".")):
            value = {part: value}
        _merge(settings, value)
    method = settings.get("method", kind_of(settings).default_method)
    if isinstance(method, str):
        _merge(settings, sweep.methods.get(method, {}), under=chosen)
    return settings


def _merge(into: dict[str, Any], more: Mapping[str, Any], under: Mapping[str, Any] = {}) -> None:
    """Set nested settings; those whose dotted names are in `under` stay."""
    for key, value in more.items():
        if key in under:
            continue
        if isinstance(value, Mapping):
            inner = into.setdefault(key, {})
            if not isinstance(inner, dict):
                raise UserError(f"sweep: {key} is set to {inner!r} and to {dict(value)!r}")
            prefix = f"{key}."
            below = {k.removeprefix(prefix): v for k, v in under.items() if k.startswith(prefix)}
            _merge(inner, value, below)
        else:
            into[key] = value


def _text(value: Any) -> str:
    """A value as part of a folder's name."""
    return "".join(c if c.isalnum() or c in "._+" else "_" for c in str(value))


def stacks(runs: Sequence[Run], most: int) -> list[list[Run]]:
    """Pack runs that are not finished into stacks of at most `most` runs.

    Runs go together that train alike and are equally far, so that they can go on together.
    """
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        if not run.finished:
            groups.setdefault((run.config.stack_key(), run.update), []).append(run)
    packed = []
    for group in groups.values():
        parts = math.ceil(len(group) / most)
        bounds = [round(i * len(group) / parts) for i in range(parts + 1)]
        packed += [group[start:end] for start, end in itertools.pairwise(bounds)]
    return packed


def load_sweep(path: Path) -> SweepConfig:
    """Read a sweep from YAML."""
    content = read_yaml(path)
    if "grid" not in content:
        hint = f"train it with --config {as_asked(path)}"
        raise UserError(f"{path}: has no grid, so is no sweep; {hint}")
    try:
        return SweepConfig.model_validate(content)
    except UserError as error:
        hint = " (what all runs share stands under settings)"
        raise UserError(f"{path}: {error}{hint * str(error).startswith('unknown')}") from None
