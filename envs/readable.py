"""What networks can read of an environment's observations: no texts, and symbols as symbols.

MiniGrid's dictionaries hold a mission, which is a text, and an image that SB3 would take for a
picture. What is left out is said by an attribute `left_out`.
"""

from __future__ import annotations

from typing import Any, cast

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from minigrid.core.mission import MissionSpace
from numpy.typing import NDArray
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import (
    VecEnv,
    VecEnvWrapper,
    VecTransposeImage,
    is_vecenv_wrapped,
)

from oversight_rl.envs.minigrid import NO_SYMBOLS, SymbolicObservation, as_symbols, symbols_of

TOLD_AT_ONCE = {"image", "direction"}
"""Entries of a MiniGrid dictionary of which the image says all: the view turns with the agent, and
where it does not, the agent's direction is one of its symbols."""


def said(env: VecEnv, name: str) -> list[Any] | None:
    """An attribute of each environment; None where they have none, or cannot be asked.

    VecEnvs that are not SB3's own, as SuperSuit's, need not have the methods that ask.
    """
    try:
        return env.get_attr(name) if env.has_attr(name) else None
    except (AttributeError, NotImplementedError):
        return None


def seen(observation: Any, space: spaces.Space[Any]) -> Any:
    """What is read of an observation (or of many), by the space that was made for reading it."""
    if not isinstance(observation, dict):
        return observation
    if isinstance(space, spaces.Dict):
        return {name: observation[name] for name in space.spaces}
    return observation["image"]


class ReadableObservation(gym.ObservationWrapper[Any, Any, Any]):
    """An environment with a dictionary of which some is left out; attributes `told` say what."""

    def __init__(self, env: gym.Env[Any, Any], space: spaces.Dict, told: dict[str, Any]) -> None:
        super().__init__(env)
        self.observation_space = space
        vars(self).update(told)

    def observation(self, observation: Any) -> Any:
        return seen(observation, self.observation_space)


class ReadableVecEnv(VecEnvWrapper):
    """The same for a VecEnv; symbols may stand alone, too."""

    def __init__(self, venv: VecEnv, space: spaces.Space[Any], told: dict[str, Any]) -> None:
        self.told = told
        super().__init__(venv, observation_space=space)

    def reset(self) -> Any:
        return seen(self.venv.reset(), self.observation_space)

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = self.venv.step_wait()
        for info in infos:
            if "terminal_observation" in info:
                last = info["terminal_observation"]
                info["terminal_observation"] = seen(last, self.observation_space)
        return seen(observations, self.observation_space), rewards, dones, infos

    def has_attr(self, attr_name: str) -> bool:
        return attr_name in self.told or self.venv.has_attr(attr_name)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name in self.told:
            return [self.told[attr_name] for _ in self._get_indices(indices)]
        return self.venv.get_attr(attr_name, indices)


def readable(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """The environment, with what networks can read of its observations."""
    symbols = symbols_of(env)
    space, left_out = _left(env.observation_space, symbols)
    if space is env.observation_space:
        return env
    if not isinstance(space, spaces.Dict):
        return SymbolicObservation(env)
    flags = None if symbols is None else getattr(SymbolicObservation(env), "flags", None)
    return ReadableObservation(env, space, _told(space, left_out, flags))


def readable_vec(env: VecEnv) -> VecEnv:
    """The same for environments in a VecEnv, if it can be asked what they are."""
    symbols = _symbols_of_many(env)
    space, left_out = _left(env.observation_space, symbols)
    if space is env.observation_space:
        return env
    views = said(env, "view_flags") if said(env, "flags") is None else None
    flags = views[0] if symbols and views and views[0].shape == symbols.shape else None
    return ReadableVecEnv(env, space, _told(space, left_out, flags))


def _told(
    space: spaces.Space[Any], left_out: tuple[str, ...], flags: NDArray[np.bool_] | None
) -> dict[str, Any]:
    """What is said of a space: texts left out, and entries that show flags unless that is None."""
    shown = {"image": flags} if isinstance(space, spaces.Dict) else flags
    return {"left_out": left_out} | ({} if flags is None else {"flags": shown})


def _left(
    space: spaces.Space[Any], symbols: spaces.Box | None
) -> tuple[spaces.Space[Any], tuple[str, ...]]:
    """The space of what is read of one with or without MiniGrid's symbols, and texts left out."""
    marked = None if symbols is None else as_symbols(symbols)
    if not isinstance(space, spaces.Dict):
        return (space if marked is None else marked), ()
    texts = tuple(k for k, part in space.items() if isinstance(part, spaces.Text | MissionSpace))
    left = {name: part for name, part in space.items() if name not in texts}
    if marked is not None:
        left["image"] = marked
        if set(left) <= TOLD_AT_ONCE:
            return marked, texts
    return (spaces.Dict(left) if texts or marked is not None else space), texts


def _symbols_of_many(env: VecEnv) -> spaces.Box | None:
    """The space of MiniGrid's symbols in the observations of a VecEnv, None without them."""
    space: Any = env.observation_space
    image: Any = space.get("image") if isinstance(space, spaces.Dict) else space
    if not is_image_space(image) or image.shape[2] != 3:
        return None
    if is_vecenv_wrapped(env, VecTransposeImage) or said(env, "see_through_walls") is None:
        return None
    changed = any(any(env.env_is_wrapped(wrapper)) for wrapper in NO_SYMBOLS)
    return None if changed else cast(spaces.Box, image)
