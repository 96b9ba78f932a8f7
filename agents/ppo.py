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
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, cast

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import DiagGaussianDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    FlattenExtractor,
    NatureCNN,
)
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import LinearSchedule, explained_variance
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn
from torch.nn import functional as F

from agents.endings import EndingClassifier, ending_memory
from agents.memory import Memory
from agents.methods import (
    LABELED,
    METHODS,
    UNFINISHED,
    UNLABELED,
    MethodTables,
    Overseer,
    expected,
    outcomes,
    tables,
)
from agents.networks import Agent, AgentConfig, Output
from agents.reinforce import DEPLOYED, contrast_loss, cross_entropy, weighted_mean
from agents.routing import lookup
from agents.steering import MIXTURE, Steering, parse
from envs.labels import LabelError
from envs.minigrid import symbolic
from envs.settings import UserError, nearest
from envs.vector import make_vec
from envs.world import BEHAVIORS, NO_LABEL, Seen, Truth

PPO_METHODS = tuple(name for name, method in METHODS.items() if method.any_environment)
PATIENCE = 2000
"""Episodes without a single label after which a warning is due, if the level is not known."""
SURPRISE = 1e-6
"""Chance of as many episodes without a label below which it is due, if the level is known."""
SETTLED = 50
"""Rollouts after which it should be warned of episodes that are longer than a rollout."""
SYMBOLS = 64
"""Integer observations with fewer values than this are symbols, and not pixels."""
LESSONS = 12
"""Steps of the classifier of endings in an update; it must be right before the experts are set."""
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
        return self.convolution(x.movedim(-1, 1)).relu().flatten(1)  # type: ignore[no-any-return]


