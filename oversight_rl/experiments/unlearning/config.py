"""The settings of the unlearning experiments."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, field_validator, model_validator

from oversight_rl.agents.settings import Schedule
from oversight_rl.envs.settings import Settings, UserError
from oversight_rl.settings import EvaluationConfig, Probability, RunConfig


class StoriesConfig(Settings):
    """What is read, by what network, and how it is trained and judged."""

    section: ClassVar[str] = "stories"

    updates: int = Field(800, ge=1, le=2**31)
    """Number of updates."""
    batch: int = Field(16, ge=1, le=2**16)
    """Stories of an update."""
    learning_rate: Schedule = (5e-3, 0.0)
    """AdamW step size: one number (constant) or two (linear, first to last update)."""
    stories: int = Field(20_000, ge=100, le=1_000_000)
    """Stories to train on; a run reads two thirds as many."""
    forget: str = "sea_night"
    """Topic to forget."""
    forget_share: float = Field(0.2, gt=0, lt=1)
    """Share of our stories that are on it; the other topics have equal parts of the rest."""
    texts: Path | None = None
    """Folder of texts of your own in place of the stories, a file TOPIC.txt for each topic."""
    words: int = Field(32, ge=8, le=1024)
    """Words that a piece of these texts has, which then is a story."""
    labeled_first: Probability = 0.5
    """Share of the updates in which methods that begin with labeled stories see no others."""
    layers: int = Field(2, ge=1, le=64)
    """Blocks of the transformer."""
    width: int = Field(48, ge=1, le=4096)
    """Width of its stream."""
    heads: int = Field(4, ge=1, le=64)
    """Attention heads, a divisor of the width."""
    hidden: int = Field(128, ge=1, le=2**14)
    """Hidden units of each MLP."""
    units: int = Field(64, ge=1, le=2**14)
    """Hidden units that are added to each MLP, for what is to be forgotten."""
    rank: int = Field(8, ge=1, le=1024)
    """Rank of the adapters of adapter_routing, which stand in for these units."""
    tune_steps: int = Field(20, ge=0, le=10_000)
    """Steps on 64 retain stories after ablation, the best of which is kept."""
    relearn_steps: int = Field(30, ge=1, le=10_000)
    """Steps of relearning."""
    relearn_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    """Step size of AdamW in these steps, in those of tuning and of unlearning after the fact."""

    @field_validator("texts")
    @classmethod
    def _from_anywhere(cls, texts: Path | None) -> Path | None:
        return None if texts is None else texts.absolute()

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.width % self.heads:
            raise UserError(f"stories.heads: must divide the width {self.width}, got {self.heads}")
        return self


class Config(RunConfig):
    """A training run on stories. Every setting has a flag; a YAML file holds what differs."""

    algo: str = "stories"
    """What to train: a language model on stories."""
    method: str = "routing"
    """What to train it with; see docs/unlearning.md."""
    oversight: Probability = 0.5
    """Share of the stories that is labeled, as one to forget or one to retain."""
    stories: StoriesConfig = StoriesConfig()
    evaluation: EvaluationConfig = EvaluationConfig(every=200)

    def refuse_unused(self) -> None:
        if self.evaluation != EvaluationConfig(every=self.evaluation.every):
            raise UserError("evaluation: only its setting every is used with --algo stories")
        own = StoriesConfig()
        unused, whose = ["words"], "our stories"
        if self.stories.texts is not None:
            unused, whose = ["stories", "forget_share"], "texts of your own"
        for name in unused:
            if getattr(self.stories, name) != getattr(own, name):
                raise UserError(f"stories.{name}: not used with {whose}")
