"""Gradient routing on Stable-Baselines3: `RoutedPPO` and its mixture-of-experts policy.

The methods, the routes, the networks and the memory are those of the REINFORCE learner; here they
meet SB3's PPO, its environments, callbacks, logger and files. A label is known at an episode's
end, so `RoutedRolloutBuffer` writes it back to the episode's steps before the learner sees them.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Self, cast
from zipfile import ZipFile

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
)
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import LinearSchedule, explained_variance, obs_as_tensor
from stable_baselines3.common.vec_env import (
    VecEnv,
    VecFrameStack,
    VecTransposeImage,
    is_vecenv_wrapped,
    unwrap_vec_wrapper,
)
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal
from torch.nn import functional as F

from oversight_rl.agents.endings import EndingClassifier, ending_memory
from oversight_rl.agents.held import Held, LateLabel, Steps, Window
from oversight_rl.agents.memory import MOST_BYTES, Memory
from oversight_rl.agents.methods import (
    LABELED,
    METHODS,
    UNFINISHED,
    MethodTables,
    Overseer,
    outcomes,
    tables,
)
from oversight_rl.agents.networks import Agent, AgentConfig, Output
from oversight_rl.agents.observations import (
    as_rows,
    check_spaces,
    each,
    flags_in_axes_of,
    from_rows,
    how_many,
    row_type,
    row_width,
)
from oversight_rl.agents.ppo_config import DEFAULT_METHOD, LABEL_REACH
from oversight_rl.agents.ppo_targets import (
    Experience,
    Targets,
    gae,
    judged,
    learns_alone,
    older_share,
    targets,
)
from oversight_rl.agents.reinforce import DEPLOYED, contrast_loss, cross_entropy, weighted_mean
from oversight_rl.agents.steering import KEPT, MIXTURE, Steering, parse
from oversight_rl.agents.threads import on_threads
from oversight_rl.aliases import names_of_0_1
from oversight_rl.envs.labels import LabelError, behavior_index, distinct_names
from oversight_rl.envs.readable import readable, readable_vec, said, seen
from oversight_rl.envs.settings import UserError, nearest
from oversight_rl.envs.vector import make_vec
from oversight_rl.envs.world import BEHAVIORS, NO_LABEL, Seen, Truth

PPO_METHODS = tuple(name for name, method in METHODS.items() if method.any_environment)
FIRST_ROLLOUTS, PATIENCE = 2, 20
"""Rollouts, and episodes in them, without a single label after which a warning is due, if the level
is not known."""
SURPRISE = 1e-6
"""Chance of as many episodes without a label below which it is due, if the level is known."""
SETTLED = 50
"""Rollouts after which it should be warned of episodes that are longer than a rollout, and about as
many as the scale of the task's returns is a mean over."""
SMALLEST_IMAGE = 36  # pixels along a side that SB3's NatureCNN takes
SYMBOLS = 64
"""Integer observations with fewer values than this are symbols, and not pixels."""
LESSONS = 12
"""Steps of the classifier of endings in an update; it must be right before the experts are set."""
ROLLOUT = 2048
"""Samples of a rollout at least, unless its steps are given: few environments need long ones."""
MINIBATCHES, LEAST_MINIBATCH = 4, 64
"""Of a rollout at most, and samples in each at least, unless their size is given."""
RESERVED = (MIXTURE.name, KEPT, "single")
ASKED = (
    "behaviors", "oversight", "ghost_oversight", "flags", "flags_visible", "has_task", "left_out",
)  # fmt: skip
"""Attributes of an environment that say something to a model."""
AT_ONCE = 4096
"""Observations that a network judges at once."""
FIRST_LABELS = 100
"""Labeled endings that the classifier is to have seen before the policy learns."""
LOOKING = 0.1
"""Share of training that this may take at most."""
COMBINATIONS = 2**16
"""Combinations of a cell's symbols at most, which `SymbolicCNN` has a table of."""


# ---- networks


