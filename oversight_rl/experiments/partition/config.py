"""The settings of the partition experiments."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, field_validator

from oversight_rl.agents.settings import NonNegative, Schedule, Sizes
from oversight_rl.envs.settings import Settings, UserError
from oversight_rl.settings import EvaluationConfig, Probability, RunConfig

DIGITS = "digits"
MOST_CLASS = 255  # of an idx file
_CLASSES = re.compile(r"([0-9]{1,3})(?:-([0-9]{1,3}))?")


def classes(group: str) -> frozenset[int]:
    """The classes of a group: `0-4`, or `0,2,7-9`."""
    found: set[int] = set()
    for part in group.split(","):
        match = _CLASSES.fullmatch(part.strip())
        first = int(match[1]) if match else 0
        last = int(match[2] or first) if match else -1
        if not first <= last <= MOST_CLASS:
            raise ValueError(f"must be classes like 0-4 or 0,2,7-9, up to {MOST_CLASS}")
        found |= set(range(first, last + 1))
    return frozenset(found)


class PartitionSettings(Settings):
    """The learner. A schedule is one number (constant) or two (linear, first to last update)."""

    section: ClassVar[str] = "partition"

    updates: int = Field(2000, ge=1, le=2**31)
    """Number of updates."""
    batch_size: int = Field(128, ge=2, le=2**20)
    """Images of an update."""
    learning_rate: Schedule = (2e-3, 1e-4)
    """Adam step size."""
    hidden: Sizes = (256, 128)
    """Units of each hidden layer of the encoder; the decoder has them the other way round."""
    code: int = Field(16, ge=1, le=2**14)
    """Units of each part of the code."""
    sparsity: NonNegative = 3e-3
    """Weight of the sum of the code's sizes (L1); with 0, routed codes grow without bound."""
    sparsity_ramp: Probability = 0.33
    """Share of training in which that weight rises from 0."""
    correlation: NonNegative = 0.1
    """Weight of the mean size of correlations between units of different parts."""
    certificate_steps: int = Field(1000, ge=1, le=10**6)
    """Training steps of the fresh decoders that say what is in a part; a quarter of them while
    training goes on."""


Groups = Annotated[
    tuple[Annotated[str, BeforeValidator(str)], ...], Field(min_length=2, max_length=64)
]


class PartitionConfig(RunConfig):
    """A run: an autoencoder whose code has a part for each group of classes."""

    algo: str = "partition"
    """What to train: partition, a split autoencoder."""
    method: str = "routed"
    """What to train it with: routed, not_routed, separate_decoders or one_group_routed."""
    oversight: Probability = 1.0
    """Share of the images whose class is known in training; the others update every part."""
    data: str = DIGITS
    """The digits that scikit-learn has, or a folder of idx files: train-images..., train-labels...
    and, if there are any, t10k-images... and t10k-labels..., gzipped or not."""
    groups: Groups = ("0-4", "5-9")
    """Classes that each part is for, like 0-4 or 0,2,7-9; images of others are left out."""
    partition: PartitionSettings = PartitionSettings()
    evaluation: EvaluationConfig = EvaluationConfig(every=2000)

    @field_validator("groups")
    @classmethod
    def _distinct_classes(cls, groups: tuple[str, ...]) -> tuple[str, ...]:
        sets = [classes(group) for group in groups]
        if sum(map(len, sets)) > len(frozenset.union(*sets)):
            raise ValueError("no class may be in two groups")
        return groups

    def refuse_unused(self) -> None:
        used = EvaluationConfig(every=self.evaluation.every)
        if self.evaluation != used:
            raise UserError("evaluation: of a partition, there is nothing to set but every")
