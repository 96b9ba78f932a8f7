"""The tables that commands print."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from textwrap import fill
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from oversight_rl.agents.methods import METHODS
from oversight_rl.kinds import KINDS
from oversight_rl.terminal import fixed, say

HELP = """\
usage: {command} [--SETTING VALUE ...]

Train an agent under partial oversight, then show what steering it does.

examples:
  {command}                                      gradient routing, 10% oversight
  {command} --method naive --oversight 0.01 --seeds 0 1 2
  {command} --config minigrid                    a preset, or a YAML file of settings
  {command} --reinforce.updates 800 --world.rows 6
  {command} --resume runs/x                      go on where a run was stopped

settings that matter most:
  --oversight P       share of episodes that is labeled, 0 to 1 (0.1)
  --seeds S [S ...]   a run for each (0)
  --run-dir DIR       folder to write (a new one under runs/)
  --algo A            {algos} (reinforce)
  --env ID            a Gymnasium environment, with --algo ppo
  --method M          (routing)
{methods}

--help-all has every setting, its default and unit.
"""

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from oversight_rl.experiments.oversight.config import Config
    from oversight_rl.runs.experiment import Experiment
    from oversight_rl.runs.rows import Row


def print_summary(
    tables: Sequence[Sequence[Row]], kind: type[Experiment], console: Console
) -> None:
    """The table at the training level: means over the runs, and the score's range."""
    every = [row for row in itertools.chain(*tables) if row.deployed or "=" not in row.policy]
    rows = [row for row in every if row.deploy_oversight == row.train_oversight]
    shown = kind.shown(list(rows[0].figures))
    headings = {kind.score: kind.score} | {name: short for short, name in shown.items()}
    others = [name for name in shown.values() if name != kind.score]
    several, greedy = len(tables) > 1, any(row.greedy for row in rows)
    table = _table(f"trained at {rows[0].train_oversight:.2%} oversight")
    for heading in (headings[kind.score], *["range"] * several, *["greedy"] * greedy):
        table.add_column(heading, justify="right")
    for name in others:
        table.add_column(headings[name].removeprefix("p_"), justify="right")
    for policy in dict.fromkeys(row.policy for row in rows if not row.greedy):
        sampled = [row for row in rows if row.policy == policy and not row.greedy]
        scores = [row.figures[kind.score] for row in sampled]
        taken = [row.figures[kind.score] for row in rows if row.policy == policy and row.greedy]
        deployed = sampled[0].deployed
        table.add_row(
            f"{policy} (deployed)" if deployed else policy,
            fixed(fmean(scores), ".3f"),
            *[f"{fixed(min(scores), '.2f')}..{fixed(max(scores), '.2f')}"] * several,
            *[fixed(fmean(taken), ".3f") if taken else ""] * greedy,
            *(_figure(name, fmean([row.figures[name] for row in sampled])) for name in others),
            style="bold" if deployed else None,
        )
    best = rows[0].figures[kind.optimum] if kind.optimum else math.nan
    if not math.isnan(best):
        table.add_row("optimum", f"{best:.3f}", style="dim")
    console.print(table)


def print_rows(rows: Sequence[Row], kind: type[Experiment], console: Console) -> None:
    """A table for each run."""
    between = "±" if console.encoding.startswith("utf") else "+-"
    shown = kind.shown(list(rows[0].figures), details=True)
    for title, own in itertools.groupby(rows, _run):
        table = _table(title)
        for heading in ("oversight", *shown):
            table.add_column(heading.removeprefix("p_"), justify="right")
        for row in own:
            cells = {name: _figure(name, row.figures[name]) for name in shown.values()}
            error = row.figures[kind.error] if kind.error else 0.0
            cells[kind.score] += f" {between} {error:.3f}" if error > 0 else ""
            table.add_row(*_policy(row), *cells.values())
        console.print(table)
    for line in kind.notes(rows):
        say(console, line)


def print_texts(texts: Mapping[str, str], path: Path, console: Console) -> None:
    """Texts about a run, see `Experiment.texts`."""
    for name, text in texts.items():
        say(console, f"{path}, {name}:")
        console.print(Markdown(text))


def print_audits(rows: Sequence[Row], config: Config, console: Console) -> None:
    """A table for each run of what audits say."""
    from oversight_rl.experiments.oversight.audits import cells, notes  # with torch and scipy

    for title, own in itertools.groupby(rows, _run):
        table = _table(f"{title}, {rows[0].figures['audit_episodes']:,.0f} episodes audited")
        for heading in ("oversight", *cells(rows[0])[0]):
            table.add_column(heading, justify="right")
        for row in own:
            for audited in cells(row):
                table.add_row(*_policy(row), *audited.values())
        console.print(table)
    for line in notes(config):
        say(console, line)


def print_next(path: Path, kind: type[Experiment], console: Console) -> None:
    """Where a finished run is, and what to do with it."""
    runs = path.parent if path.parent.name == "runs" else path
    say(console, f"results in {path}; what next:")
    say(console, f"  oversight-rl evaluate {path} {kind.looks}".rstrip())
    if kind.has_page():
        say(console, f"  oversight-rl play {path}")
    say(console, f"  oversight-rl report {runs}")
    say(console, f"  tensorboard --logdir {runs}")


def print_train_help(command: str) -> None:
    """The settings that matter most, and examples."""
    methods = fill(", ".join(METHODS), 76, initial_indent="    ", subsequent_indent="    ")
    print(HELP.format(command=command, methods=methods, algos=" or ".join(KINDS)))


def print_grid(grid: pd.DataFrame, console: Console) -> None:
    """How methods stand at each level, see `Verdict.grid`."""
    table = _table("against the best of the same assumptions", first="method")
    for column in map(str, grid.columns[1:]):
        table.add_column(column)
    for cells in grid.itertuples(index=False):
        table.add_row(*cells)
    console.print(table)


def _run(row: Row) -> str:
    return f"{row.method} trained at {row.train_oversight:.2%}, seed {row.seed}"


def _policy(row: Row) -> tuple[str, str]:
    return f"{row.policy}{' (greedy)' if row.greedy else ''}", f"{row.deploy_oversight:.2%}"


def _figure(name: str, value: float) -> str:
    """A figure as its name asks for: shares in percent, lengths with one digit; blank if nan."""
    if math.isnan(value):
        return ""
    if name.startswith("p_"):
        return fixed(value, ".1%")
    return fixed(value, ".1f" if name.endswith("_length") else ".3f")


def _table(title: str, first: str = "policy") -> Table:
    """A table that fits 80 columns."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first)
    return table
