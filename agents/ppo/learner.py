"""`RoutedPPO` as a learner that a loop drives, update by update.

Every update draws from streams of its own, seeded by the run's seed and the update's number, so a
resumed run takes the numbers that the uninterrupted one would have taken.
"""

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

from oversight_rl.agents.learner import Bounds, Learner, check_states, fresh_moments
from oversight_rl.agents.memory import Memory
from oversight_rl.agents.methods import LABELED, TIMEOUT, UNLABELED
from oversight_rl.agents.ppo.algorithm import RoutedPPO
from oversight_rl.agents.ppo.config import PPOConfig
from oversight_rl.agents.ppo.environment import ask, policy_arguments
from oversight_rl.agents.ppo.experience import SETTLED
from oversight_rl.agents.ppo.losses import figure_names
from oversight_rl.agents.ppo.observations import named, parts_of, unnamed
from oversight_rl.agents.ppo.policy import MoEPolicy
from oversight_rl.agents.reinforce.figures import reward_model_figures
from oversight_rl.agents.settings import AgentConfig, at
from oversight_rl.envs.overseers import Overseer
from oversight_rl.envs.settings import BEHAVIORS, NO_LABEL, UserError

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
    """A fresh model; arguments and errors are those of `PPOLearner`."""
    _check_size(agent)
    return RoutedPPO(
        "MoEPolicy", env, seed=seed, device=device, method=method,
        learning_rate=functools.partial(_schedule, settings.learning_rate),
        n_steps=settings.steps, n_epochs=settings.epochs,
        batch_size=min(settings.batch_size, settings.steps * env.num_envs),
        gamma=settings.discount, gae_lambda=settings.gae_lambda, clip_range=settings.clip_range,
        ent_coef=settings.entropy_coef, vf_coef=settings.value_coef, gate_coef=settings.gate_coef,
        contrast_coef=settings.contrast_coef, solo_share=settings.solo_share,
        task_weight=settings.task_weight, labeled_weight=settings.labeled_weight,
        gate_replay=settings.gate_replay, label_reach=settings.label_reach,
        label_recall=overseer.made.recall, label_error=overseer.made.error,
        threads=None,  # those of the whole run
        policy_kwargs={"net_arch": list(agent.hidden), "experts": _experts(agent)},
    )  # fmt: skip


def _check_size(agent: AgentConfig) -> None:
    layers = itertools.pairwise(agent.hidden)
    parameters = (agent.experts + 2) * sum(ins * outs for ins, outs in layers)
    if parameters > MOST_PARAMETERS:
        raise UserError(f"agent: at most {MOST_PARAMETERS:,} parameters, got {parameters:,}")


def _experts(agent: AgentConfig) -> int | None:
    """Number of experts; None, where it is the default, for one for each behavior."""
    return None if agent.experts == 2 else agent.experts


def new_policy(agent: AgentConfig, env: VecEnv, method: str) -> MoEPolicy:
    """A policy for any number of environments, to be filled with parameters that a method learned.

    It acts and does not learn: it has no value nets but the mixture's. No random stream is touched.

    Raises:
        UserError: the networks are too large.
        ValueError: it does not fit this environment.
    """
    _check_size(agent)
    env = RoutedPPO._wrap_env(env)
    declared = ask(env, method, (), {})
    behaviors, experts = declared.behaviors or BEHAVIORS, _experts(agent)
    arguments = policy_arguments(method, behaviors, experts, declared.flags, False, soloists=0)
    with torch.random.fork_rng(devices=[]):
        return MoEPolicy(
            env.observation_space, env.action_space, None, net_arch=list(agent.hidden), **arguments
        )


