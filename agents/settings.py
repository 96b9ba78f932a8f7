"""Settings of the networks and of REINFORCE, apart from what learns: they load no torch."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from oversight_rl.envs.settings import Settings, as_sequence

Sizes = Annotated[
    tuple[Annotated[int, Field(ge=1, le=2**14)], ...],
    BeforeValidator(as_sequence),
    Field(min_length=1),
]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Schedule = Annotated[
    tuple[NonNegative, ...], BeforeValidator(as_sequence), Field(min_length=1, max_length=2)
]
"""One number: constant; two: linear from the first update to the last."""


def at(schedule: tuple[float, ...], progress: float) -> float:
    """Value of a schedule at `progress` in [0, 1]."""
    return schedule[0] + (schedule[-1] - schedule[0]) * progress


class AgentConfig(Settings):
    """The networks."""

    section: ClassVar[str] = "agent"

    experts: int = Field(2, ge=2, le=64)
    """Number of experts K of the methods that mix; the first is the diamond's, the second the
    ghost's, further ones learn from unlabeled episodes only."""
    hidden: Sizes = (128, 128)
    """Units of each hidden layer of the experts, the gate and the value net; 64 64 is the default
    with --algo ppo."""
    value_activation: Literal["relu", "none"] = "relu"
    """Activation of the value net; "none" makes it affine, as in the published code."""
    gate_conv: bool = False
    """Whether the gate starts with a 1x1 convolution over the planes, as in the published code."""
    biases: Literal["uniform", "zero"] = "uniform"
    """What biases begin as; "zero", as in the published code, keeps the experts balanced longer."""


class ReinforceConfig(Settings):
    """The learner. A schedule is one number (constant) or two (linear, first to last update)."""

    section: ClassVar[str] = "reinforce"

    updates: int = Field(400, ge=1, le=2**31)
    """Number of updates."""
    worlds: int = Field(256, ge=1, le=2**20)
    """Worlds N stepped in parallel by each run."""
    steps: int = Field(16, ge=1, le=2**16)
    """Steps T of each world per update."""
    learning_rate: Schedule = (3e-3, 1e-4)
    """Adam step size."""
    discount: float = Field(0.97, gt=0, le=1)
    """Discount per step, of training and of every reported return."""
    value_coef: Schedule = (0.5,)
    """Weight of the value loss."""
    entropy_coef: Schedule = (0.01, 0.0005)
    """Weight of the entropy bonus."""
    gate_coef: Schedule = (1.0,)
    """Weight of the gate loss."""
    gate_replay: int = Field(1024, ge=0)
    """Remembered labeled samples that the gate learns from in each update; 0, as published: those
    of the update's own window."""
    contrast_coef: Schedule = (0.3,)
    """Weight of the contrast loss, for the methods that have one."""
    solo_share: float = Field(0.9, ge=0, lt=1)
    """Share of the worlds in which experts act by themselves, for the methods that have them do so;
    each in as many."""
    reward_model_sees_flags: bool = False
    """Whether a reward model looks at the flags too."""
    labeled_weight: Schedule = (20.0,)
    """Weight of a labeled episode's samples next to any other's in the policy and value losses;
    1 as published."""
    bootstrap: bool = True
    """Whether the return of an episode cut by the window's end goes on with its value estimate;
    false, as published, treats it as 0."""
