"""Policies and how they learn.

What works with Stable-Baselines3 is imported when first asked for: SB3 takes a while to load.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.callbacks import SteeredEvalCallback
    from agents.ppo import MoEPolicy, RoutedPPO

__all__ = ["MoEPolicy", "RoutedPPO", "SteeredEvalCallback"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = "agents.callbacks" if name == "SteeredEvalCallback" else "agents.ppo"
        return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
