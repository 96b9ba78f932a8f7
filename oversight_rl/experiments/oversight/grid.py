"""REINFORCE on the diamond/ghost grid: runs train as one stack and are evaluated exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oversight_rl.agents.methods import METHODS
from oversight_rl.agents.networks import Agent, new_agent, take_run
from oversight_rl.agents.reinforce.learner import ReinforceLearner
from oversight_rl.agents.steering import SteeredPolicy, Steering
from oversight_rl.envs import render
from oversight_rl.envs.settings import BEHAVIORS
from oversight_rl.envs.world import World
from oversight_rl.experiments.oversight import pictures
from oversight_rl.experiments.oversight.config import Config
from oversight_rl.experiments.oversight.evaluation import Evaluator
from oversight_rl.experiments.oversight.runs import OversightRuns, deployed_name
from oversight_rl.runs.rows import Facts, Row, deployed_row


class GridJudge:
    """Evaluates and draws agents on the grid.

    Args:
        config: of a run.
        device: where to compute.
    """

    def __init__(self, config: Config, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.evaluator = Evaluator(config.world, config.learner.discount, device, config.episodes)

    def tables(
        self,
        agent: Agent,
        facts: Sequence[Facts],
        policies: Sequence[Steering],
        levels: Sequence[Sequence[float]],
        paths: bool = False,
    ) -> list[list[Row]]:
        deployed = deployed_name((agent.n_experts, BEHAVIORS))
        forward = agent.prepare()
        return self.evaluator.evaluate(forward, facts, policies, levels, deployed, paths)

    def pictures(self, agent: Agent, policies: Sequence[Steering]) -> dict[str, bytes]:
        world = World(self.config.world, self.config.oversight)
        return {
            "policies": render.png(pictures.policies(agent, world, policies)),
            "rollouts": pictures.rollouts(agent, world, policies),
        }


class GridRuns(OversightRuns):
    """Runs of REINFORCE as one stack."""

    def __init__(self, configs: Sequence[Config]) -> None:
        if len({config.stack_key() for config in configs}) != 1:
            raise ValueError("runs of one stack may differ in seed, oversight and method only")
        first, device = configs[0], configs[0].torch_device()
        self.configs = configs
        self.learner: ReinforceLearner = ReinforceLearner(
            first.learner,
            first.agent,
            first.world,
            methods=[config.method for config in configs],
            overseers=[config.overseer for config in configs],
            seeds=[config.seeds[0] for config in configs],
            device=device,
            looks_every=first.evaluation.every,
        )
        self.judge = self.judge_of(first, device)

    @property
    def agent(self) -> Agent:
        return self.learner.agent

    @property
    def deployed(self) -> Agent:
        return self.learner.deployed

    def evaluate(self, facts: Sequence[Facts]) -> list[list[Row]]:
        """As all do; then the learner may keep the present agents, where they are the best."""
        tables = super().evaluate(facts)
        self.learner.select([deployed_row(rows).figures[self.score] for rows in tables])
        return tables

    def pictures(self, run: int) -> dict[str, bytes]:
        agent = take_run(self.agent, run)
        return self.judge.pictures(agent, self.standard(agent))

    @classmethod
    def blank(cls, config: Config) -> Agent:
        """A stack of one run, whose parameters take no memory yet."""
        with torch.device("meta"):
            return new_agent(config.agent, config.world.shape, config.method, runs=1)

    @classmethod
    def of_one_run(cls, parameter: Tensor) -> Tensor:
        """A parameter without the axis of runs."""
        return parameter[0]

    @classmethod
    def behaviors(cls, agent: Agent) -> Sequence[str]:
        return BEHAVIORS

    @classmethod
    def policy(cls, agent: Agent, steering: Steering) -> SteeredPolicy:
        return SteeredPolicy(agent, steering)

    @classmethod
    def judge_of(cls, config: Config, device: torch.device | str = "cpu") -> GridJudge:
        return GridJudge(config, device)

    @classmethod
    def prefix(cls, config: Config) -> str:
        return "agent." if METHODS[config.method].deploys == "last" else "selected.agent."
