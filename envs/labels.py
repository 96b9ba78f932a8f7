"""Partial oversight for any Gymnasium environment: who says what an episode was, and how often.

The protocol, which our worlds follow too: at an episode's end, `info["behavior"]` says which
behavior it was (for evaluation, and for methods that need the truth), and `info["label"]` says the
same where an overseer saw it. `OversightLabels` puts both there for an environment of any kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs


class LabelError(ValueError):
    """An environment told of a behavior that it has not got."""


BehaviorFn = Callable[[gym.Env[Any, Any], Any, float, bool, bool, dict[str, Any]], str | None]
"""(environment, last observation, last reward, terminated, truncated, info) -> behavior or None."""


class OversightLabels(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """An environment whose episodes are told apart by behavior and labeled now and then.

    Each behavior is watched in an episode with the given probability, independently, drawn at its
    start; an episode that ends in a watched behavior is labeled.

    Args:
        env: any environment.
        behavior_fn: tells at an episode's end which behavior it was, None if none of them.
        oversight_probability: chance that a behavior is watched in an episode.
        behaviors: names of the behaviors, the wanted one first.
        flags_visible: whether the observation, then a vector of numbers, ends with a number for
            each behavior: 1 where it is watched, else 0. So the agent can tell when it is watched.
            The attribute `flags` then says which entries of an observation these are.

    Raises:
        ValueError: an argument is out of range, flags cannot be shown, or `behavior_fn` returned
            (as `LabelError`) a name that is not among the behaviors.
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        behavior_fn: BehaviorFn,
        oversight_probability: float = 0.1,
        behaviors: Sequence[str] = ("wanted", "unwanted"),
        flags_visible: bool = False,
    ) -> None:
        RecordConstructorArgs.__init__(
            self,
            behavior_fn=behavior_fn,
            oversight_probability=oversight_probability,
            behaviors=behaviors,
            flags_visible=flags_visible,
        )
        gym.Wrapper.__init__(self, env)
        if not 0 <= oversight_probability <= 1:
            raise ValueError(
                f"oversight_probability must lie in [0, 1], got {oversight_probability}"
            )
        if len(behaviors) < 2 or len(set(behaviors)) < len(behaviors):
            raise ValueError(f"behaviors must be two or more distinct names, got {behaviors!r}")
        self.behavior_fn, self.behaviors = behavior_fn, tuple(behaviors)
        self.oversight, self.flags_visible = oversight_probability, flags_visible
        self._generator = np.random.default_rng()
        self._watched = np.zeros(len(behaviors), bool)
        space = env.observation_space
        if flags_visible:
            if not isinstance(space, spaces.Box) or len(space.shape) != 1:
                raise ValueError(
                    f"flags can be shown in vectors of numbers only, got {space}; wrap the "
                    "environment in gymnasium's FlattenObservation first"
                )
            self.observation_space = spaces.Box(
                np.append(space.low, np.zeros(len(behaviors))).astype(np.float32),
                np.append(space.high, np.ones(len(behaviors))).astype(np.float32),
            )
            self.flags = np.arange(len(space.low) + len(behaviors)) >= len(space.low)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self._generator = np.random.default_rng([seed, 1])  # apart from the environment's own
        self._watched = self._generator.random(len(self.behaviors)) < self.oversight
        observation, info = self.env.reset(seed=seed, options=options)
        return self._shown(observation), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            behavior = self.behavior_fn(
                self.env, observation, float(reward), terminated, truncated, info
            )
            info = info | {"behavior": behavior}
            if behavior is not None:
                if behavior not in self.behaviors:
                    raise LabelError(
                        f"behavior_fn must return one of {', '.join(self.behaviors)} or None, got "
                        f"{behavior!r}"
                    )
                if self._watched[self.behaviors.index(behavior)]:
                    info["label"] = behavior
        return self._shown(observation), reward, terminated, truncated, info

    def _shown(self, observation: Any) -> Any:
        if not self.flags_visible:
            return observation
        return np.append(observation, self._watched).astype(np.float32)
