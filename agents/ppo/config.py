"""Settings of the PPO learner, apart from it so that reading them does not load SB3."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from oversight_rl.agents.settings import NonNegative, Schedule
from oversight_rl.envs.settings import Settings, UserError

DEFAULT_METHOD = "imputed_routing"
"""The one that works in the most environments. Plain routing, the paper's method, needs a gate that
tells the behaviors apart before the experts have learned them."""
LABEL_REACH = 256
"""Steps before a rollout's end that its labels reach, by default."""
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
    label_reach: int = Field(LABEL_REACH, ge=0, le=2**12)
    """Steps before a rollout's end that its labels reach; a step waits for its label so long."""
    contrast_coef: NonNegative = 1.0
    """Weight of the contrast loss, for the methods that have one."""
    solo_share: float = Field(0.75, ge=0, lt=1)
    """Share of the episodes in which the deployed expert acts by itself, with imputed_routing."""
    task_weight: NonNegative = 0.5
    """How much one spread of the task's advantage (of the environment's reward) counts next to one
    of the behavior's, in an environment whose reward is a task's own."""
    labeled_weight: float = Field(20.0, gt=0)
    """Weight of a labeled episode's samples next to any other's."""

    @model_validator(mode="after")
    def _fits_memory(self) -> Self:
        if self.worlds * self.steps > MOST_SAMPLES:
            raise UserError(
                f"ppo: worlds times steps must be at most {MOST_SAMPLES:,}, got "
                f"{self.worlds * self.steps:,}"
            )
        return self
