"""`RoutedPPO` as a learner that a loop drives, update by update.

Every update draws from streams of its own, seeded by the run's seed and the update's number, so a
resumed run takes the numbers that the uninterrupted one would have taken.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from oversight_rl.agents.learner import Bounds, check_numbers, check_shapes
from oversight_rl.agents.memory import Memory
from oversight_rl.agents.methods import Overseer
from oversight_rl.agents.ppo.algorithm import RoutedPPO
from oversight_rl.agents.ppo.buffer import RoutedRolloutBuffer, RoutedSamples
from oversight_rl.agents.ppo.config import PPOConfig
from oversight_rl.agents.ppo.environment import ask, policy_arguments
from oversight_rl.agents.ppo.experience import SETTLED
from oversight_rl.agents.ppo.figures import statistics
from oversight_rl.agents.ppo.losses import figure_names
from oversight_rl.agents.ppo.observations import named
from oversight_rl.agents.ppo.policy import MoEPolicy
from oversight_rl.agents.settings import AgentConfig, at
from oversight_rl.envs.settings import BEHAVIORS, UserError

MOST_PARAMETERS = 2**27
CONSTANT = ("train/n_updates", "train/clip_range")  # logged by SB3, of no use as curves
COMPUTATION = "computation"
MADE = (
    "environment's reward",
    "policy's output",
    "reward model's loss",
    "gradient's norm",
    COMPUTATION,  # something else raised
    "loss",
)
"""What an update makes, in this order; see `NotFinite`."""


def make_model(
    settings: PPOConfig,
    agent: AgentConfig,
    env: VecEnv,
    method: str,
    overseer: Overseer,
    seed: int,
    device: torch.device | str = "cpu",
) -> RoutedPPO:
    """A fresh model; see `PPOLearner`.

    Raises:
        UserError: the networks are too large.
        ValueError, AssertionError, NotImplementedError: it cannot learn in this environment, as
            SB3 says.
    """
    _check_size(agent)
    experts = {} if agent.experts == 2 else {"experts": agent.experts}
    return RoutedPPO(
        "MoEPolicy",
        env,
        learning_rate=functools.partial(_schedule, settings.learning_rate),
        n_steps=settings.steps,
        batch_size=min(settings.batch_size, settings.steps * env.num_envs),
        n_epochs=settings.epochs,
        gamma=settings.discount,
        gae_lambda=settings.gae_lambda,
        ent_coef=settings.entropy_coef,
        vf_coef=settings.value_coef,
        clip_range=settings.clip_range,
        method=method,
        labeled_weight=settings.labeled_weight,
        gate_coef=settings.gate_coef,
        contrast_coef=settings.contrast_coef,
        solo_share=settings.solo_share,
        task_weight=settings.task_weight,
        threads=None,  # those of the whole run
        gate_replay=settings.gate_replay,
        label_reach=settings.label_reach,
        label_recall=overseer.recall,
        label_error=overseer.error,
        policy_kwargs={"net_arch": list(agent.hidden), **experts},
        seed=seed,
        device=device,
    )


def _check_size(agent: AgentConfig) -> None:
    layers = itertools.pairwise(agent.hidden)
    parameters = (agent.experts + 2) * sum(ins * outs for ins, outs in layers)
    if parameters > MOST_PARAMETERS:
        raise UserError(f"agent: at most {MOST_PARAMETERS:,} parameters, got {parameters:,}")


def new_policy(agent: AgentConfig, env: VecEnv, method: str) -> MoEPolicy:
    """A policy for an environment, to be filled with parameters; no random stream is touched.

    Args:
        agent: of the networks.
        env: any number of environments.
        method: that it was trained with.

    Raises:
        UserError: the networks are too large.
        ValueError: it does not fit this environment.
    """
    _check_size(agent)
    env = RoutedPPO._wrap_env(env)
    declared = ask(env, method, (), {})
    experts = None if agent.experts == 2 else agent.experts
    arguments = policy_arguments(
        method, declared.behaviors or BEHAVIORS, experts, declared.flags, declared.has_task
    )
    with torch.random.fork_rng(devices=[]):
        return MoEPolicy(
            env.observation_space,
            env.action_space,
            None,
            net_arch=list(agent.hidden),
            **arguments,
        )


class PPOLearner:
    """One run of PPO; a `Learner`.

    Where the environment has `get_state` and `set_state`, as our batches have, its state is part
    of the run's; any other starts anew when a run goes on.

    Args:
        settings: of the learner.
        agent: of the networks: experts and hidden layers.
        env: N environments, at the overseer's level; closed with the learner.
        method: what to train with.
        overseer: of whom recall and error are looked at; the level is the environment's own.
        seed: of the run.
        device: where to train.
        curves_every: updates between those after which `curves` tells of the rollout, too.

    Raises:
        UserError: the networks are too large.
        ValueError, AssertionError, NotImplementedError: it cannot learn in this environment, as
            SB3 says.
    """

    runs = 1

    def __init__(
        self,
        settings: PPOConfig,
        agent: AgentConfig,
        env: VecEnv,
        method: str,
        overseer: Overseer,
        seed: int,
        device: torch.device | str = "cpu",
        curves_every: int = 1,
    ) -> None:
        self.model = make_model(settings, agent, env, method, overseer, seed, device)
        self.model.set_logger(Logger(folder=None, output_formats=[]))
        self.updates, self.total = 0, settings.updates
        self.seed, self.curves_every = seed, curves_every
        self.env.seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        self._reset()
        steps = self.total * self.model.n_steps * self.env.num_envs
        self._steps, self._callback = self.model._setup_learn(steps, reset_num_timesteps=False)
        self._statistics: dict[str, float] = {}  # of the latest rollout, if they are due
        self._made: dict[str, float] = {}

    @property
    def env(self) -> VecEnv:
        """The environments, as SB3 wrapped them."""
        return cast(VecEnv, self.model.env)

    @property
    def policy(self) -> MoEPolicy:
        """In training."""
        return cast(MoEPolicy, self.model.policy)

    @property
    def env_steps(self) -> int:
        """Steps taken so far, those of a rollout that broke off counted as a whole one's."""
        return self.updates * self.model.n_steps * self.env.num_envs

    def close(self) -> None:
        """Close the environments."""
        self.env.close()

    def _reset(self) -> None:
        self.model._last_obs = cast(Any, self.model._start(self.env))
        self.model._last_episode_starts = np.ones(self.env.num_envs, dtype=bool)

    def update(self) -> None:
        """A rollout, and what is learned from it: an iteration of SB3's `learn`."""
        model, made = self.model, dict.fromkeys(MADE, 0.0)
        model.logger.dump(self.updates)  # forgets the update before
        for name in figure_names(self.policy, model.reward_memory is not None):
            model.logger.record(f"train/{name}", math.nan)  # where nothing is learned
        model.label_generator = _seed(self.seed, self.updates + 1)
        self._statistics = {}
        try:
            model.collect_rollouts(self.env, self._callback, model.rollout_buffer, model.n_steps)
            model._update_current_progress_remaining(model.num_timesteps, self._steps)
            if (self.updates + 1) % self.curves_every == 0:
                self._statistics = statistics(model)
            model.train()
            learned = len(cast("RoutedSamples[Any]", self._buffer.samples).alone)
            made["loss"] = model.logger.name_to_value["train/loss"] if learned else 0.0
        except FloatingPointError as error:
            what = getattr(error, "what", COMPUTATION)
            made[what if what in made else COMPUTATION] = getattr(error, "value", math.nan)
            if model._last_obs is None:  # nobody knows where the environments are
                self._reset()
        self.updates, self._made = self.updates + 1, made
        model.num_timesteps = self.env_steps

    def curves(self) -> list[dict[str, float]]:
        """Losses as SB3 logs them, and statistics of the rollout, if they are due."""
        values = {
            f"loss/{name.removeprefix('train/').removesuffix('_loss')}": float(value)
            for name, value in self.model.logger.name_to_value.items()
            if name.startswith("train/") and name not in CONSTANT and isinstance(value, float | int)
        }
        return [values | self._statistics]

    def numbers(self) -> dict[str, Tensor]:
        """What the last update made: nan or infinite where it broke off. [1] each"""
        sizes = [torch.linalg.vector_norm(p.detach()) for p in self.policy.parameters()]
        made = {name: torch.tensor([x], device=self.model.device) for name, x in self._made.items()}
        return made | {"parameters' norm": torch.linalg.vector_norm(torch.stack(sizes))[None]}

    def learned(self) -> list[Tensor]:
        """Parameters, the optimizer's moments, and the scale of the task's returns. [1, ...]"""
        memories = {f"{m}.{b}" for m, x in self._memories.items() for b, _ in x.named_buffers()}
        return [x.detach()[None] for name, x in self._kept.items() if name not in memories]

    @property
    def _memories(self) -> dict[str, Memory]:
        # by their names in checkpoints
        found = {"memory": self.model.memory, "endings": self.model.reward_memory}
        return {name: memory for name, memory in found.items() if memory is not None}

    @property
    def _kept(self) -> dict[str, Tensor]:
        """All tensors that learning changes in place, by name."""
        policy = self.policy
        learned: dict[str, Tensor] = dict(policy.named_parameters())
        kept = {f"policy.{name}": parameter for name, parameter in learned.items()}
        for name, parameter in learned.items():
            moments = policy.optimizer.state[parameter]
            if not moments:  # as Adam has it before its first step
                moments["step"] = torch.tensor(0.0)
                moments["exp_avg"] = torch.zeros_like(parameter)
                moments["exp_avg_sq"] = torch.zeros_like(parameter)
            for moment in ("step", "exp_avg", "exp_avg_sq"):
                kept[f"adam.{moment}.{name}"] = moments[moment]
        if policy.task:
            kept["policy.task_square"] = cast(Tensor, policy.task_square)
        for name, memory in self._memories.items():
            kept |= {f"{name}.{part}": buffer for part, buffer in memory.named_buffers()}
        return kept

    @property
    def _buffer(self) -> RoutedRolloutBuffer:
        return cast(RoutedRolloutBuffer, self.model.rollout_buffer)

    def state(self, run: int = 0) -> dict[str, Tensor]:
        """Everything that the run needs to go on, by name."""
        model = self.model
        tensors = {name: tensor.detach() for name, tensor in self._kept.items()}
        tensors["last.turn"] = torch.as_tensor(self._buffer.turn)
        if hasattr(self.env, "get_state"):
            if model.tables.asks_labels:
                held = self._buffer.held.state()
                tensors |= {f"held.{name}": torch.as_tensor(part) for name, part in held.items()}
            world = cast(Any, self.env).get_state()
            tensors |= {f"world.{k}": torch.as_tensor(np.asarray(v)) for k, v in world.items()}
            tensors["last.observation"] = torch.as_tensor(model._last_obs)
            tensors["last.episode_starts"] = torch.as_tensor(model._last_episode_starts)
        return tensors

    def bounds(self) -> Bounds:
        """Least and greatest number in each tensor of whole numbers, and in floats that matter.

        Those of the environment are what their types can hold; its `set_state` looks further.
        """
        model, space = self.model, self.model.observation_space
        parts = space.spaces if isinstance(space, spaces.Dict) else {"": space}
        ranges = {name: _range(part) for name, part in parts.items()}
        seen, taken = _side_by_side(*ranges.values()), _range(model.action_space)
        found: Bounds = {
            "held.actions": taken,
            "held.alone": (0, 1),
            "held.learned": (0, 1),
            "held.length": (0, model.label_reach),
            "last.observation": seen,
            "last.episode_starts": (0, 1),
            "last.turn": (0, self.env_steps + self.env.num_envs),
        }
        found |= named("held.observations", ranges if isinstance(space, spaces.Dict) else seen)
        if self.policy.task:
            found["policy.task_square"] = np.zeros(2), np.array([np.finfo(float).max, SETTLED])
        for name in self._memories:
            found[f"{name}.observation"] = seen if name == "memory" else _side_by_side(seen, taken)
            found[f"{name}.label"] = 0, len(model.behaviors) - 1
            found[f"{name}.count"] = 0, self.env_steps
        ours = self.state()
        for name in ours:
            kind = ours[name].dtype
            if name.startswith("adam.step."):  # a float, which an exponent comes of
                found[name] = 0, np.finfo(float).max
            if name.startswith("world.") and not kind.is_floating_point:
                limits = None if kind == torch.bool else torch.iinfo(kind)
                found[name] = (0, 1) if limits is None else (limits.min, limits.max)
        return {name: pair for name, pair in found.items() if name in ours}

    def load(self, states: Sequence[Mapping[str, Tensor]], update: int) -> None:
        """Go on from the state of a run, taken after an update.

        Raises:
            UserError: a tensor is missing, has another shape or type, or holds what cannot be.
        """
        (state,), model = states, self.model
        self.updates, ours = update, self.state()
        model.num_timesteps = self.env_steps
        check_shapes(state, ours)
        check_numbers(_looked_at({name: state[name] for name in ours}), self.bounds())
        parts: dict[str, dict[str, Any]] = {"world": {}, "last": {}, "held": {}}
        for name in ours:
            part, _, rest = name.partition(".")
            if part in parts:
                parts[part][rest] = state[name].numpy()
        if parts["world"]:
            try:
                cast(Any, self.env).set_state(parts["world"])
            except ValueError as error:
                raise UserError(f"the checkpoint holds what cannot be: world: {error}") from None
            model._last_obs = parts["last"]["observation"]
            model._last_episode_starts = parts["last"]["episode_starts"]
        with torch.no_grad():
            for name, tensor in self._kept.items():
                tensor.copy_(state[name])
        if parts["held"]:
            self._buffer.held.load(parts["held"])
        self._buffer.turn = parts["last"]["turn"]


def _schedule(schedule: tuple[float, ...], remaining: float) -> float:
    return at(schedule, 1 - remaining)


def _seed(seed: int, update: int) -> np.random.Generator:
    """Seed SB3's streams, which are global, for one update; returns a stream for the labels."""
    states = np.random.SeedSequence(seed, spawn_key=(update,)).generate_state(3)
    torch.manual_seed(int(states[0]))
    np.random.seed(states[1])
    return np.random.default_rng(states[2])


def _looked_at(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A run's tensors without what is never read: rows of memories and held steps not in use."""
    read = dict(state)
    for name in ("memory", "endings"):
        if f"{name}.count" in state:
            rows = state[f"{name}.observation"]
            known = min(max(0, int(state[f"{name}.count"][0])), rows.shape[1] - 1)
            read[f"{name}.observation"] = rows[0, :known]
    for name in state:
        if name == "held.actions" or name.startswith("held.observations"):
            steps = state[name]
            age = len(steps) - torch.arange(len(steps))[:, None]
            read[name] = steps[age <= state["held.length"]]
    return read


def _side_by_side(*pairs: tuple[NDArray[Any], NDArray[Any]]) -> Any:
    return tuple(np.concatenate(side) for side in zip(*pairs, strict=True))


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
