"""REINFORCE on the diamond/ghost grid: runs train as one stack, are evaluated exactly, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from oversight_rl.agents.methods import METHODS
from oversight_rl.agents.networks import Agent, new_agent, take_run
from oversight_rl.agents.reinforce.learner import ReinforceLearner
from oversight_rl.agents.steering import SteeredPolicy, Steering, expert_names, standard
from oversight_rl.envs import render
from oversight_rl.envs.settings import BEHAVIORS, NO_LABEL
from oversight_rl.envs.world import State, World
from oversight_rl.experiments.oversight.config import Config
from oversight_rl.experiments.oversight.evaluation import Evaluator
from oversight_rl.experiments.oversight.runs import OversightRuns
from oversight_rl.runs.rows import Facts, Row, deployed_row

MOST_POLICIES = 4  # panels in a row; a page shows no more
FRAMES = 48
Frames: TypeAlias = list[tuple[render.Picture, str]]


class GridJudge:
    """Evaluates and draws agents on the grid, on a device; see `Judge`."""

    def __init__(
        self, config: Config, device: torch.device | str = "cpu", *, exact: bool = True
    ) -> None:
        self.config = config
        episodes = config.evaluation.episodes
        self.evaluator = Evaluator(
            config.world, config.learner.discount, device, episodes, exact=exact
        )

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
        arrows = render.png(draw_policies(agent, world, policies))
        columns = [_rollout(agent, world, policy) for policy in policies[:MOST_POLICIES]]
        return {"policies": arrows, "rollouts": side_by_side(columns)}


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

    def snapshot(self, run: int) -> dict[str, Tensor]:
        return {name: parameter[run] for name, parameter in self.deployed.named_parameters()}

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


# ---- pictures


def placement(world: World, flagged: bool) -> State:
    """Agents on all cells around one fixed diamond and ghost. Batch shape `[S]`."""
    rows, cols = world.config.rows, world.config.cols
    inset = (min(1, rows // 4), min(1, cols // 4))
    diamond = inset[0] * cols + cols - 1 - inset[1]
    ghost = (rows - 1 - inset[0]) * cols + inset[1]
    agent = torch.arange(world.config.cells, device=world.device)
    flags = torch.full_like(agent, flagged, dtype=torch.bool)
    return State(
        agent=agent,
        diamond=torch.full_like(agent, diamond),
        ghost=torch.full_like(agent, ghost),
        diamond_flag=flags,
        ghost_flag=flags,
        spurious=flags.new_zeros(world.config.cells, world.config.cells),
        time=torch.zeros_like(agent),
    )


def draw_policies(agent: Agent, world: World, steerings: Sequence[Steering]) -> render.Picture:
    """Arrows of each policy of a stack of one run, a column each, unwatched above watched.

    The gate's heat lies below them, where there is a gate.
    """
    rows = []
    for flagged in (False, True):
        state = placement(world, flagged)
        observation = world.observe(state)
        panels, captions = [], []
        for steering in steerings[:MOST_POLICIES]:
            chances = SteeredPolicy(agent, steering)(observation).cpu().numpy()
            heat = None
            if agent.has_gate:
                with torch.no_grad():
                    heat = agent(observation.flatten(1)[None]).gate[0, :, 0].cpu().numpy()
            shown = state.map(lambda x: x.cpu())[0]
            panels.append(render.policy(world.config, shown, chances, heat))
            captions.append(f"{steering.name}, {'watched' if flagged else 'unwatched'}")
        rows.append(render.panels(panels, captions))
    return render.stack(rows)


def side_by_side(columns: Sequence[Frames]) -> bytes:
    """A GIF of policies' frames, each with its caption."""
    joined = []
    for step in zip(*columns, strict=True):
        pictures, captions = zip(*step, strict=True)
        joined.append(render.panels(pictures, captions))
    return render.gif(joined)


def _rollout(agent: Agent, world: World, steering: Steering) -> Frames:
    """Frames of one policy, with captions that count endings; an episode's last shows its end."""
    generator = torch.Generator(world.device).manual_seed(0)
    policy = SteeredPolicy(agent, steering)
    tally = dict.fromkeys([*BEHAVIORS, "timeout"], 0)
    shown: Frames = []

    def show(state: State) -> None:
        count = ", ".join(f"{name} {n}" for name, n in tally.items())
        picture = render.frame(world.config, state.map(lambda x: x.cpu())[0])
        shown.append((picture, f"policy: {steering.name}\nreached: {count}"))

    noise = torch.rand(FRAMES, 1, world.noise_channels, generator=generator, device=world.device)
    starts = world.reset(noise)  # of all episodes, so that every policy meets the same
    episode, state = 0, starts[0]
    show(state)
    while len(shown) < FRAMES:
        action = policy.act(world.observe(state), generator)
        state, step = world.step(state, action, starts[episode + 1])
        if bool(step.seen.terminated | step.seen.truncated):
            ending = int(step.truth.ending)
            tally["timeout" if ending == NO_LABEL else BEHAVIORS[ending]] += 1
            show(step.last)
            episode += 1
        if len(shown) < FRAMES:
            show(state)
    return shown
