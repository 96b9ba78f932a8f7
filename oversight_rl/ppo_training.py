"""Training with PPO: SB3's loop drives, and a recorder fills the run folder between updates.

Every update draws from streams of its own, seeded by the run's seed and the update's number, so a
resumed run takes the numbers that the uninterrupted one would have taken.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray
from rich.console import Console
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from oversight_rl import checkpoint, pictures
from oversight_rl.agents.memory import Memory
from oversight_rl.agents.methods import LABELED, TIMEOUT, UNLABELED
from oversight_rl.agents.ppo.algorithm import RoutedPPO
from oversight_rl.agents.ppo.buffer import RoutedRolloutBuffer
from oversight_rl.agents.ppo.experience import SETTLED
from oversight_rl.agents.ppo.observations import each, named
from oversight_rl.agents.ppo.policy import MoEPolicy
from oversight_rl.agents.reinforce import at, reward_model_figures
from oversight_rl.agents.steering import standard
from oversight_rl.config import Config
from oversight_rl.envs.labels import LabelError
from oversight_rl.envs.plugins import why
from oversight_rl.envs.settings import UserError
from oversight_rl.envs.world import NO_LABEL
from oversight_rl.evaluation import EnvEvaluator, Row, Subject, final_tables, make_env
from oversight_rl.tracking import RunFolder
from oversight_rl.training import (
    LOG_EVERY,
    PICTURES,
    Interrupted,
    newest_common,
    progress_bar,
    run_folders,
    show,
)

MOST_PARAMETERS = 2**27
TRIAL = 32  # steps that an environment is tried out for
CONSTANT = ("train/n_updates", "train/clip_range")  # logged by SB3, of no use as curves


def make_model(config: Config, envs: int | None = None) -> RoutedPPO:
    """A fresh model of a run.

    Args:
        config: with one seed.
        envs: number of environments; None: as the configuration says.

    Raises:
        UserError: the environment cannot be made, or is not one that PPO can train on.
    """
    ppo, seed = config.ppo, config.seeds[0]
    layers = itertools.pairwise(config.agent.hidden)
    parameters = (config.agent.experts + 2) * sum(ins * outs for ins, outs in layers)
    if parameters > MOST_PARAMETERS:
        raise UserError(f"agent: at most {MOST_PARAMETERS:,} parameters, got {parameters:,}")
    env = make_env(config, config.oversight, envs or ppo.worlds)
    experts = {} if config.agent.experts == 2 else {"experts": config.agent.experts}
    try:
        return RoutedPPO(
            "MoEPolicy",
            env,
            learning_rate=functools.partial(_schedule, ppo.learning_rate),
            n_steps=ppo.steps,
            batch_size=min(ppo.batch_size, ppo.steps * env.num_envs),
            n_epochs=ppo.epochs,
            gamma=ppo.discount,
            gae_lambda=ppo.gae_lambda,
            ent_coef=ppo.entropy_coef,
            vf_coef=ppo.value_coef,
            clip_range=ppo.clip_range,
            method=config.method,
            labeled_weight=ppo.labeled_weight,
            gate_coef=ppo.gate_coef,
            contrast_coef=ppo.contrast_coef,
            solo_share=ppo.solo_share,
            task_weight=ppo.task_weight,
            threads=None,  # those of the whole run
            gate_replay=ppo.gate_replay,
            label_reach=ppo.label_reach,
            label_recall=config.label_recall,
            label_error=config.label_error,
            policy_kwargs={"net_arch": list(config.agent.hidden), **experts},
            seed=seed,
            device=config.torch_device(),
        )
    except (ValueError, AssertionError, NotImplementedError) as error:  # as SB3 refuses spaces
        raise UserError(f"env: {config.env}: {error}") from None


def _schedule(schedule: tuple[float, ...], remaining: float) -> float:
    return at(schedule, 1 - remaining)


def _seed(seed: int, update: int) -> np.random.Generator:
    """Seed SB3's streams, which are global, for one update; returns a stream for the labels."""
    states = np.random.SeedSequence(seed, spawn_key=(update,)).generate_state(3)
    torch.manual_seed(int(states[0]))
    np.random.seed(states[1])
    return np.random.default_rng(states[2])


