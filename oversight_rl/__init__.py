"""Experiments on scalable oversight: configs, training runs, steering, evaluation.

For code of one's own: `from oversight_rl import RoutedPPO, OversightLabels, load_policy`; these are
imported when first asked for, since Stable-Baselines3 takes a while to load.
"""

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oversight_rl.agents.ppo.algorithm import RoutedPPO
    from oversight_rl.agents.ppo.callbacks import SteeredEvalCallback
    from oversight_rl.agents.ppo.policy import MoEPolicy
    from oversight_rl.envs.labels import OversightLabels
    from oversight_rl.experiments.oversight.policies import load_policy

_MODULES = {
    "MoEPolicy": "agents.ppo.policy",
    "OversightLabels": "envs.labels",
    "RoutedPPO": "agents.ppo.algorithm",
    "SteeredEvalCallback": "agents.ppo.callbacks",
    "load_policy": "experiments.oversight.policies",
}
__all__ = ["MoEPolicy", "OversightLabels", "RoutedPPO", "SteeredEvalCallback", "load_policy"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return resolve_name(f"oversight_rl.{_MODULES[name]}:{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
