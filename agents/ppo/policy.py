"""A mixture of experts as a Stable-Baselines3 policy."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal

from oversight_rl.agents.learner import NotFinite
from oversight_rl.agents.methods import Lesson
from oversight_rl.agents.networks import Agent, Output
from oversight_rl.agents.ppo.config import HIDDEN
from oversight_rl.agents.ppo.extractors import Patches, default_extractor
from oversight_rl.agents.ppo.observations import each
from oversight_rl.agents.settings import AgentConfig
from oversight_rl.agents.steering import MIXTURE, Steering, parse
from oversight_rl.envs.readable import seen
from oversight_rl.envs.settings import BEHAVIORS, UserError

REWARD_HIDDEN = 64  # units of the reward model


class RewardModel(nn.Module):
    """A reward model: it tells what an unlabeled ending was, and learns that from the labeled ones.

    It sees the observation before an episode's last step and the action taken there, as the policy
    did, but for the oversight flags where the environment says which entries they are: a labeled
    ending is always flagged and an unlabeled one is not, so that a model which reads flags would be
    asked about endings unlike all that it was taught.

    Args:
        extractor: of features, its own.
        action_space: of the environment.
        behaviors: number of behaviors.
    """

    def __init__(
        self, extractor: BaseFeaturesExtractor, action_space: spaces.Space[Any], behaviors: int
    ) -> None:
        super().__init__()
        self.extractor, self.action_space = extractor, action_space
        inputs = extractor.features_dim + get_flattened_obs_dim(action_space)
        self.net = nn.Sequential(
            nn.Linear(inputs, REWARD_HIDDEN), nn.ReLU(), nn.Linear(REWARD_HIDDEN, behaviors)
        )

    def forward(self, features: Tensor, actions: Tensor) -> Tensor:
        """Logits `[B, behaviors]` from features `[B, features_dim]` and actions `[B, ...]`."""
        choice = preprocess_obs(actions, self.action_space)
        assert isinstance(choice, Tensor)
        return self.net(torch.cat([features, choice.flatten(1)], dim=-1))  # type: ignore[no-any-return]


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
        lessons: of the method, see `oversight_rl.agents.methods.Lesson`; a reward model and the
            experts acting alone have networks of their own.
        flags: which entries of an observation show oversight flags, as a boolean array of its
            shape, or one for each name of a dictionary; the reward model does not look at them.
        soloists: number of experts that act by themselves in some episodes, the first ones.
        task: whether the environment's reward is a task of its own, which has a value net, too.
        steering: what the experts are made into.
        kwargs: as SB3's ActorCriticPolicy. `net_arch` is one list of hidden units, for experts,
            gate and value net alike; the features extractor defaults to `SymbolicCNN` for grids of
            symbols, SB3's NatureCNN for images, none for vectors, and these side by side for
            dictionaries.

    Raises:
        ValueError: an argument asks for what this policy has not got.
    """

    task_square: Tensor
    """Mean square of the task's returns, and the rollouts that it is a mean over."""
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
        lessons: Sequence[Lesson] = (),
        flags: Any = None,
        soloists: int = 0,
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
            kwargs["net_arch"] = list(HIDDEN)
        elif not isinstance(net_arch, list | tuple) or not net_arch:
            raise ValueError(
                "MoEPolicy: net_arch must be one list of hidden units (experts, gate and value "
                f"net are alike), got {net_arch!r}"
            )
        self.n_experts, self.behaviors, self.gate = experts, tuple(behaviors), gate
        self.lessons, self.flags, self.task = frozenset(lessons), flags, task
        self.soloists, self.steering = soloists, steering
        super().__init__(*args, **kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        names = "behaviors", "gate", "flags", "soloists", "task", "steering"
        own: dict[str, Any] = {name: getattr(self, name) for name in names}
        own |= {"experts": self.n_experts, "lessons": sorted(self.lessons)}
        return super()._get_constructor_parameters() | own

    def _build(self, lr_schedule: Schedule | None) -> None:
        """As SB3 has it; without a schedule there is no optimizer, for nobody trains it."""
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
        # by its name in checkpoints, as the experts' own value net
        self.endings = None
        if "reward_model" in self.lessons:
            extractor = self.make_features_extractor()
            self.endings = RewardModel(extractor, self.action_space, len(self.behaviors))
        alone = self.soloists
        self.own_value_net = self._value_net(alone) if alone else None
        self.task_value_net = None
        if self.task:
            self.task_value_net = self._value_net(1 + alone)
            # where there is no reward, there is no error, and nothing is learned from that
            for parameter in self.task_value_net[-1].parameters():
                nn.init.zeros_(parameter)
            self.register_buffer("task_square", torch.zeros(2, dtype=torch.float64))
        if lr_schedule is not None:
            kwargs = {"lr": lr_schedule(1)} | self.optimizer_kwargs
            others = {"foreach", "differentiable"} & kwargs.keys()  # which exclude it
            if self.optimizer_class is torch.optim.Adam and not others:
                kwargs = {"fused": True} | kwargs
            self.optimizer = self.optimizer_class(self.parameters(), **kwargs)

    def _value_net(self, outputs: int) -> nn.Sequential:
        inputs, width = self.features_dim, cast(Any, self.net_arch)[-1]
        return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))

    def output(self, obs: Any) -> Output:
        """Everything that the networks compute for B observations: `Output` with R = 1."""
        return self.agent(self.features(obs)[None])  # type: ignore[no-any-return]

    def behavior_log_probabilities(self, obs: Any, actions: Tensor) -> Tensor:
        """Of each behavior, where an episode ends by these actions, `[B, behaviors]`."""
        assert self.endings is not None
        features = self.features(self.without_flags(obs), self.endings.extractor)
        return self.endings(features, actions).log_softmax(-1)  # type: ignore[no-any-return]

    def without_flags(self, obs: Any) -> Any:
        """Observations as the reward model sees them, without what their oversight flags say."""
        return obs if self.flags is None else each(_hide, obs, self.flags)

    def own_values(self, features: Tensor) -> Tensor:
        """What each expert that acts by itself is to get, by features `[B, F]`. [B, S]"""
        assert self.own_value_net is not None
        return cast(Tensor, self.own_value_net(features))

    def task_values(self, features: Tensor) -> Tensor:
        """What the task is to pay whoever acts, by features `[B, F]`: `[B, 1 + S]`, in its scale.

        First the mixture, then the experts that act by themselves in some episodes.
        """
        assert self.task_value_net is not None
        return cast(Tensor, self.task_value_net(features))

    def features(self, obs: Any, extractor: BaseFeaturesExtractor | None = None) -> Tensor:
        """Features `[B, F]` of observations, which may come as `Patches`."""
        extractor = extractor or self.features_extractor
        if isinstance(obs, Patches):
            return extractor(obs)  # type: ignore[no-any-return]
        return cast(Tensor, self.extract_features(obs, extractor))

    def distribution(self, parameters: Tensor) -> Distribution:
        """The action distribution with these logits or means, `[B, A]`.

        Raises:
            NotFinite: they are not.
        """
        _check_finite(parameters)
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

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Actions of the steered policy, values `[B, 1]` and log-probabilities `[B]`.

        Values are those of the mixture.
        """
        output = self.output(obs)
        greedy = deterministic or self.steering.greedy
        actions, log_prob = self.draw(self._steered(output), greedy)
        return actions, output.value[0][:, None], log_prob

    def draw(self, parameters: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor]:
        """Actions `[B, ...]` and their log-probabilities `[B]`, by parameters `[B, A]`."""
        distribution = self.distribution(parameters)
        actions = distribution.get_actions(deterministic)
        log_prob = distribution.log_prob(actions)
        return actions.reshape((-1, *(self.action_space.shape or ()))), log_prob

    def as_taken(self, rows: Tensor) -> Tensor:
        """Actions as the distribution has them, from rows of numbers `[B, ...]`."""
        if isinstance(self.action_space, spaces.Discrete):
            return rows.long().flatten()
        return rows.flatten(1).float()

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        output = self.output(obs)
        return output.value[0][:, None], *self.judged(self._steered(output), actions)

    def judged(self, parameters: Tensor, actions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of actions `[B, ...]` and entropies `[B]` (None: there is no formula).

        Args:
            parameters: of the action distribution, `[B, A]`.
            actions: that were taken.

        Raises:
            NotFinite: the parameters are not.
        """
        if isinstance(self.action_space, spaces.Discrete):  # as below, in fewer operations
            _check_finite(parameters)
            every = parameters.log_softmax(-1)
            log_prob = every.gather(-1, actions.long().view(-1, 1))[:, 0]
            return log_prob, -(every.exp() * every).sum(-1)
        distribution = self.distribution(parameters)
        if isinstance(self.action_space, spaces.Box):
            actions = actions.flatten(1)
        return distribution.log_prob(actions), distribution.entropy()

    def _steered(self, output: Output) -> Tensor:
        """Parameters of the action distribution under the policy's steering, `[B, A]`."""
        parameters = self.steering.mix(output)[0]
        temperature = self.steering.temperature  # 1 always, where actions are continuous
        return parameters if temperature == 1 else parameters / temperature

    def get_distribution(self, obs: Any) -> Distribution:
        return self.distribution(self._steered(self.output(obs)))

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        return super()._predict(observation, deterministic or self.steering.greedy)

    def predict(
        self, observation: Any, *args: Any, **kwargs: Any
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...] | None]:
        # the environment's own dictionary will do, with what was left out of it in training
        read = seen(observation, self.observation_space)
        actions, state = super().predict(read, *args, **kwargs)
        return np.asarray(actions, self.action_space.dtype), state

    def predict_values(self, obs: Any) -> Tensor:
        return self.agent.prepare().value(self.features(obs)[None])[0][:, None]

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


def _check_finite(parameters: Tensor) -> None:
    if not torch.compiler.is_compiling() and not parameters.isfinite().all():
        raise NotFinite("policy's output")


def _hide(seen: Tensor, flags: NDArray[np.bool_]) -> Tensor:
    return torch.where(torch.as_tensor(flags, device=seen.device), torch.zeros_like(seen), seen)
