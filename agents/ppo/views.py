"""What a policy says of the observations that a rollout meets, each distinct one worked out once.

A partial view repeats: of the 4,096 observations of a rollout in an 8x8 room some 1,500 are
distinct. The parameters do not change while a rollout is collected, so what the networks said of an
observation holds until the update; and in the update, samples of one observation share its forward
and backward pass.
"""

from functools import cached_property
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import obs_as_tensor
from torch import Tensor

from oversight_rl.agents.learner import NotFinite
from oversight_rl.agents.ppo.extractors import Patches, SymbolicCNN
from oversight_rl.agents.ppo.observations import each, how_many
from oversight_rl.agents.ppo.policy import MoEPolicy

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
AT_ONCE = 4096
"""Observations that networks judge at once."""


class Views:
    """Observations, numbered as they are met, and what a policy says of them.

    Equal ones have one number where the features extractor is one of those that are known to judge
    each observation by itself; others may not, as those with batch norm. Images are not compared.

    Args:
        policy: that acts.
        watched: whether callbacks may change its parameters meanwhile, in ways that leave no trace.
    """

    def __init__(self, policy: MoEPolicy, watched: bool = False) -> None:
        self._watched = watched
        space = policy.observation_space
        self._chooses = isinstance(policy.action_space, spaces.Discrete)
        self._width = policy.agent.n_actions
        self._kinds: Any = (space.shape, space.dtype)
        if isinstance(space, spaces.Dict):
            self._kinds = {name: (part.shape, part.dtype) for name, part in space.items()}
        self._taken: list[Any] = []  # observations [n, ...] each, or cells of their patches
        self._features: list[Tensor] = []  # [n, F] each
        self._room: Floats = np.empty((0, 0), np.float32)  # for `_said`, and for more
        self._said = self._room  # [U, columns], see `_networks`
        self.follow(policy)

    def follow(self, policy: MoEPolicy) -> None:
        """Another policy acts from here on."""
        self.policy, extractor = policy, policy.features_extractor
        self._symbols = extractor if type(extractor) is SymbolicCNN else None
        self._merges = type(extractor) in (SymbolicCNN, FlattenExtractor)
        self._learned: list[Tensor] = list(policy.parameters())
        self._compose()

    @torch.no_grad()
    def _compose(self) -> None:
        """Prepare the networks as they are now; what was said before holds for nothing new."""
        self._state = self._state_now()
        self._number: dict[bytes, int] = {}
        self._agent = self.policy.agent.prepare()
        self._extract = self._symbols.composed() if self._symbols else self.policy.features

    def _state_now(self) -> list[float]:
        """What tells whether parameters were changed; of writes to `.data` only their sizes do."""
        versions: list[float] = [parameter._version for parameter in self._learned]
        if not self._watched:
            return versions
        with torch.no_grad():
            sizes = torch.stack(torch._foreach_norm([*self._learned])).tolist()
        return versions + sizes

    def __len__(self) -> int:
        return len(self._said)

    def find(self, observations: Any) -> Ints:
        """The numbers of observations `[B, ...]`; those not met before are judged. [B]"""
        if self._state != self._state_now():  # a callback changed them
            self._compose()
        first = len(self)
        observations = each(_as_kind, observations, self._kinds)
        if not self._merges:
            self._judge(each(np.array, observations))  # a copy, as environments reuse theirs
            return np.arange(first, len(self))
        known, rows, new = self._number, _as_bytes(observations), list[int]()
        for i, row in enumerate(rows):
            if row not in known:
                known[row] = first + len(new)
                new.append(i)
        if new:
            self._judge(observations[new])
        return np.array([known[row] for row in rows])

    def _judge(self, observations: Any) -> None:
        for start in range(0, how_many(observations), AT_ONCE):
            part = each(lambda x, at=start: x[at : at + AT_ONCE], observations)
            tensors: Any = obs_as_tensor(part, self.policy.device)
            taken = self._symbols.cells(tensors) if self._symbols else tensors
            features, said = self._networks(taken)
            self._taken.append(taken)
            self._features.append(features)
            self._add(said)
        for name in ("features", "_observations"):
            vars(self).pop(name, None)  # what was put together before

    def _add(self, said: Floats) -> None:
        count = len(self) + len(said)
        if count > len(self._room):
            room = np.empty((2 * count, said.shape[1]), np.float32)
            room[: len(self)] = self._said if len(self) else said[:0]
            self._room = room
        self._room[len(self) : count] = said
        self._said = self._room[:count]

    @torch.no_grad()
    def _networks(self, taken: Any) -> tuple[Tensor, Floats]:
        """Features `[n, F]` of observations, or their cells, and what is said of them in columns.

        Raises:
            NotFinite: the policy's output is not.
        """
        features = self._extract(taken)
        output = self._agent(features[None])
        columns = [self._acting(output.mixture), output.value[..., None]]
        if self.policy.n_experts > 1:
            alone = range(max(1, self.policy.soloists))
            columns += [self._acting(output.alone(k)) for k in alone]
            columns += [output.gate_logits.log_softmax(-1)]
        said: Floats = torch.cat(columns, dim=-1)[0].cpu().numpy()
        if not np.isfinite(said[:, : self._width]).all():
            raise NotFinite("policy's output")
        return features, said

    def _acting(self, parameters: Tensor) -> Tensor:
        """Parameters of an action distribution; choices of one have their log-probabilities."""
        return parameters.log_softmax(-1) if self._chooses else parameters

    def act(
        self, observations: Any, actor: Ints, uniform: Floats
    ) -> tuple[Ints, NDArray[Any], Floats, Floats]:
        """Draw actions: numbers of the observations `[N]`, actions `[N, ...]`, values `[N]` and the
        actions' log-probabilities `[N]`.

        Args:
            observations: of N environments.
            actor: who acts, 0 the mixture, k + 1 expert k by itself, `[N]`.
            uniform: numbers in [0, 1) to draw with where actions are choices of one, `[N]`.
        """
        at = self.find(observations)
        parameters = self._parameters(at, actor)
        if self._chooses:
            chances = np.exp(parameters)
            actions = (uniform[:, None] >= chances.cumsum(1)[:, :-1]).sum(1)
            return at, actions, self.values[at], _of_choices(parameters, actions)
        with torch.no_grad():
            drawn, log_prob = self.policy.draw(self._tensor(parameters))
        return at, drawn.cpu().numpy(), self.values[at], log_prob.cpu().numpy()

    def log_probabilities(self, at: Ints, actions: NDArray[Any], actor: Ints) -> Floats:
        """Of actions `[B, ...]` that were taken where observations have these numbers. [B]"""
        parameters = self._parameters(at, actor)
        if self._chooses:
            return _of_choices(parameters, actions.reshape(-1).astype(np.int64))
        with torch.no_grad():
            taken = self.policy.as_taken(self._tensor(actions))
            log_prob, _ = self.policy.judged(self._tensor(parameters), taken)
        return log_prob.cpu().numpy()

    @property
    def values(self) -> Floats:
        """Of the mixture. [U]"""
        return self._said[:, self._width]

    @property
    def gates(self) -> Floats:
        """Mixing probabilities. [U, K]"""
        return np.exp(self._said[:, -self.policy.n_experts :])

    @cached_property
    def features(self) -> Tensor:
        """Of all observations, before the update. [U, F]"""
        self._features = [torch.cat(self._features)]
        return self._features[0]

    @cached_property
    def _observations(self) -> Any:
        """All of them, as `MoEPolicy.features` takes them soonest. [U, ...]"""
        whole = each(lambda *parts: torch.cat(parts), *self._taken)
        self._taken = [whole]
        return Patches.of(whole) if self._symbols else whole

    def __getitem__(self, numbers: Tensor) -> Any:
        """Observations of these numbers `[B]`, as `MoEPolicy.features` takes them. [B, ...]"""
        return each(lambda part: part[numbers], self._observations)

    def _parameters(self, at: Ints, actor: Ints) -> Floats:
        """Of the action distributions of who acts. [B, A]"""
        said, width = self._said[at], self._width
        if not actor.any():
            return said[:, :width]
        first = actor * width + (actor > 0)  # behind the mixture's stands its value
        return np.take_along_axis(said, first[:, None] + np.arange(width), 1)

    def _tensor(self, x: NDArray[Any]) -> Tensor:
        return torch.as_tensor(x, device=self.policy.device)


def _as_kind(x: Any, kind: tuple[tuple[int, ...], Any]) -> NDArray[Any]:
    """Observations as arrays of the shape and type that their space has."""
    shape, dtype = kind
    return np.asarray(x, dtype).reshape(-1, *(shape or (1,)))


def _as_bytes(observations: NDArray[Any]) -> list[bytes]:
    rows = np.ascontiguousarray(observations.reshape(how_many(observations), -1))
    width = rows.shape[1] * rows.itemsize
    found: list[bytes] = rows.view(np.dtype((np.void, width)))[:, 0].tolist()
    return found


def _of_choices(log_probabilities: Floats, actions: Ints) -> Floats:
    return np.take_along_axis(log_probabilities, actions[:, None], 1)[:, 0]
