"""Gradient routing for any network: which data may update which part of it.

It needs torch and nothing else of ours; docs/routing.md is its page. The names below are imported
when first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oversight_rl.agents.routing.evaluation import certify, leakage, precision_recall, relearn
    from oversight_rl.agents.routing.primitive import lookup, route
    from oversight_rl.agents.routing.regions import Region, Rule
    from oversight_rl.agents.routing.router import Router
    from oversight_rl.agents.routing.surgery import expand, merge

_MODULES = {
    "Region": "regions",
    "Router": "router",
    "Rule": "regions",
    "certify": "evaluation",
    "expand": "surgery",
    "leakage": "evaluation",
    "lookup": "primitive",
    "merge": "surgery",
    "precision_recall": "evaluation",
    "relearn": "evaluation",
    "route": "primitive",
}
__all__ = [
    "Region",
    "Router",
    "Rule",
    "certify",
    "expand",
    "leakage",
    "lookup",
    "merge",
    "precision_recall",
    "relearn",
    "route",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