def try_out(config: Config) -> None:
    """Train for one small update, to refuse what cannot be, and forget it.

    Raises:
        UserError: the environment cannot be made, does not fit, or fails.
    """
    few = {"worlds": min(config.ppo.worlds, 2), "steps": min(config.ppo.steps, TRIAL)}
    small = config.model_copy(update={"ppo": config.ppo.model_copy(update=few)})
    model = make_model(small)
    env = cast(VecEnv, model.env)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run itself will say so
            model.learn(model.n_steps * env.num_envs)
    except UserError:
        raise
    except Exception as error:  # whatever a stranger's environment leads to
        reason = str(error) if isinstance(error, LabelError) else why(error)
        raise UserError(f"env: {config.env}: no first update ({reason})") from None
    finally:
        env.close()


def fit(
    configs: Sequence[Config],
    paths: Sequence[Path],
    console: Console,
    resume: bool,
    stopping: Callable[[], bool],
) -> list[list[Row]]:
    """Train runs one after another, writing their folders; see `training.fit`."""
    with run_folders(configs, paths, resume) as folders:
        return [
            folder.result() if folder.finished else _train(config, folder, console, stopping)
            for config, folder in zip(configs, folders, strict=True)
        ]


def _train(
    config: Config, folder: RunFolder, console: Console, stopping: Callable[[], bool]
) -> list[Row]:
    model = make_model(config)
    env = cast(VecEnv, model.env)
    env.seed(int(np.random.SeedSequence(config.seeds[0]).generate_state(1)[0]))
    model.set_logger(Logger(folder=None, output_formats=[_Points()]))
    recorder = _Recorder(config, folder, console, stopping)
    newest = newest_common([config], [folder])
    model._last_obs = cast(Any, env.reset())
    model._last_episode_starts = np.ones(env.num_envs, dtype=bool)
    if newest is not None:
        if folder.version.startswith("0.1."):
            raise UserError(
                f"{folder.path}: begun with version {folder.version}, whose PPO runs cannot be "
                "gone on with; evaluate it, or train anew"
            )
        saved = checkpoint.load(folder.checkpoints, newest, _tensors(model))
        recorder.restore(model, *saved)
        checkpoint.drop_after(folder.checkpoints, newest)
        folder.rewind(saved[1].get("logged"))
    total = config.ppo.updates * config.ppo.worlds * config.ppo.steps
    try:
        with recorder.progress:
            model.learn(
                total - model.num_timesteps,
                recorder,
                log_interval=cast(Any, None),
                reset_num_timesteps=False,
            )
    except LabelError as error:
        raise UserError(f"env: {config.env}: {error}") from None
    except UserError as error:  # of the environment
        raise UserError(f"{error}; stopped there, go on with --resume {folder.path}") from None
    except FloatingPointError as error:
        raise UserError(
            f"{folder.path}: update {recorder.updates + 1}: {error}; stopped there, the checkpoint "
            f"of update {recorder.saved} is kept"
        ) from None
    return recorder.finish(model)


