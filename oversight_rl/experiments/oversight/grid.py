"""REINFORCE on the diamond/ghost grid: runs train as one stack, are evaluated exactly, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor

from oversight_rl.agents.methods import METHODS
from oversight_rl.agents.networks import Agent, new_agent, take_run
from oversight_rl.agents.reinforce.learner import ReinforceLearner
from oversight_rl.agents.steering import (
    MIXTURE,
    SteeredPolicy,
    Steering,
    expert_names,
    standard,
)
from oversight_rl.envs import render
from oversight_rl.envs.settings import BEHAVIORS, NO_LABEL
from oversight_rl.envs.world import State, World
from oversight_rl.experiments.oversight.config import Config
from oversight_rl.experiments.oversight.evaluation import Evaluator
from oversight_rl.experiments.oversight.runs import OversightRuns
from oversight_rl.runs.rows import Facts, Row, deployed_row

MOST_POLICIES = 4  # panels in a row; a page shows no more
FRAMES, HELD = 64, 2  # of an animation; in which an episode's end stands still
MOST_CELLS = 36  # of a world that is drawn large, in the placements that tell most
TELLING = 4  # of these
RINGS = {0: render.DIAMOND, 1: render.GHOST, NO_LABEL: render.LIGHT.ink}  # by ending
Frames: TypeAlias = list[tuple[render.Picture, str]]


class GridJudge:
    """Evaluates and draws agents on the grid, on a device; see `Judge`."""

    def __init__(
        self, config: Config, device: torch.device | str = "cpu", *, exact: bool = True
    ) -> None:
        self.config = config
        episodes = config.evaluation.episodes
        self.evaluator = Evaluator(
            config.world,
            config.learner.discount,
            device,
            episodes,
            exact=exact,
            labels=config.labels,
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
        """In placements in which the mixture and the deployed expert differ most."""
        world = World(self.config.world, self.config.oversight, labels=self.config.labels)
        shown, several = policies[:MOST_POLICIES], agent.n_experts > 1
        starts = telling(agent, world, standard(agent.n_experts)[1], MIXTURE) if several else None
        squares = None if starts is None else (int(starts.diamond[0]), int(starts.ghost[0]))
        return {
            "policies": render.png(draw_policies(agent, world, shown, squares)),
            "policies_dark": render.png(draw_policies(agent, world, shown, squares, render.DARK)),
            "rollouts": side_by_side(rollouts(agent, world, shown, starts)),
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
            overseers=[config.overseeing for config in configs],
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
        agent, config = take_run(self.agent, run), self.configs[run]
        world, policies = World(config.world, config.oversight), standard(agent.n_experts)
        return {  # around one placement all along
            "policies": render.png(draw_policies(agent, world, policies, tall=True)),
            "rollouts": side_by_side(rollouts(agent, world, policies[:MOST_POLICIES])),
        }

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


def placement(world: World, flagged: bool, squares: tuple[int, int] | None = None) -> State:
    """Agents on all cells around one diamond and ghost, by their cells. Batch shape `[S]`."""
    rows, cols = world.config.rows, world.config.cols
    inset = (min(1, rows // 4), min(1, cols // 4))
    corners = inset[0] * cols + cols - 1 - inset[1], (rows - 1 - inset[0]) * cols + inset[1]
    diamond, ghost = squares or corners
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


def reaching(world: World, state: State, chances: Tensor) -> Tensor:
    """Exact chance to end on the diamond from each cell, within an episode's steps.

    Of states `[..., S]`, see `placement`, and action probabilities `[..., S, A]`: `[..., S]`.
    """
    target = world.moves.view(world.config.cells, -1).to(chances.device)  # [S, A]
    cell = torch.arange(world.config.cells, device=chances.device)
    done, ghost = cell == state.diamond, cell == state.ghost
    value = done.to(chances.dtype)
    for _ in range(world.config.max_steps):
        before = value
        value = (chances * value[..., target]).sum(-1).masked_fill(done, 1).masked_fill(ghost, 0)
        if torch.equal(before, value):
            break
    return value


def telling(agent: Agent, world: World, ours: Steering, theirs: Steering) -> State | None:
    """Unwatched starts in which one policy ends on the diamond the most oftener than another.

    One for each of a few placements of the squares, `[TELLING]`; None where the world is large.
    """
    cells, cols = world.config.cells, world.config.cols
    if cells > MOST_CELLS:
        return None
    pairs = [(d, g) for d in range(cells) for g in range(cells) if d != g]
    states = State.stack([placement(world, False, pair) for pair in pairs])  # [P, S]
    observation = world.observe(states)
    more, fewer = (
        reaching(world, states, SteeredPolicy(agent, policy)(observation))
        for policy in (ours, theirs)
    )
    gain = more - fewer
    best = gain.mean(-1).topk(TELLING).indices
    # an agent from farther away shows more of what it does
    away = [
        (states.agent // cols - other // cols).abs() + (states.agent % cols - other % cols).abs()
        for other in (states.diamond, states.ghost)
    ]
    agents = (gain * torch.minimum(*away))[best].argmax(-1)
    return states[best, agents]


def draw_policies(
    agent: Agent,
    world: World,
    steerings: Sequence[Steering],
    squares: tuple[int, int] | None = None,
    theme: render.Theme = render.LIGHT,
    tall: bool = False,
) -> render.Picture:
    """Arrows of each policy of a stack of one run, a column each, unwatched above watched.

    If `tall`, a row each, and small, for TensorBoard, which shows pictures 350 pixels wide.
    The gate tints the mixture, the chance to end on the diamond tints all others.
    """
    look: Any = {"theme": theme, "scale": 1 if tall or world.config.cells > MOST_CELLS else 2}
    gates, rows, every = False, [], []
    for flagged in (False, True):
        state = placement(world, flagged, squares)
        observation = world.observe(state)
        pictures, captions = [], []
        for steering in steerings[:MOST_POLICIES]:
            chances = SteeredPolicy(agent, steering)(observation)
            ends = reaching(world, state, chances)
            tint = ends
            if agent.has_gate and steering.weights is None:
                with torch.no_grad():
                    tint, gates = agent(observation.flatten(1)[None]).gate[0, :, 0], True
            shown = state.map(lambda x: x.cpu())[0]
            own = chances.cpu().numpy(), tint.cpu().numpy()
            pictures.append(render.policy(world.config, shown, *own, **look))
            on_diamond = (ends.sum() - 1) / (world.config.cells - 2)  # of all other cells
            seen = "watched" if flagged else "nobody watches"
            captions.append(f"{titled(agent, steering)}\n{seen}: {on_diamond:.0%} to the diamond")
        rows.append(pictures)
        every.append(captions)
    if tall:
        rows, every = ([list(x) for x in zip(*table, strict=True)] for table in (rows, every))
    wide = render.widths(rows[0], list(zip(*every, strict=True)), look["scale"])
    sheets = [
        render.panels(pictures, captions, wide, **look)
        for pictures, captions in zip(rows, every, strict=True)
    ]
    entries = [("color of a cell", "ends on the ghost", "on the diamond")]
    if gates:
        entries[0] = ("experts, by how episodes end", "ghost", "diamond")
        entries.insert(0, ("mixture, by whom its gate trusts", "ghost", "diamond"))
    return render.stack([*sheets, render.key(entries, sheets[0].shape[1], **look)], theme)


def titled(agent: Agent, steering: Steering) -> str:
    """A policy's name, and whether it is the one that is deployed."""
    deployed = steering.name == expert_names(agent.n_experts)[0]
    return f"{steering.name} (deployed)" if deployed else steering.name


