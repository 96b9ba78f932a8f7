"""Exact evaluation in MiniGrid's empty rooms: against the worlds' own steps, and known answers."""

import itertools

import numpy as np
import pytest
import torch

from oversight_rl.envs.minigrid_batch import SQUARES, DiamondGhostVecEnv
from oversight_rl.envs.minigrid_mdp import DiamondGhostMDP, why_not


def mdp(**settings):
    return DiamondGhostMDP(DiamondGhostVecEnv(1, **settings))


def every_start(**settings):
    """A batch with a world in each state that an episode can start in, and those tiles."""
    size = settings["size"]
    inner = [y * size + x for y in range(1, size - 1) for x in range(1, size - 1)]
    places = [
        (agent, direction, diamond, ghost, *flags)
        for agent, diamond, ghost in itertools.permutations(inner, 3)
        for direction in range(4)
        for flags in itertools.product([0, 1], repeat=2)
    ]
    agent, direction, diamond, ghost, d, g = np.array(places).T
    env = DiamondGhostVecEnv(len(places), **settings)
    env.reset()
    state = env.get_state()
    tiles, each = np.repeat(env.walls[None], len(places), axis=0), np.arange(len(places))
    tiles[each, diamond], tiles[each, ghost] = SQUARES + d, SQUARES + 2 + g
    state |= {"tiles": tiles, "agent": agent, "direction": direction, "steps": 0 * agent}
    return env, state, {place: i for i, place in enumerate(places)}


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 4, "max_steps": 7},
        {"size": 5, "agent_view_size": 3},
        {"size": 5, "flags_visible": False, "reward": "ground_truth", "max_steps": 9},
    ],
)
def test_against_every_single_world_stepped(settings):
    """Follow each start, in rooms turned and not, through the worlds' own steps."""
    discount, levels = 0.9, [0.0, 0.35, 1.0]
    env, state, number = every_start(**settings)
    exact = mdp(**settings)
    rng = np.random.default_rng(0)
    table = rng.random((len(exact.views), 3)) ** 3
    table /= table.sum(1, keepdims=True)
    seen = {view.tobytes(): row for view, row in zip(exact.views.numpy(), table, strict=True)}
    assert len(seen) == len(exact.views)

    env.set_state(state)
    policy = np.array([seen[view.tobytes()] for view in env._observe(np.arange(len(number)))])
    places = np.array(list(number))
    leads, ends = [], []  # to which start, or how it ends
    for action in range(3):
        env.set_state(state)
        _, _, done, infos = env.step(np.full(len(number), action))
        behaviors = [info.get("behavior") for info in infos]
        kind = np.array([("diamond", "ghost", None).index(behavior) for behavior in behaviors])
        assert (done == (kind < 2)).all()
        after = places.copy()
        now = env.get_state()
        after[~done, 0], after[~done, 1] = now["agent"][~done], now["direction"][~done]
        leads.append([number[tuple(place)] for place in after.tolist()])
        ends.append(kind)
        labels = [info.get("label") for info in infos]
        flagged = np.choose(kind, [places[:, 4], places[:, 5], 0])
        assert [label is not None for label in labels] == flagged.astype(bool).tolist()

    value, best, length, *p_end = np.zeros((5, len(number)))
    for _ in range(exact.max_steps):  # so many steps to go
        before = [np.zeros(len(number)) for _ in range(4)]
        nearer = np.full(len(number), -1.0)
        for chance, lead, kind in zip(policy.T, leads, ends, strict=True):
            on, reward = kind == 2, np.array([1.0, -1.0, 0.0])[kind]
            before[0] += chance * (reward + discount * on * value[lead])
            before[1] += chance * (1 + on * length[lead])
            for i in range(2):
                before[2 + i] += chance * np.where(on, p_end[i][lead], kind == i)
            nearer = np.maximum(nearer, reward + discount * on * best[lead])
        (value, length, *p_end), best = before, nearer

    found = exact.evaluate(torch.tensor(table[None]), torch.tensor(levels), discount)
    for i, level in enumerate(levels):
        flagged = places[:, 4:].T
        weight = np.prod(np.where(flagged == 1, level, 1 - level), axis=0)
        weight /= weight.sum()
        expected = {
            "ground_truth_return": value,
            "p_diamond": p_end[0],
            "p_ghost": p_end[1],
            "p_timeout": 1 - p_end[0] - p_end[1],
            "p_diamond_flagged": p_end[0] * flagged[0],
            "p_ghost_flagged": p_end[1] * flagged[1],
            "episode_length": length,
        }
        for name, figure in expected.items():
            got = float(getattr(found, name)[0, i])
            assert got == pytest.approx(weight @ figure, abs=1e-7), name
    assert exact.optimal_return(discount) == pytest.approx(best.mean())


def test_the_optimum_of_a_square_of_four():
    # Facing its way, a turn or two off, or away: 1, 0.9 twice, 0.81. Next to the diamond (2 of 3
    # placements) one step is left then; opposite it three are, by the free one of two ways.
    turns = (1 + 2 * 0.9 + 0.81) / 4
    assert mdp(size=4).optimal_return(0.9) == pytest.approx(turns * (1 + 1 + 0.81) / 3)
    # with one step only: facing the diamond next to it
    assert mdp(size=4, max_steps=1).optimal_return(0.9) == pytest.approx(2 / 3 / 4)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"size": 7, "layout": "four_rooms"}, "gaps in the walls"),
        ({"size": 5, "lava": 1}, "lava multiplies"),
        ({"size": 16}, "118,634,880 states are more than 4,000,000"),
        ({"size": 10, "agent_view_size": 19}, "views of 19x19 tiles may take more than"),
    ],
)
def test_other_worlds_are_refused(settings, reason):
    env = DiamondGhostVecEnv(1, **settings)
    assert reason in why_not(env)
    with pytest.raises(ValueError, match=reason):
        DiamondGhostMDP(env)
    assert why_not(DiamondGhostVecEnv(1, size=10)) is None
