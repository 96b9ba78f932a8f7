"""Labels as an overseer gives them, of episodes as they end: missing, wrong, afforded, late."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from oversight_rl.envs.labels import Desk, behavior_index
from oversight_rl.envs.overseers import Labels
from oversight_rl.envs.settings import NO_LABEL, UserError

OWN = "overseer_"  # of the names in a state


class Overseen(VecEnvWrapper):
    """Environments whose labels an overseer gives, in place of those that flags give.

    Args:
        venv: environments of the protocol, which name their `behaviors`.
        labels: of the overseer. Which endings are flagged, the environments have decided.
        oversight: the level of oversight.
        seed: of what goes missing and wrong.

    Raises:
        UserError: endings are to be chosen by chance or a learner, which needs the whole window.
    """

    def __init__(self, venv: VecEnv, labels: Labels, oversight: float, seed: int) -> None:
        super().__init__(venv)
        if labels.asks != "nobody":
            raise UserError(
                f"labels.asks: {labels.asks} needs --algo reinforce; without it, labels.tied false "
                "labels a random share of endings until labels.budget is spent"
            )
        self.behaviors: Sequence[str] = venv.get_attr("behaviors")[0]
        self.desk = Desk(labels, len(self.behaviors), oversight, seed)
        # learners see whether there is one; what waits for late labels, they do not save
        if hasattr(venv, "get_state") and not labels.delay:
            self.get_state, self.set_state = self._get_state, self._set_state

    def __getattr__(self, name: str) -> Any:
        if name in ("get_state", "set_state"):  # those of the environments are not all there is
            raise AttributeError(f"environments whose labels are late have no {name}")
        return super().__getattr__(name)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name == "labels":
            return [self.desk.labels for _ in self.venv._get_indices(indices)]
        return self.venv.get_attr(attr_name, indices)

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = self.venv.step_wait()
        for env in np.flatnonzero(dones).tolist():
            info, label = infos[env], NO_LABEL
            behavior = info.get("behavior")
            if behavior is not None:
                index = behavior_index(behavior, self.behaviors, "info['behavior']")
                watched = info.pop("label", None) is not None
                label = self.desk.label(index, watched, info.get("distance"))
            own, due = self.desk.told(env, label, self.behaviors)
            info.update(own)
            for at, late in due:
                infos[at].setdefault("late_labels", []).append(late)
        return observations, rewards, dones, infos

    def _get_state(self) -> dict[str, NDArray[Any]]:
        own = {f"{OWN}{name}": value for name, value in self.desk.get_state().items()}
        return self.venv.get_state() | own  # type: ignore[attr-defined, no-any-return]

    def _set_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        own = {name for name in state if name.startswith(OWN)}
        theirs = {name: value for name, value in state.items() if name not in own}
        self.desk.set_state({name.removeprefix(OWN): state[name] for name in own})
        self.venv.set_state(theirs)  # type: ignore[attr-defined]
