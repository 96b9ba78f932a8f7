"""Training: one update reads as collect -> label -> loss -> step; `fit` drives it."""

from __future__ import annotations

import copy
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from torch import Tensor, nn
from torch.optim.adam import adam

from oversight_rl import checkpoint, pictures
from oversight_rl.agents import reinforce
from oversight_rl.agents.memory import Memory
from oversight_rl.agents.methods import LABELED, METHODS, outcomes, tables
from oversight_rl.agents.networks import Agent
from oversight_rl.agents.reward_model import RewardModel
from oversight_rl.agents.steering import standard
from oversight_rl.agents.threads import on_threads
from oversight_rl.config import Config
from oversight_rl.envs import render
from oversight_rl.envs.settings import BEHAVIORS, UserError
from oversight_rl.envs.world import State, World
from oversight_rl.evaluation import Evaluator, Row, Subject, final_tables
from oversight_rl.files import writing
from oversight_rl.health import Watch
from oversight_rl.tracking import CONFIG, RunFolder, check_free, deployed_row, locked

HELD_OUT = 4096  # fresh episodes that an agent is selected by
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
        initial = [_generator(seed[0], "cpu") for seed in seeds]
        self.agent = checkpoint.new_agent(configs[0], len(configs), initial).to(self.device)
        self.methods = tables(
            [config.method for config in configs],
            [config.overseer for config in configs],
            self.agent.n_experts,
            self.device,
        )
        self.world = World(
            configs[0].world, torch.tensor(levels)[:, None, None], self.device
        )  # levels [R, 1, 1] against worlds [R, T, N]
        self.reward_model = None
        if METHODS[configs[0].method].imputes:
            self.reward_model = RewardModel(
                len(configs), self.world, self.config.reward_model_sees_flags, initial
            ).to(self.device)
        self.gate_memory = None
        if self.agent.has_gate and self.config.gate_replay:
            self.gate_memory = Memory(
                len(configs), self.world.n_active, self.config.gate_replay
            ).to(self.device)
        self.generators = [_generator(seed[1], self.device) for seed in seeds]
        self.state: State = self.world.reset(self._draw(1)[..., : self.world.noise_channels])[:, 0]
        self.optimizer = Adam(self.parameters.values())
        self.watch = Watch(len(configs), self.device)
        self.deploys = METHODS[configs[0].method].deploys
        self.selected = None if self.deploys == "last" else Selected(self.agent)
        self.latest: tuple[reinforce.Rollout, reinforce.Targets, reinforce.Loss] | None = None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All that is learned, by its name in a checkpoint."""
        return {
            f"{prefix}.{name}": parameter
            for prefix, module in self.modules.items()
            for name, parameter in module.named_parameters()
        }

    @property
    def kept(self) -> dict[str, Tensor]:
        """What is kept beside what is learned, by its name in a checkpoint."""
        kept = {} if self.selected is None else self.selected.tensors
        for prefix, module in self.modules.items():
            kept |= {f"{prefix}.{name}": buffer for name, buffer in module.named_buffers()}
        return kept

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All that learns and remembers, by name."""
        found = {
            "agent": self.agent,
            "reward_model": self.reward_model,
            "gate_memory": self.gate_memory,
        }
        return {name: module for name, module in found.items() if module is not None}

    @property
    def deployed(self) -> Agent:
        """The agents that are deployed."""
        return self.agent if self.selected is None else self.selected.agent

    def select(self, true_returns: Sequence[float]) -> None:
        """Keep the present agents where they are the best so far, if that matters.

        Args:
            true_returns: of the present agents, one per run; only diagnostic methods look at them.
        """
        if self.selected is not None:
            by_truth = self.deploys == "best_true"
            score = torch.tensor(true_returns) if by_truth else self.held_out_returns()
            self.selected.consider(self.agent, score.to(self.device), self.updates)

    def held_out_returns(self) -> Tensor:
        """Mean true return of the labeled ones among fresh episodes, nan if none is. [R]

        All that an overseer can tell of an agent's quality. The episodes are drawn from a stream
        of their own, so that looking changes nothing in training.
        """
        shape = (self.world.config.max_steps, HELD_OUT, reinforce.noise_channels(self.world))
        streams = [
            np.random.SeedSequence(config.seeds[0], spawn_key=(self.updates,))
            for config in self.configs
        ]
        noise = _uniform(shape, [_generator(s.generate_state(1)[0], self.device) for s in streams])
        # the last step's resets start episodes that are not looked at
        start = self.world.reset(noise[:, -1:, :, : self.world.noise_channels])[:, 0]
        with torch.no_grad():
            rollout, _ = reinforce.collect(self.agent, self.world, start, noise)
        first = outcomes(rollout.seen, rollout.truth, rollout.audit, self.methods)
        outcome, left = first[0][:, 0], first[1][:, 0]  # [R, N]
        sign = (outcome == LABELED).float() - (outcome == LABELED + 1).float()
        return (sign * self.config.discount**left).sum(-1) / sign.abs().sum(-1)

    @property
    def env_steps(self) -> int:
        """Steps taken by each run, those of its looks at held-out episodes too.

        Such looks come with evaluations: of the untrained agent, now and then, and of the last.
        """
        trained = self.updates * self.config.steps * self.config.worlds
        if self.deploys != "best_labeled":
            return trained
        last, every = self.config.updates, self.configs[0].evaluation.every
        looks = 1 + self.updates // every + (self.updates == last and last % every > 0)
        return trained + looks * HELD_OUT * self.world.config.max_steps

    def update(self) -> None:
        """One update of every run."""
        progress = self.updates / max(1, self.config.updates - 1)
        rollout, self.state = reinforce.collect(
            self.agent, self.world, self.state, self._draw(self.config.steps)
        )
        targets = reinforce.label(
            rollout, self.methods, self.config, progress, self.reward_model, self.gate_memory
        )
        losses = reinforce.loss(self.agent, rollout, targets, self.reward_model, self.gate_memory)
        self._step(losses, progress)
        self.latest = rollout, targets, losses
        self.updates += 1

    def _step(self, losses: reinforce.Loss, progress: float) -> None:
        self.optimizer.zero_grad()
        losses.total(self.config, progress).sum().backward()
        skips = self.configs[0].on_nan == "skip"
        before = [x.detach().clone() for x in self._learned()] if skips else []
        self.optimizer.step(reinforce.at(self.config.learning_rate, progress))
        healthy = self.watch.look(self.updates + 1, self._numbers(losses))
        if skips:
            with torch.no_grad():
                for now, was in zip(self._learned(), before, strict=True):
                    now.copy_(torch.where(healthy.view(-1, *[1] * (now.ndim - 1)), now, was))

    def _learned(self) -> list[Tensor]:
        """Parameters and the optimizer's moments of all runs."""
        moments = [
            self.optimizer.state[parameter][moment]
            for parameter in self.parameters.values()
            for moment in ("exp_avg", "exp_avg_sq")
        ]
        return [*self.parameters.values(), *moments]

    def _numbers(self, losses: reinforce.Loss) -> dict[str, Tensor]:
        """All that an update makes, summed up: finite only if every number in it is. [R] each"""

        def norm(x: Tensor) -> Tensor:
            size: Tensor = torch.linalg.vector_norm(x.detach().flatten(1), dim=1)
            return size

        numbers = {f"{part} loss": value.detach() for part, value in vars(losses).items()}
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                numbers[f"gradient of {name}"] = norm(parameter.grad)
        return numbers | {f"parameter {name}": norm(p) for name, p in self.parameters.items()}

    def _draw(self, steps: int) -> Tensor:
        """Uniform numbers `[R, steps, N, channels]`, each run's from its own stream."""
        shape = (steps, self.config.worlds, reinforce.noise_channels(self.world))
        return _uniform(shape, self.generators)

    def curves(self) -> list[dict[str, float]]:
        """Points of the training curves after an update, for each run."""
        assert self.latest is not None
        rollout, targets, losses = self.latest
        absent = {
            "gate": not self.agent.has_gate,
            "contrast": not self.methods.contrasts,
            "reward_model": self.reward_model is None,
        }
        points = {f"loss/{k}": v for k, v in vars(losses).items() if not absent.get(k)}
        points |= reinforce.statistics(rollout, targets)
        columns = {name: value.tolist() for name, value in points.items()}
        return [
            {name: column[run] for name, column in columns.items()}
            for run in range(len(self.configs))
        ]

    def tensors(self, run: int) -> dict[str, Tensor]:
        """Everything that a run needs to go on, by name."""
        found = {name: parameter[run] for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                found[f"adam.{moment}.{name}"] = self.optimizer.state[parameter][moment][run]
        found |= {name: buffer[run] for name, buffer in self.kept.items()}
        found |= {f"world.{k}": v[run] for k, v in vars(self.state).items()}
        return found | {"generator": self.generators[run].get_state()}

    def restore(self, runs: Sequence[dict[str, Tensor]], update: int, seconds: float) -> None:
        """Go on from saved tensors, one dictionary per run.

        Raises:
            UserError: a tensor is missing or has another shape or type.
        """
        self.updates, self.seconds = update, seconds
        bounds = self.bounds()
        for run, tensors in enumerate(runs):
            for name, ours in self.tensors(run).items():
                theirs = tensors.get(name)
                if theirs is None or (theirs.shape, theirs.dtype) != (ours.shape, ours.dtype):
                    raise UserError(f"the checkpoint does not fit the configuration: {name}")
                whole = not theirs.is_floating_point() and name != "generator"
                if whole and not _within(theirs, name, *bounds[name]):
                    raise UserError(f"the checkpoint holds what cannot be: {name}")

        def joined(name: str) -> Tensor:
            return torch.stack([tensors[name] for tensors in runs]).to(self.device)

        with torch.no_grad():
            for name, buffer in self.kept.items():
                buffer.copy_(joined(name))
            for name, parameter in self.parameters.items():
                parameter.copy_(joined(name))
                state = self.optimizer.state[parameter]
                state["step"].fill_(update)
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment].copy_(joined(f"adam.{moment}.{name}"))
        self.state = State(**{name: joined(f"world.{name}") for name in vars(self.state)})
        for generator, tensors in zip(self.generators, runs, strict=True):
            try:
                generator.set_state(tensors["generator"])
            except RuntimeError:
                raise UserError("the checkpoint holds what cannot be: generator") from None

    def bounds(self) -> dict[str, tuple[int, int]]:
        """Least and greatest number that each saved tensor of whole numbers can hold by now.

        All but the generator's, which torch checks itself. Bools count as 0 and 1.
        """
        cell, flag = (0, self.world.config.cells - 1), (0, 1)
        found = {f"world.{name}": cell for name in ("agent", "diamond", "ghost")}
        found |= {f"world.{name}": flag for name in ("diamond_flag", "ghost_flag", "spurious")}
        found["world.time"] = 0, self.world.config.max_steps - 1
        memories = {"gate_memory": self.gate_memory}
        if self.reward_model is not None:
            memories["reward_model.memory"] = self.reward_model.memory
        for name, memory in memories.items():
            if memory is not None:
                found[f"{name}.observation"] = 0, self.world.inputs
                found[f"{name}.label"] = 0, len(BEHAVIORS) - 1
                found[f"{name}.count"] = 0, self.updates * self.config.steps * self.config.worlds
        if self.selected is not None:
            found["selected.update"] = 0, self.updates
        return found

    def subjects(self) -> list[Subject]:
        """What the result table says of each run."""
        return [
            Subject(c.method, c.seeds[0], c.oversight, self.env_steps, self.seconds)
            for c in self.configs
        ]


