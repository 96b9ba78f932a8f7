"""Policies and how they learn.

`RoutedPPO` and `MoEPolicy` are imported when first asked for: SB3 takes a while to load.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.ppo import MoEPolicy, RoutedPPO

__all__ = ["MoEPolicy", "RoutedPPO"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from agents import ppo

        return getattr(ppo, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
