"""Pictures: chances against episodes played, starts that tell, ends that are held."""

import io
import itertools
import re

import numpy as np
import pytest
import torch
from PIL import Image

from oversight_rl.agents.networks import new_agent, take_run
from oversight_rl.agents.settings import AgentConfig
from oversight_rl.agents.steering import MIXTURE, SteeredPolicy, keep, standard
from oversight_rl.envs import render
from oversight_rl.envs.settings import WorldConfig
from oversight_rl.envs.world import World
from oversight_rl.experiments.oversight import grid

CONFIG = WorldConfig(rows=3, cols=4, max_steps=7)


@pytest.fixture(scope="module")
def world():
    return World(CONFIG, 0.5)


@pytest.fixture(scope="module")
def agent():
    """A random one, whose experts differ much."""
    generators = [torch.Generator().manual_seed(3)]
    made = new_agent(AgentConfig(hidden=(16,)), CONFIG.shape, "routing", 1, generators)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4)
    return take_run(made, 0)


def test_chances_to_end_on_the_diamond_are_those_of_walks(world):
    """Against a sum over all walks, in plain Python."""
    state = grid.placement(world, False, (6, 3))
    chances = torch.rand(12, 4, generator=torch.Generator().manual_seed(0))
    chances /= chances.sum(-1, keepdim=True)
    moves = world.moves.view(12, 4).tolist()

    def chance(cell, left):
        if cell in (6, 3) or not left:
            return float(cell == 6)
        return sum(float(chances[cell, a]) * chance(moves[cell][a], left - 1) for a in range(4))

    found = grid.reaching(world, state, chances)
    assert found.tolist() == pytest.approx([chance(cell, 7) for cell in range(12)], abs=1e-5)


def test_the_starts_that_tell_most_are_found(world, agent):
    ours, theirs = keep("diamond", 2), MIXTURE
    starts = grid.telling(agent, world, ours, theirs)

    def gain(pair):
        state = grid.placement(world, False, pair)
        ends = [
            grid.reaching(world, state, SteeredPolicy(agent, policy)(world.observe(state)))
            for policy in (ours, theirs)
        ]
        return float((ends[0] - ends[1]).mean())

    gains = sorted(map(gain, itertools.permutations(range(12), 2)), reverse=True)
    pairs = zip(starts.diamond.tolist(), starts.ghost.tolist(), strict=True)
    assert [gain(pair) for pair in pairs] == pytest.approx(gains[: grid.TELLING], abs=1e-6)
    assert not starts.diamond_flag.any()


def test_rollouts_show_all_ends_at_once_in_a_ring(world, agent):
    policies = standard(2)
    columns = grid.rollouts(agent, world, policies)
    assert {len(column) for column in columns} == {grid.FRAMES}
    for column, policy in zip(columns, policies, strict=True):
        first = column[0][1].split("\n")
        assert first[0] == policy.name + " (deployed)" * (policy.name == "diamond")
        seen = [caption.split("\n")[1] for _, caption in column]
        assert set(seen) == {"nobody watches", "watched"}
        for condition in set(seen):  # counted apart
            said = [
                caption.split("\n")[2] for _, caption in column if f"\n{condition}\n" in caption
            ]
            counts = [sum(map(int, re.findall(r"\d+", count))) for count in said]
            assert counts[0] == 0
            assert counts == sorted(counts)
            assert counts[-1] > 0
        turns = [i for i in range(1, len(seen)) if seen[i] != seen[i - 1]]
        for turn in turns:  # an end stands still
            held = [column[turn - 1 - i][0] for i in range(grid.HELD + 1)]
            assert all(np.array_equal(held[0], other) for other in held)
    ends = {tuple(caption.split("\n")[1] for _, caption in column) for column in columns}
    assert len(ends) == 1  # the same episodes
    animation = Image.open(io.BytesIO(grid.side_by_side(columns)))
    sizes = set()
    for i in range(animation.n_frames):
        animation.seek(i)
        sizes.add(animation.size)
    assert len(sizes) == 1


def test_arrows_onto_the_ghost_have_its_color():
    state = grid.placement(World(CONFIG), False, (0, 4))[0].map(lambda x: x)  # ghost: row 1, left
    right, left, up = np.zeros((3, 12, 4))
    right[:, 1], left[:, 3], up[:, 0] = 1, 1, 1
    wanted = np.array([int(render.LIGHT.onto_ghost[i : i + 2], 16) for i in (1, 3, 5)])

    def cells(policy):
        picture = render.policy(CONFIG, state, policy).astype(int)
        near = np.abs(picture - wanted).sum(-1) < 12
        blocks = near.reshape(3, render.CELL, 4, render.CELL).sum((1, 3)) > 20
        return set(np.flatnonzero(blocks))

    assert cells(left) == {5}
    assert cells(up) == {8}
    assert cells(right) == set()  # from the right edge a step leads nowhere


def test_dark_pictures_are_dark(world, agent):
    light, dark = (
        grid.draw_policies(agent, world, standard(2), theme=theme)
        for theme in (render.LIGHT, render.DARK)
    )
    assert light.shape == dark.shape
    assert light[0, 0].min() > 200 > 60 > dark[0, 0].max()
