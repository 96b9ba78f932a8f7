"""The pictures of a run: its policies as arrows over the gate's heat, and animated rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from oversight_rl.agents.networks import Agent
from oversight_rl.agents.steering import SteeredPolicy, Steering
from oversight_rl.envs import render
from oversight_rl.envs.settings import BEHAVIORS, NO_LABEL
from oversight_rl.envs.world import State, World

MOST_POLICIES = 4  # panels in a row; a page shows no more
FRAMES = 48
Frames: TypeAlias = list[tuple[render.Picture, str]]


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


def policies(agent: Agent, world: World, steerings: Sequence[Steering]) -> render.Picture:
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


def rollouts(agent: Agent, world: World, steerings: Sequence[Steering]) -> bytes:
    """Policies of a stack of one run at work side by side, with a count of endings; a GIF.

    The world is at one oversight level; all have the same starts and random numbers.
    """
    return side_by_side([_rollout(agent, world, s) for s in steerings[:MOST_POLICIES]])


def side_by_side(columns: Sequence[Frames]) -> bytes:
    """A GIF of policies' frames, each with its caption."""
    joined = []
    for step in zip(*columns, strict=True):
        pictures, captions = zip(*step, strict=True)
        joined.append(render.panels(pictures, captions))
    return render.gif(joined)


def _rollout(agent: Agent, world: World, steering: Steering) -> Frames:
    """Frames of one policy with their captions; the last frame of an episode shows its end."""
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