def side_by_side(columns: Sequence[Frames]) -> bytes:
    """A GIF of policies' frames, each with its caption."""
    first = [column[0][0] for column in columns]
    wide = render.widths(first, [[caption for _, caption in column] for column in columns])
    joined = []
    for step in zip(*columns, strict=True):
        pictures, captions = zip(*step, strict=True)
        joined.append(render.panels(pictures, captions, wide))
    return render.gif(joined)


def rollouts(
    agent: Agent, world: World, steerings: Sequence[Steering], starts: State | None = None
) -> list[Frames]:
    """Frames of each policy on the same starts (any, if not given), each unwatched and watched.

    Captions count how the episodes ended so far, unwatched and watched ones apart.

    An episode ends for all of them at once: who is there first waits, in a ring of the color of
    what was reached.
    """
    generator = torch.Generator(world.device).manual_seed(0)
    policies = [SteeredPolicy(agent, steering) for steering in steerings]
    none = dict.fromkeys([*BEHAVIORS, "timeout"], 0)
    tallies = [(dict(none), dict(none)) for _ in policies]  # unwatched, watched
    shown: list[Frames] = [[] for _ in policies]
    if starts is None:
        noise = torch.rand(FRAMES, world.noise_channels, generator=generator, device=world.device)
        starts = world.reset(noise)

    def show(states: Sequence[State], rings: Sequence[str | None], watched: bool) -> None:
        for i, (state, ring) in enumerate(zip(states, rings, strict=True)):
            count = ", ".join(f"{name} {n}" for name, n in tallies[i][watched].items())
            seen = "watched" if watched else "nobody watches"
            picture = render.frame(world.config, state.map(lambda x: x.cpu())[0], ring)
            shown[i].append((picture, f"{titled(agent, steerings[i])}\n{seen}\n{count}"))

    for episode, watched in product(range(len(starts.agent)), (False, True)):
        begun = starts.map(lambda x: x[:, None])[episode]
        flags = torch.full_like(begun.diamond_flag, watched)
        start = replace(begun, diamond_flag=flags, ghost_flag=flags)
        states, rings = [start] * len(policies), list[str | None]([None] * len(policies))
        show(states, rings, watched)
        while None in rings and len(shown[0]) < FRAMES:
            for i, policy in enumerate(policies):
                if rings[i] is not None:
                    continue
                action = policy.act(world.observe(states[i]), generator)
                _, step = world.step(states[i], action, start)
                states[i] = step.last
                if bool(step.seen.terminated | step.seen.truncated):
                    ending = int(step.truth.ending)
                    tallies[i][watched]["timeout" if ending == NO_LABEL else BEHAVIORS[ending]] += 1
                    rings[i] = RINGS[ending]
            show(states, rings, watched)
        if len(shown[0]) >= FRAMES:
            break
        for _ in range(HELD):
            show(states, rings, watched)
    return [frames[:FRAMES] for frames in shown]
