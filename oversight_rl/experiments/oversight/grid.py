"""REINFORCE on the diamond/ghost grid: runs train as one stack and are evaluated exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oversight_rl.agents.methods import METHODS
from oversight_rl.agents.networks import Agent, new_agent, take_run
from oversight_rl.agents.reinforce.learner import ReinforceLearner
from oversight_rl.agents.steering import SteeredPolicy, Steering, expert_names, standard
from oversight_rl.envs import render
from oversight_rl.envs.world import World
from oversight_rl.experiments.oversight import pictures
from oversight_rl.experiments.oversight.config import Config
from oversight_rl.experiments.oversight.evaluation import Evaluator
from oversight_rl.experiments.oversight.runs import OversightRuns
from oversight_rl.runs.rows import Facts, Row, deployed_row


class GridJudge:
    """Evaluates and draws agents on the grid, on a device; see `Judge`."""

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
        (deployed, *_), forward = expert_names(agent.n_experts), agent.prepare()
        return self.evaluator.evaluate(forward, facts, policies, levels, deployed, paths)

    def pictures(self, agent: Agent, policies: Sequence[Steering]) -> dict[str, bytes]:
        world = World(self.config.world, self.config.oversight)
        return {
            "policies": render.png(pictures.policies(agent, world, policies)),
            "rollouts": pictures.rollouts(agent, world, policies),
        }


class GridRuns(OversightRuns):
    """Runs of REINFORCE as one stack."""

    judges = GridJudge

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
        self.judge = GridJudge(first, device)

    @property
    def agent(self) -> Agent:
        return self.learner.agent

    @property
    def deployed(self) -> Agent:
        return self.learner.deployed

    def evaluate(self, facts: Sequence[Facts]) -> list[list[Row]]:
        tables = super().evaluate(facts)  # then the learner may keep agents that are the best yet
        self.learner.select([deployed_row(rows).figures[self.score] for rows in tables])
        return tables

    def pictures(self, run: int) -> dict[str, bytes]:
        return self.judge.pictures(take_run(self.agent, run), standard(self.agent.n_experts))

    @classmethod
    def blank(cls, config: Config) -> Agent:
        with torch.device("meta"):  # parameters take no memory yet
            return new_agent(config.agent, config.world.shape, config.method, runs=1)

    @classmethod
    def of_one_run(cls, parameter: Tensor) -> Tensor:
        return parameter[0]  # files have no axis of runs

    @classmethod
    def policy(cls, agent: Agent, steering: Steering) -> SteeredPolicy:
        return SteeredPolicy(agent, steering)

    @classmethod
    def prefix(cls, config: Config) -> str:
        return "agent." if METHODS[config.method].deploys == "last" else "selected.agent."
