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

from oversight_rl.envs.settings import UserError, nearest


class LabelError(UserError, ValueError):
    """An environment told of a behavior that it has not got."""


def distinct_names(names: Any, whose: str = "behaviors") -> tuple[str, ...]:
    """The names of behaviors as a tuple.

    Raises:
        ValueError: they are not two or more distinct names.
    """
    several = not isinstance(names, str) and isinstance(names, Sequence)
    found = tuple(names) if several else ()
    named = all(isinstance(name, str) and name for name in found)
    if not named or len(set(found)) < max(2, len(found)):
        parts = names.replace(",", " ").split() if isinstance(names, str) else []
        hint = f"; did you mean {tuple(parts)}?" if len(set(parts)) > 1 else ""
        raise ValueError(f"{whose} must be two or more distinct names, got {names!r}{hint}")
    return found


def behavior_index(name: Any, behaviors: Sequence[str], what: str) -> int:
    """Place of a name among the behaviors.

    Raises:
        LabelError: it is none of them, but perhaps another spelling or the number of one.
    """
    if isinstance(name, str) and name in behaviors:
        return behaviors.index(name)
    meant = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    if isinstance(name, int | np.integer) and 0 <= name < len(behaviors):
        meant = behaviors[int(name)]
    raise LabelError(
        f"{what} must be one of {', '.join(behaviors)}, got {name!r}{nearest(meant, behaviors)}"
    )


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
        if not callable(behavior_fn):
            raise ValueError(
                "behavior_fn must be a function of (env, observation, reward, terminated, "
                f"truncated, info) that names the episode's behavior, got {behavior_fn!r}"
            )
        number = isinstance(oversight_probability, int | float | np.number)
        if not number or not 0 <= oversight_probability <= 1:
            raise ValueError(
                f"oversight_probability must lie in [0, 1], got {oversight_probability!r}"
            )
        self.behavior_fn, self.behaviors = behavior_fn, distinct_names(behaviors)
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

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
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
                what = "what behavior_fn returns, where it is not None,"
                if self._watched[behavior_index(behavior, self.behaviors, what)]:
                    info["label"] = behavior
        return self._shown(observation), reward, terminated, truncated, info

    def _shown(self, observation: Any) -> Any:
        if not self.flags_visible:
            return observation
        return np.append(observation, self._watched).astype(np.float32)
