"""Any registered environment as a Stable-Baselines3 VecEnv, ours as fast batches."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import gymnasium as gym
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from oversight_rl.envs.gym import OversightGridVecEnv
from oversight_rl.envs.minigrid_batch import DiamondGhostVecEnv
from oversight_rl.envs.plugins import find_spec, why
from oversight_rl.envs.readable import readable
from oversight_rl.envs.settings import UserError

BATCHES: dict[str, Callable[..., VecEnv]] = {
    "oversight_rl.envs.gym:OversightGridEnv": OversightGridVecEnv,
    "oversight_rl.envs.minigrid:DiamondGhostEnv": DiamondGhostVecEnv,
}


def make_vec(env_id: str, num_envs: int, **kwargs: Any) -> VecEnv:
    """Many environments of one id.

    Args:
        env_id: an id registered with gymnasium, or `module:id` to import `module` first.
        num_envs: how many.
        kwargs: arguments of the environment, besides those of its registration.

    Returns:
        Our worlds as one batch; others as a DummyVecEnv of monitored environments, with what
        networks can read of their observations: no texts, MiniGrid's symbols as symbols.

    Raises:
        UserError: the id is unknown, or there are no environments.
    """
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"no environment {env_id!r} ({error})") from None
    spec = find_spec(name)
    if num_envs < 1:
        raise UserError(f"num_envs must be at least 1, got {num_envs}")
    batch = BATCHES.get(str(spec.entry_point))
    wrapped = spec.max_episode_steps is not None or spec.additional_wrappers
    if batch is not None and not wrapped:
        return batch(num_envs, **{**spec.kwargs, **kwargs})
    return DummyVecEnv([partial(_monitored, name, kwargs)] * num_envs)


def _monitored(env_id: str, kwargs: dict[str, Any]) -> Monitor[Any, Any]:
    try:
        env = gym.make(env_id, **kwargs)
    except TypeError as error:
        for name in ("oversight", "overseer"):
            if f"unexpected keyword argument '{name}'" not in str(error):
                continue
            raise UserError(
                f"env: {env_id} does not take the argument {name}; wrap it in OversightLabels, "
                "which does, and register that (docs/environments.md, From the command line)"
            ) from None
        if "required" in str(error) and "'oversight'" in str(error):
            raise UserError(f"env: {env_id} needs to know its oversight: give oversight=") from None
        raise
    return Monitor(readable(OneLineErrors(env)))


class OneLineErrors(gym.Wrapper[Any, Any, Any, Any]):
    """Tells what goes wrong inside of an environment from what goes wrong outside, in one line.

    Raises:
        UserError: in place of whatever the environment's `reset` and `step` raise.
    """

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        with self._told("reset"):
            return self.env.reset(**kwargs)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        with self._told("step"):
            return self.env.step(action)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except UserError:  # which tells itself
            raise
        except (Exception, SystemExit) as error:
            name = self.spec.id if self.spec else type(self.unwrapped).__name__
            raise UserError(f"env: {name}: {what} failed ({why(error)})") from error
