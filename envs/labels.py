"""Partial oversight for any Gymnasium environment: who says what an episode was, and how often.

The protocol, which our worlds follow too: at an episode's end, `info["behavior"]` says which
behavior it was (for evaluation, and for methods that need the truth), and `info["label"]` says the
same where an overseer saw it. `OversightLabels` puts both there for an environment of any kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from numpy.typing import NDArray

from oversight_rl.envs.overseers import Labels, as_labels, rate
from oversight_rl.envs.settings import NO_LABEL, UserError, nearest


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


class Desk:
    """Which labels an overseer gives, of episodes in order of their ends, and when.

    Args:
        labels: of the overseer.
        behaviors: how many there are.
        oversight: the level of oversight.
        seed: of what goes missing and wrong.
    """

    def __init__(self, labels: Labels, behaviors: int, oversight: float, seed: Any) -> None:
        self.labels, self.behaviors, self.oversight = labels, behaviors, oversight
        self.rng = np.random.Generator(np.random.SFC64(seed))
        self.count = np.zeros(2, np.int64)  # labels given, episodes ended
        self.waiting = np.full((labels.delay, 2), NO_LABEL)  # environment and label, by episode

    def label(self, behavior: int, watched: bool, distance: int | None = None) -> int:
        """The label of an ending in a behavior, NO_LABEL where it gets none.

        Args:
            behavior: that it was.
            watched: whether it was flagged.
            distance: steps between diamond and ghost.

        Raises:
            ValueError: it matters how far they are apart, and that is not known.
        """
        labels, chance = self.labels, rate(self.labels.recall, behavior)
        if not labels.tied:
            watched, chance = True, chance * self.oversight * rate(labels.shares, behavior)
        if not watched or self.rng.random() >= chance:
            return NO_LABEL
        if labels.budget is not None and self.count[0] >= labels.budget:
            return NO_LABEL
        self.count[0] += 1
        if labels.near is not None and distance is None:
            raise ValueError("labels.near: the environment does not tell info['distance']")
        hard = labels.near is None or (distance or 0) <= labels.near
        if hard and self.rng.random() < rate(labels.error, behavior):
            return int(behavior + self.rng.integers(1, self.behaviors)) % self.behaviors
        return behavior

    def told(
        self, env: int, label: int, names: Sequence[str]
    ) -> tuple[dict[str, Any], list[tuple[int, tuple[int, str]]]]:
        """What the info of an episode's end says of its label, and what is late and due now.

        That is a list of environment, and number of the episode with its label.
        """
        number, delay = int(self.count[1]), self.labels.delay
        self.count[1] += 1
        if not delay:
            return ({} if label == NO_LABEL else {"label": names[label]}), []
        place = number % delay
        (at, late), self.waiting[place] = self.waiting[place].tolist(), (env, label)
        due = [] if late == NO_LABEL else [(at, (number - delay, names[late]))]
        return {"episode_id": number}, due

    def get_state(self) -> dict[str, NDArray[Any]]:
        """All that decides the future, as arrays."""
        words = self.rng.bit_generator.state["state"]["state"].astype("<u8").view("<i8")
        return {"count": self.count.copy(), "random": words, "waiting": self.waiting.copy()}

    def set_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from a state of `get_state`; `ValueError` if it cannot be one."""
        like = self.get_state()
        found = {name: (x.dtype, x.shape) for name, x in state.items()}
        if found != {name: (x.dtype, x.shape) for name, x in like.items()}:
            raise ValueError(f"expected an overseer's state of {list(like)}, got {list(found)}")
        waiting, count = state["waiting"], state["count"]
        fits = (waiting >= NO_LABEL).all() and (waiting[:, 1:] < self.behaviors).all()
        if not (fits and (count >= 0).all()):
            raise ValueError("no overseer can be in such a state")
        self.count, self.waiting = count.copy(), waiting.copy()
        kept = self.rng.bit_generator.state
        kept["state"]["state"] = state["random"].astype("<i8").view("<u8")
        self.rng.bit_generator.state = kept


BehaviorFn = Callable[[gym.Env[Any, Any], Any, float, bool, bool, dict[str, Any]], str | None]
"""(environment, last observation, last reward, terminated, truncated, info) -> behavior or None."""


class OversightLabels(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """An environment whose episodes are told apart by behavior and labeled now and then.

    Each behavior is watched in an episode with the given probability, independently, drawn at its
    start; an episode that ends in a watched behavior is labeled, as the overseer does.

    Args:
        env: any environment.
        behavior_fn: tells at an episode's end which behavior it was, None if none of them.
        oversight_probability: chance that a behavior is watched in an episode.
        behaviors: names of the behaviors, the wanted one first.
        flags_visible: whether the observation, then a vector of numbers, ends with a number for
            each behavior: 1 where it is watched, else 0. So the agent can tell when it is watched.
            The attribute `flags` then says which entries of an observation these are.
        overseer: a name in the table of overseers, settings of `Labels`, or such. Late labels come
            as the protocol has it, in `info["late_labels"]`.

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
        overseer: str | Mapping[str, Any] | Labels = "uniform",
    ) -> None:
        RecordConstructorArgs.__init__(
            self,
            behavior_fn=behavior_fn,
            oversight_probability=oversight_probability,
            behaviors=behaviors,
            flags_visible=flags_visible,
            overseer=overseer,
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
        self.labels = as_labels(overseer, len(behaviors), ("region", "near", "asks"))
        self._desk = self._new_desk(None)
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
            self._desk = self._new_desk([seed, 2])
        chances = [self.oversight * rate(self.labels.shares, b) for b in range(len(self.behaviors))]
        self._watched = self._generator.random(len(self.behaviors)) < chances
        observation, info = self.env.reset(seed=seed, options=options)
        return self._shown(observation), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            behavior = self.behavior_fn(
                self.env, observation, float(reward), terminated, truncated, info
            )
            info = info | {"behavior": behavior} | self._said(behavior)
        return self._shown(observation), reward, terminated, truncated, info

    def _new_desk(self, seed: Any) -> Desk:
        return Desk(self.labels, len(self.behaviors), self.oversight, seed)

    def _said(self, behavior: str | None) -> dict[str, Any]:
        """What the overseer adds to the info of an episode's end."""
        label = NO_LABEL
        if behavior is not None:
            what = "what behavior_fn returns, where it is not None,"
            index = behavior_index(behavior, self.behaviors, what)
            watched = bool(self._watched[index])
            plain = self.labels.clean
            label = (index if watched else NO_LABEL) if plain else self._desk.label(index, watched)
        own, due = self._desk.told(0, label, self.behaviors)
        return own | ({"late_labels": [late for _, late in due]} if due else {})

    def _shown(self, observation: Any) -> Any:
        if not self.flags_visible:
            return observation
        return np.append(observation, self._watched).astype(np.float32)
