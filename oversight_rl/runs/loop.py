"""The one loop: it drives any learner, and owns time, logs, checkpoints, health and stopping."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from torch import Tensor

from oversight_rl.agents.threads import on_threads
from oversight_rl.envs.settings import UserError
from oversight_rl.files import writing
from oversight_rl.runs import checkpoint, snapshots
from oversight_rl.runs.experiment import LOG_EVERY, Experiment, experiment_of
from oversight_rl.runs.folder import CONFIG, PICTURES, RunFolder, check_free, locked
from oversight_rl.runs.rows import Facts, Row
from oversight_rl.settings import RunConfig
from oversight_rl.terminal import fixed, say

DRAWN = 2  # times before the end
SNAPSHOTS = 50  # at least, where there are as many evaluations, and at most twice as many
WIDE, WIDEST = 72, 110  # columns of a terminal that has room for more


class Interrupted(Exception):
    """Training was asked to stop; everything is saved."""


def fit(
    runs: Mapping[Path, RunConfig], console: Console, resume: bool = False, tell: bool = True
) -> list[list[Row]]:
    """Train runs to their end, as one stack or one after another, writing their folders.

    Args:
        runs: configurations, of one kind and with one seed each, by the run's folder, new or empty,
            or one to go on with (where it is empty, the run begins).
        console: shows a progress bar, if it is a terminal.
        resume: go on from the newest checkpoint that all folders of a stack have.
        tell: say a line for each evaluation, if it is none.

    Returns:
        The rows of each run's `result.json`.

    Raises:
        Interrupted: SIGINT (unless it was ignored) or SIGTERM came; a checkpoint is saved.
        UserError: there is nothing to resume from, another process is at work on these runs, the
            folders cannot be written, numbers went bad, or there is too little memory.
    """
    configs = list(runs.values())
    size = len(configs) if configs[0].most_runs(math.inf) > 1 else 1
    tables: list[list[Row]] = []
    with _stop_requested() as stopping, on_threads(configs[0].threads), ExitStack() as opened:
        # before there is a folder, so that nothing is left of a run that cannot begin
        stack = None if resume else _begin(configs[:size])
        folders = opened.enter_context(run_folders(runs, resume))
        for start in range(0, len(configs), size):
            own = folders[start : start + size]
            if resume and all(folder.finished for folder in own):
                tables += [folder.result() for folder in own]
                continue
            with closing(stack or _begin(configs[start : start + size])) as stack:
                training = _Training(stack, own, console, stopping)
                training.tells = tell and not console.is_terminal
                tables += training.to_the_end(resume)
            stack = None
    return tables


@contextmanager
def judged_again(folder: RunFolder, final: bool = True) -> Iterator[tuple[Experiment, list[Row]]]:
    """A run as its newest checkpoint has it, and its table anew: the last, or as in training."""
    config = folder.config()
    with on_threads(config.threads), closing(_begin([config])) as run:
        state, facts = folder.load(run.learner.state(0))
        run.learner.load([state], facts["update"])
        come = facts["env_steps"], facts["wall_seconds"]
        own = Facts(config.method, config.seeds[0], config.oversight, *come)
        (rows,) = run.final([own]) if final else run.evaluate([own])
        yield run, rows


def _begin(configs: Sequence[RunConfig]) -> Experiment:
    try:
        return experiment_of(configs[0])(configs)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        raise UserError("too little memory for these worlds and networks") from None


@contextmanager
def run_folders(runs: Mapping[Path, RunConfig], resume: bool) -> Iterator[list[RunFolder]]:
    """The folders of runs, made or opened to go on with, for this process alone."""
    with ExitStack() as locks:
        for path in runs:
            if not resume:
                check_free(path)
            with writing(path):
                path.mkdir(parents=True, exist_ok=True)
            locks.enter_context(locked(path))
        folders = []
        for path, config in runs.items():
            begun = resume and (path / CONFIG).is_file()
            folders.append(RunFolder.open(path) if begun else RunFolder.create(path, config))
        if resume and all(folder.finished for folder in folders):
            raise UserError(f"{folders[0].path}: this run is finished")
        with writing(folders[0].path, "; what was saved before is whole"):
            yield folders


class _Training:
    """A stack on its way to its end."""

    def __init__(
        self,
        runs: Experiment,
        folders: Sequence[RunFolder],
        console: Console,
        stopping: Callable[[], bool],
    ) -> None:
        self.runs, self.learner, self.folders = runs, runs.learner, folders
        self.config, self.console, self.stopping = runs.configs[0], console, stopping
        self.device = self.config.torch_device()
        self.watch = Watch(self.learner.runs, self.device)
        self.told: set[int] = set()  # runs of which it was said that updates are left out
        self.seconds, self.tells = 0.0, False
        self.progress = progress_bar(console)

    def to_the_end(self, resume: bool) -> list[list[Row]]:
        """Train, from the newest checkpoint if it is there and asked for; returns final tables."""
        learner, total, every = self.learner, self.learner.total, self.config.evaluation.every
        if not (resume and self._go_on()):
            self._save()
        with self.progress:
            done = learner.updates
            self.task = self.progress.add_task("", total=total, completed=done, speed=0.0, note="")
            if learner.updates == 0:
                self._evaluate()
                self._draw()
            self._start_watch()
            while learner.updates < total:
                if self.stopping():
                    self._check_health()
                    self._lap()
                    self._save()
                    raise Interrupted
                self._update()
                n = learner.updates
                evaluating = n % every == 0 or n == total
                if self.device.type == "cpu" or n % LOG_EVERY == 0 or evaluating:
                    self._check_health()
                if n % LOG_EVERY == 0:
                    self._log()
                self.progress.update(self.task, completed=n)
                if evaluating:
                    self._lap()
                    self._evaluate()
                    if n == total or n // every % max(1, total // every // DRAWN) == 0:
                        self._draw()
                    self._save()
                    self._start_watch()
        tables = self._found(self.runs.final)
        for config, folder, rows in zip(self.runs.configs, self.folders, tables, strict=True):
            folder.finish(config, rows, type(self.runs))
        return tables

    def _facts(self) -> list[Facts]:
        come, configs = (self.learner.env_steps, self.seconds), self.runs.configs
        return [Facts(c.method, c.seeds[0], c.oversight, *come) for c in configs]

    def _update(self) -> None:
        """One update; it is taken back in runs where numbers went bad, if they are to go on."""
        learner, skips = self.learner, self.config.on_nan == "skip"
        before = [x.detach().clone() for x in learner.learned()] if skips else []
        done = learner.updates
        with self._saying_where():
            learner.update()
        if learner.updates != done + 1:
            raise TypeError(f"{type(learner).__name__}.update must count itself in updates")
        healthy = self.watch.look(learner.updates, learner.numbers())
        with torch.no_grad():
            for now, was in zip(learner.learned() if skips else [], before, strict=True):
                well = healthy.to(now.device)  # Adam may count on the CPU
                now.copy_(torch.where(well.view(-1, *[1] * (now.ndim - 1)), now, was))

    @contextmanager
    def _saying_where(self) -> Iterator[None]:
        """Say what to do about an error, of an environment say, that does not come from us."""
        try:
            yield
        except UserError as error:
            hint = f"go on with --resume {self.folders[0].path}"
            raise UserError(f"{error}; stopped there, {hint}") from None

    def _check_health(self) -> None:
        """Stop a stack in which numbers went bad, or say once that updates are left out."""
        for run, what in self.watch.seen().items():
            folder = self.folders[run]
            if self.config.on_nan == "stop":
                newest = max(checkpoint.updates(folder.checkpoints))
                raise UserError(
                    f"{folder.path}: {what}; stopped there, the checkpoint of update {newest} is "
                    "kept (on_nan: skip in its config.yaml leaves such updates out)"
                )
            if run not in self.told:
                self.told.add(run)
                say(self.console, f"{folder.path}: {what}; left out, as further ones will be")

    def _start_watch(self) -> None:
        self.since, self.done = time.perf_counter(), self.learner.updates

    def _lap(self) -> float:
        """Add the training time since the start, per run; returns steps per second, of all runs."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elapsed, learner = time.perf_counter() - self.since, self.learner
        steps = (learner.updates - self.done) * learner.steps * learner.runs
        self.seconds += elapsed / learner.runs
        self._start_watch()
        return steps / elapsed

    def _log(self) -> None:
        speed, n = self._lap(), self.learner.updates
        for folder, points in zip(self.folders, self.learner.curves(), strict=True):
            folder.log(n, {"training/env_steps_per_second": speed})
            folder.log_training(n, points)
        self.progress.update(self.task, speed=speed)
        self._start_watch()

    def _evaluate(self) -> None:
        self.progress.update(self.task, note="evaluating")
        tables = self._found(self.runs.evaluate)
        for folder, rows in zip(self.folders, tables, strict=True):
            folder.log_rows(self.learner.updates, rows, type(self.runs))
        self._keep_snapshots()
        note = self._note(tables)
        self.progress.update(self.task, note=note)
        if self.tells:
            say(self.console, f"update {self.learner.updates}/{self.learner.total}: {note}")

    def _found(self, judge: Callable[[Sequence[Facts]], list[list[Row]]]) -> list[list[Row]]:
        """The table of each run, refused if it could not be read again."""
        with self._saying_where():
            tables = judge(self._facts())
            try:
                for rows in tables:
                    self.runs.check(rows)
            except ValueError as error:
                raise UserError(f"cannot report: {error}") from None
        return tables

    def _note(self, tables: Sequence[Sequence[Row]]) -> str:
        """Scores of policies (the deployed one's where there is little room), averaged over the
        stack's runs, and the best that can be.
        """
        kind, scores = type(self.runs), dict[str, list[float]]()
        narrow = self.console.is_terminal and self.console.width < WIDEST
        for row in chain(*tables):
            if row.deployed or not narrow:
                scores.setdefault(row.policy, []).append(row.figures[kind.score])
        note = [f"{name} {fixed(float(np.mean(own)), '+.2f')}" for name, own in scores.items()]
        best = tables[0][0].figures[kind.optimum] if kind.optimum else math.nan
        return "  ".join(note if math.isnan(best) else [*note, f"optimum {best:.2f}"])

    def _draw(self) -> None:
        for run, (config, folder) in enumerate(zip(self.runs.configs, self.folders, strict=True)):
            for name, content in self.runs.pictures(run).items() if config.pictures else ():
                folder.picture(f"{PICTURES}/{name}", self.learner.updates, content)
            for name, words in self.runs.texts(run).items() if config.pictures else ():
                folder.text(f"texts/{name}", self.learner.updates, words)

    def _keep_snapshots(self) -> None:
        n, total, every = self.learner.updates, self.learner.total, self.config.evaluation.every
        if n != total and n // every % max(1, total // every // SNAPSHOTS):
            return
        for run, (config, folder) in enumerate(zip(self.runs.configs, self.folders, strict=True)):
            if config.pictures and (tensors := self.runs.snapshot(run)):
                snapshots.save(folder.snapshots, self.learner.updates, tensors)

    def _save(self) -> None:
        for run, folder in enumerate(self.folders):
            steps, states = self.learner.env_steps, self.learner.state(run)
            facts = {"env_steps": steps, "wall_seconds": self.seconds, "logged": folder.logged()}
            checkpoint.save(folder.checkpoints, self.learner.updates, states, facts)

    def _go_on(self) -> bool:
        """Go on from the newest checkpoint that all have, if there is one, and there alone."""
        newest = newest_common(self.runs.configs, self.folders)
        if newest is None:
            return False
        try:
            saved = [
                checkpoint.load(folder.checkpoints, newest, self.learner.state(run))
                for run, folder in enumerate(self.folders)
            ]
            self.learner.load([states for states, _ in saved], newest)
        except UserError as error:
            then = self.folders[0].provenance.get("versions.oversight-rl", "unknown")
            hint = f" (begun with version {then}; evaluate it, or train anew)"
            raise UserError(f"{error}{hint * (then != version('oversight-rl'))}") from None
        self.seconds = float(np.mean([facts["wall_seconds"] for _, facts in saved]))
        for folder, (_, facts) in zip(self.folders, saved, strict=True):
            checkpoint.drop_after(folder.checkpoints, newest)
            snapshots.drop_after(folder.snapshots, newest)
            folder.rewind(facts.get("logged"))
        return True


