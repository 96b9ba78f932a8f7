"""What the networks say of a whole rollout, and of the window of steps that its labels reach."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oversight_rl.agents.learner import NotFinite
from oversight_rl.agents.methods import MethodTables, outcomes
from oversight_rl.agents.ppo.buffer import RoutedRolloutBuffer
from oversight_rl.agents.ppo.held import Steps, Window
from oversight_rl.agents.ppo.observations import each, how_many
from oversight_rl.agents.ppo.policy import MoEPolicy
from oversight_rl.agents.ppo.targets import Experience, gae, older_share
from oversight_rl.envs.world import Seen, Truth

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
        if "acts_alone" in policy.lessons:
            own = of_all(policy, policy.deployed_values, steps).reshape(shape)
        if policy.task:
            task = of_all(policy, policy.task_values, steps, buffer.alone.ravel()).reshape(shape)
        return own, task

    def experience(
        self,
        window: Window,
        ends: tuple[NDArray[np.int64], NDArray[np.int64]],
        due: NDArray[np.bool_],
        taught: bool,
        with_values: bool,
    ) -> Experience:
        """All that the targets are made of.

        Args:
            window: of the rollout.
            ends: see `outcomes_of`.
            due: see `Experience`.
            taught: likewise.
            with_values: whether values of older steps are asked for, too.
        """
        policy, (outcome, left) = self.policy, ends
        share, log_prob, old_value = judged_anew(policy, window, due, with_values)
        after = {"value_after": self._after(window, "value", _values(policy, self.following))}
        if "reward_model" in policy.lessons:
            after["chances"] = impute(policy, window.steps, left)
        if "acts_alone" in policy.lessons:
            beyond = of_all(policy, policy.deployed_values, self.following)
            after["deployed_value_after"] = self._after(window, "deployed_value", beyond)
        if policy.task:
            turns = np.append(self.buffer.acts_alone, self.buffer.alone[self._cut])
            beyond = of_all(policy, policy.task_values, self.following, turns)
            after["task_value_after"] = self._after(window, "task_value", beyond)
        x = Experience(
            window, outcome, left, due, share, log_prob, old_value, taught=taught, **after
        )
        return replace(x, gate=_foretold(policy, x)) if policy.agent.has_gate else x

    @property
    def _cut(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Steps and environments where episodes were cut."""
        at, envs = np.array([cut[:2] for cut in self.buffer.cuts], np.int64).reshape(-1, 2).T
        return at, envs

    def _after(self, window: Window, name: str, beyond: Floats) -> Floats:
        """A value after each step of the window, of what follows in its episode. `[W, C]`"""
        (at, envs), n = self._cut, self.buffer.n_envs
        value = getattr(window.steps, name)
        after = np.append(value[1:], np.zeros_like(value[:1]), axis=0)
        after[-1, :n] = beyond[:n]
        after = np.where(window.steps.done, np.float32(0), after)
        after[window.earlier + at, envs] = beyond[n:]
        for cut in window.cuts:
            after[cut.row, cut.column] = getattr(cut.last, name)[0, 0]
        return after


def outcomes_of(
    window: Window, methods: MethodTables, generator: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Outcome of each step's episode, and the steps left of it; see `methods.outcomes`. `[W, C]`"""
    steps = window.steps
    uniform = np.zeros(steps.done.shape, np.float32)
    rollout = window.of_rollout(uniform)  # a view; episodes end in the rollout
    rollout[:] = generator.random(rollout.shape, dtype=np.float32)
    late = window.late & steps.ended
    uniform[late] = generator.random(int(late.sum()), dtype=np.float32)
    parts = steps.ended, steps.done & ~steps.ended, steps.label, steps.truth, uniform
    *seen, truth, drawn = (torch.as_tensor(part)[None] for part in parts)  # [1, W, C]
    outcome, left = outcomes(Seen(*seen), Truth(truth), drawn, methods)
    return outcome[0].numpy(), left[0].numpy()


def judged_anew(
    policy: MoEPolicy, window: Window, due: NDArray[np.bool_], with_values: bool
) -> tuple[Floats, ...]:
    """How much the window's steps count, and their log-probabilities and values now. `[W, C]` each

    Only those that are due and older than the policy are judged; by their values, if asked for.
    """
    steps = window.steps
    share, log_prob = due.astype(np.float32), steps.log_prob.copy()
    value, older = steps.value.copy(), window.older & due
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
    return of_all(policy, lambda x: policy.predict_values(x).flatten(), observations)


def _foretold(policy: MoEPolicy, x: Experience) -> Floats:
    """The gate's probabilities where it is asked, else 0. `[W, C, K]`"""
    gate = np.zeros((*x.judged.shape, policy.n_experts), np.float32)
    if x.judged.any():
        log_gate = of_all(
            policy,
            lambda seen: policy.gate_log_probabilities(seen)[0],
            each(lambda part: part[x.judged], x.steps.observations),
        )
        gate[x.judged] = np.exp(log_gate)
    return gate


def impute(policy: MoEPolicy, steps: Steps, left: NDArray[np.int64]) -> Floats:
    """Chance of each behavior that each step's episode ended in. `[W, C, behaviors]`

    It is 0 where the episode did not end in one, by the steps `left` until its last one.
    """

    def chances(seen: Any, taken: Tensor) -> Tensor:
        return policy.behavior_log_probabilities(seen, policy.as_taken(taken)).exp()

    ended = steps.ended
    imputed = np.zeros((*ended.shape, len(policy.behaviors)), np.float32)
    if ended.any():
        seen = each(lambda x: x[ended], steps.observations)
        imputed[ended] = of_all(policy, chances, seen, steps.actions[ended])
    end = (np.arange(len(left))[:, None] + left).clip(max=len(left) - 1)
    return np.take_along_axis(imputed, end[..., None], 0)


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
    mean, count = policy.task_square.tolist()
    count = min(count + 1, SETTLED)
    mean += (float((returns**2).mean()) - mean) / count
    policy.task_square.copy_(torch.tensor([mean, count], dtype=torch.float64))
    scale = mean**0.5 if mean > 0 else 1.0
    return (reward / scale).astype(np.float32)


def _one_below_another(kept: NDArray[Any], last: Any, *finals: Any) -> NDArray[Any]:
    """N observations and then single ones, in the shape that a rollout keeps them in."""
    return np.concatenate([np.asarray(x).reshape(-1, *kept.shape[2:]) for x in (last, *finals)])