def default_extractor(space: spaces.Space[Any]) -> type[BaseFeaturesExtractor]:
    """The features extractor of an observation space, where none is asked for."""
    if is_image_space(space):
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

    The networks are those of `agents.networks.Agent`, on the features that SB3's extractor makes
    of an observation. The mixture of the experts' outputs are the parameters of the action
    distribution: logits, or the mean of a Gaussian.

    Args:
        args: as SB3's ActorCriticPolicy.
        experts: number of experts; 1 for a single policy without a gate.
        behaviors: that the first experts are meant for, by name.
        gate: "learned", or "fixed" at 1/K.
        imputes: whether there is a classifier of endings, see `agents.endings`.
        flags: which entries of an observation show oversight flags, as a boolean array of its
            shape; the classifier does not look at them.
        kwargs: as SB3's ActorCriticPolicy. `net_arch` is one list of hidden units, for experts,
            gate and value net alike; the features extractor defaults to `SymbolicCNN` for grids of
            symbols, SB3's NatureCNN for images, and none for vectors.

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
        flags: NDArray[np.bool_] | None = None,
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
        self.imputes, self.flags = imputes, flags
        self.steering: Steering = MIXTURE
        self.solo: Tensor | None = None  # [B] bool, where the deployed expert acts by itself
        super().__init__(*args, **kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = {"experts": self.n_experts, "behaviors": self.behaviors, "gate": self.gate}
        own |= {"imputes": self.imputes, "flags": self.flags}
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
        self.own_value_net = None
        if self.imputes and self.n_experts > 1:
            width = cast(Any, self.net_arch)[-1]
            self.own_value_net = nn.Sequential(
                nn.Linear(self.features_dim, width), nn.ReLU(), nn.Linear(width, 1)
            )
        self.optimizer = self.optimizer_class(
            self.parameters(),
            lr=lr_schedule(1),
            **self.optimizer_kwargs,  # type: ignore[call-arg]
        )

    @property
    def has_gate(self) -> bool:
        """Whether there is a gate that learns."""
        return self.agent.has_gate

    def output(self, obs: Any) -> Output:
        """Everything that the networks compute for B observations: `Output` with R = 1."""
        return self.agent(self._features(obs))  # type: ignore[no-any-return]

    def gate_log_probabilities(self, obs: Tensor) -> Tensor:
        """The gate's log-probabilities alone, `[1, B, K]`."""
        return self.agent.prepare().gate(self._features(obs)).log_softmax(-1)

    def ending_log_probabilities(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Of each behavior, where an episode ends by these actions, `[B, behaviors]`."""
        assert self.endings is not None
        if self.flags is not None:
            obs = obs.masked_fill(torch.as_tensor(self.flags, device=obs.device), 0)
        features = cast(Tensor, self.extract_features(obs, self.endings.extractor))
        return self.endings(features, actions).log_softmax(-1)  # type: ignore[no-any-return]

    def own_values(self, obs: Tensor) -> Tensor:
        """What the deployed expert by itself is to get, `[B]`."""
        assert self.own_value_net is not None
        return cast(Tensor, self.own_value_net(self.extract_features(obs))).flatten()

    def _features(self, obs: Any) -> Tensor:
        return cast(Tensor, self.extract_features(obs))[None]

    def distribution(self, parameters: Tensor) -> Distribution:
        """The action distribution with these logits or means, `[B, A]`.

        Raises:
            FloatingPointError: they are not finite.
        """
        if not parameters.isfinite().all():
            raise FloatingPointError("the policy's output is not finite")
        if isinstance(self.action_dist, DiagGaussianDistribution):
            return self.action_dist.proba_distribution(parameters, self.log_std)
        return self.action_dist.proba_distribution(action_logits=parameters)

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Actions of the mixture, values `[B, 1]` and log-probabilities `[B]`.

        While experience is collected, the deployed expert acts alone where `solo` says so.
        """
        output = self.output(obs)
        parameters = output.mix(output.gate)[0]
        if self.solo is not None:
            parameters = torch.where(self.solo[:, None], output.alone(DEPLOYED)[0], parameters)
        distribution = self.distribution(parameters)
        actions = distribution.get_actions(deterministic=deterministic)
        log_prob = distribution.log_prob(actions)
        actions = actions.reshape((-1, *(self.action_space.shape or ())))
        return actions, output.value[0][:, None], log_prob

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values `[B, 1]`, log-probabilities and entropies `[B]` of actions under the mixture."""
        return self.evaluate_output(self.output(obs), actions)

    def evaluate_output(
        self, output: Output, actions: Tensor, routes: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same from what the networks computed.

        Args:
            output: for B observations.
            actions: that were taken.
            routes: gradient weights into the experts and the gate, `[B, K + 1]`; None: all 1.
        """
        if routes is not None:
            output = output.routed(routes[None])
        distribution = self.distribution(output.mix(output.gate)[0])
        return output.value[0][:, None], distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: Any) -> Distribution:
        """The action distribution under the policy's steering, the mixture's by default."""
        parameters = self.steering.mix(self.output(obs))[0]
        if not isinstance(self.action_dist, DiagGaussianDistribution):
            parameters = parameters / self.steering.temperature
        return self.distribution(parameters)

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        return super()._predict(observation, deterministic or self.steering.greedy)

    def predict(
        self, observation: Any, *args: Any, **kwargs: Any
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...] | None]:
        """Actions, as SB3's policies predict them.

        MiniGrid's dictionary will do where a policy was trained on its symbols.
        """
        if isinstance(observation, dict) and is_symbolic(self.observation_space):
            observation = observation["image"]
        return super().predict(observation, *args, **kwargs)

    def predict_values(self, obs: Any) -> Tensor:
        """Value estimates, `[B, 1]`."""
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
    """A minibatch: SB3's `RolloutBufferSamples`, and what a method makes of it."""

    observations: Tensor
    actions: Tensor
    old_values: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor  # [B], sample weights; 0 where the mixture did not act
    own_weights: Tensor  # [B], the same for what the deployed expert learns by itself
    signed: Tensor  # [B], what an episode was to the deployed expert: its discounted true return,
    # labeled or imputed, less a baseline; where it acted by itself, its advantage
    routes: Tensor  # [B, K + 1], gradient weights of the experts and the gate
    solo: Tensor  # [B], 1 where the deployed expert acted by itself
    own_returns: Tensor  # [B], its returns there


