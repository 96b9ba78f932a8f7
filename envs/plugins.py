"""Environments that installed packages declare, under the entry points `gymnasium.envs`.

Gymnasium before 1.1 called these when it was imported; since then whoever wants them does.
"""

from __future__ import annotations

import traceback
import warnings
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

import gymnasium as gym
from gymnasium.envs import registration

from oversight_rl.envs.settings import UserError, nearest

GROUP = "gymnasium.envs"
ROOT = ("__root__", "__internal__")  # names of entry points whose ids have no namespace


def find_spec(env_id: str) -> registration.EnvSpec:
    """What is registered under an id, by us, by Gymnasium or by any installed package.

    Packages are asked if the id is not known without them, for they may take long to load. One
    that cannot be loaded is warned of; where the id is not found, it may be the one to blame.

    Raises:
        UserError: the id is unknown.
    """
    broken = {} if env_id in gym.registry else register_plugins()
    why = "; ".join(f"{name} could not be loaded ({error})" for name, error in broken.items())
    try:
        spec = gym.spec(env_id)
    except gym.error.Error:
        hint = nearest(env_id, gym.registry)
        raise UserError(f"no environment {env_id!r}{hint}{f'; {why}' if why else ''}") from None
    if why:
        warnings.warn(why, stacklevel=2)
    return spec


@cache
def register_plugins() -> dict[str, str]:
    """Call what packages declare, once in a process.

    Returns:
        Why it failed, by what was declared, where it did.
    """
    broken = {}
    for plugin in entry_points(group=GROUP):
        before = registration.current_namespace
        registration.current_namespace = None if plugin.name in ROOT else plugin.name
        try:
            with warnings.catch_warnings():  # ids that were registered by an import before
                warnings.filterwarnings("ignore", ".*Overriding environment")
                register = plugin.load()
                if callable(register):  # else a module, whose import was all
                    register()
        except Exception as error:  # whatever a stranger's code raises
            broken[f"{GROUP} of {plugin.dist.name if plugin.dist else plugin.value}"] = why(error)
        finally:
            registration.current_namespace = before
    return broken


def why(error: BaseException) -> str:
    """What a stranger's code raised, and where, in one line."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(*Path(last.filename).parts[-2:])}:{last.lineno}"
    said = f"{type(error).__name__}: {error}".removesuffix(": ")
    return f"{said}, {where}"