def _within(integers: Tensor, name: str, low: int, high: int) -> bool:
    """Whether a saved tensor's numbers can be, so that no index among them leads elsewhere."""
    if name.endswith("memory.label"):
        integers = integers[:-1]  # the last row is scratch
    if integers.dtype == torch.bool:
        integers = integers.view(torch.uint8)  # a file's bytes can be others than 0 and 1
    return not integers.numel() or (low <= int(integers.min()) and int(integers.max()) <= high)


def _generator(seed: int, device: torch.device | str) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(seed))


def _uniform(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Numbers in [0, 1) `[R, *shape]`, each run's from its own stream."""
    return torch.stack([torch.rand(*shape, generator=g, device=g.device) for g in generators])


class Adam:
    """Adam, its numbers those of `torch.optim.Adam` to the bit.

    That class loads torch's compiler when it is first used, nearly a second at every start.

    Args:
        parameters: to learn.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.state = {
            parameter: {
                "step": torch.tensor(0.0, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            for parameter in parameters
        }

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.state:
            parameter.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Move every parameter that has a gradient."""
        moved = [(p, p.grad, kept) for p, kept in self.state.items() if p.grad is not None]
        adam(
            [parameter for parameter, _, _ in moved],
            [gradient for _, gradient, _ in moved],
            [kept["exp_avg"] for _, _, kept in moved],
            [kept["exp_avg_sq"] for _, _, kept in moved],
            [],
            [kept["step"] for _, _, kept in moved],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=learning_rate,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )


class Selected:
    """The best agent of each run so far, for methods that do not deploy the last.

    Args:
        agent: the stack in training.
    """

    def __init__(self, agent: Agent) -> None:
        self.agent = copy.deepcopy(agent).requires_grad_(False)
        self.score = torch.full_like(agent.head.bias[:, 0].detach(), -torch.inf)  # [R]
        self.update = torch.zeros_like(self.score, dtype=torch.int64)  # [R], when it was selected

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of it, by its name in a checkpoint."""
        agent = {f"selected.agent.{name}": p for name, p in self.agent.named_parameters()}
        return agent | {"selected.score": self.score, "selected.update": self.update}

    @torch.no_grad()
    def consider(self, agent: Agent, score: Tensor, update: int) -> None:
        """Take the agents of the runs whose score `[R]` (nan: unknown) is the best so far.

        As long as nothing is known of any, the newest is taken.
        """
        score = score.nan_to_num(nan=-torch.inf)
        better = (score > self.score) | self.score.isneginf()
        self.score[better], self.update[better] = score[better], update
        for ours, theirs in zip(self.agent.parameters(), agent.parameters(), strict=True):
            ours[better] = theirs[better]


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
            agent = checkpoint.take_run(trainer.agent, config, run)
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
