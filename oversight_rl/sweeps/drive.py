"""A sweep under way: stacks are handed to workers, again where one is lost, and counted."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from oversight_rl.envs.settings import UserError
from oversight_rl.files import write_atomically, writing
from oversight_rl.runs.experiment import experiment_of
from oversight_rl.runs.folder import CONFIG, RunFolder, locked
from oversight_rl.runs.rows import deployed_row
from oversight_rl.settings import dump_yaml
from oversight_rl.sweeps.plan import SWEEP, Run, SweepConfig, plan, stacks
from oversight_rl.sweeps.workers import ATTEMPTS, Submit, WorkerFailed, WorkerLost
from oversight_rl.terminal import say

CPU_STACK, GPU_STACK = 5, 96  # runs per stack


def sweep(
    config: SweepConfig,
    out: Path,
    workers: AbstractContextManager[Submit],
    console: Console,
    memory: float = math.inf,
) -> dict[Path, str]:
    """Bring every run of a sweep to its end.

    The folder `out` is new, or of the same sweep with a smaller grid; the workers are
    `local_workers` or `ray_workers`; a stack may take `memory` bytes. Returns why runs failed, or
    cannot be read, by folder; empty if all are finished.
    """
    out = out.resolve()  # workers may run in other folders
    runs = plan(config, out)
    unlike = {run.config.stack_key(): run.config for run in reversed(runs) if not run.finished}
    for first in unlike.values():
        experiment_of(first).try_out(first)
    _claim(config, out, runs)
    gpu = runs[0].config.torch_device().type == "cuda"
    most = config.stack or (GPU_STACK if gpu else CPU_STACK)
    most = min([most, *(run.config.most_runs(memory) for run in runs)])
    overview = _Overview(runs, console)
    with locked(out), workers as submit, overview:
        failed = overview.count([run for run in runs if run.finished])
        waiting = [(stack, 1) for stack in stacks(runs, most)]
        pending: dict[Future[None], tuple[list[Run], int]] = {}
        while waiting or pending:
            for stack, attempt in waiting:
                job = [[str(run.path), run.config.model_dump(mode="json")] for run in stack]
                pending[submit(json.dumps(job))] = stack, attempt
            waiting = []
            done, _ = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                stack, attempt = pending.pop(future)
                failed |= overview.count([run for run in stack if run.finished], tell=True)
                rest = [run for run in stack if not run.finished]
                if not rest:
                    continue
                error = future.exception() or WorkerFailed("ended without a result")
                if again := _again(rest, attempt, isinstance(error, WorkerLost), most):
                    waiting += again
                else:
                    failed[rest[0].path] = str(error)
                    overview.say(f"{rest[0].path}: failed ({error})")
            overview.refresh([stack for stack, _ in pending.values()])
    return failed


def _again(rest: list[Run], attempt: int, lost: bool, most: int) -> list[tuple[list[Run], int]]:
    """How to go on with runs of a stack whose worker failed or is `lost`; not at all, if empty."""
    if lost and attempt < ATTEMPTS:
        return [(part, attempt + 1) for part in stacks(rest, most)]
    if len(rest) > 1:  # the others shall not fail with the one that does
        return [([run], ATTEMPTS) for run in rest]
    return [(rest, ATTEMPTS)] if attempt < ATTEMPTS else []


def _cell(run: Run) -> tuple[str, float]:
    return run.config.method, run.config.oversight


def _claim(config: SweepConfig, out: Path, runs: Sequence[Run]) -> None:
    """Write the sweep into its folder, in which every run must be one of its own.

    So a sweep may be given more values, and nothing else.
    """
    path = out / SWEEP
    planned = {run.path: run.config for run in runs}
    if path.exists():
        for found in sorted(out.rglob(CONFIG)):
            theirs = planned.get(found.parent)
            if theirs is None or RunFolder.open(found.parent).config() != theirs:
                name = found.parent.relative_to(out)
                raise UserError(f"{out}: holds another sweep ({name}); choose another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not empty and holds no sweep; choose another --out")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(path, dump_yaml(config).encode())


class _Overview:
    """What is done so far: by method and level, and how much in all."""

    def __init__(self, runs: Sequence[Run], console: Console) -> None:
        self.runs, self.console = runs, console
        self._total = Counter(map(_cell, runs))
        self._scores: dict[tuple[str, float], list[float]] = defaultdict(list)
        self._progress = Progress(
            TextColumn("{task.completed:.1f} of {task.total:.0f} runs"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._progress.add_task("", total=len(self.runs))
        self._live = Live(console=self.console, get_renderable=self._render, auto_refresh=False)

    def __enter__(self) -> _Overview:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.console.is_terminal:
            self.refresh([])
            self._live.stop()

    def count(self, runs: Sequence[Run], tell: bool = False) -> dict[Path, str]:
        """Add the scores of finished runs; returns why some cannot be read, by folder.

        `tell` says that they are done, unless the table shows it.
        """
        unreadable = {}
        for run in runs:
            try:
                row = deployed_row(RunFolder.open(run.path).result())
            except UserError as error:
                unreadable[run.path] = str(error)
                self.say(str(error))
            else:
                score = row.figures[experiment_of(run.config).score]
                self._scores[_cell(run)].append(score)
        if runs and tell and not self.console.is_terminal:
            seeds = ", ".join(str(run.config.seeds[0]) for run in runs)
            self.say(f"{runs[0].path.parent.name}, seed {seeds}: done")
        return unreadable

    def say(self, line: str) -> None:
        """Say how much is done, and a line beside it."""
        say(self.console, f"{self._done()} of {len(self.runs)} runs; {line}")

    def _done(self) -> int:
        return sum(len(scores) for scores in self._scores.values())

    def refresh(self, pending: Sequence[Sequence[Run]]) -> None:
        """Show how far things are, stacks under way included."""
        if self.console.is_terminal:
            done: float = self._done()
            for first, *others in pending:
                share = max(0, first.update) / first.config.learner.updates
                done += share * (1 + len(others))
            self._progress.update(self._task, completed=done)
            self._live.refresh()

    def _render(self) -> Group:
        table = Table(box=None, padding=(0, 1))
        methods = list(dict.fromkeys(method for method, _ in self._total))
        levels = sorted({level for _, level in self._total})
        kind = experiment_of(self.runs[0].config)
        table.add_column(f"deployed {next(iter(kind.shown([kind.score])), kind.score)}")
        for level in levels:
            table.add_column(f"{100 * level:.3g}%", justify="right")
        for method in methods:
            cells = []
            for level in levels:
                scores, total = self._scores[method, level], self._total[method, level]
                mean = f"{sum(scores) / len(scores):+.2f}" if scores else "     "
                cells.append(f"{mean} {len(scores)}/{total}" if total else "")
            table.add_row(method, *cells)
        return Group(table, self._progress)
