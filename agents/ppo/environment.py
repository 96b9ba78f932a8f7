"""What an environment declares of its behaviors, its overseer and its reward."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.vec_env import (
    VecEnv,
    VecFrameStack,
    VecTransposeImage,
    is_vecenv_wrapped,
    unwrap_vec_wrapper,
)

from oversight_rl.agents.methods import METHODS
from oversight_rl.agents.ppo.observations import flags_in_axes_of
from oversight_rl.agents.steering import KEPT, MIXTURE
from oversight_rl.envs.labels import distinct_names
from oversight_rl.envs.overseers import Labels
from oversight_rl.envs.readable import said
from oversight_rl.envs.vector import make_vec

RESERVED = (MIXTURE.name, KEPT, "single")  # names of policies
ASKED = (
    "behaviors", "oversight", "labels", "flags", "flags_visible", "has_task", "left_out",
)  # fmt: skip
"""Attributes of an environment that a model looks at."""


class Declared(NamedTuple):
    """What an environment declares; None where it has no such attribute."""

    behaviors: tuple[str, ...] | None
    oversight: float | None
    labels: Labels  # of its overseer
    flags: Any  # in the axes that the policy sees; None where the method has no use for them
    has_task: bool
    left_out: tuple[str, ...]


def ppo_methods() -> list[str]:
    """Names of the methods that PPO can follow."""
    return [name for name, method in METHODS.items() if method.any_environment]


def policy_arguments(
    method_name: str,
    behaviors: Sequence[str],
    experts: int | None,
    flags: Any,
    task: bool,
    soloists: int | None = None,
) -> dict[str, Any]:
    """What a policy is made with, as follows from its method and environment.

    Where experts act by themselves, so many do, or (None) those of all behaviors.

    Raises:
        ValueError: there are fewer experts (None: one for each behavior) than behaviors.
    """
    method = METHODS[method_name]
    experts = max(2, len(behaviors)) if experts is None else experts
    if method.policy.experts == "one":
        experts = 1
    elif experts < len(behaviors):
        raise ValueError(f"experts must be at least {len(behaviors)}, got {experts}")
    own: dict[str, Any] = {
        "behaviors": tuple(behaviors),
        "gate": method.policy.gate,
        "lessons": method.lessons,
    }
    own |= {"flags": flags} if looks_for_flags(method_name) else {}
    alone = len(behaviors) if soloists is None else soloists
    own |= {"soloists": alone if "acts_alone" in method.lessons else 0}
    return own | {"experts": experts, "task": task}


def looks_for_flags(method_name: str) -> bool:
    """Whether a method has a reward model that does not look at flags, and so must know them."""
    method = METHODS[method_name]
    return "reward_model" in method.lessons and method.reward_model == "told"


def ask(env: VecEnv, method_name: str, before: Sequence[str], made: Mapping[str, Any]) -> Declared:
    """What an environment declares of behaviors, oversight and its reward, for a method.

    Args:
        env: the environment.
        method_name: of the method.
        before: behaviors of the environment before, if there was one that named any.
        made: arguments of the policy, as far as there is one.

    Raises:
        ValueError: it says what cannot be, or does not fit the method or the policy.
    """
    declared: dict[str, Any] = {}
    for name in ASKED:
        values = said(env, name) or [None]
        if not all(_same(values[0], value) for value in values[1:]):
            raise ValueError(f"the environments of one model must agree in their {name}")
        declared[name] = values[0]
    behaviors, method = declared["behaviors"], METHODS[method_name]
    if behaviors is not None:
        behaviors = checked_behaviors(behaviors, "the environment's behaviors")
    known = tuple(before or made.get("behaviors", ()))  # a zip has lists
    if behaviors and known and behaviors != known:
        raise ValueError(
            f"the environment's behaviors are {', '.join(behaviors)}; the model was made for "
            f"{', '.join(known)}, in this order"
        )
    flags = None
    if looks_for_flags(method_name):
        flags = _checked_flags(env, declared["flags"], made)
    level, labels = declared["oversight"], declared["labels"]
    number = isinstance(level, int | float | np.number) and not isinstance(level, bool)
    if level is not None and not (number and 0 <= level <= 1):
        raise ValueError(f"the environment's oversight must lie in [0, 1], got {level!r}")
    labels = labels if isinstance(labels, Labels) else Labels()  # others' may be anything
    if method.policy.hides_flags and declared["flags_visible"] is not False:
        raise ValueError(
            f"method {method_name} is for environments that hide their flags from the policy "
            "(an attribute flags_visible that is False)"
        )
    if declared["oversight"] is None and method.table.labels == "audit":
        raise ValueError(
            f"method {method_name} needs to know the share of episodes that it may look at: "
            "give the environment an attribute oversight"
        )
    task = True if declared["has_task"] is None else declared["has_task"]
    if not isinstance(task, bool | np.bool_):
        raise ValueError(f"the environment's has_task must be True or False, got {task!r}")
    if "behaviors" in made and task != made.get("task", False):
        was = f"the environment's has_task is {task}; the model was made for {not task}"
        if "task" not in made:
            was = "a model of version 0.1 had no task part"
            was += ": load it without env to act, or train one anew"
        raise ValueError(was)
    about = {"behaviors": behaviors, "flags": flags, "has_task": bool(task)}
    left_out = tuple(declared["left_out"] or ())
    return Declared(**about, oversight=level, labels=labels, left_out=left_out)


def made(
    env: Any, n_envs: int, method: str, oversight: float | None, env_kwargs: dict[str, Any] | None
) -> Any:
    """An environment, made if only its id is given.

    Raises:
        ValueError: it is made already, and what it should be made with is given.
    """
    if isinstance(env, str):
        level = {} if oversight is None else {"oversight": oversight}
        hides = {"flags_visible": False} if METHODS[method].policy.hides_flags else {}
        return make_vec(env, n_envs, **{**(env_kwargs or {}), **level, **hides})
    if oversight is not None or env_kwargs:
        raise ValueError(
            "oversight and env_kwargs are for environments made from their id; give them to "
            "the environment itself, or to OversightLabels"
        )
    return env


def _checked_flags(env: VecEnv, flags: Any, made: Mapping[str, Any]) -> Any:
    """An environment's flags, in the axes that the policy sees."""
    if flags is not None:
        turned = is_vecenv_wrapped(env, VecTransposeImage)
        stack = unwrap_vec_wrapper(env, VecFrameStack)
        stacked = stack.stacked_obs.n_stack if stack else 1
        flags = flags_in_axes_of(env.observation_space, flags, turned, stacked)
    if "behaviors" in made and not _same(flags, made.get("flags")):
        raise ValueError(
            "the environment's flags are not those that the reward model was taught without"
        )
    return flags


def checked_behaviors(names: Any, whose: str = "behaviors") -> tuple[str, ...]:
    """The names of behaviors as a tuple.

    Raises:
        ValueError: they are not two or more distinct names, or cannot be steered to.
    """
    found = distinct_names(names, whose)
    for name in found:
        if name in RESERVED or name.startswith(("without:", "expert_")) or set("=,") & set(name):
            raise ValueError(f"{whose}: {name!r} would mean something else when steering")
    return found


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two things that environments say are the same; arrays among them."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_same(ours[k], theirs[k]) for k in ours)
    return type(ours) is type(theirs) and bool(np.array_equal(ours, theirs))