def progress_bar(console: Console) -> Progress:
    """What shows updates, time left, and a note that gives way where there is little room."""
    speed: list[ProgressColumn] = [TextColumn("{task.fields[speed]:,.0f} steps/s")]
    return Progress(
        MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=9)),
        BarColumn(None, table_column=Column(ratio=1, min_width=4)),
        *(speed if console.width >= WIDE else []),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=console,
        disable=not console.is_terminal,
        transient=True,
        expand=True,
    )


def newest_common(configs: Sequence[RunConfig], folders: Sequence[RunFolder]) -> int | None:
    """Update of the newest checkpoint that all folders have.

    None, with all of them cleared, where a kill came before the first one was there for all.
    """
    common = set.intersection(*(set(checkpoint.updates(f.checkpoints)) for f in folders))
    if common:
        return max(common)
    if any(folder.has_evaluations for folder in folders):
        where = folders[0].path
        raise UserError(f"{where}: no checkpoint to resume from; remove it and train anew")
    for config, folder in zip(configs, folders, strict=True):
        folder.clear(config)
    return None


class Watch:
    """Notes the first number of each of R runs that is not finite, without making a GPU wait."""

    def __init__(self, runs: int, device: torch.device) -> None:
        self.names: list[str] = []
        self.update = torch.zeros(runs, dtype=torch.int64, device=device)  # of the first, or 0
        self.which = torch.zeros_like(self.update)  # index into names
        self.value = torch.zeros(runs, device=device)
        self.count = torch.zeros_like(self.update)  # updates with any

    @torch.no_grad()
    def look(self, update: int, numbers: Mapping[str, Tensor]) -> Tensor:
        """Look at what an update (counted from 1) made; returns whether all is finite, [R] bool.

        The numbers are `[R]` each, see `Learner.numbers`.
        """
        self.names = list(numbers)
        values = torch.stack(list(numbers.values())).to(self.value)  # [numbers, R]
        bad = ~values.isfinite()
        any_bad = bad.any(0)
        first = any_bad & (self.count == 0)
        which = bad.int().argmax(0)  # the first of several
        self.update = torch.where(first, update, self.update)
        self.which = torch.where(first, which, self.which)
        self.value = torch.where(first, values.gather(0, which[None])[0], self.value)
        self.count = self.count + any_bad
        return ~any_bad

    def seen(self) -> dict[int, str]:
        """What was seen first, in words, by run; waits for the device."""
        if not bool(self.count.any()):
            return {}
        return {
            run: f"update {self.update[run]}: the {self.names[which]} is {float(self.value[run])}"
            for run, which in enumerate(self.which.tolist())
            if self.count[run]
        }


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come; a second one acts at once.

    SIGINT stays ignored where it was, as under nohup or in the background of a script.
    """
    asked = False
    before: dict[signal.Signals, object] = {}

    def give_back() -> None:
        for name, handler in before.items():
            signal.signal(name, handler)  # type: ignore[arg-type]

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        give_back()

    with suppress(ValueError):  # not the main thread: whoever runs it handles signals
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, ask)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            before[signal.SIGINT] = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        give_back()
