"""Training: one update reads as collect -> label -> loss -> step; `fit` drives it."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from oversight_rl import checkpoint, pictures
from oversight_rl.agents.methods import METHODS
from oversight_rl.agents.networks import take_run
from oversight_rl.agents.reinforce.learner import ReinforceLearner
from oversight_rl.agents.steering import standard
from oversight_rl.agents.threads import on_threads
from oversight_rl.config import Config
from oversight_rl.envs import render
from oversight_rl.envs.settings import UserError
from oversight_rl.envs.world import World
from oversight_rl.evaluation import Evaluator, Row, Subject, final_tables
from oversight_rl.files import writing
from oversight_rl.health import Watch
from oversight_rl.tracking import CONFIG, RunFolder, check_free, deployed_row, locked

LOG_EVERY = 10  # updates between points of the training curves
PICTURES = 4  # evaluations with pictures over a run, beside the untrained agent's


class Interrupted(Exception):
    """Training was asked to stop; everything is saved."""


def stack_key(config: Config) -> Config:
    """What runs must share to train in one stack: all but the seed, the level and the method.

    Methods may differ as long as they train the same networks by the same losses.
    """
    shape = METHODS[config.method].shape
    alike = next(name for name, method in METHODS.items() if method.shape == shape)
    free = {"method": alike, "oversight": 0.0, "seeds": (), "label_recall": 1.0, "label_error": 0.0}
    return config.model_copy(update=free)


class Trainer(ReinforceLearner):
    """Temporary: to be taken out with the loop."""

    def __init__(self, configs: Sequence[Config]) -> None:
        if len({stack_key(config).model_dump_json() for config in configs}) != 1:
            raise ValueError("runs of one stack may differ in seed, oversight and method only")
        self.configs = list(configs)
        self.config = configs[0].training
        super().__init__(
            configs[0].training,
            configs[0].agent,
            configs[0].world,
            [config.method for config in configs],
            [config.overseer for config in configs],
            [config.seeds[0] for config in configs],
            configs[0].torch_device(),
            configs[0].evaluation.every,
        )
        self.seconds = 0.0
        self.watch = Watch(self.runs, self.device)

    def update(self) -> None:
        skips = self.configs[0].on_nan == "skip"
        before = [x.clone() for x in self.learned()] if skips else []
        super().update()
        healthy = self.watch.look(self.updates, self.numbers())
        if skips:
            for now, was in zip(self.learned(), before, strict=True):
                now.copy_(torch.where(healthy.view(-1, *[1] * (now.ndim - 1)), now, was))

    def restore(self, runs: Sequence[dict[str, Tensor]], update: int, seconds: float) -> None:
        self.load(runs, update)
        self.seconds = seconds

    def tensors(self, run: int) -> dict[str, Tensor]:
        return self.state(run)

    def subjects(self) -> list[Subject]:
        """What the result table says of each run."""
        return [
            Subject(c.method, c.seeds[0], c.oversight, self.env_steps, self.seconds)
            for c in self.configs
        ]


def fit(
    configs: Sequence[Config], paths: Sequence[Path], console: Console, resume: bool = False
) -> list[list[Row]]:
    """Train a stack to its end, writing its run folders.

    Args:
        configs: one per run, with one seed each.
        paths: folder of each run, new or empty, or one to go on with (where it is empty, the run
            begins).
        console: shows a progress bar, if it is a terminal.
        resume: go on from the newest checkpoint that all folders have.

    Returns:
        The rows of each run's `result.json`.

    Raises:
        Interrupted: SIGINT (unless it was ignored) or SIGTERM came; a checkpoint is saved.
        UserError: there is nothing to resume from, another process is at work on these runs, the
            folders cannot be written, numbers went bad, or there is too little memory.
    """
    with _stop_requested() as stopping, on_threads(configs[0].threads):
        if configs[0].algo == "ppo":
            from oversight_rl import ppo_training  # loading SB3 takes a while

            return ppo_training.fit(configs, paths, console, resume, stopping)
        try:
            trainer = Trainer(configs)
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            raise UserError("too little memory for these worlds and networks") from None
        with run_folders(configs, paths, resume) as folders:
            if resume:
                _resume(trainer, folders)
            else:
                _save(trainer, folders)
            return _train(trainer, folders, console, stopping)


def try_out(config: Config) -> None:
    """Refuse what cannot be trained here, before anything is written.

    Raises:
        UserError: there is no such device or environment, or the environment does not fit.
    """
    config.torch_device()
    if config.algo == "ppo":
        from oversight_rl import ppo_training  # loading SB3 takes a while

        with on_threads(config.threads):
            ppo_training.try_out(config)


@contextmanager
def run_folders(
    configs: Sequence[Config], paths: Sequence[Path], resume: bool
) -> Iterator[list[RunFolder]]:
    """The folders of runs, made or opened to go on with, for this process alone.

    Raises:
        UserError: another process is at work on these runs, they are finished, or the folders
            cannot be written, now or later.
    """
    with ExitStack() as locks:
        for path in paths:
            if not resume:
                check_free(path)
            with writing(path):
                path.mkdir(parents=True, exist_ok=True)
            locks.enter_context(locked(path))
        folders = [
            RunFolder.open(path)
            if resume and (path / CONFIG).is_file()
            else RunFolder.create(path, config)
            for path, config in zip(paths, configs, strict=True)
        ]
        if resume and all(folder.finished for folder in folders):
            raise UserError(f"{paths[0]}: this run is finished")
        with writing(paths[0], "; what was saved before is whole"):
            yield folders


def _train(
    trainer: Trainer,
    folders: Sequence[RunFolder],
    console: Console,
    stopping: Callable[[], bool],
) -> list[list[Row]]:
    settings = trainer.configs[0]
    total, every = trainer.config.updates, settings.evaluation.every
    evaluator = Evaluator(
        settings.world, trainer.config.discount, trainer.device, settings.episodes
    )
    policies = standard(trainer.agent.n_experts)

    def evaluate() -> list[list[Row]]:
        levels = [[config.oversight] for config in trainer.configs]
        tables = evaluator.evaluate(trainer.agent, trainer.subjects(), policies, levels)
        for folder, rows in zip(folders, tables, strict=True):
            folder.log_rows(trainer.updates, rows)
        trainer.select([deployed_row(rows).ground_truth_return for rows in tables])
        return tables

    with progress_bar(console) as progress:
        task = progress.add_task("", total=total, completed=trainer.updates, speed=0.0, note="")
        if trainer.updates == 0:
            show(progress, task, evaluate())
            _draw_pictures(trainer, folders)
        timer, health = _Stopwatch(trainer), _Health(trainer, folders, console)
        while trainer.updates < total:
            if stopping():
                health.check()
                timer.lap()
                _save(trainer, folders)
                raise Interrupted
            trainer.update()
            n = trainer.updates
            evaluating = n % every == 0 or n == total
            if trainer.device.type == "cpu" or n % LOG_EVERY == 0 or evaluating:
                health.check()
            if n % LOG_EVERY == 0:
                speed = timer.lap()
                for folder, points in zip(folders, trainer.curves(), strict=True):
                    folder.log(n, {"training/env_steps_per_second": speed})
                    folder.log_training(n, points)
                progress.update(task, speed=speed)
                timer.start()
            progress.update(task, completed=n)
            if evaluating:
                timer.lap()
                show(progress, task, evaluate())
                if n == total or n // every % max(1, total // every // PICTURES) == 0:
                    _draw_pictures(trainer, folders)
                _save(trainer, folders)
                timer.start()
    return _finish(trainer, folders, evaluator)


def _finish(
    trainer: Trainer, folders: Sequence[RunFolder], evaluator: Evaluator
) -> list[list[Row]]:
    """The final table and result.json."""
    tables = final_tables(evaluator, trainer.deployed, trainer.subjects(), trainer.configs)
    for config, folder, rows in zip(trainer.configs, folders, tables, strict=True):
        folder.finish(config, rows)
    return tables


def _resume(trainer: Trainer, folders: Sequence[RunFolder]) -> None:
    """Go on from the newest checkpoint that all have; what came after it is taken back."""
    newest = newest_common(trainer.configs, folders)
    if newest is None:
        _save(trainer, folders)
        return
    saved = [
        checkpoint.load(folder.checkpoints, newest, trainer.tensors(run))
        for run, folder in enumerate(folders)
    ]
    seconds = float(np.mean([facts["wall_seconds"] for _, facts in saved]))
    trainer.restore([t for t, _ in saved], newest, seconds)
    for folder, (_, facts) in zip(folders, saved, strict=True):
        checkpoint.drop_after(folder.checkpoints, newest)
        folder.rewind(facts.get("logged"))


def newest_common(configs: Sequence[Config], folders: Sequence[RunFolder]) -> int | None:
    """Update of the newest checkpoint that all folders have.

    None, with all of them cleared, where a kill came before the first one was there for all.

    Raises:
        UserError: there is none, though something was logged.
    """
    common = set.intersection(*(set(checkpoint.updates(f.checkpoints)) for f in folders))
    if common:
        return max(common)
    if any(folder.has_evaluations for folder in folders):
        raise UserError(
            f"{folders[0].path}: no checkpoint to resume from; remove it and train anew"
        )
    for config, folder in zip(configs, folders, strict=True):
        folder.clear(config)
    return None


def _save(trainer: Trainer, folders: Sequence[RunFolder]) -> None:
    for run, folder in enumerate(folders):
        facts = {
            "env_steps": trainer.env_steps,
            "wall_seconds": trainer.seconds,
            "logged": folder.logged(),
        }
        checkpoint.save(folder.checkpoints, trainer.updates, trainer.tensors(run), facts)


def _draw_pictures(trainer: Trainer, folders: Sequence[RunFolder]) -> None:
    policies = standard(trainer.agent.n_experts)
    for run, (config, folder) in enumerate(zip(trainer.configs, folders, strict=True)):
        if config.pictures:
            agent = take_run(trainer.agent, run)
            world = World(config.world, config.oversight)
            arrows = render.png(pictures.policies(agent, world, policies))
            folder.picture("pictures/policies", trainer.updates, arrows)
            animation = pictures.rollouts(agent, world, policies)
            folder.picture("pictures/rollouts", trainer.updates, animation)


class _Health:
    """Stops a stack in which numbers went bad, or says once that updates are left out."""

    def __init__(self, trainer: Trainer, folders: Sequence[RunFolder], console: Console) -> None:
        self.trainer, self.folders, self.console = trainer, folders, console
        self.told: set[int] = set()

    def check(self) -> None:
        for run, what in self.trainer.watch.seen().items():
            folder = self.folders[run]
            if self.trainer.configs[run].on_nan == "stop":
                newest = max(checkpoint.updates(folder.checkpoints))
                raise UserError(
                    f"{folder.path}: {what}; stopped there, the checkpoint of update {newest} is "
                    "kept (on_nan: skip in its config.yaml leaves such updates out)"
                )
            if run not in self.told:
                self.told.add(run)
                line = f"{folder.path}: {what}; left out, as further ones will be"
                self.console.print(line, soft_wrap=True, markup=False, highlight=False)


class _Stopwatch:
    """Adds training time per run, and only that, to the trainer's clock."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.start()

    def start(self) -> None:
        self.since, self.updates = time.perf_counter(), self.trainer.updates

    def lap(self) -> float:
        """Stop; returns environment steps per second over all runs since the start."""
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - self.since
        config, runs = self.trainer.config, len(self.trainer.configs)
        self.trainer.seconds += elapsed / runs
        steps = (self.trainer.updates - self.updates) * config.steps * config.worlds * runs
        self.start()
        return steps / elapsed


def progress_bar(console: Console) -> Progress:
    """A bar of updates done, with fields `speed` (steps per second) and `note`."""
    return Progress(
        TextColumn("update"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[speed]:,.0f} steps/s"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


def show(progress: Progress, task: TaskID, tables: list[list[Row]]) -> None:
    """The current returns in the progress bar, averaged over the stack's runs."""
    returns: dict[str, list[float]] = {}
    for row in chain(*tables):
        returns.setdefault(row.policy, []).append(row.ground_truth_return)
    note = "  ".join(f"{name} {np.mean(values):+.2f}" for name, values in returns.items())
    optimum = tables[0][0].optimal_return
    progress.update(task, note=note if math.isnan(optimum) else f"{note}  optimum {optimum:.2f}")


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come; a second one acts at once.

    SIGINT stays ignored where it was, as under nohup or in the background of a script.
    """
    asked = False
    before: dict[signal.Signals, object] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        for name, handler in before.items():
            signal.signal(name, handler)  # type: ignore[arg-type]

    try:
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, ask)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            before[signal.SIGINT] = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread: whoever runs it handles signals
        pass
    try:
        yield lambda: asked
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)  # type: ignore[arg-type]
