"""Exact evaluation against known answers, an independent recursion, and simulation."""

import math
import subprocess
import sys

import pytest
import torch

from oversight_rl.agents.networks import cumulative, sample
from oversight_rl.envs.mdp import WorldMDP, why_not
from oversight_rl.envs.settings import WorldConfig
from oversight_rl.envs.world import World


def random_table(mdp, seed=0, sharpness=3.0):
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(1, mdp.n_states, 4, generator=generator) ** sharpness
    return table / table.sum(-1, keepdim=True)


def lookup_from(mdp):
    """Index of the table's row for states, built without using how states are numbered."""
    cells = mdp.world.config.cells

    def key(s):
        placement = (s.agent * cells + s.diamond) * cells + s.ghost
        return (placement * 2 + s.diamond_flag) * 2 + s.ghost_flag

    index = torch.full((cells**3 * 4,), -1)
    all_states = torch.arange(mdp.n_states)
    index[key(mdp.states(all_states))] = all_states
    return lambda state: index[key(state)]


def test_states_are_all_distinct_placements_with_all_flags():
    mdp = WorldMDP(World(WorldConfig(rows=2, cols=3)))
    state = mdp.states(torch.arange(mdp.n_states))
    assert mdp.n_states == 6 * 5 * 4 * 4
    rows = torch.stack(
        [state.agent, state.diamond, state.ghost, state.diamond_flag, state.ghost_flag], -1
    )
    assert len(rows.unique(dim=0)) == mdp.n_states
    assert bool((state.agent != state.diamond).all())
    assert bool((state.agent != state.ghost).all())
    assert bool((state.diamond != state.ghost).all())


def test_the_optimum_of_the_published_world():
    mdp = WorldMDP(World(WorldConfig()))
    assert mdp.optimal_return(0.97) == pytest.approx(0.9317, abs=5e-5)


def test_the_optimum_of_a_square_of_four():
    # Next to the diamond (2 of 3 placements): 1. Opposite it: 0.9, by the free one of two ways.
    mdp = WorldMDP(World(WorldConfig(rows=2, cols=2)))
    assert mdp.optimal_return(0.9) == pytest.approx((1 + 1 + 0.9) / 3)


def test_the_optimum_minds_the_step_limit():
    mdp = WorldMDP(World(WorldConfig(rows=2, cols=2, max_steps=1)))
    assert mdp.optimal_return(0.9) == pytest.approx(2 / 3)


def test_going_up_always_in_a_square_of_four():
    # The agent starts on the lower row half the time, and then ends on the cell above if that is
    # a square: diamond or ghost 1/3 each. Otherwise it stays on the upper row until the limit.
    mdp = WorldMDP(World(WorldConfig(rows=2, cols=2, max_steps=5)))
    table = torch.zeros(1, mdp.n_states, 4)
    table[..., 0] = 1.0
    endings = mdp.evaluate(table, torch.tensor([0.3]), 0.9)
    assert float(endings.p_diamond) == pytest.approx(1 / 6)
    assert float(endings.p_ghost) == pytest.approx(1 / 6)
    assert float(endings.p_timeout) == pytest.approx(2 / 3)
    assert float(endings.ground_truth_return) == pytest.approx(0)
    assert float(endings.episode_length) == pytest.approx(1 / 3 + 5 * 2 / 3)