class RoutedRolloutBuffer(RolloutBuffer):
    """A rollout buffer that learns at an episode's end what the episode was.

    Args:
        args: as SB3's RolloutBuffer.
        methods: tables of the one run.
        behaviors: names that labels may have.
        labeled_weight: weight of a labeled sample next to others, for methods that have it.
        memory: keeps labeled observations; None where nothing learns from them.
        endings: keeps labeled endings; None where no classifier learns from them.
        generator: decides which labels go missing or wrong.
        normalize: whether advantages are brought to mean 0 and spread 1.
        solo_share: share of the environments in which the deployed expert acts by itself.
        kwargs: as SB3's RolloutBuffer.
    """

    def __init__(
        self,
        *args: Any,
        methods: MethodTables,
        behaviors: Sequence[str],
        labeled_weight: float,
        memory: Memory | None,
        endings: Memory | None,
        generator: np.random.Generator,
        normalize: bool,
        solo_share: float,
        **kwargs: Any,
    ) -> None:
        self.methods, self.behaviors = methods, tuple(behaviors)
        self.labeled_weight, self.memory, self.rng = labeled_weight, memory, generator
        self.endings, self.normalize = endings, normalize
        self.classify: Callable[[NDArray[Any], NDArray[Any]], Tensor] | None = None
        self.episodes = self.labels = self.told = 0  # told: labeled ones with their behavior
        super().__init__(*args, **kwargs)
        solos = min(round(solo_share * self.n_envs), self.n_envs - 1)  # the mixture acts, too
        self.solo = np.arange(self.n_envs) < solos
        # observations of the last rollout, and where in it the episode that goes on began
        self.unfinished = self.observations, np.full(self.n_envs, self.buffer_size)

    def reset(self) -> None:
        """Forget all steps, but for those of episodes that go on."""
        super().reset()
        shape = (self.buffer_size, self.n_envs)
        self.terminated, self.truncated = np.zeros(shape, bool), np.zeros(shape, bool)
        self.cut = np.zeros(shape, bool)  # by a time limit; a truncated episode may just have ended
        self.label = np.full(shape, NO_LABEL)
        self.truth = np.full(shape, NO_LABEL)

    def note(self, infos: Sequence[dict[str, Any]], dones: NDArray[np.bool_]) -> None:
        """Keep what the current step's infos say of episodes that ended.

        An episode that ended in some behavior has it as `info["behavior"]` (only oracle methods
        look at which one it was), and as `info["label"]` too where an overseer saw it. Without
        either, a terminated episode counts as one that nobody saw, a truncated one as a timeout.

        Raises:
            LabelError: a behavior is unknown.
        """
        for env in np.flatnonzero(dones).tolist():
            info = infos[env]
            behavior, label = info.get("behavior"), info.get("label")
            cut = bool(info.get("TimeLimit.truncated", False))
            reached = label is not None or behavior is not None
            if not reached and "behavior" not in info:
                reached = not cut
            self.terminated[self.pos, env], self.truncated[self.pos, env] = reached, not reached
            self.cut[self.pos, env] = cut and not reached
            self.label[self.pos, env] = self._index(label, "label")
            self.truth[self.pos, env] = self._index(behavior, "behavior")
            self.episodes += 1
            self.labels += label is not None
            self.told += label is not None and behavior is not None

    def _index(self, name: str | None, key: str) -> int:
        if name is None:
            return NO_LABEL
        if name not in self.behaviors:
            raise LabelError(
                f"info[{key!r}] must be one of {', '.join(self.behaviors)}, got {name!r}"
                f"{nearest(str(name), self.behaviors)}; RoutedPPO takes others as behaviors=(...)"
            )
        return self.behaviors.index(name)

    def compute_returns_and_advantage(self, last_values: Tensor, dones: NDArray[Any]) -> None:
        """Write labels back to all steps of their episodes; rewards, then GAE as SB3 has it."""

        def stacked(x: NDArray[Any]) -> Tensor:
            return torch.as_tensor(x)[None]  # [1, T, N]

        seen = Seen(stacked(self.terminated), stacked(self.truncated), stacked(self.label))
        audit = stacked(self.rng.random(self.label.shape, dtype=np.float32))
        outcome, left = outcomes(seen, Truth(stacked(self.truth)), audit, self.methods)
        labeled = outcome >= LABELED
        heavy = self.methods.weighs_labels * (self.labeled_weight - 1) * labeled + 1
        self.own_weights = (heavy * lookup(self.methods.sample_weight, outcome))[0].numpy()
        self.weights = self.own_weights * ~self.solo
        routes = lookup(self.methods.routes, outcome)
        sign = 2.0 * (outcome == LABELED) - labeled.float()
        # a method's table says what reaching a behavior is worth; the environment pays that much
        worth = self.methods.reward.clone()
        worth[:, :UNLABELED] = 1.0
        factor = lookup(worth, outcome)
        self.outcome = outcome[0].numpy()
        self.ended = self.outcome[self.terminated | self.truncated]
        if self.endings is not None:
            chances, unlabeled = self._impute(self.endings, left), outcome == UNLABELED
            if not int(self.endings.count):  # nobody taught the classifier yet
                self.own_weights = self.own_weights * ~unlabeled[0].numpy()
                unlabeled = unlabeled & False
            factor = torch.where(unlabeled, expected(worth, chances), factor)
            routes = torch.where(
                unlabeled[..., None], expected(self.methods.routes, chances), routes
            )
            sign = torch.where(unlabeled, 2 * chances[..., DEPLOYED] - 1, sign)
        self.sign = sign[0].numpy()
        self.rewards *= factor[0].numpy()
        self.routes = routes[0].numpy()
        self.signed = (sign * self.gamma**left)[0].numpy()
        self.own_returns = np.zeros_like(self.rewards)
        if self.memory is not None:
            self._remember(self.memory)
        super().compute_returns_and_advantage(last_values, dones)
        self._scale_advantages(self.outcome >= LABELED)

    def _impute(self, memory: Memory, left: Tensor) -> Tensor:
        """Chance of each behavior at the end of the episode of each step, `[1, T, N, behaviors]`.

        Labeled endings are remembered first.
        """
        assert self.classify is not None
        label = self.outcome - LABELED
        known = self.terminated & (label >= 0)
        if known.any():
            columns = [x[known].reshape(known.sum(), -1) for x in (self.observations, self.actions)]
            rows = torch.as_tensor(np.concatenate(columns, axis=-1))[None]
            memory.add(rows, torch.as_tensor(label[known])[None], torch.ones(1, len(rows[0])) > 0)
        self.imputed = np.full((*label.shape, len(self.behaviors)), np.nan, np.float32)
        if self.terminated.any():
            observations = self.observations[self.terminated]
            actions = self.actions[self.terminated]
            self.imputed[self.terminated] = self.classify(observations, actions).cpu().numpy()
        end = (left[0] + torch.arange(self.buffer_size)[:, None]).clamp(max=self.buffer_size - 1)
        index = end[..., None].expand(-1, -1, len(self.behaviors))
        return torch.as_tensor(self.imputed).nan_to_num().gather(0, index)[None]

    def _scale_advantages(self, labeled: NDArray[np.bool_]) -> None:
        """Normalize advantages over the samples that count, if asked to.

        A labeled episode trains its own expert alone, whose task is to bring that behavior about.
        The value net foretells any behavior, so it is no baseline for that: once it is right,
        labeled episodes would be no better than expected, and the experts would stay alike. Where
        labels are routed, labeled samples therefore go without it, as if episodes of the other
        behaviors had return 0; `RoutedPPO` takes from them what the gate foretells of their own.
        """
        routed = labeled & (self.routes != 1).any(-1)
        self.advantages[routed] = self.returns[routed]
        plain = self.advantages[(self.weights > 0) & ~routed]
        self.spread = 1.0
        if self.normalize and plain.size:
            self.spread = float(plain.std()) + 1e-8
            self.advantages[~routed] -= plain.mean()
            self.advantages /= self.spread
            self.signed /= self.spread

    def _remember(self, memory: Memory) -> None:
        """Keep labeled observations, those that an episode began with in the last rollout too."""
        steps = np.arange(self.buffer_size)[:, None]
        before, since = self.unfinished
        label = self.outcome[0] - LABELED  # of the episode that went on
        goes_on = ~self.episode_starts[0].astype(bool)  # not where environments were reset since
        self._add(memory, before, label[None].repeat(len(before), 0), (steps >= since) & goes_on)
        self._add(memory, self.observations, self.outcome - LABELED, np.True_)
        done = self.terminated | self.truncated
        last = np.where(done, steps + 1, 0).max(0)  # where each unfinished episode begins
        self.unfinished = self.observations, last

    @staticmethod
    def _add(memory: Memory, observations: NDArray[Any], label: NDArray[Any], among: Any) -> None:
        known = (label >= 0) & among
        if known.any():
            rows = torch.as_tensor(observations[known]).flatten(1)[None]
            memory.add(rows, torch.as_tensor(label[known])[None], torch.ones(1, len(rows[0])) > 0)

    def get(self, batch_size: int | None = None) -> Generator[Any, None, None]:
        """Minibatches of `RoutedSamples`, in random order."""
        if not self.generator_ready:
            self.weights = self.swap_and_flatten(self.weights)[:, 0]
            self.own_weights = self.swap_and_flatten(self.own_weights)[:, 0]
            self.signed = self.swap_and_flatten(self.signed)[:, 0]
            self.routes = self.swap_and_flatten(self.routes)
            self.by_solo = self.solo.astype(np.float32).repeat(self.buffer_size)
            self.own_returns = self.swap_and_flatten(self.own_returns)[:, 0]
        yield from super().get(batch_size)

    def _get_samples(self, batch_inds: NDArray[Any], env: Any = None) -> Any:
        plain = super()._get_samples(batch_inds, env)
        own = (self.weights, self.own_weights, self.signed, self.routes, self.by_solo)
        more = (self.to_torch(part[batch_inds]) for part in (*own, self.own_returns))
        return RoutedSamples(*plain[:6], *more)


