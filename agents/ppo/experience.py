"""What the networks say of a whole rollout, and of the window of steps that its labels reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oversight_rl.agents.learner import NotFinite
from oversight_rl.agents.ppo.buffer import RoutedRolloutBuffer
from oversight_rl.agents.ppo.held import Steps
from oversight_rl.agents.ppo.observations import each, how_many
from oversight_rl.agents.ppo.policy import MoEPolicy
from oversight_rl.agents.ppo.targets import Experience, gae, judged, learns_alone, older_share

Floats = NDArray[np.float32]
SETTLED = 50
"""Rollouts after which it should be warned of episodes that are longer than a rollout, and about as
many as the scale of the task's returns is a mean over."""
AT_ONCE = 4096
"""Observations that a network judges at once."""


@dataclass(frozen=True)
class Rollout:
    """A whole rollout and what followed it."""

    policy: MoEPolicy
    buffer: RoutedRolloutBuffer
    last: Any  # observations after it, [N, ...]

    @cached_property
    def following(self) -> Any:
        """Observations after the rollout, and where episodes were cut in it. `[N + cuts, ...]`"""
        finals = [cut[2] for cut in self.buffer.cuts]
        return each(_one_below_another, self.buffer.observations, self.last, *finals)

    def values(self) -> tuple[Floats, Floats]:
        """Of the deployed expert by itself, and of the task, at its steps; `[T, N]`, 0 without."""
        policy, buffer, shape = self.policy, self.buffer, self.buffer.done.shape
        steps = each(lambda x: x.reshape(-1, *x.shape[2:]), buffer.observations)
        own = task = np.zeros(shape, np.float32)
        if policy.own_value_net is not None:
            own = of_all(policy, policy.own_values, steps).reshape(shape)
        if policy.task:
            task = of_all(policy, policy.task_values, steps, buffer.alone.ravel()).reshape(shape)
        return own, task

    def experience(
        self, left: NDArray[np.int64], chances: Floats | None, share: Floats
    ) -> Experience:
        """All that the targets are made of.

        Args:
            left: steps until the episode's last one, `[W, C]`.
            chances: of what each step's episode ended in, `[W, C, behaviors]`; None: nobody knows.
            share: how much each step counts, `[W, C]`.
        """
        policy, buffer = self.policy, self.buffer
        steps, more = buffer.window.steps, dict[str, Any]()
        if policy.own_value_net is not None:
            beyond = of_all(policy, policy.own_values, self.following)
            more |= {
                "own_value": steps.own_value,
                "own_value_after": self._after("own_value", beyond),
            }
        if policy.task:
            at, envs = self._cut
            turns = np.concatenate([buffer.acts_alone, buffer.alone[at, envs]])
            beyond = of_all(policy, policy.task_values, self.following, turns)
            more |= {
                "task_reward": steps.task_reward,
                "task_value": steps.task_value,
                "task_value_after": self._after("task_value", beyond),
            }
        beyond = _values(policy, self.following)
        known = chances is not None
        return Experience(
            outcome=buffer.outcome,
            left=left,
            ended=steps.ended,
            done=steps.done,
            alone=steps.alone,
            value=steps.value,
            value_after=self._after("value", beyond),
            gate=_foretold(policy, buffer, share, known) if policy.has_gate else None,
            chances=chances,
            share=share,
            **more,
        )

    @property
    def _cut(self) -> NDArray[np.int64]:
        """Steps and environments where episodes were cut. `[2, cuts]`"""
        return np.array([cut[:2] for cut in self.buffer.cuts], np.int64).reshape(-1, 2).T

    def _after(self, name: str, beyond: Floats) -> Floats:
        """A value after each step of the window, of what follows in its episode. `[W, C]`"""
        window, (at, envs), n = self.buffer.window, self._cut, self.buffer.n_envs
        value = getattr(window.steps, name)
        after = np.append(value[1:], np.zeros_like(value[:1]), axis=0)
        after[-1, :n] = beyond[:n]
        after = np.where(window.steps.done, np.float32(0), after)
        after[window.earlier + at, envs] = beyond[n:]
        for cut in window.cuts:
            after[cut.row, cut.column] = getattr(cut.last, name)[0, 0]
        return after


