"""Warnings, once of each cause, of data from which little can be learned."""

import warnings
from collections.abc import Sequence

from oversight_rl.agents.methods import UNFINISHED
from oversight_rl.agents.ppo.buffer import RoutedRolloutBuffer
from oversight_rl.agents.ppo.held import LateLabel
from oversight_rl.agents.ppo.targets import Experience
from oversight_rl.envs.settings import NO_LABEL

FIRST_ROLLOUTS, PATIENCE = 2, 20
"""Rollouts, and episodes in them, without a single label after which a warning is due, if the level
is not known."""
SURPRISE = 1e-6
"""Chance of as many episodes without a label below which it is due, if the level is known."""


class DataWarnings:
    """What a model has been warned of."""

    def __init__(self) -> None:
        self.given: set[str] = set()
        self.rollouts = 0

    def of_texts(self, left_out: Sequence[str]) -> None:
        """Of entries of observations that are not read."""
        if left_out:
            self._warn(
                "texts",
                f"{', '.join(map(repr, left_out))} is left out of the observations: it is a text, "
                "and no network here reads any",
            )

    def of_labels(self, buffer: RoutedRolloutBuffer, level: float | None) -> None:
        """Of labels that do not come, at this level if it is known, or say too little.

        To be called once a rollout.
        """
        self.rollouts += 1
        missing = buffer.episodes >= PATIENCE and self.rollouts >= FIRST_ROLLOUTS
        if level is not None:
            missing = (1 - level) ** buffer.episodes < SURPRISE
        if missing and not buffer.labels:
            known = (buffer.truth != NO_LABEL).any()
            unknown = "; an attribute oversight says how often to expect one"
            self._warn(
                "unlabeled",
                f"none of {buffer.episodes:,} episodes was labeled: at their ends info says "
                f"{'a behavior and no label' if known else 'neither label nor behavior'}. Does the "
                "environment put 'label' there where an overseer saw the episode, and does every "
                "wrapper pass info on? OversightLabels does it for any environment"
                f"{unknown if level is None else ''}",
            )
        if buffer.labels > buffer.explained:
            self._warn(
                "unexplained",
                "episodes were labeled that had no 'behavior' in info: evaluation and oracle "
                "methods will not know what they were",
            )

    def of_reach(self, x: Experience, reach: int) -> None:
        """Of labels that reach too few steps, in a method that asks for them."""
        acted = x.due & ~x.steps.alone
        beyond = float((x.outcome[acted] == UNFINISHED).mean()) if acted.any() else 0.0
        if beyond > 0.5:
            self._warn(
                "unfinished",
                f"{beyond:.0%} of the steps learned from are of episodes whose end, and label, is "
                f"more than {reach} steps away: let label_reach be longer",
            )

    def of_lost(self, missed: Sequence[LateLabel], reach: int) -> None:
        """Of late labels whose episode is not kept."""
        if missed:
            label = missed[0]
            self._warn(
                "late",
                f"a late label is lost, of episode {label.episode!r} of environment "
                f"{label.environment}: either no episode ended with this info['episode_id'] there, "
                f"or it had its label, or it was more than label_reach = {reach} steps ago",
            )

    def of_useless(self, method: str) -> None:
        """Of late labels, in a method that does not ask for them."""
        self._warn(
            "late for nothing",
            f"method {method} learns nothing from labels that come late: its rewards are paid when "
            "an episode ends",
        )

    def _warn(self, cause: str, text: str) -> None:
        if cause not in self.given:
            self.given.add(cause)
            warnings.warn(text, UserWarning, stacklevel=4)