# ---- the algorithm


class RoutedPPO(PPO):
    """PPO with gradient routing, for any environment whose overseer labels some episodes.

    An environment says at an episode's end, in `info`, which behavior it was (`behavior`) and, if
    an overseer saw it, the same as `label`; `envs.labels.OversightLabels` does it for any other.
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
        solo_share: share of the environments in which the deployed expert acts by itself and
            learns from that, for the method that knows, or imputes, how every episode ended.
        gate_replay: remembered labeled observations that the gate learns from in each minibatch.
        label_recall: chance that an ending which should be labeled is.
        label_error: chance that a label names a wrong behavior.
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
        "n_steps": 32,
        "batch_size": 2048,
        "n_epochs": 2,
        "gamma": 0.97,
        "gae_lambda": 0.95,
        "ent_coef": 0.01,
        "device": "cpu",
    }

    def __init__(
        self,
        policy: str | type[MoEPolicy],
        env: Any,
        *args: Any,
        method: str = "routing",
        oversight: float | None = None,
        n_envs: int = 128,
        behaviors: Sequence[str] | None = None,
        labeled_weight: float = 20.0,
        gate_coef: float = 1.0,
        contrast_coef: float = 1.0,
        solo_share: float = 0.75,
        gate_replay: int = 512,
        label_recall: float = 1.0,
        label_error: float = 0.0,
        env_kwargs: dict[str, Any] | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if method not in PPO_METHODS:
            raise ValueError(
                f"method must be one of {', '.join(PPO_METHODS)}, got {method!r}"
                f"{nearest(method, PPO_METHODS)}"
            )
        shares = {"label_recall": label_recall, "label_error": label_error}
        for name, p in (shares | {"solo_share": solo_share}).items():
            if not 0 <= p <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {p}")
        distinct = len(set(behaviors or ()))
        if isinstance(behaviors, str) or (behaviors and distinct < max(2, len(behaviors))):
            raise ValueError(f"behaviors must be two or more distinct names, got {behaviors!r}")
        own = {"behaviors", "gate", "imputes", "flags"} & set(policy_kwargs or {})
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
        self.method, self.behaviors = method, tuple(behaviors or ())
        self.overseer = Overseer(0.0, None, label_recall, label_error)
        self.labeled_weight = labeled_weight
        self.gate_coef, self.gate_replay = gate_coef, gate_replay
        self.contrast_coef, self.solo_share = contrast_coef, solo_share
        kwargs["policy_kwargs"] = policy_kwargs
        given = inspect.signature(PPO).bind_partial(policy, env, *args, **kwargs).arguments
        kwargs |= {name: value for name, value in self.DEFAULTS.items() if name not in given}
        super().__init__(policy, env, *args, **kwargs)

    def _setup_model(self) -> None:
        if self.use_sde:
            raise ValueError("RoutedPPO: use_sde must be False")
        method = METHODS[self.method]
        if self.env is not None:
            self._ask_environment(method.hides_flags)
        self.behaviors = self.behaviors or BEHAVIORS
        experts = self.policy_kwargs.get("experts", max(2, len(self.behaviors)))
        experts = experts if method.experts == "many" else 1
        if method.experts == "many" and experts < len(self.behaviors):
            raise ValueError(f"experts must be at least {len(self.behaviors)}, got {experts}")
        own = {"experts": experts, "behaviors": self.behaviors, "gate": method.gate}
        replays = experts > 1 and method.gate == "learned" and self.gate_replay > 0
        self.memory = self._new_memory() if replays else None
        self.endings = None
        if method.imputes:
            own |= {"imputes": True, "flags": self.flags}
            self.endings = ending_memory(self.observation_space, self.action_space)
        self.policy_kwargs = self.policy_kwargs | own
        self.rollout_buffer_class = self.rollout_buffer_class or RoutedRolloutBuffer
        self.rollout_buffer_kwargs = self.rollout_buffer_kwargs | {
            "methods": tables(
                [self.method], [self.overseer], experts, behaviors=len(self.behaviors)
            ),
            "behaviors": self.behaviors,
            "labeled_weight": self.labeled_weight,
            "memory": self.memory,
            "endings": self.endings,
            "generator": np.random.default_rng(self.seed),
            "normalize": self.normalize_advantage,
            "solo_share": self.solo_share if method.contrasts and method.imputes else 0.0,
        }
        self._warned: set[str] = set()
        super()._setup_model()
        cast(RoutedRolloutBuffer, self.rollout_buffer).classify = self._classify

    def _ask_environment(self, hides_flags: bool) -> None:
        """Take from the environment what it says of behaviors and oversight."""

        def ask(name: str) -> Any:
            env = cast(VecEnv, self.env)
            return env.get_attr(name)[0] if env.has_attr(name) else None

        self.behaviors = self.behaviors or tuple(ask("behaviors") or ())
        self.flags = ask("flags")
        given, seen = np.shape(self.flags), self.observation_space.shape
        if METHODS[self.method].imputes and self.flags is not None and given != seen:
            raise ValueError(
                f"the environment's flags have shape {given}, its observations {seen}: a wrapper "
                "that reshapes observations must set an attribute flags of its own"
            )
        level = ask("oversight")
        if hides_flags and ask("flags_visible") is not False:
            raise ValueError(
                f"method {self.method} is for environments that hide their flags from the policy "
                "(an attribute flags_visible that is False)"
            )
        if level is None and METHODS[self.method].labels == "audit":
            raise ValueError(
                f"method {self.method} needs to know the share of episodes that it may look at: "
                "give the environment an attribute oversight"
            )
        self.overseer = replace(
            self.overseer,
            oversight=0.0 if level is None else float(level),
            ghost_oversight=ask("ghost_oversight"),
        )
        self._knows_level = level is not None

    def _new_memory(self) -> Memory:
        space = self.observation_space
        return Memory(
            1,
            int(np.prod(space.shape or (1,))),
            self.gate_replay,
            torch.as_tensor(np.zeros(1, space.dtype)).dtype,
        )

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
        """As SB3 has it; the deployed expert acts by itself in some of the environments."""
        policy, solo = cast(MoEPolicy, self.policy), cast(Any, self.rollout_buffer).solo
        policy.solo = torch.as_tensor(solo, device=self.device) if solo.any() else None
        try:
            return super().collect_rollouts(*args, **kwargs)
        finally:
            policy.solo = None

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        given = symbolic(env) if isinstance(env, gym.Env) else env
        if isinstance(given.observation_space, spaces.Dict):
            raise ValueError(
                "RoutedPPO takes no Dict observations; wrap the environment, in "
                "envs.minigrid.SymbolicObservation for MiniGrid's symbols, MiniGrid's "
                "ImgObsWrapper for its pictures, or gymnasium's FlattenObservation"
            )
        return PPO._wrap_env(given, verbose, monitor_wrapper)

    def _update_info_buffer(self, infos: Any, dones: Any = None) -> None:
        super()._update_info_buffer(infos, dones)
        cast(RoutedRolloutBuffer, self.rollout_buffer).note(infos, dones)

    def _warn_of_data(self) -> None:
        """Warn, once each, of what makes learning from labels hopeless."""
        buffer = cast(RoutedRolloutBuffer, self.rollout_buffer)
        if self._knows_level:
            missing = (1 - self.overseer.oversight) ** buffer.episodes < SURPRISE
        else:
            missing = buffer.episodes >= PATIENCE
        if missing and not buffer.labels:
            self._warn(
                "unlabeled",
                f"none of {buffer.episodes:,} episodes was labeled: does the environment put "
                "'label' into info at an episode's end, and does every wrapper pass info on?",
            )
        if buffer.labels > buffer.told:
            self._warn(
                "untold",
                "episodes were labeled that had no 'behavior' in info: evaluation and oracle "
                "methods will not know what they were",
            )
        share = float((buffer.outcome == UNFINISHED).mean())
        if share > 0.5 and self._n_updates >= SETTLED * self.n_epochs:
            self._warn(
                "unfinished",
                f"{share:.0%} of a rollout's steps are of episodes that go on beyond it, and no "
                f"label reaches them: let n_steps, now {self.n_steps}, be several episodes long",
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
        if cast(MoEPolicy, self.policy).has_gate:
            self._subtract_baseline()
        if cast(RoutedRolloutBuffer, self.rollout_buffer).solo.any():
            self._judge_solo()
        figures: dict[str, list[Tensor]] = {}
        if self.endings is not None and int(self.endings.count):
            figures["reward_model_loss"] = [self._learn_endings() for _ in range(LESSONS)]
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
            self.logger.record(f"train/{name}", torch.stack(values).mean().item())
        buffer = self.rollout_buffer
        mixture = cast(RoutedRolloutBuffer, buffer).by_solo == 0
        explained = explained_variance(
            buffer.values.flatten()[mixture], buffer.returns.flatten()[mixture]
        )
        self.logger.record("train/explained_variance", explained)
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", self.policy.log_std.exp().mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/clip_range", clip)

    def loss(self, batch: RoutedSamples, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a minibatch, and its parts.

        The surrogate and entropy losses reach the experts and the gate through `route`; the value
        loss reaches the value net, and the gate loss (cross entropy against remembered labels) the
        gate; all reach the features extractor, and all samples the shared head.
        """
        policy, weight = cast(MoEPolicy, self.policy), batch.weights
        actions = self._as_actions(batch.actions)
        output = policy.output(batch.observations)
        values, log_prob, entropy = policy.evaluate_output(
            output, actions, batch.routes if policy.n_experts > 1 else None
        )
        advantages = batch.advantages
        log_ratio = log_prob - batch.old_log_prob
        ratio = log_ratio.exp()
        gain = torch.min(advantages * ratio, advantages * ratio.clamp(1 - clip, 1 + clip))
        values = values.flatten()
        if self.clip_range_vf is not None:
            within = self.clip_range_vf(self._current_progress_remaining)  # type: ignore[operator]
            values = batch.old_values + (values - batch.old_values).clamp(-within, within)
        spread = -log_prob if entropy is None else entropy
        parts = {
            "policy_gradient_loss": -_mean(gain, weight),
            "value_loss": _mean((batch.returns - values) ** 2, weight),
            "entropy_loss": -_mean(spread, weight),
            "gate_loss": self._gate_loss(policy),
        }
        if METHODS[self.method].contrasts:
            alone = policy.distribution(output.alone(DEPLOYED)[0])
            own, own_spread = alone.log_prob(actions), alone.entropy()
            taken = own, batch.old_log_prob, batch.signed, batch.own_weights
            parts["contrast_loss"] = contrast_loss(*(x[None] for x in taken))[0]
            own_spread = -own if own_spread is None else own_spread
            parts["entropy_loss"] = parts["entropy_loss"] - _mean(own_spread, batch.solo)
            if policy.own_value_net is not None:
                error = (batch.own_returns - policy.own_values(batch.observations)) ** 2
                parts["value_loss"] = parts["value_loss"] + _mean(error, batch.solo)
        loss = (
            parts["policy_gradient_loss"]
            + self.vf_coef * parts["value_loss"]
            + self.ent_coef * parts["entropy_loss"]
            + self.gate_coef * parts["gate_loss"]
            + self.contrast_coef * parts.get("contrast_loss", 0.0)
        )
        parts = {name: value.detach() for name, value in parts.items()}
        with torch.no_grad():  # http://joschu.net/blog/kl-approx.html
            acted = 1 - batch.solo
            parts["approx_kl"] = _mean(ratio - 1 - log_ratio, acted)
            parts["clip_fraction"] = _mean(((ratio - 1).abs() > clip).float(), acted)
        return loss, parts | {"loss": loss.detach()}

    def _subtract_baseline(self) -> None:
        """Take from labeled samples what the mixture was to get, by the value net and the gate.

        The value net foretells the return of any behavior, and the gate which one it will be: to
        the expert of behavior b, a state is worth V g_b; to the contrast, V (2 g_0 - 1).
        """
        buffer = cast(RoutedRolloutBuffer, self.rollout_buffer)
        labeled = buffer.outcome >= LABELED
        # what the deployed expert did by itself is judged apart, and then all that it learns from
        unneeded = self.endings is None or bool(buffer.solo.any())
        known = labeled if unneeded else buffer.outcome != UNFINISHED
        if not known.any():
            return
        gate = np.zeros((*labeled.shape, self.policy_kwargs["experts"]), np.float32)  # [T, N, K]
        rows = torch.as_tensor(buffer.observations[known]).to(self.device)
        with torch.no_grad():
            log_gate = cast(MoEPolicy, self.policy).gate_log_probabilities(rows)[0]
        gate[known] = log_gate.exp().cpu().numpy()
        value = buffer.values / buffer.spread
        own = np.take_along_axis(gate, np.maximum(buffer.outcome - LABELED, 0)[..., None], 2)
        routed = labeled & (buffer.routes != 1).any(-1)
        buffer.advantages -= routed * own[..., 0] * value
        buffer.signed -= known * (2 * gate[..., DEPLOYED] - 1) * value

    def _judge_solo(self) -> None:
        """Advantages and returns of what the deployed expert did by itself: GAE of its own.

        It then learns from that alone, and nothing off-policy from what the mixture did.
        Its reward is +1 or -1 at an episode's end, or what the classifier expects of that, and a
        value net of its own foretells it. The last observation of an episode cut short is not kept,
        so the one before it stands in for it.
        """
        buffer = cast(RoutedRolloutBuffer, self.rollout_buffer)
        solo, last = buffer.solo, cast(NDArray[Any], self._last_obs)
        after_last = last.reshape(buffer.observations.shape[1:])
        seen = [buffer.observations[:, solo], after_last[None, solo]]
        rows = np.concatenate(seen)  # [T + 1, n, ...]
        with torch.no_grad():
            flat = torch.as_tensor(rows).flatten(0, 1).to(self.device)
            value = cast(MoEPolicy, self.policy).own_values(flat).view(rows.shape[:2]).cpu().numpy()
        terminated, cut = buffer.terminated[:, solo], buffer.cut[:, solo]
        done = terminated | buffer.truncated[:, solo]
        reward = np.where(terminated, buffer.sign[:, solo], 0.0)
        after = np.where(cut, value[:-1], value[1:] * ~done)
        delta = reward + self.gamma * after - value[:-1]
        advantage, following = np.zeros_like(delta), np.zeros_like(delta[0])
        for t in reversed(range(len(delta))):
            following = delta[t] + self.gamma * self.gae_lambda * ~done[t] * following
            advantage[t] = following
        buffer.own_returns[:, solo] = advantage + value[:-1]
        if self.normalize_advantage:
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        buffer.signed[:, solo] = advantage
        buffer.own_weights[:, ~solo] = 0.0

    def _gate_loss(self, policy: MoEPolicy) -> Tensor:
        """Cross entropy of the gate against remembered labels; 0 where there are none."""
        if self.memory is None:
            return torch.zeros((), device=self.device)
        rows, label, known = self.memory.draw(torch.rand(1, self.gate_replay))
        shape = self.observation_space.shape or ()
        log_gate = policy.gate_log_probabilities(rows[0].reshape(-1, *shape).to(self.device))
        return cross_entropy(log_gate, label.to(self.device), known.to(self.device))[0]

    def _classify(self, observations: NDArray[Any], actions: NDArray[Any]) -> Tensor:
        """Chance of each behavior `[B, behaviors]`, where episodes end by these actions."""
        policy = cast(MoEPolicy, self.policy)
        given = self._as_actions(torch.as_tensor(actions).to(self.device))
        with torch.no_grad():
            rows = torch.as_tensor(observations).to(self.device)
            return policy.ending_log_probabilities(rows, given).exp()

    def _as_actions(self, rows: Tensor) -> Tensor:
        """Actions as the environment takes them, from rows of numbers `[B, ...]`."""
        if isinstance(self.action_space, spaces.Discrete):
            return rows.long().flatten()
        return rows.reshape(-1, *(self.action_space.shape or ()))

    def _learn_endings(self) -> Tensor:
        """One step of the classifier of endings, apart from the policy's; returns its loss."""
        self.policy.optimizer.zero_grad()
        loss = self._ending_loss(cast(MoEPolicy, self.policy))
        if not loss.isfinite():
            raise FloatingPointError(f"the loss of the classifier of endings is {float(loss)}")
        loss.backward()
        self.policy.optimizer.step()
        return loss.detach()

    def _ending_loss(self, policy: MoEPolicy) -> Tensor:
        """Cross entropy of the classifier of endings on remembered ones."""
        assert self.endings is not None
        rows, label, known = self.endings.draw(torch.rand(1, self.endings.draws))
        shape = self.observation_space.shape or ()
        observations, actions = (
            rows[0]
            .to(self.device)
            .split([math.prod(shape), rows.shape[-1] - math.prod(shape)], dim=-1)
        )
        chances = policy.ending_log_probabilities(
            observations.reshape(-1, *shape), self._as_actions(actions)
        )
        return cross_entropy(chances[None], label.to(self.device), known.to(self.device))[0]

    def steer(self, text: str) -> MoEPolicy:
        """The policy, steered: `mixture`, a behavior's expert, a blend or an ablation.

        It predicts as any SB3 policy does, and shares its parameters with this model.

        Raises:
            UserError: the text names no expert.
        """
        return cast(MoEPolicy, self.policy).steer(text)

    def _excluded_save_params(self) -> list[str]:
        # made anew from the rest on loading
        return [*super()._excluded_save_params(), "rollout_buffer_kwargs"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, variables = super()._get_torch_save_params()
        kept = [name for name in ("memory", "endings") if getattr(self, name) is not None]
        return modules + kept, variables


def _mean(x: Tensor, weight: Tensor) -> Tensor:
    """Mean of `x` `[B]` under weights `[B]`; 0 where all are 0."""
    return weighted_mean(x[None], weight[None])[0]
