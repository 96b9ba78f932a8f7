"""Rollouts of environments in which experts act by themselves in some of the episodes."""

from collections.abc import Sequence
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.vec_env import VecEnv

from oversight_rl.agents.ppo.buffer import RoutedRolloutBuffer
from oversight_rl.agents.ppo.observations import check_spaces
from oversight_rl.agents.ppo.policy import MoEPolicy
from oversight_rl.agents.ppo.views import Views
from oversight_rl.agents.steering import MIXTURE
from oversight_rl.envs.readable import readable, readable_vec


class CollectingPPO(PPO):
    """SB3's PPO up to where a rollout is whole: what is learned from it, a subclass says."""

    policy: MoEPolicy
    rollout_buffer: RoutedRolloutBuffer
    _last_obs: Any
    _last_episode_starts: Any
    _resets: Any = None  # seeds and options of the environments when last looked at

    def make_targets(self, buffer: RoutedRolloutBuffer) -> None:
        """Turn a rollout that is whole into samples, as SB3 computes returns and advantages."""
        raise NotImplementedError

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        if isinstance(env, VecEnv | gym.Env):  # of anything else SB3 says what it is
            env = readable_vec(env) if isinstance(env, VecEnv) else readable(env)
            check_spaces(env.observation_space, env.action_space)
        try:
            return PPO._wrap_env(env, verbose, monitor_wrapper)
        except AssertionError as error:  # as SB3 says that it takes images of one kind at once
            raise ValueError(str(error)) from None

    def set_random_seed(self, seed: int | None = None) -> None:
        try:
            super().set_random_seed(seed)
        except AttributeError as error:  # of a VecEnv that is not SB3's
            if error.name != "seed":
                raise
            raise ValueError(
                "seed: these environments cannot be seeded; leave it out, or seed them, torch and "
                "NumPy yourself"
            ) from error

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int
    ) -> bool:
        """As SB3 has it; experts act by themselves in some of the episodes.

        The reward is kept as it came: what follows an episode that a time limit cut is known when
        the rollout is whole. One that is stopped on the way leaves nothing behind; after an
        exception, nobody knows where the environments are, and they are reset.

        Raises:
            ValueError: the policy is steered.
        """
        buffer: RoutedRolloutBuffer = rollout_buffer
        policy = self.policy
        if policy.n_experts > 1 and policy.steering != MIXTURE:
            raise ValueError(
                f"the policy is steered to {policy.steering.name}, and learns as the mixture only: "
                "set model.policy = model.steer('mixture') first"
            )
        if self._reset_by_others(env):
            self._start(env)
        policy.set_training_mode(False)
        buffer.reset()
        callback.on_rollout_start()
        watched = not isinstance(callback, ConvertCallback) or callback.callback is not None
        watched = watched and bool(getattr(callback, "callbacks", [callback]))
        views = buffer.views = Views(policy, watched)
        uniform = torch.rand(n_rollout_steps, env.num_envs).numpy()
        whole = False
        try:
            for drawn in uniform:
                if not self._step(env, callback, buffer, views, drawn):
                    return False
            self.make_targets(buffer)
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

    def _step(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RoutedRolloutBuffer,
        views: Views,
        uniform: NDArray[np.float32],
    ) -> bool:
        """A step of every environment; whether callbacks, which see its locals, let it go on."""
        if self.policy is not views.policy:  # a callback put another one in its place
            views.follow(self.policy)
        actor = rollout_buffer.acts
        at, actions, *said = views.act(self._last_obs, actor, uniform)
        values, log_probs = map(torch.from_numpy, said)  # as SB3 has them, for callbacks
        values = values[:, None]
        clipped_actions = actions
        if isinstance(self.action_space, spaces.Box):
            low, high = self.action_space.low, self.action_space.high
            clipped_actions = np.clip(actions, low, high).astype(low.dtype, copy=False)
        new_obs, rewards, dones, infos = env.step(clipped_actions)
        self.num_timesteps += env.num_envs
        callback.update_locals(locals())
        goes_on = callback.on_step()
        if self._reset_by_others(env):  # a callback did
            infos = _cut(infos, dones, new_obs)
            new_obs, dones = self._reset(env), np.ones_like(dones)
        if goes_on:
            self._update_info_buffer(infos, dones)
            rollout_buffer.note(infos, dones, at)
            begun = self._last_obs, actions, rewards, self._last_episode_starts
            rollout_buffer.add(*begun, values, log_probs)
        rollout_buffer.pass_on(dones)
        self._last_obs, self._last_episode_starts = new_obs, dones
        return goes_on

    def _setup_learn(
        self, steps: int, callback: Any = None, reset_num_timesteps: bool = True, *args: Any
    ) -> tuple[int, BaseCallback]:
        starts_anew = self._last_obs is None or reset_num_timesteps
        result = super()._setup_learn(steps, callback, reset_num_timesteps, *args)
        if starts_anew:
            self._reset_by_others(cast(VecEnv, self.env))
        return result

    def _start(self, env: VecEnv) -> None:
        self._last_obs = self._reset(env)
        self._last_episode_starts = np.ones(env.num_envs, dtype=bool)

    def _reset(self, env: VecEnv) -> Any:
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


def _cut(infos: Sequence[dict[str, Any]], dones: NDArray[np.bool_], last: Any) -> Any:
    """What to say of episodes that were cut, where they did not end anyway."""
    return [
        info
        if done
        else {
            "TimeLimit.truncated": True,
            "terminal_observation": observation,
            "late_labels": info.get("late_labels"),
        }
        for info, done, observation in zip(infos, dones, last, strict=True)
    ]