@pytest.mark.parametrize(("rows", "cols", "limit"), [(2, 2, 5), (2, 3, 4), (3, 3, 3)])
def test_against_a_recursion_over_single_episodes(rows, cols, limit):
    """Follow every sequence of actions through the world's own `step`."""
    discount, level = 0.9, 0.35
    mdp = WorldMDP(World(WorldConfig(rows=rows, cols=cols, max_steps=limit)))
    table = random_table(mdp, seed=rows * 10 + cols).double()
    row_of = lookup_from(mdp)

    def follow(state, weight, depth):
        totals = torch.zeros(4, dtype=torch.float64)  # return, diamond, ghost, length
        for action in range(4):
            share = weight * table[0, row_of(state), action]
            _, step = mdp.world.step(state, torch.full_like(state.agent, action), state)
            ended = step.seen.terminated | step.seen.truncated
            totals[0] += (share * discount**depth * step.truth.reward).sum()
            totals[1] += share[step.truth.ending == 0].sum()
            totals[2] += share[step.truth.ending == 1].sum()
            totals[3] += (share * ended * (depth + 1)).sum()
            if not ended.all():
                totals += follow(step.last[~ended], share[~ended], depth + 1)
        return totals

    start = mdp.states(torch.arange(mdp.n_states))
    chance = torch.where(start.diamond_flag, level, 1 - level)
    chance = chance * torch.where(start.ghost_flag, level, 1 - level)
    value, diamond, ghost, length = follow(start, chance.double() / (mdp.n_states / 4), 0)
    exact = mdp.evaluate(table, torch.tensor([level], dtype=torch.float64), discount)
    assert float(exact.ground_truth_return) == pytest.approx(float(value), abs=1e-6)
    assert float(exact.p_diamond) == pytest.approx(float(diamond), abs=1e-6)
    assert float(exact.p_ghost) == pytest.approx(float(ghost), abs=1e-6)
    assert float(exact.episode_length) == pytest.approx(float(length), abs=1e-5)


@pytest.mark.parametrize("window", [1, 2, 5])
def test_the_window_return_against_single_steps(window):
    """Where an endless sequence of episodes is at a step, times what follows within the window."""
    limit, discount, level = 3, 0.9, 0.35
    mdp = WorldMDP(World(WorldConfig(rows=2, cols=2, max_steps=limit)))
    table = random_table(mdp, seed=4).double()[0]
    row_of = lookup_from(mdp)
    state = mdp.states(torch.arange(mdp.n_states))
    chance = torch.where(state.diamond_flag, level, 1 - level)
    chance = chance.double() * torch.where(state.ghost_flag, level, 1 - level)
    chance = chance / chance.sum()

    def following(state, steps):
        """Expected discounted return of each state over the next steps of its episode."""
        total = torch.zeros(len(state.agent), dtype=torch.float64)
        if steps == 0:
            return total
        for action in range(4):
            _, step = mdp.world.step(state, torch.full_like(state.agent, action), state)
            ended = step.seen.terminated | step.seen.truncated
            value = step.truth.reward.double()
            if not ended.all():
                value[~ended] += discount * following(step.last[~ended], steps - 1)
            total += table[row_of(state), action] * value
        return total

    def visits(state, weight):
        """Sum over the steps of an episode of the mean return within a window cut at random."""
        ahead = sum(following(state, h) for h in range(1, window + 1)) / window
        total = torch.stack([(weight * ahead).sum(), weight.sum()])  # and the episode's length
        for action in range(4):
            _, step = mdp.world.step(state, torch.full_like(state.agent, action), state)
            alive = ~(step.seen.terminated | step.seen.truncated)
            if alive.any():
                share = weight * table[row_of(state), action]
                total += visits(step.last[alive], share[alive])
        return total

    summed, length = visits(state, chance)
    exact = mdp.evaluate(table[None], torch.tensor([level]).double(), discount, window)
    assert float(exact.window_return) == pytest.approx(float(summed / length), abs=1e-6)


def test_levels_mix_the_flag_settings():
    mdp = WorldMDP(World(WorldConfig(rows=2, cols=2, max_steps=6)))
    n = mdp.n_states // 4
    table = torch.zeros(1, mdp.n_states, 4)
    table[0, :, 0] = 1.0  # up
    table[0, 3 * n :] = torch.tensor([0.0, 0.0, 1.0, 0.0])  # down where both squares are flagged
    table[0, 2 * n : 3 * n] = 0.25  # at random where only the diamond is
    endings = mdp.evaluate(table, torch.tensor([0.0, 0.5, 1.0]), 0.9)
    assert float(endings.p_timeout[0, 0]) == pytest.approx(2 / 3)
    assert float(endings.p_timeout[0, 2]) == pytest.approx(2 / 3)  # down mirrors up
    alone = torch.zeros(1, mdp.n_states, 4)
    alone[:] = table[0, 2 * n]
    random = mdp.evaluate(alone, torch.tensor([0.0]), 0.9).p_timeout[0, 0]
    assert float(endings.p_timeout[0, 1]) == pytest.approx(0.75 * 2 / 3 + 0.25 * float(random))


