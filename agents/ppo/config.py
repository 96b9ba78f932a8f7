"""Settings of the PPO learner, apart from it so that reading them does not load SB3."""

import math
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from oversight_rl.agents.settings import NonNegative, Schedule
from oversight_rl.envs.overseers import Rates
from oversight_rl.envs.settings import Settings, UserError

DEFAULT_METHOD = "imputed_routing"
"""The one that works in the most environments. Plain routing, the paper's method, needs a gate that
tells the behaviors apart before the experts have learned them."""
HIDDEN = (64, 64)
"""Units of each hidden layer, where they are not given."""
ROLLOUT = 2048
"""Samples of a rollout at least, unless its steps are given: few environments need long ones."""
MINIBATCHES, LEAST_MINIBATCH = 4, 64
"""Of a rollout at most, and samples in each at least, unless their size is given."""
MOST_SAMPLES = 2**24  # of a rollout, which is kept in memory


class PPOConfig(Settings):
    """The PPO learner. A schedule is one number (constant) or two (linear, first to last)."""

    section: ClassVar[str] = "ppo"

    updates: int = Field(250, ge=1, le=2**31)
    """Number of updates, of one rollout each."""
    worlds: int = Field(128, ge=1, le=2**16)
    """Environments N stepped in parallel."""
    steps: int = Field(32, ge=2, le=2**16)
    """Steps T of each environment per update."""
    batch_size: int = Field(2048, ge=2)
    """Samples of a minibatch."""
    epochs: int = Field(2, ge=1)
    """Passes over the rollout in an update."""
    learning_rate: Schedule = (3e-3, 1e-4)
    """Adam step size."""
    discount: float = Field(0.97, gt=0, le=1)
    """Discount per step, of training and of every reported return."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """Lambda of generalized advantage estimation."""
    clip_range: float = Field(0.2, gt=0)
    """How far the ratio of new to old policy counts."""
    value_coef: NonNegative = 0.5
    """Weight of the value loss."""
    entropy_coef: NonNegative = 0.02
    """Weight of the entropy bonus."""
    gate_coef: NonNegative = 1.0
    """Weight of the gate loss."""
    gate_replay: int = Field(512, ge=0)
    """Remembered labeled observations that the gate learns from in each minibatch."""
    label_reach: int = Field(256, ge=0, le=2**16)
    """Steps before a rollout's end that its labels reach; a step waits for its label so long."""
    contrast_coef: NonNegative = 2.0
    """Weight of the contrast loss, for the methods that have one."""
    solo_share: float = Field(0.75, ge=0, lt=1)
    """Share of the episodes in which experts act by themselves, in turn, with imputed_routing."""
    task_weight: NonNegative = 0.5
    """How much one spread of the task's advantage (of the environment's reward) counts next to one
    of the behavior's, in an environment whose reward is a task's own."""
    labeled_weight: float = Field(20.0, gt=0, allow_inf_nan=False)
    """Weight of a labeled episode's samples next to any other's."""

    @model_validator(mode="after")
    def _fits_memory(self) -> Self:
        if self.worlds * self.steps > MOST_SAMPLES:
            raise UserError(
                f"ppo: worlds times steps must be at most {MOST_SAMPLES:,}, got "
                f"{self.worlds * self.steps:,}"
            )
        return self


class RoutedPPOArguments(PPOConfig):
    """What `RoutedPPO` takes besides what SB3's PPO does: numbers in the ranges of the settings."""

    section: ClassVar[str] = ""

    label_recall: Rates = (1.0,)
    """Chance that an ending which should be labeled is, of all or by behavior."""
    label_error: Rates = (0.0,)
    """Chance that a label names a wrong behavior, of all or by behavior."""
    threads: int | None = Field(1, ge=1)
    """Of PyTorch, while it learns; None leaves them as they are."""

    @classmethod
    def checked(cls, **arguments: Any) -> dict[str, Any]:
        """Arguments by name, as numbers.

        Raises:
            ValueError: one is out of its range.
        """
        plain = {name: x.item() if hasattr(x, "item") else x for name, x in arguments.items()}
        try:
            made = cls(**plain)
        except UserError as error:
            raise ValueError(str(error)) from None
        return {name: getattr(made, name) for name in arguments}


def rollout_sizes(envs: int, n_steps: int | None = None, **_: Any) -> dict[str, int]:
    """Steps and minibatches of a rollout, if they are not given."""
    if n_steps is None:
        n_steps = max(32, math.ceil(ROLLOUT / MINIBATCHES / envs) * MINIBATCHES)
    size = n_steps * envs
    fitting = [  # as many as are alike and not too small
        parts
        for parts in range(1, MINIBATCHES + 1)
        if parts == 1 or (size % parts == 0 and size >= parts * LEAST_MINIBATCH)
    ]
    return {"n_steps": n_steps, "batch_size": size // fitting[-1]}