def judged_anew(
    policy: MoEPolicy, buffer: RoutedRolloutBuffer, with_values: bool
) -> tuple[Floats, ...]:
    """How much the window's steps count, and their log-probabilities and values now. `[W, C]` each

    Args:
        policy: before the update.
        buffer: whose window it is.
        with_values: whether values of older steps are asked for, too.
    """
    steps = buffer.window.steps
    share, log_prob = buffer.due.astype(np.float32), steps.log_prob.copy()
    value, older = steps.value.copy(), buffer.window.older & buffer.due
    if older.any():
        seen = each(lambda x: x[older], steps.observations)
        taken = steps.actions[older], steps.alone[older]
        now = of_all(policy, policy.log_probabilities, seen, *taken)
        share[older] = older_share(now, log_prob[older])
        log_prob[older] = now
        if with_values:
            value[older] = _values(policy, seen)
    return share, log_prob, value


def of_all(
    policy: MoEPolicy, function: Callable[..., Tensor], observations: Any, *more: NDArray[Any]
) -> NDArray[Any]:
    """What a network says of many observations, `[B, ...]`; in parts, to bound the memory."""

    def part(x: NDArray[Any]) -> Tensor:
        return torch.as_tensor(x[at]).to(policy.device)

    parts = []
    with torch.no_grad():
        for start in range(0, how_many(observations), AT_ONCE):
            at = slice(start, start + AT_ONCE)
            said = function(each(part, observations), *map(part, more))
            parts.append(said.cpu().numpy())
    return np.concatenate(parts)


def _values(policy: MoEPolicy, observations: Any) -> Floats:
    """What the mixture is to get, `[B]`."""
    return of_all(policy, lambda x: policy.predict_values(x).flatten(), observations)


def _foretold(
    policy: MoEPolicy, buffer: RoutedRolloutBuffer, share: Floats, imputed: bool
) -> Floats:
    """The gate's probabilities where the targets ask for them, else 0. [W, C, K]"""
    steps = buffer.window.steps
    by_label = not imputed or learns_alone(steps.alone, share)
    known = judged(buffer.outcome, by_label) & (share > 0)
    gate = np.zeros((*known.shape, policy.n_experts), np.float32)
    if known.any():
        log_gate = of_all(
            policy,
            lambda x: policy.gate_log_probabilities(x)[0],
            each(lambda x: x[known], steps.observations),
        )
        gate[known] = np.exp(log_gate)
    return gate


def impute(policy: MoEPolicy, steps: Steps) -> Floats:
    """Chance of each behavior where an episode ends, else nan. [W, C, behaviors]"""

    def chances(seen: Any, taken: Tensor) -> Tensor:
        return policy.ending_log_probabilities(seen, policy.as_taken(taken)).exp()

    ended = steps.ended
    imputed = np.full((*ended.shape, len(policy.behaviors)), np.nan, np.float32)
    if ended.any():
        seen = each(lambda x: x[ended], steps.observations)
        imputed[ended] = of_all(policy, chances, seen, steps.actions[ended])
    return imputed


def in_task_scale(policy: MoEPolicy, buffer: RoutedRolloutBuffer, discount: float) -> Floats:
    """The environment's rewards in units of the root mean square of its returns. [T, N]

    The mean runs over all rollouts, the newest counting most once there are many. A power of
    two in the reward is in the scale and nowhere else, to the bit.
    """
    reward = buffer.rewards.astype(np.float64)
    nothing = np.zeros_like(reward)
    if not np.isfinite(reward).all():
        raise NotFinite("environment's reward")
    returns = gae(reward, nothing, nothing, buffer.done, discount, 1.0)
    square = cast(Tensor, policy.task_square)  # mean, rollouts in it
    mean, count = square.tolist()
    count = min(count + 1, SETTLED)
    mean += (float((returns**2).mean()) - mean) / count
    square.copy_(torch.tensor([mean, count], dtype=square.dtype))
    scale = mean**0.5 if mean > 0 else 1.0
    return (reward / scale).astype(np.float32)


def _one_below_another(kept: NDArray[Any], last: Any, *finals: Any) -> NDArray[Any]:
    """N observations and then single ones, in the shape that a rollout keeps them in."""
    shape = kept.shape[2:]
    return np.concatenate([np.asarray(x).reshape(-1, *shape) for x in (last, *finals)])