def test_exact_figures_agree_with_40_000_episodes():
    """Return, endings, length and window return of a random policy, within 4 standard errors."""
    level, discount, worlds = 0.3, 0.97, 40_000
    mdp = WorldMDP(World(WorldConfig()))
    table, row_of = random_table(mdp), lookup_from(mdp)
    exact = mdp.evaluate(table, torch.tensor([level]), discount)
    world = World(WorldConfig(), level)
    generator = torch.Generator().manual_seed(1)

    def noise():
        return torch.rand(worlds, world.noise_channels, generator=generator)

    state = world.reset(noise())
    episodes, windows = [], []
    rewards, dones = [], []
    for t in range(32 * 3):
        edges = cumulative(table[0, row_of(state)])
        action = sample(edges, torch.rand(worlds, generator=generator))
        state, step = world.step(state, action, world.reset(noise()))
        done = step.seen.terminated | step.seen.truncated
        rewards.append(step.truth.reward)
        dones.append(done)
        if t < 32:
            episodes.append((step.truth.ending, step.last.time, done))
        if t % 32 == 31:
            following, total = torch.zeros(worlds), torch.zeros(worlds)
            for reward, end in zip(reversed(rewards), reversed(dones), strict=True):
                following = reward + discount * following * ~end
                total += following / 32
            if t > 32:  # past the transient after the common start
                windows.append(total)
            rewards, dones = [], []
    # a world's first episode, so that short episodes are not over-represented
    ended = torch.stack([done for _, _, done in episodes])
    is_first = ended & (ended.int().cumsum(0) == 1)  # [32, worlds]
    ending = torch.stack([ending for ending, _, _ in episodes])[is_first]
    length = torch.stack([length for _, length, _ in episodes])[is_first].double()
    assert len(ending) == worlds
    value = discount ** (length - 1) * ((ending == 0).double() - (ending == 1).double())

    def agree(samples, figure):
        error = samples.double().std() / math.sqrt(samples.numel())
        assert abs(float(samples.double().mean() - figure)) < 4 * float(error)

    agree(value, exact.ground_truth_return)
    agree(ending == 0, exact.p_diamond)
    agree(ending == 1, exact.p_ghost)
    agree(ending == -1, exact.p_timeout)
    agree(length, exact.episode_length)
    agree(torch.stack(windows).mean(0), exact.window_return)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (WorldConfig(spurious_oversight=0.1), "spurious"),
        (WorldConfig(rows=11, cols=11), "states"),
    ],
)
def test_says_why_it_does_not_apply(config, reason):
    assert reason in (why_not(World(config)) or "")
    with pytest.raises(ValueError, match=reason):
        WorldMDP(World(config))


def test_a_grid_of_8_by_8_fits_in_4_gib():
    program = """
import resource, torch
from oversight_rl.agents.networks import Agent
from oversight_rl.agents.settings import AgentConfig
from oversight_rl.envs.settings import WorldConfig
from oversight_rl.experiments.oversight.evaluation import Evaluator
from oversight_rl.runs.rows import Facts
from oversight_rl.agents.steering import standard
agent = Agent(AgentConfig(hidden=(128, 128)), (4, 8, 8), 4, 1, generators=[torch.Generator()])
evaluator = Evaluator(WorldConfig(rows=8, cols=8), 0.97)
facts = [Facts("routing", 0, 0.1)]
rows = evaluator.evaluate(agent.prepare(), facts, standard(2)[:1], [[0.1]], "diamond")[0]
assert rows[0].evaluator == "exact"
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 4.0
