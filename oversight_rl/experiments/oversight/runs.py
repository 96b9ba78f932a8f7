"""What all oversight experiments share: figures, steered policies, tables and their words."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, cast

from torch import Tensor, nn

from oversight_rl.agents.methods import METHODS
from oversight_rl.agents.networks import Agent
from oversight_rl.agents.steering import Steering, standard, steering_curve
from oversight_rl.envs.overseers import OVERSEERS
from oversight_rl.envs.settings import BEHAVIORS
from oversight_rl.experiments.oversight.config import Config
from oversight_rl.runs.experiment import Experiment
from oversight_rl.runs.rows import Facts, Row

WINDOW_RETURN = "window_return"  # no other world than the grid has any
ENDS = (*BEHAVIORS, "timeout")
PARTS = ("_flagged", "_on_path")  # endings of the names of figures that are parts of others


class Judge(Protocol):
    """What evaluates and draws the policies of agents, from the configuration of a run."""

    def __init__(self, config: Config, *, exact: bool = True) -> None:
        """If not `exact`, episodes are played even where exact evaluation applies."""

    def tables(
        self,
        agent: Any,
        facts: Sequence[Facts],
        policies: Sequence[Steering],
        levels: Sequence[Sequence[float]],
        paths: bool = False,
    ) -> list[list[Row]]:
        """The table of each run of a stack of agents, see `evaluation.Evaluator.evaluate`."""

    def pictures(self, agent: Any, policies: Sequence[Steering]) -> dict[str, bytes]:
        """PNG and GIF files of an agent's policies, by name."""


class OversightRuns(Experiment):
    """Runs of agents under partial oversight; the subclasses are its learners."""

    score: ClassVar[str] = "ground_truth_return"
    optimum: ClassVar[str | None] = "optimal_return"
    error: ClassVar[str | None] = "return_se"
    methods: ClassVar[Mapping[str, Any]] = METHODS
    looks: ClassVar[str] = "--steer deployed --oversight 0 1"
    report: ClassVar[str] = "oversight_rl.experiments.oversight.figures:REPORT"
    panel: ClassVar[str | None] = "overseer"
    panels: ClassVar[Sequence[str]] = tuple(OVERSEERS)
    charts: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "Deployed": {"return of the deployed policy, and the optimum": "deployed/return$"},
        "Ground truth": {
            "return of each policy": "evaluation/return$",
            **{f"share that ends: {end}": f"evaluation/p_{end}$" for end in ENDS},
        },
        "Training": {
            "endings as seen": "training/endings/.*",
            "gate by outcome": "training/gate/.*",
        },
    }

    judges: ClassVar[type[Judge]]
    """Who evaluates the agents of a run."""

    configs: Sequence[Config]
    judge: Judge

    @classmethod
    def has_page(cls) -> bool:
        return True

    @property
    @abstractmethod
    def agent(self) -> Any:
        """The agents in training."""

    @property
    def deployed(self) -> Any:
        """The agents that are deployed."""
        return self.agent

    @classmethod
    @abstractmethod
    def blank(cls, config: Config) -> nn.Module:
        """An agent as a configuration wants it, to be filled from a file."""

    @classmethod
    def of_one_run(cls, parameter: Tensor) -> Tensor:
        """A parameter of an agent as files have it."""
        return parameter

    @classmethod
    @abstractmethod
    def prefix(cls, config: Config) -> str:
        """What the names of the deployed agent's tensors begin with in a checkpoint."""

    @classmethod
    def names(cls, agent: Any) -> tuple[int, Sequence[str]]:
        """Number of experts, and the behaviors that the first are meant for."""
        return agent.n_experts, BEHAVIORS

    @classmethod
    @abstractmethod
    def policy(cls, agent: Any, steering: Steering) -> Any:
        """An agent under a steering, which predicts."""

    @classmethod
    def networks(cls, agent: Any) -> Agent:
        """The experts, gate and value net of an agent."""
        return cast(Agent, agent)

    def evaluate(self, facts: Sequence[Facts]) -> list[list[Row]]:
        levels = [[config.oversight] for config in self.configs]
        return self.judge.tables(self.agent, facts, standard(*self.names(self.agent)), levels)

    def final(self, facts: Sequence[Facts]) -> list[list[Row]]:
        agent, names = self.deployed, self.names(self.deployed)
        policies = standard(*names)
        policies += [policy.with_options(greedy=True) for policy in policies]
        levels = [sorted({c.oversight, *c.evaluation.oversight}) for c in self.configs]
        tables = self.judge.tables(agent, facts, policies, levels, paths=True)
        if agent.n_experts > 1:
            own = [[config.oversight] for config in self.configs]
            curves = self.judge.tables(agent, facts, steering_curve(*names), own)
            tables = [rows + curve for rows, curve in zip(tables, curves, strict=True)]
        return tables

    def pictures(self, run: int) -> dict[str, bytes]:
        return self.judge.pictures(self.agent, standard(*self.names(self.agent)))

    @classmethod
    def shown(cls, figures: Sequence[str], details: bool = False) -> dict[str, str]:
        def whole(name: str) -> bool:
            return not any(
                name.endswith(part) and name.removesuffix(part) in figures for part in PARTS
            )

        wanted = {"return": cls.score} | ({"window": WINDOW_RETURN} if details else {})
        wanted |= {name: name for name in figures if name.startswith("p_") and whole(name)}
        wanted["steps"] = "episode_length"
        return {short: name for short, name in wanted.items() if name in figures}

    @classmethod
    def notes(cls, rows: Sequence[Row]) -> list[str]:
        optimum = rows[0].figures["optimal_return"]
        if math.isnan(optimum):
            lines = ["no exact evaluation of this world: figures are from rollouts"]
        else:
            lines = ["return: exact, per episode from a fresh start"]
            lines.append(f"optimum: {optimum:.4f}, of an agent that sees everything")
        if WINDOW_RETURN in rows[0].figures:
            lines.append("window: the published metric, mean discounted return per visited step")
        return lines

    @classmethod
    def describe(cls, config: Any) -> str:
        method = METHODS[config.method]
        kept = "the first expert" if method.policy.experts == "many" else "the only expert"
        return (
            f"**{config.method}**: {method.summary}. It assumes: {method.assumes}. Deployed: "
            f"**{kept}**. Environment: {config.env}.\n\n"
            "* `deployed`: what the deployed policy does\n"
            "* `evaluation/return`: expected discounted ground-truth return per episode of the "
            "mixture and of each expert alone, at the training oversight level, next to the "
            "optimum where it is known (all in one chart under *Custom Scalars*)\n"
            "* `evaluation/p_...`: how episodes of each policy end: in which behavior, or none "
            "(`p_timeout`); `evaluation/steps`: how long they are\n"
            "* `pictures/policies` (grid world): arrows are action probabilities; the color is the "
            "gate, teal where it trusts the diamond expert and violet where the ghost expert\n"
            "* `pictures/rollouts`: each policy at work on the same starts, animated\n"
            "* `training/endings`: how training episodes ended, as the learner saw them\n"
            "* `training/gate`: mean gate weight on the first expert, by the episode's outcome\n"
            "* `training/loss`, `training/env_steps_per_second`"
        )