class PPOLearner(Learner):
    """One run of PPO.

    Where the environment has `get_state` and `set_state`, as our batches have, its state is part
    of the run's; any other starts anew when a run goes on.

    Args:
        settings: of the learner.
        agent: of the networks: experts and hidden layers.
        env: N environments, at the overseer's level; closed with the learner.
        method: what to train with.
        overseer: of whom recall and error are looked at, as far as they are left to make; the
            level and the rest are the environment's own.
        seed: of the run.
        device: where to train.
        curves_every: updates between those after which `curves` tells of the rollout, too.

    Raises:
        UserError: the networks are too large.
        ValueError, AssertionError, NotImplementedError: it cannot learn there, as SB3 says.
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
        self.model._start(self.env)
        # a rollout that broke off counts as a whole one
        self.steps = self.model.n_steps * self.env.num_envs
        self._steps, self._callback = self.model._setup_learn(
            self.total * self.steps, reset_num_timesteps=False
        )
        self._statistics: dict[str, float] = {}  # of the latest rollout, if they are due
        self._made: dict[str, float] = {}

    @property
    def env(self) -> VecEnv:
        """The environments, as SB3 wrapped them."""
        return cast(VecEnv, self.model.env)

    @property
    def policy(self) -> MoEPolicy:
        """In training."""
        return self.model.policy

    def close(self) -> None:
        """Close the environments."""
        self.env.close()

    def update(self) -> None:
        # an iteration of SB3's `learn`
        model, made = self.model, dict.fromkeys(MADE, 0.0)
        model.logger.dump(self.updates)  # forgets the update before
        for name in figure_names(self.policy, model.endings is not None):
            model.logger.record(f"train/{name}", math.nan)  # where nothing is learned
        model.label_generator = _seed(self.seed, self.updates + 1)
        self._statistics = {}
        try:
            model.collect_rollouts(self.env, self._callback, model.rollout_buffer, model.n_steps)
            model._update_current_progress_remaining(model.num_timesteps, self._steps)
            if (self.updates + 1) % self.curves_every == 0:
                self._statistics = statistics(model)
            model.train()
            if (model.experience.share > 0).any():
                made["loss"] = model.logger.name_to_value["train/loss"]
        except FloatingPointError as error:
            what = getattr(error, "what", COMPUTATION)
            made[what if what in made else COMPUTATION] = getattr(error, "value", math.nan)
            if model._last_obs is None:  # nobody knows where the environments are
                self.model._start(self.env)
        self.updates, self._made = self.updates + 1, made
        model.num_timesteps = self.env_steps

    def curves(self) -> list[dict[str, float]]:
        values = {
            f"loss/{name.removeprefix('train/').removesuffix('_loss')}": float(value)
            for name, value in self.model.logger.name_to_value.items()
            if name.startswith("train/") and name not in CONSTANT and isinstance(value, float | int)
        }
        return [values | self._statistics]

    def numbers(self) -> dict[str, Tensor]:
        sizes = [torch.linalg.vector_norm(p.detach()) for p in self.policy.parameters()]
        made = {name: torch.tensor([x], device=self.model.device) for name, x in self._made.items()}
        return made | {"parameters' norm": torch.linalg.vector_norm(torch.stack(sizes))[None]}

    def learned(self) -> list[Tensor]:
        memories = "tally.", *(f"{name}." for name in self._memories)
        return [x[None] for name, x in self._kept.items() if not name.startswith(memories)]

    @property
    def _memories(self) -> dict[str, Memory]:
        # by their names in checkpoints
        model = self.model
        found = {"memory": model.memory, "endings": model.endings}
        found["every_ending"] = model.every_ending
        return {name: memory for name, memory in found.items() if memory is not None}

    @property
    def _kept(self) -> dict[str, Tensor]:
        """All tensors that learning changes in place, by name."""
        policy = self.policy
        kept = named("policy", {name: p.detach() for name, p in policy.named_parameters()})
        for name, parameter in policy.named_parameters():
            moments = policy.optimizer.state[parameter]
            if not moments:  # as Adam has it before its first step
                moments.update(fresh_moments(parameter, "cpu"))
            kept |= {f"adam.{moment}.{name}": x for moment, x in moments.items()}
        if policy.task:
            kept["policy.task_square"] = policy.task_square
        for name, memory in self._memories.items():
            kept |= named(name, dict(memory.named_buffers()))
        if self.model.tally is not None:
            kept |= named("tally", dict(self.model.tally.named_buffers()))
        return kept

    def state(self, run: int = 0) -> dict[str, Tensor]:
        model = self.model
        tensors = self._kept
        tensors["last.turn"] = torch.as_tensor(self.model.rollout_buffer.turn)
        if hasattr(self.env, "get_state"):
            if model.tables.asks_labels:
                held = named("held", self.model.rollout_buffer.held.state())
                tensors |= {name: torch.as_tensor(part) for name, part in held.items()}
            world = named("world", cast(Any, self.env).get_state())
            tensors |= {name: torch.as_tensor(np.asarray(part)) for name, part in world.items()}
            tensors["last.observation"] = torch.as_tensor(model._last_obs)
            tensors["last.episode_starts"] = torch.as_tensor(model._last_episode_starts)
        return tensors

    def bounds(self) -> Bounds:
        # the environment's are what their types can hold; its `set_state` looks further
        model, space = self.model, self.model.observation_space
        ranges = {name: _range(part) for name, part in parts_of(space).items()}
        seen, taken = _side_by_side(*ranges.values()), _range(model.action_space)
        found: Bounds = dict.fromkeys(("held.learned", "last.episode_starts"), (0, 1))
        found["held.actor"] = 0, self.policy.soloists
        found |= {"held.actions": taken, "held.length": (0, model.label_reach)}
        found |= named("held.observations", ranges if isinstance(space, spaces.Dict) else seen)
        found["last.observation"] = seen
        found["last.turn"] = 0, self.env_steps + self.env.num_envs
        if self.policy.task:
            found["policy.task_square"] = np.zeros(2), np.array([np.finfo(float).max, SETTLED])
        for name in ("labeled", "others", "on_labeled", "on_others"):
            found[f"tally.{name}"] = 0, self.env_steps
        found["tally.telling"] = 0, 1
        for name in self._memories:
            found[f"{name}.observation"] = seen if name == "memory" else _side_by_side(seen, taken)
            found[f"{name}.label"] = 0, len(model.behaviors) - (name != "every_ending")
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
        (state,), model, self.updates = states, self.model, update
        model.num_timesteps = self.env_steps
        check_states(states, self, _looked_at)
        kept = self._kept
        others = {name: state[name].numpy() for name in self.state() if name not in kept}
        world, held, last = (unnamed(part, others) for part in ("world", "held", "last"))
        if world:
            try:
                cast(Any, self.env).set_state(world)
            except ValueError as error:
                raise UserError(f"the checkpoint holds what cannot be: world: {error}") from None
            model._last_obs = last["observation"]
            model._last_episode_starts = last["episode_starts"]
        for name, tensor in kept.items():
            tensor.copy_(state[name])
        if held:
            self.model.rollout_buffer.held.load(held)
        self.model.rollout_buffer.turn = last["turn"]


def statistics(model: RoutedPPO) -> dict[str, float]:
    """How episodes of a whole rollout ended, as the learner saw them, and the gate by outcome."""
    buffer = model.rollout_buffer
    kinds = {"timeout": TIMEOUT, "unlabeled": UNLABELED}
    kinds |= {f"labeled_{name}": LABELED + i for i, name in enumerate(buffer.behaviors)}
    x = model.experience
    outcome = x.window.of_rollout(x.outcome)
    endings = outcome[buffer.done]
    count = max(1, len(endings))
    shares = {f"endings/{k}": float((endings == v).sum()) / count for k, v in kinds.items()}
    if x.chances is not None:
        wanted, truth = x.window.of_rollout(x.chances[..., 0]), buffer.truth
        parts = (wanted, truth, truth != NO_LABEL, outcome)
        figures = reward_model_figures(*(torch.as_tensor(part).flatten()[None] for part in parts))
        shares |= {name: float(figure) for name, figure in figures.items()}
    if model.policy.agent.has_gate:
        gate = buffer.views.gates[buffer.view, 0]
        for kind, value in kinds.items():
            chosen = gate[outcome == value]
            shares[f"gate/{kind}"] = float(chosen.mean()) if chosen.size else math.nan
    return shares


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
    for name, rows in state.items():
        if name in ("memory.observation", "endings.observation", "every_ending.observation"):
            count = int(state[name.replace("observation", "count")][0])
            read[name] = rows[0, : min(max(0, count), rows.shape[1] - 1)]
        elif name == "held.actions" or name.startswith("held.observations"):
            age = len(rows) - torch.arange(len(rows))[:, None]
            read[name] = rows[age <= state["held.length"]]
    return read


def _side_by_side(*pairs: tuple[NDArray[Any], NDArray[Any]]) -> Any:
    return tuple(np.concatenate(side) for side in zip(*pairs, strict=True))


def _range(space: spaces.Space[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least and greatest number in each place of a flattened element; infinite where they vary."""
    if isinstance(space, spaces.Box):
        whole = np.issubdtype(space.dtype, np.integer)
        low, high = space.low, space.high
        if not whole:
            low, high = np.full(space.shape, -np.inf), np.full(space.shape, np.inf)
    elif isinstance(space, spaces.MultiDiscrete):
        low, high = space.start, space.start + space.nvec - 1
    elif isinstance(space, spaces.Discrete):
        low, high = np.array([space.start]), np.array([space.start + space.n - 1])
    else:
        low, high = np.zeros(space.shape or (1,)), np.ones(space.shape or (1,))
    return low.flatten().astype(float), high.flatten().astype(float)
