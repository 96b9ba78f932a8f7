"""Policies and how they learn.

What works with Stable-Baselines3 is imported when first asked for: SB3 takes a while to load.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oversight_rl.agents.ppo.algorithm import RoutedPPO
    from oversight_rl.agents.ppo.callbacks import SteeredEvalCallback
    from oversight_rl.agents.ppo.policy import MoEPolicy

_MODULES = {"MoEPolicy": "policy", "RoutedPPO": "algorithm", "SteeredEvalCallback": "callbacks"}
__all__ = ["MoEPolicy", "RoutedPPO", "SteeredEvalCallback"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"oversight_rl.agents.ppo.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "agents":  # imported by the folder's own name, in a checkout
    from oversight_rl.aliases import same_as_ours

    same_as_ours(__name__)