class SymbolicCNN(BaseFeaturesExtractor):
    """A small CNN over a grid of symbols: `[B, rows, cols, channels]` integers.

    Each channel is a one-hot code. A 1x1 convolution of the codes is a sum of a few rows of a
    table, so it is looked up; a 3x3 convolution of stride 2 follows.

    Args:
        observation_space: `Box` of integers from 0, with three axes.
        width: channels after the first convolution.
        channels: channels after the second.
    """

    sizes: Tensor
    """Number of symbols in each channel."""

    def __init__(self, observation_space: spaces.Box, width: int = 8, channels: int = 16) -> None:
        kernel = cast(Any, tuple(min(3, side) for side in observation_space.shape[:2]))
        steps = [(side - 3) // 2 + 1 if side > 3 else 1 for side in observation_space.shape[:2]]
        super().__init__(observation_space, channels * math.prod(steps))
        sizes = observation_space.high.max(axis=(0, 1)).astype(np.int64) + 1
        self.register_buffer("sizes", torch.as_tensor(sizes), persistent=False)
        self.codes = nn.ParameterList(nn.Parameter(torch.randn(n, width)) for n in sizes)
        self.convolution = nn.Conv2d(width, channels, kernel, stride=2)

    def forward(self, observation: Tensor) -> Tensor:
        """Features `[B, features_dim]`."""
        # one row for each combination of symbols, so that a cell is one look-up
        table = self.codes[0]
        for code in list(self.codes)[1:]:
            table = (table[:, None] + code).flatten(0, 1)
        combination: Tensor = observation[..., 0].long()
        for channel, size in enumerate(self.sizes[1:].unbind(), start=1):
            combination = combination * size + observation[..., channel].long()
        x = F.embedding(combination, table).relu()
        return self.convolution(x.permute(0, 3, 1, 2)).relu().flatten(1)  # type: ignore[no-any-return]


class EntryExtractor(CombinedExtractor):
    """SB3's CombinedExtractor; an entry that its CNN does not fit has the extractor that it would
    have alone.

    Args:
        observation_space: `Dict`.
        kwargs: as CombinedExtractor's, for the other entries.
    """

    def __init__(self, observation_space: spaces.Dict, **kwargs: Any) -> None:
        own = {name: default_extractor(part) for name, part in observation_space.items()}
        plain = {
            name: part
            for name, part in observation_space.items()
            if own[name] is NatureCNN or not (is_image_space(part) or own[name] is SymbolicCNN)
        }
        super().__init__(spaces.Dict(plain), **kwargs)
        self._observation_space = observation_space
        for name in own.keys() - plain.keys():
            extractor = own[name](observation_space[name])
            self.extractors[name] = extractor
            self._features_dim += extractor.features_dim


def default_extractor(space: spaces.Space[Any]) -> type[BaseFeaturesExtractor]:
    """The features extractor of an observation space, where none is asked for."""
    if isinstance(space, spaces.Dict):
        return EntryExtractor
    if is_image_space(space) and min(cast(spaces.Box, space).shape[-2:]) >= SMALLEST_IMAGE:
        return NatureCNN
    if is_symbolic(space):
        return SymbolicCNN
    return FlattenExtractor


def is_symbolic(space: spaces.Space[Any]) -> bool:
    """Whether observations are grids of a few integer symbols, as MiniGrid's are."""
    return (
        isinstance(space, spaces.Box)
        and len(space.shape) == 3
        and np.issubdtype(space.dtype, np.integer)
        and bool((space.low == 0).all() and space.high.max() < SYMBOLS)
        and math.prod(int(n) + 1 for n in space.high.max(axis=(0, 1))) <= COMBINATIONS
    )


class MoEPolicy(ActorCriticPolicy):
    """A mixture of experts under one shared linear head, a gate and a value net.

    The networks are those of `networks.Agent`, on the features that SB3's extractor makes
    of an observation. The mixture of the experts' outputs are the parameters of the action
    distribution: logits, or the mean of a Gaussian.

    Args:
        args: as SB3's ActorCriticPolicy.
        experts: number of experts; 1 for a single policy without a gate.
        behaviors: that the first experts are meant for, by name.
        gate: "learned", or "fixed" at 1/K.
        imputes: whether there is a classifier of endings, see `oversight_rl.agents.endings`.
        flags: which entries of an observation show oversight flags, as a boolean array of its
            shape, or one for each name of a dictionary; the classifier does not look at them.
        task: whether the environment's reward is a task of its own, which has a value net, too.
        steering: what the experts are made into.
        kwargs: as SB3's ActorCriticPolicy. `net_arch` is one list of hidden units, for experts,
            gate and value net alike; the features extractor defaults to `SymbolicCNN` for grids of
            symbols, SB3's NatureCNN for images, none for vectors, and these side by side for
            dictionaries.

    Raises:
        ValueError: an argument asks for what this policy has not got.
    """

    FIXED: ClassVar[dict[str, Any]] = {
        "activation_fn": nn.ReLU,
        "ortho_init": False,
        "use_sde": False,
        "share_features_extractor": True,
    }

    def __init__(
        self,
        *args: Any,
        experts: int = 2,
        behaviors: Sequence[str] = BEHAVIORS,
        gate: str = "learned",
        imputes: bool = False,
        flags: Any = None,
        task: bool = False,
        steering: Steering = MIXTURE,
        **kwargs: Any,
    ) -> None:
        for name, only in self.FIXED.items():
            if kwargs.setdefault(name, only) != only:
                raise ValueError(f"MoEPolicy: {name} must be {only}, got {kwargs[name]}")
        space: Any = kwargs.get("observation_space", args[0] if args else None)
        kwargs.setdefault("features_extractor_class", default_extractor(space))
        net_arch = kwargs.get("net_arch")
        if net_arch is None:
            kwargs["net_arch"] = [64, 64]
        elif not isinstance(net_arch, list | tuple) or not net_arch:
            raise ValueError(
                "MoEPolicy: net_arch must be one list of hidden units (experts, gate and value "
                f"net are alike), got {net_arch!r}"
            )
        self.n_experts, self.behaviors, self.gate = experts, tuple(behaviors), gate
        self.imputes, self.flags, self.task = imputes, flags, task
        self.steering = steering
        super().__init__(*args, **kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = {"experts": self.n_experts, "behaviors": self.behaviors, "gate": self.gate}
        own |= {"imputes": self.imputes, "flags": self.flags, "task": self.task}
        own |= {"steering": self.steering}
        return super()._get_constructor_parameters() | own

    def _build(self, lr_schedule: Schedule) -> None:
        gaussian = isinstance(self.action_dist, DiagGaussianDistribution)
        if gaussian:
            outputs = int(np.prod(self.action_space.shape or (1,)))
            self.log_std = nn.Parameter(torch.full((outputs,), float(self.log_std_init)))
        else:  # a categorical distribution over all choices, concatenated
            net = self.action_dist.proba_distribution_net(latent_dim=1)
            outputs = cast(nn.Linear, net).out_features
        self.agent = Agent(
            AgentConfig(experts=max(2, self.n_experts), hidden=tuple(cast(Any, self.net_arch))),
            (1, self.features_dim),
            outputs,
            runs=1,
            experts="many" if self.n_experts > 1 else "one",
            gate=cast(Any, self.gate),
            generators=[torch.default_generator],
        )
        self.endings = None
        if self.imputes:
            extractor = self.make_features_extractor()
            self.endings = EndingClassifier(extractor, self.action_space, len(self.behaviors))
        two = self.imputes and self.n_experts > 1  # who act: the mixture, an expert by itself
        self.own_value_net = self._value_net(1) if two else None
        self.task_value_net = None
        if self.task:
            self.task_value_net = self._value_net(1 + two)
            # where there is no reward, there is no error, and nothing is learned from that
            nn.init.zeros_(self.task_value_net[-1].weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.task_value_net[-1].bias)  # type: ignore[arg-type]
            self.register_buffer("task_square", torch.zeros(2, dtype=torch.float64))
        self.optimizer = self.optimizer_class(
            self.parameters(),
            lr=lr_schedule(1),
            **self.optimizer_kwargs,  # type: ignore[call-arg]
        )

    def _value_net(self, outputs: int) -> nn.Sequential:
        width = cast(Any, self.net_arch)[-1]
        return nn.Sequential(
            nn.Linear(self.features_dim, width), nn.ReLU(), nn.Linear(width, outputs)
        )

    @property
    def has_gate(self) -> bool:
        """Whether there is a gate that learns."""
        return self.agent.has_gate

    def output(self, obs: Any) -> Output:
        """Everything that the networks compute for B observations: `Output` with R = 1."""
        return self.agent(self._features(obs))  # type: ignore[no-any-return]

    def gate_log_probabilities(self, obs: Any) -> Tensor:
        """The gate's log-probabilities alone, `[1, B, K]`."""
        return self.agent.prepare().gate(self._features(obs)).log_softmax(-1)

    def ending_log_probabilities(self, obs: Any, actions: Tensor) -> Tensor:
        """Of each behavior, where an episode ends by these actions, `[B, behaviors]`."""
        assert self.endings is not None
        if self.flags is not None:
            obs = each(_hide, obs, self.flags)
        features = cast(Tensor, self.extract_features(obs, self.endings.extractor))
        return self.endings(features, actions).log_softmax(-1)  # type: ignore[no-any-return]

    def own_values(self, obs: Any) -> Tensor:
        """What the deployed expert by itself is to get, `[B]`."""
        assert self.own_value_net is not None
        return cast(Tensor, self.own_value_net(self.extract_features(obs))).flatten()

    def task_values(self, obs: Any, alone: Tensor) -> Tensor:
        """What the task is to pay, in units of its scale, `[B]`.

        Args:
            obs: B observations.
            alone: where the deployed expert acts by itself, `[B]` bool; else the mixture does.
        """
        assert self.task_value_net is not None
        values = self.task_value_net(self.extract_features(obs))  # [B, 1 or 2]
        column = alone.long().clamp(max=values.shape[-1] - 1)
        return values.gather(-1, column[:, None])[:, 0]  # type: ignore[no-any-return]

    def _features(self, obs: Any) -> Tensor:
        return cast(Tensor, self.extract_features(obs))[None]

    def distribution(self, parameters: Tensor) -> Distribution:
        """The action distribution with these logits or means, `[B, A]`.

        Raises:
            FloatingPointError: they are not finite.
        """
        if not torch.compiler.is_compiling() and not parameters.isfinite().all():
            raise FloatingPointError("the policy's output is not finite")
        # as SB3 makes them, but not validated once more, which exporters cannot follow
        dist: Any = self.action_dist
        if isinstance(dist, DiagGaussianDistribution):
            spread = torch.ones_like(parameters) * self.log_std.exp()
            dist.distribution = Normal(parameters, spread, validate_args=False)
        elif isinstance(dist, MultiCategoricalDistribution):
            dist.distribution = [
                Categorical(logits=logits, validate_args=False)
                for logits in parameters.split(list(dist.action_dims), dim=1)
            ]
        else:
            kind = Bernoulli if isinstance(dist, BernoulliDistribution) else Categorical
            dist.distribution = kind(logits=parameters, validate_args=False)
        return cast(Distribution, dist)

    def forward(
        self, obs: Any, deterministic: bool = False, alone: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Actions of the steered policy, values `[B, 1]` and log-probabilities `[B]`.

        Values are those of the mixture. Where `alone` (`[B]` bool) says so, the deployed expert
        acts by itself.
        """
        output = self.output(obs)
        distribution = self.distribution(self._acting(output, alone))
        actions = distribution.get_actions(deterministic or self.steering.greedy)
        log_prob = distribution.log_prob(actions)
        actions = actions.reshape((-1, *(self.action_space.shape or ())))
        return actions, output.value[0][:, None], log_prob

    def log_probabilities(self, obs: Any, actions: Tensor, alone: Tensor) -> Tensor:
        """Of actions that were taken, by the deployed expert where it was `alone`. `[B]`"""
        distribution = self.distribution(self._acting(self.output(obs), alone))
        return distribution.log_prob(self.as_taken(actions))

    def as_taken(self, rows: Tensor) -> Tensor:
        """Actions as the distribution has them, from rows of numbers `[B, ...]`."""
        if isinstance(self.action_space, spaces.Discrete):
            return rows.long().flatten()
        return rows.flatten(1).float()

    def _acting(self, output: Output, alone: Tensor | None) -> Tensor:
        """Parameters of the action distribution of who acts, `[B, A]`."""
        parameters = self._steered(output)
        if alone is None:
            return parameters
        return torch.where(alone[:, None], output.alone(DEPLOYED)[0], parameters)

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values `[B, 1]`, log-probabilities and entropies `[B]` of actions, as steered."""
        output = self.output(obs)
        return self._judged(output, self._steered(output), actions)

    def evaluate_output(
        self, output: Output, actions: Tensor, routes: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same of the mixture, from what the networks computed.

        Args:
            output: for B observations.
            actions: that were taken.
            routes: gradient weights into the experts and the gate, `[B, K + 1]`; None: all 1.
        """
        if routes is not None:
            output = output.routed(routes[None])
        return self._judged(output, output.mix(output.gate)[0], actions)

    def _judged(
        self, output: Output, parameters: Tensor, actions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        distribution = self.distribution(parameters)
        if isinstance(self.action_space, spaces.Box):
            actions = actions.flatten(1)
        return output.value[0][:, None], distribution.log_prob(actions), distribution.entropy()

    def _steered(self, output: Output) -> Tensor:
        """Parameters of the action distribution under the policy's steering, `[B, A]`."""
        parameters = self.steering.mix(output)[0]
        if self.steering.temperature == 1.0:  # always, where actions are continuous
            return parameters
        return parameters / self.steering.temperature

    def get_distribution(self, obs: Any) -> Distribution:
        """The action distribution under the policy's steering, the mixture's by default."""
        return self.distribution(self._steered(self.output(obs)))

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        return super()._predict(observation, deterministic or self.steering.greedy)

    def predict(
        self, observation: Any, *args: Any, **kwargs: Any
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...] | None]:
        """Actions, as SB3's policies predict them.

        The environment's own dictionary will do, with what was left out of it in training.
        """
        read = seen(observation, self.observation_space)
        actions, state = super().predict(read, *args, **kwargs)
        return np.asarray(actions, self.action_space.dtype), state

    def predict_values(self, obs: Any) -> Tensor:
        """What the mixture's endings are to be worth, `[B, 1]`."""
        return self.agent.prepare().value(self._features(obs))[0][:, None]

    def steer(self, text: str) -> MoEPolicy:
        """The same policy, steered; it shares the parameters. See `steering.parse`.

        Raises:
            UserError: the text names no expert.
        """
        return self.steered(parse(text, self.n_experts, self.behaviors))

    def steered(self, steering: Steering) -> MoEPolicy:
        """The same policy under a steering; it shares the parameters.

        Raises:
            UserError: a temperature, where actions are continuous.
        """
        if steering.temperature != 1 and isinstance(self.action_dist, DiagGaussianDistribution):
            raise UserError("temperature: continuous actions have none; steer greedily")
        policy = copy.copy(self)
        policy.steering = steering
        return policy


# ---- experience


class RoutedSamples(NamedTuple):
    """A minibatch: SB3's `RolloutBufferSamples`, and the rest of `ppo_targets.Targets`."""

    observations: Tensor
    actions: Tensor
    old_values: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor
    own_weights: Tensor
    alone_weights: Tensor
    routes: Tensor
    signed: Tensor
    own_returns: Tensor
    task_returns: Tensor
    alone: Tensor  # [B] bool, where the deployed expert acted by itself
    share: Tensor  # how much a step counts, less than 1 where an older policy took it


OF_TARGETS = RoutedSamples._fields[4:-2]
"""Those that are fields of `ppo_targets.Targets`."""


class RoutedRolloutBuffer(RolloutBuffer):
    """A rollout buffer that learns at an episode's end, or later, what the episode was.

    Args:
        args: as SB3's RolloutBuffer.
        behaviors: names that labels may have.
        solo_share: share of the episodes in which the deployed expert acts by itself.
        label_reach: steps before a rollout's end that labels reach, as far as MOST_BYTES allow.
        kwargs: as SB3's RolloutBuffer.
    """

    targets: Targets | None = None
    """What the losses ask of each step of the window, once the rollout is whole."""
    window: Window
    """The rollout, with the steps of earlier ones that its labels reach."""
    outcome: NDArray[np.int64]
    """Of each step's episode, in the window. [W, C]"""
    due: NDArray[np.bool_]
    """Which steps of the window are to be learned from now. [W, C]"""

    def __init__(
        self,
        *args: Any,
        behaviors: Sequence[str],
        solo_share: float,
        label_reach: int,
        **kwargs: Any,
    ) -> None:
        self.behaviors, self.solo_share = tuple(behaviors), solo_share
        self.episodes = self.labels = self.told = 0  # told: labeled ones with their behavior
        super().__init__(*args, **kwargs)
        self.turn = np.arange(self.n_envs)  # each environment's episodes take turns
        nothing = np.zeros_like(self.values)
        steps = self._steps(nothing, nothing, nothing)
        self.held = Held(steps, min(label_reach, MOST_BYTES // steps.row_bytes))

    def reset(self) -> None:
        """Forget the rollout, but not what labels still reach."""
        super().reset()
        shape = (self.buffer_size, self.n_envs)
        self.ended, self.done, self.alone = (np.zeros(shape, bool) for _ in range(3))
        self.label, self.truth = np.full((2, *shape), NO_LABEL)
        self.cuts: list[tuple[int, int, Any]] = []  # (step, environment, last observation)
        self.names: dict[tuple[int, Hashable], int] = {}  # environment, episode's id: its last step
        self.late: list[LateLabel] = []
        self.targets = None

    @property
    def acts_alone(self) -> NDArray[np.bool_]:
        """In which environments the deployed expert acts by itself now. [N]

        Episodes take turns, the first of four (at three quarters) being the mixture's.
        """
        share = self.solo_share
        alone: NDArray[np.bool_] = np.floor((self.turn + 1) * share) > np.floor(self.turn * share)
        return alone

    def note(self, infos: Sequence[dict[str, Any]], dones: NDArray[np.bool_]) -> None:
        """Keep what the current step's infos say of episodes that ended.

        An episode that ended in some behavior has it as `info["behavior"]` (only oracle methods
        look at which one it was), and as `info["label"]` too where an overseer saw it. Without
        either, a terminated episode counts as one that nobody saw, a truncated one as a timeout.
        A label may come later: the episode's end then says `info["episode_id"]`, and a later step
        of the same environment `info["late_labels"] = [(episode_id, label), ...]`.

        Raises:
            LabelError: a behavior is unknown.
        """
        self.alone[self.pos] = self.acts_alone
        self.done[self.pos] = dones
        for env in np.flatnonzero(dones).tolist():
            info = infos[env]
            behavior, label = info.get("behavior"), info.get("label")
            cut = bool(info.get("TimeLimit.truncated", False))
            ended = label is not None or behavior is not None
            if not ended and "behavior" not in info:
                ended = not cut
            self.ended[self.pos, env] = ended
            if cut and not ended:
                self.cuts.append((self.pos, env, info["terminal_observation"]))
            self.label[self.pos, env] = self._index(label, "label")
            self.truth[self.pos, env] = self._index(behavior, "behavior")
            if label is None and info.get("episode_id") is not None:
                self._name(env, info["episode_id"])
            else:
                self.episodes += 1
            self.labels += label is not None
            self.told += label is not None and behavior is not None
        for env, info in enumerate(infos):
            if "late_labels" in info:
                for name, label in _pairs(info["late_labels"]):
                    self._note_late(LateLabel(env, name, self._index(label, "late_labels")))

    def _name(self, env: int, name: Any) -> None:
        """Keep the id of an episode whose label may come later."""
        try:
            taken = (env, name) in self.names or (env, name) in self.held.ended
        except TypeError:
            raise LabelError(f"info['episode_id'] must be hashable, got {name!r}") from None
        if taken:
            raise LabelError(
                f"info['episode_id'] must be another one for each episode of an environment; "
                f"{name!r} of environment {env} still waits for its label"
            )
        self.names[env, name] = self.pos

    def _note_late(self, label: LateLabel) -> None:
        key = label.environment, label.episode
        if key not in self.names:
            self.late.append(label)
            return
        step, env = self.names.pop(key), label.environment
        self.label[step, env], self.ended[step, env] = label.behavior, True
        self.cuts = [cut for cut in self.cuts if cut[:2] != (step, env)]
        self._count_late(self.truth[step, env])

    def _count_late(self, truth: np.int64) -> None:
        self.episodes, self.labels = self.episodes + 1, self.labels + 1
        self.told += int(truth != NO_LABEL)

    def pass_on(self, dones: NDArray[np.bool_]) -> None:
        """Let the next episode have its turn, where one is done."""
        self.turn = self.turn + dones

    def _index(self, name: Any, key: str) -> int:
        if name is None:
            return NO_LABEL
        try:
            return behavior_index(name, self.behaviors, f"info[{key!r}]")
        except LabelError as error:
            raise LabelError(f"{error}; RoutedPPO takes others as behaviors=(...)") from None

    def look_back(
        self, own_value: NDArray[Any], task_value: NDArray[Any], task_reward: NDArray[Any]
    ) -> list[LateLabel]:
        """Make the window of a rollout that is whole.

        Args:
            own_value: what the networks say of the rollout's steps, `[T, N]`.
            task_value: likewise.
            task_reward: of the rollout's steps, in the task's scale of now.

        Returns:
            Labels of episodes that are not kept.
        """
        now = self._steps(own_value, task_value, task_reward)
        goes_on = ~self.episode_starts[0].astype(bool)  # not where environments were reset since
        self.window, missed = self.held.window(now, goes_on, self.late)
        late = self.window.late & self.window.steps.ended
        for truth in self.window.steps.truth[late]:
            self._count_late(truth)
        return missed

    def _steps(
        self, own_value: NDArray[Any], task_value: NDArray[Any], task_reward: NDArray[Any]
    ) -> Steps:
        return Steps(
            self.observations,
            self.actions,
            self.log_probs,
            self.alone,
            self.values,
            own_value,
            task_value,
            task_reward,
            np.zeros_like(self.done),
            self.ended,
            self.done,
            self.label,
            self.truth,
        )

    def outcomes(
        self, methods: MethodTables, generator: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Outcome of each step's episode, and the steps left of it; see `methods.outcomes`.

        Both are of the window, `[W, C]`.
        """
        steps, n = self.window.steps, self.n_envs

        def stacked(x: NDArray[Any]) -> Tensor:
            return torch.as_tensor(x)[None]  # [1, W, C]

        audit = np.zeros(steps.done.shape, np.float32)  # episodes end in the rollout
        audit[self.window.earlier :, :n] = generator.random(self.label.shape, dtype=np.float32)
        late = self.window.late & steps.ended
        audit[late] = generator.random(int(late.sum()), dtype=np.float32)
        seen = Seen(stacked(steps.ended), stacked(steps.done & ~steps.ended), stacked(steps.label))
        outcome, left = outcomes(seen, Truth(stacked(steps.truth)), stacked(audit), methods)
        self.outcome = outcome[0].numpy()
        return self.outcome, left[0].numpy()

    def choose(self, waits: bool) -> None:
        """Say which steps of the window are to be learned from now.

        Args:
            waits: whether the method asks what an episode was, so that steps wait for its end: all
                but those where the deployed expert acted by itself, of which nothing is routed.
        """
        window = self.window
        age = len(window.exists) - np.arange(len(window.exists))[:, None]  # 1 for the last row
        ready = (self.outcome != UNFINISHED) | window.steps.alone | (age > self.held.reach)
        if waits:
            again = window.late & (self.outcome >= LABELED)
            self.due = window.exists & (~window.steps.learned & ready | again)
        else:
            self.due = ~window.older

    def hold(self, waits: bool) -> None:
        """Keep the steps that labels may still reach, and which of them were learned from.

        Args:
            waits: whether steps wait for their episode's end.
        """
        window = self.window
        learned = window.steps.learned | self.due
        ended = [(step, env, name) for (env, name), step in self.names.items()]
        window = replace(window, steps=window.steps._replace(learned=learned))
        self.episodes += self.held.keep(window, ended, waits)

    def remember(self, memory: Memory) -> None:
        """Keep labeled observations, those of earlier rollouts whose label came now, too."""
        label = self.outcome - LABELED
        known = (label >= 0) & self.window.exists
        memory.keep(_rows_where(known, self.window.steps.observations), label[known])

    def remember_endings(self, memory: Memory) -> None:
        """Keep the labeled endings, each with its action."""
        steps, label = self.window.steps, self.outcome - LABELED
        known = steps.ended & (label >= 0)
        if known.any():
            parts = (_rows_where(known, x) for x in (steps.observations, steps.actions))
            memory.keep(np.concatenate([*parts], axis=-1), label[known])

    def set_targets(
        self,
        targets: Targets,
        log_prob: NDArray[np.float32],
        value: NDArray[np.float32],
        share: NDArray[np.float32],
    ) -> None:
        """Take over what the losses ask of each step of the window, `[W, C]` all.

        Args:
            targets: of all methods.
            log_prob: under the policy that PPO's ratio is to.
            value: that PPO's clipped value is around.
            share: how much a step counts.
        """
        self.targets = targets
        rollout = slice(self.window.earlier, None), slice(self.n_envs)
        self.advantages, self.returns = targets.advantages[rollout], targets.returns[rollout]
        steps, chosen = self.window.steps, share.T > 0
        parts = {name: getattr(targets, name) for name in OF_TARGETS}
        parts |= {"observations": steps.observations, "actions": steps.actions}
        parts |= {"old_values": value, "old_log_prob": log_prob, "alone": steps.alone}
        parts |= {"share": share, "outcome": self.outcome}
        self.flat = {
            name: each(lambda x: x.swapaxes(0, 1)[chosen], part) for name, part in parts.items()
        }

    def get(self, batch_size: int | None = None) -> Generator[Any, None, None]:
        """Minibatches of `RoutedSamples` at most so large, in random order."""
        samples = len(self.flat["alone"])  # none, where all steps wait
        order = np.random.permutation(samples)
        parts = math.ceil(samples / (batch_size or max(1, samples)))
        for part in np.array_split(order, parts) if parts else ():
            yield RoutedSamples(
                *(
                    each(lambda x, at=part: self.to_torch(x[at]), self.flat[name])
                    for name in RoutedSamples._fields
                )
            )


class RoutedDictRolloutBuffer(RoutedRolloutBuffer, DictRolloutBuffer):
    """The same for Dict observations, kept as SB3 keeps them: an array for each entry."""


# ---- the algorithm


class RoutedPPO(PPO):
    """PPO with gradient routing, for any environment whose overseer labels some episodes.

    An environment says at an episode's end, in `info`, which behavior it was (`behavior`) and, if
    an overseer saw it, the same as `label`; `oversight_rl.OversightLabels` does it for any other.
    The first behavior is the wanted one, and the first expert its own.

    Args:
        policy: "MoEPolicy", or a subclass of it.
        env: an environment, a VecEnv, or an id, of which `n_envs` are made.
        method: a row of the table of methods that PPO can follow, see `PPO_METHODS`.
        oversight: chance that a behavior is watched in an episode; given to an environment that is
            made from its id, and None with any other.
        n_envs: number of environments, made from an id.
        behaviors: names that labels may have; None: the environment's own `behaviors`, or diamond
            and ghost.
        labeled_weight: weight of a labeled episode's samples next to any other's.
        gate_coef: weight of the gate loss.
        contrast_coef: weight of the contrast loss, for the methods that have one.
        solo_share: share of the episodes in which the deployed expert acts by itself and learns
            from that, for the method that knows, or imputes, how every episode ended.
        task_weight: exchange rate between the environment's reward and the behaviors: how much
            one spread of the task's advantage counts next to one of the behavior's. At 0 the
            reward is not looked at; neither is it where the environment has an attribute
            `has_task` that is False, since its reward says no more than that a behavior was shown.
        gate_replay: remembered labeled observations that the gate learns from in each minibatch.
        label_reach: steps before a rollout's end that its labels reach. Where a method asks for
            labels, a step is learned from when its episode has ended, or when it is as old as this.
        label_recall: chance that an ending which should be labeled is.
        label_error: chance that a label names a wrong behavior.
        threads: of PyTorch, while it learns; None leaves them as they are. Networks of this size
            gain little from a second one, and lose a lot where another process keeps it busy.
        env_kwargs: more for an environment that is made from its id.
        policy_kwargs: as SB3's; `experts` defaults to one for each behavior.
        kwargs: as SB3's PPO, with other defaults: short rollouts of many environments, few epochs.

    Raises:
        ValueError: the method, an argument or a space is not one that this works with.

    Source: arXiv 2410.04332, section 4.3, for the routes; PPO as in SB3.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MoEPolicy": MoEPolicy}
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "learning_rate": LinearSchedule(3e-3, 1e-4, 1.0),
        "n_epochs": 4,
        "gamma": 0.97,
        "gae_lambda": 0.95,
        "ent_coef": 0.02,
        "device": "cpu",
    }

    def __init__(
        self,
        policy: str | type[MoEPolicy],
        env: Any,
        *args: Any,
        method: str = DEFAULT_METHOD,
        oversight: float | None = None,
        n_envs: int = 128,
        behaviors: Sequence[str] | None = None,
        labeled_weight: float = 20.0,
        gate_coef: float = 1.0,
        contrast_coef: float = 1.0,
        solo_share: float = 0.75,
        task_weight: float = 0.5,
        gate_replay: int = 512,
        label_reach: int = LABEL_REACH,
        label_recall: float = 1.0,
        label_error: float = 0.0,
        threads: int | None = 1,
        env_kwargs: dict[str, Any] | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(policy, str) and policy not in self.policy_aliases:
            raise ValueError(
                "policy must be 'MoEPolicy', which takes vectors, images and dictionaries, or a "
                f"subclass of it, got {policy!r}"
            )
        if method not in PPO_METHODS:
            raise ValueError(
                f"method must be one of {', '.join(PPO_METHODS)}, got {method!r}"
                f"{nearest(method, PPO_METHODS)}"
            )
        shares = {"label_recall": label_recall, "label_error": label_error}
        for name, p in (shares | {"solo_share": solo_share}).items():
            if not 0 <= p <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {p}")
        if solo_share == 1:
            raise ValueError("solo_share must be below 1, or the mixture learns nothing")
        numbers = {"task_weight": task_weight, "gate_coef": gate_coef, "gate_replay": gate_replay}
        for name, x in (numbers | {"contrast_coef": contrast_coef}).items():
            if not 0 <= x < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {x}")
        if not 0 < labeled_weight < math.inf:
            raise ValueError(f"labeled_weight must be above 0 and finite, got {labeled_weight}")
        if not isinstance(label_reach, int | np.integer) or label_reach < 0:
            raise ValueError(f"label_reach must be a whole number, 0 or more, got {label_reach!r}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, or None, got {threads}")
        behaviors = None if behaviors is None else checked_behaviors(behaviors)
        own = {"behaviors", "gate", "imputes", "flags", "task", "steering"}
        own &= set(policy_kwargs or {})
        if own:
            raise ValueError(f"policy_kwargs: {own.pop()} follows from the method and behaviors")
        hides = {"flags_visible": False} if METHODS[method].hides_flags else {}
        if not isinstance(env, str) and (oversight is not None or env_kwargs):
            raise ValueError(
                "oversight and env_kwargs are for environments made from their id; give them to "
                "the environment itself, or to OversightLabels"
            )
        if isinstance(env, str):
            level = {} if oversight is None else {"oversight": oversight}
            env = make_vec(env, n_envs, **{**(env_kwargs or {}), **level, **hides})
        self.method, self.behaviors = method, behaviors or ()
        self.told_behaviors: tuple[str, ...] = ()  # what the environment calls its own
        self.steering = MIXTURE  # of a policy that was saved steered
        self.left_out: tuple[str, ...] = ()  # names of what is not read of observations
        self.audit: np.random.Generator | None = None
        self.task_weight, self.threads = task_weight, threads
        self.overseer = Overseer(0.0, None, label_recall, label_error)
        self.labeled_weight = labeled_weight
        self.gate_coef, self.gate_replay = gate_coef, gate_replay
        self.contrast_coef, self.solo_share = contrast_coef, solo_share
        self.label_reach = label_reach
        kwargs["policy_kwargs"] = policy_kwargs
        given = inspect.signature(PPO).bind_partial(policy, env, *args, **kwargs).arguments
        envs = getattr(env, "num_envs", 1)
        n_steps = given.get(
            "n_steps", max(32, math.ceil(ROLLOUT / MINIBATCHES / envs) * MINIBATCHES)
        )
        batch_size = n_steps * envs
        for parts in range(2, MINIBATCHES + 1):  # as many as are alike and not too small
            if n_steps * envs % parts == 0 and n_steps * envs >= parts * LEAST_MINIBATCH:
                batch_size = n_steps * envs // parts
        defaults = self.DEFAULTS | {"n_steps": n_steps, "batch_size": batch_size}
        kwargs |= {name: value for name, value in defaults.items() if name not in given}
        super().__init__(policy, env, *args, **kwargs)

    def _setup_model(self) -> None:
        if self.use_sde:
            raise ValueError("RoutedPPO: use_sde must be False")
        method = METHODS[self.method]
        flags, task = (self.policy_kwargs.get(name) for name in ("flags", "task"))
        if self.env is not None:
            told = self._ask(self.env, self.policy_kwargs)
            self._heed(told)
            flags, task = told["flags"], told["has_task"]
        self.behaviors = self.behaviors or BEHAVIORS
        experts = self.policy_kwargs.get("experts", max(2, len(self.behaviors)))
        experts = experts if method.experts == "many" else 1
        if method.experts == "many" and experts < len(self.behaviors):
            raise ValueError(f"experts must be at least {len(self.behaviors)}, got {experts}")
        own = {"experts": experts, "behaviors": self.behaviors, "gate": method.gate}
        own |= {"task": bool(task)}
        replays = experts > 1 and method.gate == "learned" and self.gate_replay > 0
        self.memory = self._new_memory() if replays else None
        self.endings = None
        if method.imputes:
            own |= {"imputes": True, "flags": flags}
            self.endings = ending_memory(self.observation_space, self.action_space)
        self.policy_kwargs = self.policy_kwargs | own
        self._set_tables()
        if self.audit is None:  # it decides which labels go missing or wrong
            self.audit = np.random.default_rng(self.seed)
        if self.rollout_buffer_class is None:
            by_name = isinstance(self.observation_space, spaces.Dict)
            self.rollout_buffer_class = RoutedDictRolloutBuffer if by_name else RoutedRolloutBuffer
        self.rollout_buffer_kwargs = self.rollout_buffer_kwargs | {
            "behaviors": self.behaviors,
            "solo_share": self.solo_share if method.contrasts and method.imputes else 0.0,
            "label_reach": self.label_reach,
        }
        self._warned: set[str] = set()
        self._rollouts = 0
        self._resets: Any = None
        self._warn_of_texts()
        super()._setup_model()
        cast(MoEPolicy, self.policy).steering = self.steering

    def _set_tables(self) -> None:
        experts = self.policy_kwargs["experts"]
        self.tables = tables([self.method], [self.overseer], experts, behaviors=len(self.behaviors))

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """As SB3 has it; the environment is asked what the constructor asks it.

        Raises:
            ValueError: it does not fit what the model was made for.
        """
        env = self._wrap_env(env, self.verbose)
        told = self._ask(env, self.policy_kwargs)
        super().set_env(env, force_reset)
        held = cast(RoutedRolloutBuffer, self.rollout_buffer).held
        held.interrupt()
        held.ended.clear()  # its names are others
        self._heed(told)
        self._warn_of_texts()
        self._set_tables()

    def _ask(self, env: VecEnv, made: Mapping[str, Any]) -> dict[str, Any]:
        """What an environment says of behaviors, oversight and its reward.

        Args:
            env: the environment.
            made: arguments of the policy, as far as there is one.

        Returns:
            Its attributes by name; None for those that it has not got.

        Raises:
            ValueError: it says what cannot be, or does not fit the method or the policy.
        """
        told: dict[str, Any] = {}
        for name in ASKED:
            values = said(env, name) or [None]
            if not all(_same(values[0], value) for value in values[1:]):
                raise ValueError(f"the environments of one model must agree in their {name}")
            told[name] = values[0]
        behaviors, method = told["behaviors"], METHODS[self.method]
        if behaviors is not None:
            behaviors = checked_behaviors(behaviors, "the environment's behaviors")
        before = tuple(self.told_behaviors or made.get("behaviors", ()))  # a zip has lists
        if behaviors and before and behaviors != before:
            raise ValueError(
                f"the environment's behaviors are {', '.join(behaviors)}; the model was made for "
                f"{', '.join(before)}, in this order"
            )
        told["behaviors"] = behaviors
        told["flags"] = self._checked_flags(env, told["flags"], made)
        for name in ("oversight", "ghost_oversight"):
            level = told[name]
            number = isinstance(level, int | float | np.number) and not isinstance(level, bool)
            if level is not None and not (number and 0 <= level <= 1):
                raise ValueError(f"the environment's {name} must lie in [0, 1], got {level!r}")
        if method.hides_flags and told["flags_visible"] is not False:
            raise ValueError(
                f"method {self.method} is for environments that hide their flags from the policy "
                "(an attribute flags_visible that is False)"
            )
        if told["oversight"] is None and method.labels == "audit":
            raise ValueError(
                f"method {self.method} needs to know the share of episodes that it may look at: "
                "give the environment an attribute oversight"
            )
        task = True if told["has_task"] is None else told["has_task"]
        if not isinstance(task, bool | np.bool_):
            raise ValueError(f"the environment's has_task must be True or False, got {task!r}")
        if "behaviors" in made and task != made.get("task", False):
            if "task" not in made:
                raise ValueError(
                    "a model of version 0.1 had no task part: load it without env to act, or "
                    "train one anew"
                )
            raise ValueError(
                f"the environment's has_task is {task}; the model was made for {not task}"
            )
        return told | {"has_task": bool(task)}

    def _checked_flags(self, env: VecEnv, flags: Any, made: Mapping[str, Any]) -> Any:
        """An environment's flags, in the axes that the policy sees."""
        if not METHODS[self.method].imputes:
            return None
        if flags is not None:
            turned = is_vecenv_wrapped(env, VecTransposeImage)
            stack = unwrap_vec_wrapper(env, VecFrameStack)
            stacked = stack.stacked_obs.n_stack if stack else 1
            flags = flags_in_axes_of(env.observation_space, flags, turned, stacked)
        if "behaviors" in made and not _same(flags, made.get("flags")):
            raise ValueError(
                "the environment's flags are not those that the model's classifier was taught "
                "without"
            )
        return flags

    def _heed(self, told: Mapping[str, Any]) -> None:
        """Take over what an environment said."""
        self.told_behaviors = told["behaviors"] or self.told_behaviors
        self.behaviors = self.behaviors or self.told_behaviors
        self.left_out = told["left_out"] or ()
        self._knows_level = told["oversight"] is not None
        self.overseer = replace(
            self.overseer,
            oversight=float(told["oversight"] or 0.0),
            ghost_oversight=told["ghost_oversight"],
        )

    def _new_memory(self) -> Memory:
        space = self.observation_space
        return Memory(1, row_width(space), self.gate_replay, row_type(space))

    def set_random_seed(self, seed: int | None = None) -> None:
        """As SB3 has it.

        Raises:
            ValueError: the environment cannot be seeded.
        """
        try:
            super().set_random_seed(seed)
        except AttributeError as error:  # of a VecEnv that is not SB3's
            if error.name != "seed":
                raise
            raise ValueError(
                "seed: these environments cannot be seeded; leave it out, or seed them, torch and "
                "NumPy yourself"
            ) from error

    def learn(self, *args: Any, **kwargs: Any) -> Self:
        """As SB3 has it, with the model's number of threads.

        Raises:
            ValueError: there is no environment.
        """
        if self.env is None:
            raise ValueError("there is no environment: load(..., env=env) or set_env(env) first")
        with on_threads(self.threads or torch.get_num_threads()):
            return super().learn(*args, **kwargs)

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """As SB3 has it; the deployed expert acts by itself in some of the episodes.

        The reward is kept as it came: what follows an episode that a time limit cut is known when
        the rollout is whole. One that is stopped on the way leaves nothing behind; after an
        exception, nobody knows where the environments are, and they are reset.

        Raises:
            ValueError: the policy is steered.
        """
        buffer, policy = cast(RoutedRolloutBuffer, rollout_buffer), cast(MoEPolicy, self.policy)
        if policy.n_experts > 1 and policy.steering != MIXTURE:
            raise ValueError(
                f"the policy is steered to {policy.steering.name}, and learns as the mixture only: "
                "set model.policy = model.steer('mixture') first"
            )
        if self._reset_by_others(env):
            self._last_obs = cast(Any, self._start(env))
            self._last_episode_starts = np.ones(env.num_envs, dtype=bool)
        policy.set_training_mode(False)
        buffer.reset()
        callback.on_rollout_start()
        whole = False
        try:
            for _ in range(n_rollout_steps):
                alone = buffer.acts_alone
                acting = torch.as_tensor(alone, device=self.device) if alone.any() else None
                with torch.no_grad():
                    obs_tensor = obs_as_tensor(cast(Any, self._last_obs), self.device)
                    actions, values, log_probs = policy(obs_tensor, alone=acting)
                actions = actions.cpu().numpy()
                clipped_actions = actions
                if isinstance(self.action_space, spaces.Box):
                    low, high = self.action_space.low, self.action_space.high
                    clipped_actions = np.clip(actions, low, high).astype(low.dtype, copy=False)
                new_obs, rewards, dones, infos = env.step(clipped_actions)
                self.num_timesteps += env.num_envs
                callback.update_locals(locals())
                goes_on = callback.on_step()
                if self._reset_by_others(env):  # a callback did: these episodes are cut
                    infos = [
                        info
                        if done
                        else {
                            "TimeLimit.truncated": True,
                            "terminal_observation": last,
                            "late_labels": info.get("late_labels"),
                        }
                        for info, done, last in zip(infos, dones, new_obs, strict=True)
                    ]
                    new_obs, dones = cast(Any, self._start(env)), np.ones_like(dones)
                if goes_on:
                    self._update_info_buffer(infos, dones)
                    buffer.note(infos, dones)
                    if isinstance(self.action_space, spaces.Discrete):
                        actions = actions.reshape(-1, 1)
                    starts = cast(Any, self._last_episode_starts)
                    last = cast(Any, self._last_obs)
                    buffer.add(last, actions, rewards, starts, values, log_probs)
                buffer.pass_on(dones)
                self._last_obs, self._last_episode_starts = cast(Any, new_obs), dones
                if not goes_on:
                    return False
            self._learn_what_it_was(buffer)
            whole = True
        except BaseException:
            self._last_obs = None
            raise
        finally:
            if not whole:
                buffer.held.interrupt()
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: Any = None,
        reset_num_timesteps: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[int, BaseCallback]:
        """As SB3 has it, whose own resets are no surprise."""
        starts_anew = self._last_obs is None or reset_num_timesteps
        result = super()._setup_learn(
            total_timesteps, callback, reset_num_timesteps, *args, **kwargs
        )
        if starts_anew:
            self._reset_by_others(cast(VecEnv, self.env))
        return result

    def _start(self, env: VecEnv) -> Any:
        observation = env.reset()
        self._reset_by_others(env)
        return observation

    def _reset_by_others(self, env: VecEnv) -> bool:
        """Whether the environments were reset since the last time that this was asked.

        SB3's VecEnvs forget seeds and options at every reset, and take new lists for them.
        """
        base = env.unwrapped
        now = getattr(base, "_seeds", None), getattr(base, "_options", None)
        before, self._resets = self._resets, now
        return before is not None and all(x is not y for x, y in zip(before, now, strict=True))

    def _learn_what_it_was(self, buffer: RoutedRolloutBuffer) -> None:
        """Write labels back to all steps of their episodes, remember them, and set the targets."""
        policy, method = cast(MoEPolicy, self.policy), METHODS[self.method]
        shape = buffer.done.shape
        cut_at, cut_envs = np.array([c[:2] for c in buffer.cuts], np.int64).reshape(-1, 2).T
        # after the rollout, and where episodes were cut
        finals = [cut[2] for cut in buffer.cuts]
        following = each(_one_below_another, buffer.observations, self._last_obs, *finals)
        everything = each(lambda x: x.reshape(-1, *x.shape[2:]), buffer.observations)
        own = task = task_reward = np.zeros(shape, np.float32)
        if policy.own_value_net is not None:
            own = self._of_all(policy.own_values, everything).reshape(shape)
        if policy.task:
            task = self._of_all(policy.task_values, everything, buffer.alone.ravel()).reshape(shape)
            task_reward = self._in_task_scale(buffer)
        if bool(self.tables.sees_truth.any()):  # and nobody's labels
            buffer.names.clear()
            buffer.late.clear()
        self._warn_of_late(buffer.look_back(own, task, task_reward))
        window = buffer.window
        steps = window.steps

        outcome, left = buffer.outcomes(self.tables, cast(np.random.Generator, self.audit))
        buffer.choose(self.tables.asks_labels)
        if self.memory is not None:
            buffer.remember(self.memory)
        chances = None
        if self.endings is not None:
            buffer.remember_endings(self.endings)
            self.imputed = self._impute(steps)
            if int(self.endings.count):
                end = (np.arange(len(left))[:, None] + left).clip(max=len(left) - 1)
                at_end = np.take_along_axis(self.imputed, end[..., None], 0)
                chances = np.nan_to_num(at_end)

        def after(name: str, beyond: NDArray[np.float32]) -> NDArray[np.float32]:
            value = getattr(steps, name)
            following = np.append(value[1:], np.zeros_like(value[:1]), axis=0)
            following[-1, : self.n_envs] = beyond[: self.n_envs]
            following = np.where(steps.done, np.float32(0), following)
            following[window.earlier + cut_at, cut_envs] = beyond[self.n_envs :]
            for cut in window.cuts:
                following[cut.row, cut.column] = getattr(cut.last, name)[0, 0]
            return following

        more: dict[str, Any] = {}
        if policy.own_value_net is not None:
            beyond = self._of_all(policy.own_values, following)
            more |= {
                "own_value": steps.own_value,
                "own_value_after": after("own_value", beyond),
            }
        if policy.task:
            turns = np.concatenate([buffer.acts_alone, buffer.alone[cut_at, cut_envs]])
            beyond = self._of_all(policy.task_values, following, turns)
            more |= {
                "task_reward": steps.task_reward,
                "task_value": steps.task_value,
                "task_value_after": after("task_value", beyond),
            }
        beyond = self._of_all(lambda x: policy.predict_values(x).flatten(), following)
        share, log_prob, old_value = self._judged_anew(buffer)
        experience = Experience(
            outcome=outcome,
            left=left,
            ended=steps.ended,
            done=steps.done,
            alone=steps.alone,
            value=steps.value,
            value_after=after("value", beyond),
            gate=self._foretold(buffer, share, chances is not None) if policy.has_gate else None,
            chances=chances,
            share=share,
            **more,
        )
        found = targets(
            experience,
            self.tables,
            discount=self.gamma,
            trace=self.gae_lambda,
            labeled_weight=self.labeled_weight,
            imputes=method.imputes,
            normalize=self.normalize_advantage,
            task_weight=self.task_weight,
        )
        buffer.set_targets(found, log_prob, old_value, share)
        buffer.hold(self.tables.asks_labels)

    def _judged_anew(self, buffer: RoutedRolloutBuffer) -> tuple[NDArray[np.float32], ...]:
        """How much the window's steps count, their log-probabilities and values now. [W, C] each"""
        policy, steps = cast(MoEPolicy, self.policy), buffer.window.steps
        share, log_prob = buffer.due.astype(np.float32), steps.log_prob.copy()
        value, older = steps.value.copy(), buffer.window.older & buffer.due
        if older.any():
            seen = each(lambda x: x[older], steps.observations)
            taken = steps.actions[older], steps.alone[older]
            now = self._of_all(policy.log_probabilities, seen, *taken)
            share[older] = older_share(now, log_prob[older])
            log_prob[older] = now
            if self.clip_range_vf is not None:  # which is around these
                value[older] = self._of_all(lambda x: policy.predict_values(x).flatten(), seen)
        return share, log_prob, value

    def _of_all(
        self, function: Callable[..., Tensor], observations: Any, *more: NDArray[Any]
    ) -> NDArray[Any]:
        """What a network says of many observations, `[B, ...]`; in parts, to bound the memory."""

        def part(x: NDArray[Any]) -> Tensor:
            return torch.as_tensor(x[at]).to(self.device)

        parts = []
        with torch.no_grad():
            for start in range(0, how_many(observations), AT_ONCE):
                at = slice(start, start + AT_ONCE)
                said = function(each(part, observations), *map(part, more))
                parts.append(said.cpu().numpy())
        return np.concatenate(parts)

    def _foretold(
        self, buffer: RoutedRolloutBuffer, share: NDArray[np.float32], imputed: bool
    ) -> NDArray[np.float32]:
        """The gate's probabilities where the targets ask for them, else 0. [W, C, K]"""
        policy, steps = cast(MoEPolicy, self.policy), buffer.window.steps
        by_label = not imputed or learns_alone(steps.alone, share)
        known = judged(buffer.outcome, by_label) & (share > 0)
        gate = np.zeros((*known.shape, policy.n_experts), np.float32)
        if known.any():
            log_gate = self._of_all(
                lambda x: policy.gate_log_probabilities(x)[0],
                each(lambda x: x[known], steps.observations),
            )
            gate[known] = np.exp(log_gate)
        return gate

    def _impute(self, steps: Steps) -> NDArray[np.float32]:
        """Chance of each behavior where an episode ends, else nan. [W, C, behaviors]"""
        ended = steps.ended
        imputed = np.full((*ended.shape, len(self.behaviors)), np.nan, np.float32)
        if ended.any():
            seen = each(lambda x: x[ended], steps.observations)
            imputed[ended] = self._classify(seen, steps.actions[ended])
        return imputed

    def _in_task_scale(self, buffer: RoutedRolloutBuffer) -> NDArray[np.float32]:
        """The environment's rewards in units of the root mean square of its returns. [T, N]

        The mean runs over all rollouts, the newest counting most once there are many. A power of
        two in the reward is in the scale and nowhere else, to the bit.
        """
        reward = buffer.rewards.astype(np.float64)
        nothing = np.zeros_like(reward)
        if self.task_weight == 0:
            return nothing.astype(np.float32)
        if not np.isfinite(reward).all():
            raise FloatingPointError("the environment's reward is not finite")
        returns = gae(reward, nothing, nothing, buffer.done, self.gamma, 1.0)
        square = cast(Tensor, cast(MoEPolicy, self.policy).task_square)  # mean, rollouts in it
        mean, count = square.tolist()
        count = min(count + 1, SETTLED)
        mean += (float((returns**2).mean()) - mean) / count
        square.copy_(torch.tensor([mean, count], dtype=square.dtype))
        scale = mean**0.5 if mean > 0 else 1.0
        return (reward / scale).astype(np.float32)

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        if isinstance(env, VecEnv | gym.Env):  # of anything else SB3 says what it is
            env = readable_vec(env) if isinstance(env, VecEnv) else readable(env)
            check_spaces(env.observation_space, env.action_space)
        try:
            return PPO._wrap_env(env, verbose, monitor_wrapper)
        except AssertionError as error:  # as SB3 says that it takes images of one kind at once
            raise ValueError(str(error)) from None

    def _warn_of_texts(self) -> None:
        if self.left_out:
            self._warn(
                "texts",
                f"{', '.join(map(repr, self.left_out))} is left out of the observations: it is a "
                "text, and no network here reads any",
            )

    def _warn_of_data(self) -> None:
        """Warn, once each, of what makes learning from labels hopeless."""
        buffer = cast(RoutedRolloutBuffer, self.rollout_buffer)
        self._rollouts += 1
        if self._knows_level:
            missing = (1 - self.overseer.oversight) ** buffer.episodes < SURPRISE
        else:
            missing = buffer.episodes >= PATIENCE and self._rollouts >= FIRST_ROLLOUTS
        if missing and not buffer.labels:
            told = (buffer.truth != NO_LABEL).any()
            self._warn(
                "unlabeled",
                f"none of {buffer.episodes:,} episodes was labeled: at their ends info says "
                f"{'a behavior and no label' if told else 'neither label nor behavior'}. Does the "
                "environment put 'label' there where an overseer saw the episode, and does every "
                "wrapper pass info on? OversightLabels does it for any environment"
                + (
                    ""
                    if self._knows_level
                    else "; an attribute oversight says how often to expect one"
                ),
            )
        if buffer.labels > buffer.told:
            self._warn(
                "untold",
                "episodes were labeled that had no 'behavior' in info: evaluation and oracle "
                "methods will not know what they were",
            )
        acted = buffer.due & ~buffer.window.steps.alone
        beyond = float((buffer.outcome[acted] == UNFINISHED).mean()) if acted.any() else 0.0
        if self.tables.asks_labels and beyond > 0.5 and self._n_updates >= SETTLED * self.n_epochs:
            self._warn(
                "unfinished",
                f"{beyond:.0%} of the steps learned from are of episodes whose end, and label, is "
                f"more than {buffer.held.reach} steps away: let label_reach be longer",
            )

    def _warn_of_late(self, missed: Sequence[LateLabel]) -> None:
        """Warn, once, of late labels that are lost, or of no use."""
        window = cast(RoutedRolloutBuffer, self.rollout_buffer).window
        if window.late.any() and not self.tables.asks_labels and self.endings is None:
            self._warn(
                "late for nothing",
                f"method {self.method} learns nothing from labels that come late: its rewards are "
                "paid when an episode ends",
            )
        if missed:
            label, buffer = missed[0], cast(RoutedRolloutBuffer, self.rollout_buffer)
            self._warn(
                "late",
                f"a late label is lost, of episode {label.episode!r} of environment "
                f"{label.environment}: either no episode ended with this info['episode_id'] there, "
                f"or it had its label, or it was more than label_reach = {buffer.held.reach} steps "
                "ago",
            )

    def _warn(self, cause: str, text: str) -> None:
        if cause not in self._warned:
            self._warned.add(cause)
            warnings.warn(text, UserWarning, stacklevel=4)

    def train(self) -> None:
        """Update the policy from the rollout: PPO's losses, with every gradient routed.

        Raises:
            FloatingPointError: numbers went bad.
        """
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        clip = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        self._warn_of_data()
        figures: dict[str, list[Tensor]] = {}
        if self.endings is not None:
            lessons = LESSONS if int(self.endings.count) else 0
            figures["reward_model_loss"] = [self._learn_endings() for _ in range(lessons)]
        for _ in range(self.n_epochs):
            for batch in self.rollout_buffer.get(self.batch_size):
                loss, parts = self.loss(cast(Any, batch), clip)
                for name, value in parts.items():
                    figures.setdefault(name, []).append(value)
                if self.target_kl is not None and parts["approx_kl"] > 1.5 * self.target_kl:
                    break
                self.policy.optimizer.zero_grad()
                loss.backward()
                norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
                if not norm.isfinite():
                    raise FloatingPointError(f"the gradient's norm is {float(norm)}")
                self.policy.optimizer.step()
            else:
                self._n_updates += 1
                continue
            break
        for name, values in figures.items():
            mean = torch.stack(values).mean().item() if values else math.nan
            self.logger.record(f"train/{name}", mean)
        buffer = cast(RoutedRolloutBuffer, self.rollout_buffer)
        mixture = ~buffer.flat["alone"]
        foretold, was = (buffer.flat[name][mixture] for name in ("old_values", "returns"))
        explained = explained_variance(foretold, was) if mixture.any() else math.nan
        self.logger.record("train/explained_variance", explained)
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", self.policy.log_std.exp().mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/clip_range", clip)

    @property
    def still_looks(self) -> bool:
        """Whether the experts wait for the classifier of endings; values and the gate do not.

        A policy that learns before anyone knows what was unsafe settles on something quick, and
        leaves it no more. So labels come first, for a tenth of training at most.
        """
        return (
            self.endings is not None
            and int(self.endings.count) < FIRST_LABELS
            and self._current_progress_remaining > 1 - LOOKING
        )

    def loss(self, batch: RoutedSamples, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a minibatch, and its parts.

        The surrogate and entropy losses reach the experts and the gate through `route`; the value
        loss reaches the value net, and the gate loss (cross entropy against remembered labels) the
        gate; all reach the features extractor, and all samples the shared head.
        """
        policy, weight, share = cast(MoEPolicy, self.policy), batch.weights, batch.share
        actions = policy.as_taken(batch.actions)
        output = policy.output(batch.observations)
        values, log_prob, entropy = policy.evaluate_output(
            output, actions, batch.routes if policy.n_experts > 1 else None
        )
        advantages = batch.advantages
        # a ratio to who did not act may be anything, and 0 times that is nan
        log_ratio = torch.where(batch.alone, 0.0, log_prob - batch.old_log_prob)
        ratio = log_ratio.exp()
        gain = _surrogate(advantages, ratio, clip)
        values = values.flatten()
        if self.clip_range_vf is not None:
            within = self.clip_range_vf(self._current_progress_remaining)  # type: ignore[operator]
            values = batch.old_values + (values - batch.old_values).clamp(-within, within)
        spread = -log_prob if entropy is None else entropy
        parts = {
            "policy_gradient_loss": -_mean(share * gain, weight),
            "value_loss": _mean(share * (batch.returns - values) ** 2, weight),
            "entropy_loss": -_mean(share * spread, weight),
            "gate_loss": self._gate_loss(policy),
        }
        own = log_prob
        if METHODS[self.method].contrasts:
            alone = policy.distribution(output.alone(DEPLOYED)[0])
            own, own_spread = alone.log_prob(actions), alone.entropy()
            # off-policy from what the mixture did, PPO where the expert acted by itself
            signed = share * batch.signed
            taken = own, batch.old_log_prob, signed, batch.own_weights * ~batch.alone
            own_log_ratio = torch.where(batch.alone, own - batch.old_log_prob, 0.0)
            own_gain = _surrogate(signed, own_log_ratio.exp(), clip)
            parts["contrast_loss"] = contrast_loss(*(x[None] for x in taken))[0] - _mean(
                own_gain, batch.alone_weights
            )
            own_spread = share * (-own if own_spread is None else own_spread)
            parts["entropy_loss"] = parts["entropy_loss"] - _mean(own_spread, batch.alone_weights)
            if policy.own_value_net is not None:
                error = (batch.own_returns - policy.own_values(batch.observations)) ** 2
                parts["value_loss"] = parts["value_loss"] + _mean(
                    share * error, batch.alone_weights
                )
        if policy.task:  # the reward is seen in every episode, whatever the method drops
            task = policy.task_values(batch.observations, batch.alone)
            parts["task_value_loss"] = (share * (batch.task_returns - task) ** 2).mean()
        acting = (
            parts["policy_gradient_loss"]
            + self.ent_coef * parts["entropy_loss"]
            + self.contrast_coef * parts.get("contrast_loss", 0.0)
        )
        loss = (
            (0.0 if self.still_looks else 1.0) * acting
            + self.vf_coef * (parts["value_loss"] + parts.get("task_value_loss", 0.0))
            + self.gate_coef * parts["gate_loss"]
        )
        parts = {name: value.detach() for name, value in parts.items()}
        with torch.no_grad():  # http://joschu.net/blog/kl-approx.html
            log_ratio = torch.where(batch.alone, own - batch.old_log_prob, log_ratio)
            ratio = log_ratio.exp()
            parts["approx_kl"] = (ratio - 1 - log_ratio).mean()
            parts["clip_fraction"] = ((ratio - 1).abs() > clip).float().mean()
        return loss, parts | {"loss": loss.detach()}

    def _gate_loss(self, policy: MoEPolicy) -> Tensor:
        """Cross entropy of the gate against remembered labels; 0 where there are none."""
        if self.memory is None:
            return torch.zeros((), device=self.device)
        rows, label, known = self.memory.draw(torch.rand(1, self.gate_replay))
        observations = from_rows(rows[0].to(self.device), self.observation_space)
        log_gate = policy.gate_log_probabilities(observations)
        return cross_entropy(log_gate, label.to(self.device), known.to(self.device))[0]

    def _classify(self, observations: Any, actions: NDArray[Any]) -> NDArray[Any]:
        """Chance of each behavior `[B, behaviors]`, where episodes end by these actions."""
        policy = cast(MoEPolicy, self.policy)

        def chances(seen: Any, taken: Tensor) -> Tensor:
            return policy.ending_log_probabilities(seen, policy.as_taken(taken)).exp()

        return self._of_all(chances, observations, actions)

    def _learn_endings(self) -> Tensor:
        """One step of the classifier of endings, apart from the policy's; returns its loss."""
        self.policy.optimizer.zero_grad()
        loss = self._ending_loss(cast(MoEPolicy, self.policy))
        if not loss.isfinite():
            raise FloatingPointError(
                f"the loss of the classifier of endings is {float(loss.detach())}"
            )
        loss.backward()
        self.policy.optimizer.step()
        return loss.detach()

    def _ending_loss(self, policy: MoEPolicy) -> Tensor:
        """Cross entropy of the classifier of endings on remembered ones."""
        assert self.endings is not None
        rows, label, known = self.endings.draw(torch.rand(1, self.endings.draws))
        width = row_width(self.observation_space)
        seen, actions = rows[0].to(self.device).tensor_split([width], dim=-1)
        chances = policy.ending_log_probabilities(
            from_rows(seen, self.observation_space), policy.as_taken(actions)
        )
        return cross_entropy(chances[None], label.to(self.device), known.to(self.device))[0]

    def save(self, *args: Any, **kwargs: Any) -> None:
        """As SB3 has it; a policy that is steered is steered when it is loaded."""
        self.steering = cast(MoEPolicy, self.policy).steering
        super().save(*args, **kwargs)

    @classmethod
    def load(cls, path: Any, *args: Any, **kwargs: Any) -> Self:
        """As SB3 has it; zips of version 0.1, too."""
        file = open_path(path, "r", suffix="zip")
        with ZipFile(file) as archive:
            data = archive.read("data")
        old = b'"__module__": "agents.ppo"' in data
        if file is not path:
            file.close()
        if b'"overseer"' not in data:
            raise ValueError(f"{path}: holds a model of another kind, and not a RoutedPPO")
        with names_of_0_1() if old else nullcontext():
            return super().load(path, *args, **kwargs)

    def steer(self, text: str) -> MoEPolicy:
        """The policy, steered: `mixture`, `deployed`, an expert, a blend or an ablation.

        It predicts as any SB3 policy does, and shares its parameters with this model.

        Raises:
            UserError: the text names no expert.
        """
        return cast(MoEPolicy, self.policy).steer(text)

    def _excluded_save_params(self) -> list[str]:
        # made anew from the rest on loading
        return [*super()._excluded_save_params(), "rollout_buffer_kwargs", "tables", "imputed"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, variables = super()._get_torch_save_params()
        kept = [name for name in ("memory", "endings") if getattr(self, name) is not None]
        return modules + kept, variables


def checked_behaviors(names: Any, whose: str = "behaviors") -> tuple[str, ...]:
    """The names of behaviors as a tuple.

    Raises:
        ValueError: they are not two or more distinct names, or cannot be steered to.
    """
    found = distinct_names(names, whose)
    for name in found:
        if name in RESERVED or name.startswith(("without:", "expert_")) or set("=,") & set(name):
            raise ValueError(f"{whose}: {name!r} would mean something else when steering")
    return found


def _pairs(late: Any) -> list[tuple[Hashable, Any]]:
    """What an environment says of earlier episodes, as pairs of an id and a label."""
    pairs = [] if late is None else late if isinstance(late, list | tuple) else [None]
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or pair[1] is None:
            raise LabelError(
                f"info['late_labels'] must be a list of (episode_id, label), got {late!r}"
            )
    return cast("list[tuple[Hashable, Any]]", pairs)


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two things that environments say are the same; arrays among them."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_same(ours[k], theirs[k]) for k in ours)
    return type(ours) is type(theirs) and bool(np.array_equal(ours, theirs))


def _hide(seen: Tensor, flags: NDArray[np.bool_]) -> Tensor:
    """Observations without what their oversight flags say. [B, ...]"""
    return torch.where(torch.as_tensor(flags, device=seen.device), torch.zeros_like(seen), seen)


def _rows_where(chosen: NDArray[np.bool_], observations: Any) -> NDArray[Any]:
    """Those observations `[T, N, ...]` that are chosen, `[T, N]`, as rows `[B, D]`."""
    return as_rows(each(lambda x: x[chosen], observations))


def _one_below_another(kept: NDArray[Any], last: Any, *finals: Any) -> NDArray[Any]:
    """N observations and then single ones, in the shape that a rollout keeps them in."""
    shape = kept.shape[2:]
    return np.concatenate([np.asarray(x).reshape(-1, *shape) for x in (last, *finals)])


def _surrogate(advantages: Tensor, ratio: Tensor, clip: float) -> Tensor:
    """The clipped gain of each sample (arXiv 1707.06347, equation 7). [B]"""
    return torch.min(advantages * ratio, advantages * ratio.clamp(1 - clip, 1 + clip))


def _mean(x: Tensor, weight: Tensor) -> Tensor:
    """Mean of `x` `[B]` under weights `[B]`; 0 where all are 0."""
    return weighted_mean(x[None], weight[None])[0]
