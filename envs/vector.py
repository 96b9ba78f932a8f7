"""Any registered environment as a Stable-Baselines3 VecEnv, ours as fast batches."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from oversight_rl.envs.gym import OversightGridVecEnv
from oversight_rl.envs.minigrid_batch import DiamondGhostVecEnv
from oversight_rl.envs.readable import readable
from oversight_rl.envs.settings import UserError, nearest

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
        spec = gym.spec(name)
    except (gym.error.Error, ModuleNotFoundError):
        raise UserError(f"no environment {env_id!r}{nearest(name, gym.registry)}") from None
    if num_envs < 1:
        raise UserError(f"num_envs must be at least 1, got {num_envs}")
    batch = BATCHES.get(str(spec.entry_point))
    wrapped = spec.max_episode_steps is not None or spec.additional_wrappers
    if batch is not None and not wrapped:
        return batch(num_envs, **{**spec.kwargs, **kwargs})
    return DummyVecEnv([partial(_monitored, name, kwargs)] * num_envs)


def _monitored(env_id: str, kwargs: dict[str, Any]) -> Monitor[Any, Any]:
    return Monitor(readable(gym.make(env_id, **kwargs)))
