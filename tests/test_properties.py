"""What holds for any world, any policy and any window of experience."""

import math
from types import SimpleNamespace

import numpy as np
import plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mdp import lookup_from, random_table
from test_world import check_observation, worlds

from oversight_rl.agents.methods import LABELED, METHODS, UNLABELED
from oversight_rl.agents.networks import cumulative, sample
from oversight_rl.agents.outcomes import tables
from oversight_rl.agents.reinforce.losses import label as make_targets
from oversight_rl.agents.settings import ReinforceConfig
from oversight_rl.envs.mdp import WorldMDP
from oversight_rl.envs.overseers import Overseer
from oversight_rl.envs.settings import ACTIONS, NO_LABEL, WorldConfig
from oversight_rl.envs.world import Seen, World

chance = st.one_of(st.none(), st.floats(0, 1))


@settings(max_examples=40, deadline=None)
@given(
    config=st.builds(
        WorldConfig,
        rows=st.integers(2, 64),
        cols=st.integers(2, 64),
        max_steps=st.integers(1, 40),
        flags_visible=st.booleans(),
    ),
    level=st.floats(0, 1),
    data=st.data(),
)
def test_whole_episodes_in_any_world(config, level, data):
    """Whatever is done: inside the grid, one ending, labels on flagged endings, the exact limit."""
    world, n = World(config, level), 8
    state = start = worlds(world, n, data.draw(st.integers(0, 10_000)))
    check_observation(world, state)
    ends, action = np.zeros(n, dtype=int), torch.zeros(n, dtype=torch.int64)
    steady = st.lists(st.integers(0, len(ACTIONS) - 1), min_size=n, max_size=n)
    for t in range(1, config.max_steps + 1):
        action = torch.tensor(data.draw(steady)) if t < 12 else (action + t) % len(ACTIONS)
        following, step = world.step(state, action, start)
        agent = step.last.agent
        assert bool(((agent >= 0) & (agent < config.cells)).all())
        row, col = agent // config.cols, agent % config.cols
        moved = (row - state.agent // config.cols).abs() + (col - state.agent % config.cols).abs()
        assert int(moved.max()) <= 1
        for i in range(n):
            if ends[i]:
                continue
            on = [bool(agent[i] == step.last.diamond[i]), bool(agent[i] == step.last.ghost[i])]
            flags = [bool(step.last.diamond_flag[i]), bool(step.last.ghost_flag[i])]
            terminated, truncated = bool(step.seen.terminated[i]), bool(step.seen.truncated[i])
            assert sum(on) <= 1
            assert terminated == any(on)
            assert truncated == (t == config.max_steps and not terminated)
            ending, label = int(step.truth.ending[i]), int(step.seen.label[i])
            assert ending == (on.index(True) if terminated else NO_LABEL)
            assert label == (ending if terminated and flags[ending] else NO_LABEL)
            ends[i] += terminated + truncated
        check_observation(world, step.last)
        state = following
    assert (ends == 1).all()


@settings(max_examples=8, deadline=None, derandomize=True)  # a chance test: the same each time
@given(
    rows=st.integers(2, 4),
    cols=st.integers(2, 4),
    limit=st.integers(1, 8),
    level=st.floats(0, 1),
    discount=st.floats(0.5, 1),
    seed=st.integers(0, 1000),
)
def test_exact_figures_agree_with_rollouts_on_any_small_grid(
    rows, cols, limit, level, discount, seed
):
    config, n = WorldConfig(rows=rows, cols=cols, max_steps=limit), 20_000
    mdp, world = WorldMDP(World(config)), World(config, level)
    table, row_of = random_table(mdp, seed), lookup_from(mdp)
    generator = torch.Generator().manual_seed(seed)
    state = world.reset(torch.rand(n, world.noise_channels, generator=generator))
    ending = torch.full((n,), NO_LABEL)
    length = torch.zeros(n, dtype=torch.int64)
    for t in range(1, limit + 1):
        edges = cumulative(table[0, row_of(state)])
        action = sample(edges, torch.rand(n, generator=generator))
        state, step = world.step(state, action, state)
        first = (length == 0) & (step.seen.terminated | step.seen.truncated)
        length[first], ending[first] = t, step.truth.ending[first]
        state = step.last
    value = discount ** (length - 1.0) * ((ending == 0).double() - (ending == 1).double())
    exact = mdp.evaluate(table, torch.tensor([level]), discount)
    for samples, figure in (
        (value, exact.ground_truth_return),
        (ending == 0, exact.p_diamond),
        (ending == 1, exact.p_ghost),
        (ending == NO_LABEL, exact.p_timeout),
        (length, exact.episode_length),
    ):
        error = float(samples.double().std()) / math.sqrt(n)
        assert abs(float(samples.double().mean() - figure)) <= 4.5 * error + 1e-6


REWARDS = {"routing": (1, 1, 1), "naive": (1, 1, -1), "filtering": (0, 1, -1)}  # as published
KINDS = st.sampled_from([0, 0, 0, 1, 2, 3, 4])  # goes on; limit, unlabeled, diamond, ghost


@settings(max_examples=100, deadline=None)
@given(
    steps=st.integers(1, 9),
    n=st.integers(1, 4),
    method=st.sampled_from(sorted(REWARDS)),
    discount=st.floats(0.1, 1),
    bootstrap=st.booleans(),
    data=st.data(),
)
def test_outcomes_and_returns_of_any_window(steps, n, method, discount, bootstrap, data):
    """Against a loop over episodes, however they begin and end in the window."""
    kinds = data.draw(st.lists(KINDS, min_size=steps * n, max_size=steps * n))
    kind = torch.tensor(kinds).view(1, steps, n)
    label = torch.where(kind >= 3, kind - 3, NO_LABEL)
    window = SimpleNamespace(
        seen=Seen(terminated=kind >= 2, truncated=kind == 1, label=label),
        truth=SimpleNamespace(ending=label),
        action=kind,
        uniform=torch.full(kind.shape, 0.5),
        value_after=torch.linspace(-1, 1, n)[None],
        acts=(slice(None),),
    )
    config = ReinforceConfig(discount=discount, bootstrap=bootstrap)
    experts = 1 if METHODS[method].policy.experts == "one" else 2
    targets = make_targets(window, tables([method], [Overseer(0.5)], experts), config)
    outcome, _ = plain.outcomes(window.seen, steps, n)
    assert np.array_equal(targets.outcome[0].numpy(), outcome)
    rewards = dict(zip(("unlabeled", "diamond", "ghost"), REWARDS[method], strict=True))
    paid = {
        UNLABELED: rewards["unlabeled"],
        LABELED: rewards["diamond"],
        LABELED + 1: rewards["ghost"],
    }
    after = window.value_after[0].numpy() * bootstrap
    expected = plain.returns(window.seen, outcome, after, discount, paid)
    assert targets.returns[0].numpy() == pytest.approx(expected, abs=1e-5)
