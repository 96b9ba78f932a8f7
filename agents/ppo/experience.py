"""What the networks say of a whole rollout, and of the window of steps that its labels reach."""

from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.utils import obs_as_tensor

from oversight_rl.agents.learner import NotFinite
from oversight_rl.agents.networks import DEPLOYED
from oversight_rl.agents.outcomes import MethodTables, labels, outcomes
from oversight_rl.agents.ppo.buffer import RoutedRolloutBuffer
from oversight_rl.agents.ppo.held import Steps, Window
from oversight_rl.agents.ppo.observations import each
from oversight_rl.agents.ppo.policy import MoEPolicy
from oversight_rl.agents.ppo.targets import Experience, gae, older_share
from oversight_rl.agents.ppo.views import AT_ONCE
from oversight_rl.envs.world import Seen, Truth

Floats = NDArray[np.float32]
SETTLED = 50
"""Rollouts after which it should be warned of episodes that are longer than a rollout, and about as
many as the scale of the task's returns is a mean over."""


class Rollout:
    """A whole rollout and what followed it.

    Args:
        policy: that took its steps.
        buffer: of its steps.
        last: observations after it, `[N, ...]`.
    """

    def __init__(self, policy: MoEPolicy, buffer: RoutedRolloutBuffer, last: Any) -> None:
        self.policy, self.buffer = policy, buffer
        # views after the rollout, and where episodes were cut in it
        self.following = buffer.views.find(last)  # [N + cuts]
        if buffer.cuts:
            ends = each(lambda *rows: np.stack(rows), *(cut[2] for cut in buffer.cuts))
            self.following = np.concatenate([self.following, buffer.views.find(ends)])
        self._features = buffer.views.features

    @cached_property
    def own_values(self) -> Floats:
        """Of each expert that acts by itself, of each view. [U, S]"""
        with torch.no_grad():
            return self.policy.own_values(self._features).cpu().numpy()

    @cached_property
    def task_values(self) -> Floats:
        """Of the task, of each view: `[U, 1 + S]`, for the mixture and these experts."""
        with torch.no_grad():
            return self.policy.task_values(self._features).cpu().numpy()

    def values(self) -> tuple[Floats, Floats]:
        """Of who acted by itself, and of the task, at its steps; `[T, N]`, 0 without."""
        view, policy = self.buffer.view, self.policy
        own = task = np.zeros(view.shape, np.float32)
        if "acts_alone" in policy.lessons:
            own = self.own_values[view, self._expert(self.buffer.actor)]
        if policy.task:
            task = self.task_values[view, self.buffer.actor]
        return own, task

    def experience(
        self,
        window: Window,
        ends: tuple[NDArray[np.int64], NDArray[np.int64]],
        due: NDArray[np.bool_],
        taught: bool,
    ) -> Experience:
        """All that the targets are made of.

        Args:
            window: of the rollout.
            ends: see `outcomes_of`.
            due: see `Experience`.
            taught: likewise.
        """
        policy, (outcome, left), beyond = self.policy, ends, self.following
        views = self.buffer.views
        after: dict[str, Any] = {}
        if "reward_model" in policy.lessons:
            after["chances"] = impute(policy, window.steps, left)
        if "acts_alone" in policy.lessons:
            said = self.own_values[beyond, self._expert(self._actors)]
            after["own_value_after"] = self._after(window, "own_value", said)
        if policy.task:
            said = self.task_values[beyond, self._actors]
            after["task_value_after"] = self._after(window, "task_value", said)
        view, share, log_prob, value = judged_anew(self.buffer, window, due)
        value_after = self._after(window, "value", views.values[beyond])
        now = window, view, outcome, left, due, share, log_prob, value, value_after
        x = Experience(*now, taught=taught, **after)
        if not policy.agent.has_gate:
            return x
        return replace(x, gate=views.gates[x.view] * x.judged[..., None])

    @property
    def _actors(self) -> NDArray[np.int64]:
        """Who would have acted after the rollout, and where episodes were cut. [N + cuts]"""
        return np.append(self.buffer.acts, self.buffer.actor[self._cut])

    @staticmethod
    def _expert(actor: NDArray[np.int64]) -> NDArray[np.int64]:
        """The expert that acts by itself; the deployed one where none does."""
        return np.maximum(actor - 1, DEPLOYED)

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
    """Outcome of each step's episode, and the steps left of it; see `outcomes`. `[W, C]`"""
    steps = window.steps
    uniform = np.zeros(steps.done.shape, np.float32)
    rollout = window.of_rollout(uniform)  # a view; episodes end in the rollout
    rollout[:] = generator.random(rollout.shape, dtype=np.float32)
    late = window.late & steps.ended
    uniform[late] = generator.random(int(late.sum()), dtype=np.float32)
    parts = steps.ended, steps.done & ~steps.ended, steps.label, steps.truth, uniform
    *seen, truth, drawn = (torch.as_tensor(part)[None] for part in parts)  # [1, W, C]
    shown = Seen(*seen)
    label = labels(shown, Truth(truth), drawn, methods)
    outcome, left = outcomes(replace(shown, label=label))
    return outcome[0].numpy(), left[0].numpy()


def judged_anew(
    buffer: RoutedRolloutBuffer, window: Window, due: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], Floats, Floats, Floats]:
    """What the window's steps saw; how much they count, their log-probabilities and values now.

    `[W, C]` each; of the steps that are older than the policy, those that are due.
    """
    steps, views, older = window.steps, buffer.views, window.older & due
    view = np.zeros(due.shape, np.int64)
    window.of_rollout(view)[:] = buffer.view
    share, log_prob, value = due.astype(np.float32), steps.log_prob.copy(), steps.value.copy()
    if older.any():
        seen = views.find(each(lambda x: x[older], steps.observations))
        now = views.log_probabilities(seen, steps.actions[older], steps.actor[older])
        view[older], value[older] = seen, views.values[seen]
        share[older] = older_share(now, log_prob[older])
        log_prob[older] = now
    return view, share, log_prob, value


def impute(policy: MoEPolicy, steps: Steps, left: NDArray[np.int64]) -> Floats:
    """Chance of each behavior that each step's episode ended in. `[W, C, behaviors]`

    It is 0 where the episode did not end in one, by the steps `left` until its last one.
    """
    ended = steps.ended
    imputed = np.zeros((*ended.shape, len(policy.behaviors)), np.float32)
    seen, taken = each(lambda x: x[ended], steps.observations), steps.actions[ended]
    parts, at = range(0, len(taken), AT_ONCE), ended.nonzero()
    with torch.no_grad():
        for part in (slice(start, start + AT_ONCE) for start in parts):
            rows = obs_as_tensor(each(lambda x, at=part: x[at], seen), policy.device)
            actions = policy.as_taken(torch.as_tensor(taken[part], device=policy.device))
            chances = policy.behavior_log_probabilities(rows, actions).exp()
            imputed[tuple(i[part] for i in at)] = chances.cpu().numpy()
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
