"""Training: one update reads as collect -> label -> loss -> step; `fit` drives it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

from agents import reinforce
from agents.methods import METHODS, tables
from envs import render
from envs.settings import UserError
from envs.world import State, World
from oversight_rl import checkpoint, pictures
from oversight_rl.config import Config
from oversight_rl.evaluation import Evaluator, Row, Subject
from oversight_rl.steering import standard
from oversight_rl.tracking import RunFolder

LOG_EVERY = 10  # updates between points of the training curves
PICTURES = 4  # evaluations with pictures over a run, beside the untrained agent's


class Interrupted(Exception):
    """Training was asked to stop; everything is saved."""


def stack_key(config: Config) -> Config:
    """What runs must share to train in one stack: all but the seed, the level and the method.

    Methods may differ as long as they train the same networks.
    """
    row = METHODS[config.method]
    alike = next(
        name for name, m in METHODS.items() if (m.experts, m.gate) == (row.experts, row.gate)
    )
    return config.model_copy(update={"method": alike, "oversight": 0.0, "seeds": ()})


class Trainer:
    """R runs in training as one stack.

    Args:
        configs: one per run, each with one seed; they must agree in `stack_key`.

    Raises:
        ValueError: they do not.
    """

    def __init__(self, configs: Sequence[Config]) -> None:
        if len({stack_key(config).model_dump_json() for config in configs}) != 1:
            raise ValueError("runs of one stack may differ in seed, oversight and method only")
        self.configs = list(configs)
        self.config = configs[0].training
        self.device = configs[0].torch_device()
        self.updates, self.seconds = 0, 0.0
        levels = [config.oversight for config in configs]
        seeds = [np.random.SeedSequence(config.seeds[0]).generate_state(2) for config in configs]
        initial = [torch.Generator().manual_seed(int(seed[0])) for seed in seeds]
        self.agent = checkpoint.new_agent(configs[0], len(configs), initial).to(self.device)
        self.methods = tables(
            [config.method for config in configs], levels, self.agent.n_experts, self.device
        )
        self.world = World(
            configs[0].world, torch.tensor(levels)[:, None, None], self.device
        )  # levels [R, 1, 1] against worlds [R, T, N]
        self.generators = [torch.Generator(self.device).manual_seed(int(seed[1])) for seed in seeds]
        self.state: State = self.world.reset(self._draw(1)[..., : self.world.noise_channels])[:, 0]
        self.optimizer = torch.optim.Adam(
            self.agent.parameters(), lr=self.config.learning_rate[0], fused=True
        )
        for parameter in self.agent.parameters():  # as Adam has it before its first step
            self.optimizer.state[parameter] = {
                "step": torch.tensor(0.0, device=self.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self.latest: tuple[reinforce.Rollout, reinforce.Targets, reinforce.Loss] | None = None

    @property
    def env_steps(self) -> int:
        """Steps taken by each run."""
        return self.updates * self.config.steps * self.config.worlds

    def update(self) -> None:
        """One update of every run."""
        progress = self.updates / max(1, self.config.updates - 1)
        rollout, self.state = reinforce.collect(
            self.agent, self.world, self.state, self._draw(self.config.steps)
        )
        targets = reinforce.label(self.agent, rollout, self.methods, self.config)
        losses = reinforce.loss(self.agent, rollout, targets)
        self._step(losses.total(self.config, progress), progress)
        self.latest = rollout, targets, losses
        self.updates += 1

    def _step(self, total: Tensor, progress: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = reinforce.at(self.config.learning_rate, progress)
        self.optimizer.zero_grad()
        total.sum().backward()
        self.optimizer.step()

    def _draw(self, steps: int) -> Tensor:
        """Uniform numbers `[R, steps, N, channels]`, each run's from its own stream."""
        shape = (steps, self.config.worlds, reinforce.noise_channels(self.world))
        return torch.stack(
            [torch.rand(shape, generator=g, device=self.device) for g in self.generators]
        )

    def curves(self) -> dict[str, list[float]]:
        """Points of the training curves after an update, a value per run."""
        assert self.latest is not None
        rollout, targets, losses = self.latest
        points = {f"loss/{name}": getattr(losses, name) for name in ("policy", "value", "gate")}
        points |= {"loss/entropy": losses.entropy}
        points |= reinforce.statistics(rollout, targets)
        return {name: value.tolist() for name, value in points.items()}

    def tensors(self, run: int) -> dict[str, Tensor]:
        """Everything that a run needs to go on, by name."""
        found = {f"agent.{name}": p[run] for name, p in self.agent.named_parameters()}
        for name, parameter in self.agent.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                found[f"adam.{moment}.{name}"] = self.optimizer.state[parameter][moment][run]
        found |= {f"world.{k}": v[run] for k, v in vars(self.state).items()}
        return found | {"generator": self.generators[run].get_state()}

    def restore(self, runs: Sequence[dict[str, Tensor]], update: int, seconds: float) -> None:
        """Go on from saved tensors, one dictionary per run.

        Raises:
            UserError: a tensor is missing or has another shape or type.
        """
        for run, tensors in enumerate(runs):
            for name, ours in self.tensors(run).items():
                theirs = tensors.get(name)
                if theirs is None or (theirs.shape, theirs.dtype) != (ours.shape, ours.dtype):
                    raise UserError(f"the checkpoint does not fit the configuration: {name}")

        def joined(name: str) -> Tensor:
            return torch.stack([tensors[name] for tensors in runs]).to(self.device)

        with torch.no_grad():
            for name, parameter in self.agent.named_parameters():
                parameter.copy_(joined(f"agent.{name}"))
                state = self.optimizer.state[parameter]
                state["step"].fill_(update)
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment].copy_(joined(f"adam.{moment}.{name}"))
        self.state = State(**{name: joined(f"world.{name}") for name in vars(self.state)})
        for generator, tensors in zip(self.generators, runs, strict=True):
            generator.set_state(tensors["generator"])
        self.updates, self.seconds = update, seconds

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
        paths: folder of each run, new or empty, or one to go on with.
        console: shows a progress bar, if it is a terminal.
        resume: go on from the newest checkpoint that all folders have.

    Returns:
        The rows of each run's `result.json`.

    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint is saved.
        UserError: there is nothing to resume from, or too little memory.
    """
    with _stop_requested() as stopping:
        try:
            trainer = Trainer(configs)
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            raise UserError("too little memory for these worlds and networks") from None
        if resume:
            folders = [RunFolder.open(path) for path in paths]
            _resume(trainer, folders)
        else:
            folders = [RunFolder.create(*run) for run in zip(paths, configs, strict=True)]
            _save(trainer, folders)
        try:
            return _train(trainer, folders, console, stopping)
        finally:
            for folder in folders:
                folder.close()


def _train(
    trainer: Trainer,
    folders: Sequence[RunFolder],
    console: Console,
    stopping: Callable[[], bool],
) -> list[list[Row]]:
    settings = trainer.configs[0]
    total, every = trainer.config.updates, settings.evaluation.every
    evaluator = Evaluator(
        settings.world, trainer.config.discount, trainer.device, settings.evaluation.episodes
    )
    policies = standard(trainer.agent.n_experts)

    def evaluate() -> list[list[Row]]:
        levels = [[config.oversight] for config in trainer.configs]
        tables = evaluator.evaluate(trainer.agent, trainer.subjects(), policies, levels)
        for folder, rows in zip(folders, tables, strict=True):
            folder.log_rows(trainer.updates, rows)
        return tables

    with _progress(console) as progress:
        task = progress.add_task("", total=total, completed=trainer.updates, speed=0.0, note="")
        if trainer.updates == 0:
            _show(progress, task, evaluate())
            _draw_pictures(trainer, folders)
        timer = _Stopwatch(trainer)
        while trainer.updates < total:
            if stopping():
                timer.lap()
                _save(trainer, folders)
                raise Interrupted
            trainer.update()
            n = trainer.updates
            if n % LOG_EVERY == 0:
                speed = timer.lap()
                for name, values in trainer.curves().items():
                    for folder, value in zip(folders, values, strict=True):
                        folder.log(n, {f"training/{name}": value})
                for folder in folders:
                    folder.log(n, {"training/env_steps_per_second": speed})
                progress.update(task, speed=speed)
                timer.start()
            progress.update(task, completed=n)
            if n % every == 0 or n == total:
                timer.lap()
                _show(progress, task, evaluate())
                if n == total or n // every % max(1, total // every // PICTURES) == 0:
                    _draw_pictures(trainer, folders)
                _save(trainer, folders)
                timer.start()
    return _finish(trainer, folders, evaluator)


def _finish(
    trainer: Trainer, folders: Sequence[RunFolder], evaluator: Evaluator
) -> list[list[Row]]:
    """The final table, sampled and greedy, at all deployment levels; result.json."""
    policies = standard(trainer.agent.n_experts)
    policies += [policy.with_options(greedy=True) for policy in policies]
    levels = [sorted({c.oversight, *c.evaluation.oversight}) for c in trainer.configs]
    tables = evaluator.evaluate(trainer.agent, trainer.subjects(), policies, levels)
    for config, folder, rows in zip(trainer.configs, folders, tables, strict=True):
        folder.finish(config, rows)
    return tables


def _resume(trainer: Trainer, folders: Sequence[RunFolder]) -> None:
    common = set.intersection(*(set(checkpoint.updates(f.checkpoints)) for f in folders))
    if not common:
        raise UserError(
            f"{folders[0].path}: no checkpoint to resume from; remove it and train anew"
        )
    saved = [checkpoint.load(folder.checkpoints, max(common)) for folder in folders]
    trainer.restore([t for t, _ in saved], max(common), saved[0][1]["wall_seconds"])
    for folder in folders:  # at update 0 the first evaluation is still to come
        folder.rewind(trainer.updates if trainer.updates else -1)


def _save(trainer: Trainer, folders: Sequence[RunFolder]) -> None:
    facts = {"env_steps": trainer.env_steps, "wall_seconds": trainer.seconds}
    for run, folder in enumerate(folders):
        checkpoint.save(folder.checkpoints, trainer.updates, trainer.tensors(run), facts)


def _draw_pictures(trainer: Trainer, folders: Sequence[RunFolder]) -> None:
    policies = standard(trainer.agent.n_experts)
    for run, (config, folder) in enumerate(zip(trainer.configs, folders, strict=True)):
        if config.pictures:
            agent = checkpoint.take_run(trainer.agent, config, run)
            world = World(config.world, config.oversight)
            arrows = render.png(pictures.policies(agent, world, policies))
            folder.picture("pictures/policies", trainer.updates, arrows)
            animation = pictures.rollouts(agent, world, policies)
            folder.picture("pictures/rollouts", trainer.updates, animation)


class _Stopwatch:
    """Adds training time, and only that, to the trainer's clock."""

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
        self.trainer.seconds += elapsed
        config, runs = self.trainer.config, len(self.trainer.configs)
        steps = (self.trainer.updates - self.updates) * config.steps * config.worlds * runs
        self.start()
        return steps / elapsed


def _progress(console: Console) -> Progress:
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


def _show(progress: Progress, task: TaskID, tables: list[list[Row]]) -> None:
    """The current returns in the progress bar, averaged over the stack's runs."""
    returns: dict[str, list[float]] = {}
    for row in chain(*tables):
        returns.setdefault(row.policy, []).append(row.ground_truth_return)
    note = "  ".join(f"{name} {np.mean(values):+.2f}" for name, values in returns.items())
    progress.update(task, note=f"{note}  optimum {tables[0][0].optimal_return:.2f}")


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come; a second one acts at once."""
    asked = False
    before: dict[signal.Signals, object] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        for name, handler in before.items():
            signal.signal(name, handler)  # type: ignore[arg-type]

    try:
        for name in (signal.SIGINT, signal.SIGTERM):
            before[name] = signal.signal(name, ask)
    except ValueError:  # not the main thread: whoever runs it handles signals
        pass
    try:
        yield lambda: asked
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)  # type: ignore[arg-type]