class _Points(KVWriter):
    """Keeps what SB3 logs of an update."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
        self.values = {k: float(v) for k, v in key_values.items() if isinstance(v, float | int)}


class _Recorder(BaseCallback):
    """Between updates: curves, evaluations, pictures, checkpoints, and stopping when asked to."""

    def __init__(
        self, config: Config, folder: RunFolder, console: Console, stopping: Callable[[], bool]
    ) -> None:
        super().__init__()
        self.config, self.folder, self.stopping = config, folder, stopping
        self.evaluator = EnvEvaluator(config, config.episodes)
        self.progress = progress_bar(console)
        self.updates, self.seconds, self.saved = 0, 0.0, -1
        self.endings: dict[str, float] = {}

    @property
    def ppo(self) -> RoutedPPO:
        """The model in training."""
        return cast(RoutedPPO, self.model)

    @property
    def subject(self) -> Subject:
        """What the result table says of the run."""
        config, steps = self.config, self.ppo.num_timesteps
        return Subject(config.method, config.seeds[0], config.oversight, steps, self.seconds)

    def restore(self, model: RoutedPPO, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            UserError: it holds what cannot be.
        """
        try:
            check(model, tensors, facts["env_steps"])
        except UserError as error:
            raise UserError(f"{self.folder.checkpoints}: {error}") from None
        with torch.no_grad():
            for name, tensor in _kept(model).items():
                tensor.copy_(tensors[name])
        buffer = cast(RoutedRolloutBuffer, model.rollout_buffer)
        parts: dict[str, dict[str, Any]] = {"world": {}, "last": {}, "held": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            if part in parts:
                parts[part][rest] = tensor.numpy()
        if parts["held"]:
            buffer.held.load(parts["held"])
        buffer.turn = parts["last"]["turn"]
        if parts["world"]:
            try:
                cast(Any, model.env).set_state(parts["world"])
            except ValueError as error:
                raise UserError(f"{self.folder.checkpoints}: world: {error}") from None
            model._last_obs = parts["last"]["observation"]
            model._last_episode_starts = parts["last"]["episode_starts"]
        model.num_timesteps, self.seconds = facts["env_steps"], facts["wall_seconds"]
        self.updates = self.saved = facts["update"]

    def _on_training_start(self) -> None:
        config = self.config
        self.task = self.progress.add_task(
            "", total=config.ppo.updates, completed=self.updates, speed=0.0, note=""
        )
        self.since = time.perf_counter()
        if self.updates == 0:
            self._save()
            self._evaluate()
            self._draw()
        self.updates -= 1  # the first rollout begins before any update

    def _on_rollout_start(self) -> None:
        self.updates += 1
        self._after_update()
        self.ppo.audit = _seed(self.config.seeds[0], self.updates + 1)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if (self.updates + 1) % LOG_EVERY == 0:
            self.endings = _statistics(self.ppo)

    def _on_training_end(self) -> None:
        self.updates += 1
        self._after_update()

    def _after_update(self) -> None:
        """All that follows update number `updates`, unless that was done before a restart."""
        n, config = self.updates, self.config
        if n > max(self.saved, 0):
            if n % LOG_EVERY == 0:
                self._log()
            self.progress.update(self.task, completed=n)
            if n % config.evaluation.every == 0 or n == config.ppo.updates:
                self._lap()
                self._evaluate()
                parts = max(1, config.ppo.updates // config.evaluation.every // PICTURES)
                if n == config.ppo.updates or n // config.evaluation.every % parts == 0:
                    self._draw()
                self._save()
        if self.stopping() and n < config.ppo.updates:
            self._lap()
            self._save()
            raise Interrupted

    def _lap(self) -> float:
        """Add the training time since the last call; returns it."""
        elapsed = time.perf_counter() - self.since
        self.seconds += elapsed
        self.since = time.perf_counter()
        return elapsed

    def _log(self) -> None:
        elapsed, ppo = self._lap(), self.config.ppo
        speed = LOG_EVERY * ppo.worlds * ppo.steps / max(elapsed, 1e-9)
        self.ppo.logger.dump(self.updates)
        (points,) = self.ppo.logger.output_formats
        values = cast(_Points, points).values
        curves = {
            f"loss/{name.removeprefix('train/').removesuffix('_loss')}": value
            for name, value in values.items()
            if name.startswith("train/") and name not in CONSTANT
        }
        curves |= self.endings
        self.folder.log_training(self.updates, curves)
        self.folder.log(self.updates, {"training/env_steps_per_second": speed})
        self.progress.update(self.task, speed=speed)

    def _evaluate(self) -> None:
        policy = cast(MoEPolicy, self.ppo.policy)
        self.progress.update(self.task, note="evaluating")
        steerings = standard(policy.n_experts, policy.behaviors)
        levels = [[self.config.oversight]]
        table = self.evaluator.evaluate(policy, [self.subject], steerings, levels)
        self.folder.log_rows(self.updates, table[0])
        show(self.progress, self.task, table)
        self.since = time.perf_counter()

    def _draw(self) -> None:
        if not self.config.pictures:
            return
        policy = cast(MoEPolicy, self.ppo.policy)
        steerings = standard(policy.n_experts, policy.behaviors)
        animation = pictures.env_rollouts(policy, self.config, steerings)
        if animation is not None:
            self.folder.picture("pictures/rollouts", self.updates, animation)
        self.since = time.perf_counter()

    def _save(self) -> None:
        if self.saved == self.updates:
            return
        facts = {
            "env_steps": self.ppo.num_timesteps,
            "wall_seconds": self.seconds,
            "logged": self.folder.logged(),
        }
        checkpoint.save(self.folder.checkpoints, self.updates, _tensors(self.ppo), facts)
        self.saved = self.updates
        self.since = time.perf_counter()

    def finish(self, model: RoutedPPO) -> list[Row]:
        """The final table and result.json."""
        (rows,) = final_tables(self.evaluator, model.policy, [self.subject], [self.config])
        self.folder.finish(self.config, rows)
        return rows


def _kept(model: RoutedPPO) -> dict[str, Tensor]:
    """All tensors that learning changes in place, by name."""
    named: dict[str, Tensor] = dict(model.policy.named_parameters())
    kept = {f"policy.{name}": parameter for name, parameter in named.items()}
    for name, parameter in named.items():
        state = model.policy.optimizer.state[parameter]
        if not state:  # as Adam has it before its first step
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        for moment in ("step", "exp_avg", "exp_avg_sq"):
            kept[f"adam.{moment}.{name}"] = state[moment]
    policy = cast(MoEPolicy, model.policy)
    if policy.task:
        kept["policy.task_square"] = cast(Tensor, policy.task_square)
    for name, memory in _memories(model).items():
        kept |= {f"{name}.{part}": buffer for part, buffer in memory.named_buffers()}
    return kept


def check(model: RoutedPPO, tensors: Mapping[str, Tensor], steps: int) -> None:
    """Refuse saved numbers that would lead astray; a checksum does not notice intent.

    Raises:
        UserError: a number is out of its bounds.
    """
    limits = bounds(model, steps)
    for name, tensor in tensors.items():
        if name.startswith("world."):  # which looks itself
            continue
        if name not in limits and not tensor.is_floating_point():
            raise KeyError(f"{name} has no bounds")
        given = tensor.numpy()
        if given.dtype == bool:  # bytes of a file may be others
            given = given.view(np.uint8)
        low, high = limits.get(name, (-math.inf, math.inf))
        if name in ("memory.observation", "endings.observation"):  # the rest is unread
            known = int(tensors[name.replace("observation", "count")][0])
            given = given[0, : min(known, given.shape[1] - 1)]
        if name == "held.actions" or name.startswith("held.observations"):  # likewise
            age = len(given) - np.arange(len(given))[:, None]
            given = given[age <= tensors["held.length"].numpy()]
        columns = given.reshape(-1, np.size(low))
        within = (columns >= low) & (columns <= high)
        if not (within | (np.isnan(columns) & np.isinf(high))).all():
            raise UserError(f"{name} holds what cannot be")


def bounds(model: RoutedPPO, steps: int) -> dict[str, tuple[ArrayLike, ArrayLike]]:
    """Least and greatest numbers that saved tensors can hold, by name; of rows, by column.

    All integers are among them, and floats that become an index.

    Args:
        model: whose tensors they are.
        steps: environment steps taken.
    """
    space = model.observation_space
    parts = space.spaces if isinstance(space, spaces.Dict) else {"": space}
    ranges = {name: _range(part) for name, part in parts.items()}

    def side_by_side(*pairs: tuple[NDArray[Any], NDArray[Any]]) -> Any:
        return tuple(np.concatenate(side) for side in zip(*pairs, strict=True))

    seen = side_by_side(*ranges.values())
    taken = _range(model.action_space)
    both = side_by_side(seen, taken)
    found: dict[str, tuple[ArrayLike, ArrayLike]] = {
        "held.actions": taken,
        "held.alone": (0, 1),
        "held.learned": (0, 1),
        "held.length": (0, model.label_reach),
        "last.observation": seen,
        "last.episode_starts": (0, 1),
        "last.turn": (0, steps + model.n_envs),
    }
    found |= named("held.observations", ranges if isinstance(space, spaces.Dict) else seen)
    if cast(MoEPolicy, model.policy).task:
        found["policy.task_square"] = np.zeros(2), np.array([np.finfo(float).max, SETTLED])
    for name in _memories(model):
        found[f"{name}.observation"] = both if name == "endings" else seen
        found[f"{name}.label"] = (0, len(model.behaviors) - 1)
        found[f"{name}.count"] = (0, steps)
    return found


def _range(space: spaces.Space[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least and greatest number in each place of a flattened element; infinite where they vary."""
    low: NDArray[Any] = np.zeros(1)
    high: NDArray[Any] = np.ones(1)
    if isinstance(space, spaces.Discrete):
        low, high = low + float(space.start), low + float(space.start + space.n - 1)
    elif isinstance(space, spaces.MultiDiscrete):
        low, high = space.start.astype(float), (space.start + space.nvec - 1).astype(float)
    elif isinstance(space, spaces.MultiBinary):
        low, high = np.zeros(space.shape), np.ones(space.shape)
    elif isinstance(space, spaces.Box):
        whole = np.issubdtype(space.dtype, np.integer)
        low, high = (
            x.astype(float) if whole else np.full(space.shape, math.copysign(math.inf, sign))
            for x, sign in ((space.low, -1), (space.high, 1))
        )
    return low.flatten(), high.flatten()


def _memories(model: RoutedPPO) -> dict[str, Memory]:
    found = {"memory": model.memory, "endings": model.endings}
    return {name: memory for name, memory in found.items() if memory is not None}


def _tensors(model: RoutedPPO) -> dict[str, Tensor]:
    """Everything that a run needs to go on, by name."""
    tensors = _kept(model)
    buffer = cast(RoutedRolloutBuffer, model.rollout_buffer)
    tensors["last.turn"] = torch.as_tensor(buffer.turn)
    if hasattr(model.env, "get_state"):  # other environments start anew on resuming
        if model.tables.asks_labels:
            held = buffer.held.state()
            tensors |= {f"held.{name}": torch.as_tensor(part) for name, part in held.items()}
        world = cast(Any, model.env).get_state()
        tensors |= {f"world.{k}": torch.as_tensor(np.asarray(v)) for k, v in world.items()}
        tensors["last.observation"] = torch.as_tensor(model._last_obs)
        tensors["last.episode_starts"] = torch.as_tensor(model._last_episode_starts)
    return tensors


def _statistics(model: RoutedPPO) -> dict[str, float]:
    """How episodes of a whole rollout ended, as the learner saw them, and the gate by outcome."""
    buffer, policy = cast(RoutedRolloutBuffer, model.rollout_buffer), cast(MoEPolicy, model.policy)
    kinds = {"timeout": TIMEOUT, "unlabeled": UNLABELED}
    kinds |= {f"labeled_{name}": LABELED + i for i, name in enumerate(buffer.behaviors)}
    outcome = model.experience.window.of_rollout(model.experience.outcome)
    endings = outcome[buffer.done]
    count = max(1, len(endings))
    shares = {f"endings/{k}": float((endings == v).sum()) / count for k, v in kinds.items()}
    if model.endings is not None:
        shares |= _reward_model(model)
    if not policy.has_gate:
        return shares
    outcome = outcome.flatten()
    with torch.no_grad():
        rows = each(
            lambda x: torch.as_tensor(x).flatten(0, 1).to(model.device), buffer.observations
        )
        gate = policy.gate_log_probabilities(rows)[0, :, 0].exp().cpu().numpy()
    means = {
        f"gate/{k}": float(gate[outcome == v].mean()) if (outcome == v).any() else math.nan
        for k, v in kinds.items()
    }
    return shares | means


def _reward_model(model: RoutedPPO) -> dict[str, float]:
    """The classifier of endings against the truth, which the learner does not see."""
    buffer = cast(RoutedRolloutBuffer, model.rollout_buffer)
    x = model.experience
    assert x.chances is not None
    chance, outcome = (x.window.of_rollout(part) for part in (x.chances[..., 0], x.outcome))
    parts = (chance, buffer.truth, buffer.truth != NO_LABEL, outcome)
    figures = reward_model_figures(*(torch.as_tensor(part).flatten()[None] for part in parts))
    return {name: float(figure) for name, figure in figures.items()}
