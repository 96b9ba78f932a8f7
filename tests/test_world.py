"""The world against a slow, plain reference, and its statistics against known ones."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oversight_rl.envs.overseers import Labels
from oversight_rl.envs.settings import NO_LABEL, UserError, WorldConfig
from oversight_rl.envs.world import State, World

MOVES = {0: (-1, 0), 1: (0, 1), 2: (1, 0), 3: (0, -1)}


def worlds(world, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return world.reset(torch.rand(n, world.noise_channels, generator=generator))


def plain_step(config, cells, flags, time, action):
    """One world, one step, written out: (agent, terminated, truncated, label, ending)."""
    agent, diamond, ghost = cells
    row, col = divmod(agent, config.cols)
    row = min(max(row + MOVES[action][0], 0), config.rows - 1)
    col = min(max(col + MOVES[action][1], 0), config.cols - 1)
    agent = row * config.cols + col
    ending = 0 if agent == diamond else 1 if agent == ghost else NO_LABEL
    label = ending if ending != NO_LABEL and flags[ending] else NO_LABEL
    truncated = ending == NO_LABEL and time + 1 >= config.max_steps
    return agent, ending != NO_LABEL, truncated, label, ending


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 6),
    cols=st.integers(2, 6),
    limit=st.integers(1, 9),
    p=st.floats(0, 1),
    spurious=st.sampled_from([0.0, 0.5]),
    visible=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_every_step_agrees_with_a_plain_reference(rows, cols, limit, p, spurious, visible, seed):
    config = WorldConfig(
        rows=rows, cols=cols, max_steps=limit, spurious_oversight=spurious, flags_visible=visible
    )
    world = World(config, p)
    n = 16
    generator = torch.Generator().manual_seed(seed)
    state = worlds(world, n, seed)
    for _ in range(12):
        action = torch.randint(4, (n,), generator=generator)
        fresh = world.reset(torch.rand(n, world.noise_channels, generator=generator))
        following, step = world.step(state, action, fresh)
        for i in range(n):
            cells = tuple(int(x[i]) for x in (state.agent, state.diamond, state.ghost))
            flags = bool(state.diamond_flag[i]), bool(state.ghost_flag[i])
            agent, terminated, truncated, label, ending = plain_step(
                config, cells, flags, int(state.time[i]), int(action[i])
            )
            assert int(step.last.agent[i]) == agent
            assert bool(step.seen.terminated[i]) == terminated
            assert bool(step.seen.truncated[i]) == truncated
            assert int(step.seen.label[i]) == label
            assert int(step.truth.ending[i]) == ending
            assert float(step.truth.reward[i]) == {0: 1.0, 1: -1.0, NO_LABEL: 0.0}[ending]
            old = State.stack([step.last, fresh])[1 if terminated or truncated else 0][i]
            for name, value in vars(following[i]).items():
                assert torch.equal(value, getattr(old, name)), name
        check_observation(world, following)
        state = following


def check_observation(world, state):
    config = world.config
    planes = world.observe(state).flatten(-2)  # [n, 4, S]
    assert planes.shape == (*state.agent.shape, 4, config.cells)
    for plane, cell in ((0, state.agent), (1, state.ghost), (2, state.diamond)):
        assert torch.equal(planes[:, plane].argmax(-1), cell)
        assert torch.equal(planes[:, plane].sum(-1), torch.ones(len(cell)))
    flags = torch.zeros(len(state.agent), config.cells)
    for i in range(len(flags)):
        flags[i, state.diamond[i]] = float(state.diamond_flag[i])
        flags[i, state.ghost[i]] = float(state.ghost_flag[i])
        if config.spurious_oversight:
            flags[i] += state.spurious[i].float()
    assert torch.equal(planes[:, 3], flags * config.flags_visible)


def test_starts_are_uniform_over_distinct_placements():
    world = World(WorldConfig(rows=2, cols=2))
    state = worlds(world, 48_000)
    key = state.agent * 16 + state.diamond * 4 + state.ghost
    values, counts = key.unique(return_counts=True)
    assert len(values) == 24  # 4 * 3 * 2 placements, so none with a shared cell
    chi_squared = ((counts - 2000.0) ** 2 / 2000).sum()
    assert chi_squared < 49.7  # 99.9th percentile at 23 degrees of freedom


@pytest.mark.parametrize("cells", [(5, 5), (64, 64)])
def test_the_largest_random_number_stays_on_the_grid(cells):
    world = World(WorldConfig(rows=cells[0], cols=cells[1]))
    state = world.reset(torch.full((1, world.noise_channels), 1 - 2.0**-24))
    last = cells[0] * cells[1] - 1
    assert [int(x) for x in (state.agent, state.diamond, state.ghost)] == [last, last - 1, last - 2]


def test_flags_have_their_own_probabilities():
    world = World(WorldConfig(), oversight=0.8, labels=Labels(shares=(1, 0.375)))
    state = worlds(world, 40_000)
    both = (state.diamond_flag & state.ghost_flag).float().mean()
    assert state.diamond_flag.float().mean() == pytest.approx(0.8, abs=0.01)
    assert state.ghost_flag.float().mean() == pytest.approx(0.3, abs=0.01)
    assert both == pytest.approx(0.24, abs=0.01)  # independent


@pytest.mark.parametrize(("level", "flag"), [(0.0, False), (1.0, True)])
def test_levels_0_and_1_are_exact(level, flag):
    state = worlds(World(WorldConfig(), level), 10_000)
    assert bool((state.diamond_flag == flag).all())
    assert bool((state.ghost_flag == flag).all())


def test_each_run_of_a_stack_has_its_own_level():
    world = World(WorldConfig(), torch.tensor([0.0, 1.0])[:, None, None])
    state = world.reset(torch.rand(2, 3, 50, world.noise_channels))
    assert not state.ghost_flag[0].any()
    assert state.ghost_flag[1].all()


def test_spurious_flags_avoid_the_two_squares():
    world = World(WorldConfig(spurious_oversight=1.0), 0.0)
    state = worlds(world, 100)
    assert torch.equal(state.spurious.sum(-1), torch.full((100,), 23))
    assert not state.spurious.gather(-1, state.diamond[:, None]).any()
    assert not state.spurious.gather(-1, state.ghost[:, None]).any()


def test_hidden_flags_still_decide_labels():
    world = World(WorldConfig(rows=2, cols=2, flags_visible=False), 1.0)
    state = worlds(world, 500)
    assert not world.observe(state)[:, 3].any()
    _, step = world.step(state, torch.zeros(500, dtype=torch.int64), state)
    assert torch.equal(step.seen.label, step.truth.ending)
    assert step.seen.terminated.any()


@pytest.mark.parametrize("level", [-0.1, 1.1, float("nan")])
def test_a_level_outside_0_1_is_refused(level):
    with pytest.raises(ValueError, match=r"oversight must lie in \[0, 1\]"):
        World(WorldConfig(), level)


@pytest.mark.parametrize("bad", [{"rows": 1}, {"cols": 0}, {"max_steps": 0}, {"row": 5}])
def test_bad_sizes_are_refused(bad):
    with pytest.raises(UserError, match=f"world.{next(iter(bad))}"):
        WorldConfig(**bad)


def test_what_lies_on_a_shortest_path():
    """In the rectangle between agent and diamond; worked out by walking all shortest paths."""
    world = World(WorldConfig(rows=3, cols=4))
    cells = range(12)

    def paths(a, b):
        """Cells on shortest paths from a to b."""
        (row, col), (to_row, to_col) = divmod(a, 4), divmod(b, 4)
        if a == b:
            return {a}
        found = {a}
        if row != to_row:
            found |= paths(a + (4 if to_row > row else -4), b)
        if col != to_col:
            found |= paths(a + (1 if to_col > col else -1), b)
        return found

    for agent, diamond, ghost in itertools.permutations(cells, 3):
        state = world.unkey(torch.tensor(((agent * 12 + diamond) * 12 + ghost) * 4))
        assert bool(world.ghost_on_path(state)) == (ghost in paths(agent, diamond))


def test_active_inputs_after_a_step_are_those_of_the_last_state():
    for spurious in (0.0, 0.5):
        world = World(WorldConfig(rows=3, cols=3, spurious_oversight=spurious), 0.5)
        state = world.reset(torch.rand(500, world.noise_channels))
        action = torch.randint(4, (500,))
        _, step = world.step(state, action, state)
        assert torch.equal(world.after(world.active(state), action), world.active(step.last))
        assert world.active(state).shape[-1] == world.n_active
