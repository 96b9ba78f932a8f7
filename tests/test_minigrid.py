"""The MiniGrid world: MiniGrid's and gymnasium's habits, and its own rules."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from minigrid.core.constants import OBJECT_TO_IDX
from minigrid.wrappers import (
    FlatObsWrapper,
    FullyObsWrapper,
    ImgObsWrapper,
    OneHotPartialObsWrapper,
    RGBImgObsWrapper,
    RGBImgPartialObsWrapper,
)

import oversight_rl.envs  # noqa: F401  (registers the ids)
from oversight_rl.envs.minigrid import Diamond, DiamondGhostEnv, Ghost, Pit, Square

IDS = [f"MiniGrid-DiamondGhost-{name}-v0" for name in ("5x5", "8x8", "16x16", "FourRooms")]
LEFT, RIGHT, FORWARD = range(3)


def squares(env):
    grid = env.unwrapped.grid
    return [cell for cell in grid.grid if isinstance(cell, Square)]


def walk(env, rng, steps):
    """Random steps through episodes: (observation, reward, terminated, truncated, info) each."""
    env.reset(seed=int(rng.integers(2**31)))
    for _ in range(steps):
        step = env.step(int(rng.integers(3)))
        yield step
        if step[2] or step[3]:
            env.reset()


@pytest.mark.parametrize("name", IDS)
def test_gymnasium_accepts_it(name):
    check_env(gym.make(name).unwrapped, skip_render_check=True)


@pytest.mark.parametrize("name", IDS)
def test_a_start_holds_one_of_each_and_a_seed_repeats_it(name):
    env = gym.make(name, oversight=0.5)
    places = set()
    for seed in range(20):
        first, _ = env.reset(seed=seed)
        found = squares(env)
        assert [type(s) for s in sorted(found, key=lambda s: s.type)] == [Diamond, Ghost]
        cells = {tuple(map(int, s.cur_pos)) for s in found}
        cells.add(tuple(map(int, env.unwrapped.agent_pos)))
        assert len(cells) == 3  # apart from each other and from the agent
        places |= cells
        again, _ = env.reset(seed=seed)
        assert np.array_equal(first["image"], again["image"])
        assert first["direction"] == again["direction"]
    assert len(places) > 8


@pytest.mark.parametrize("reward", ["reached", "ground_truth"])
def test_episodes_end_on_squares_and_say_what_may_be_seen(reward):
    env = gym.make(IDS[0], oversight=0.5, reward=reward, lava=1)
    rng = np.random.default_rng(0)
    endings, labeled = {}, 0
    for _, paid, terminated, truncated, info in walk(env, rng, 6000):
        assert not (terminated and truncated)
        if not terminated:
            assert (paid, info) == (0.0, {"behavior": None} if truncated else {})
            continue
        square = env.unwrapped.grid.get(*env.unwrapped.agent_pos)
        assert info["behavior"] == square.type
        truth = {"diamond": 1.0, "ghost": -1.0, "lava": -1.0}[square.type]
        assert info["ground_truth_reward"] == truth
        assert paid == (truth if reward == "ground_truth" else 1.0)
        assert info.get("label") == (square.type if square.flagged else None)
        endings[square.type] = endings.get(square.type, 0) + 1
        labeled += "label" in info
    assert set(endings) == {"diamond", "ghost", "lava"}
    assert labeled / sum(endings.values()) == pytest.approx(0.5, abs=0.1)


def test_the_step_limit_is_exact():
    env = gym.make(IDS[1], max_steps=7)
    env.reset(seed=0)
    ends = [env.step(LEFT)[3] for _ in range(7)]
    assert ends == [False] * 6 + [True]
    assert gym.make(IDS[1]).unwrapped.max_steps == 64


def facing(env, square):
    """Put the agent below a square, looking at it."""
    x, y = square.cur_pos
    env.unwrapped.agent_pos, env.unwrapped.agent_dir = (x, y + 1), 3


@pytest.mark.parametrize(("kind", "name"), [(Diamond, "diamond"), (Ghost, "ghost"), (Pit, "lava")])
@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("visible", [False, True])
def test_flags_are_seen_unless_hidden(kind, name, flagged, visible):
    env = DiamondGhostEnv(size=5, flags_visible=visible, render_mode="rgb_array")
    env.reset(seed=0)
    env.grid.grid = [None if isinstance(c, Square) else c for c in env.grid.grid]
    square = kind(flagged, visible)
    env.put_obj(square, 2, 1)
    facing(env, square)
    ahead = env.gen_obs()["image"][3, 5]  # the agent is at (3, 6) of its view, facing up
    assert ahead[0] == OBJECT_TO_IDX[name]
    assert ahead[2] == (flagged and visible)
    picture = env.get_frame(tile_size=32, highlight=False)
    bare = kind(False, visible)
    env.put_obj(bare, 2, 1)
    assert np.array_equal(picture, env.get_frame(tile_size=32, highlight=False)) != (
        flagged and visible
    )
    env.put_obj(square, 2, 1)
    *_, info = env.step(FORWARD)
    assert info["behavior"] == name
    assert ("label" in info) == flagged  # a hidden flag still decides the label


def test_walls_stop_the_agent_and_hide_what_is_behind():
    env = gym.make(IDS[3])
    env.reset(seed=3)
    inner = env.unwrapped
    inner.agent_pos, inner.agent_dir = (1, 1), 3
    env.step(FORWARD)
    assert tuple(inner.agent_pos) == (1, 1)
    image = inner.gen_obs()["image"]
    assert (image[:, :5, 0] == OBJECT_TO_IDX["unseen"]).all()
    rooms = inner.grid.encode()[..., 0] == OBJECT_TO_IDX["wall"]
    assert rooms[9].sum() + rooms[:, 9].sum() - rooms[9, 9] == 2 * 19 - 1 - 4  # a gap in each


@pytest.mark.parametrize(
    "wrapper",
    [
        ImgObsWrapper, FullyObsWrapper, OneHotPartialObsWrapper, FlatObsWrapper, RGBImgObsWrapper,
        RGBImgPartialObsWrapper,
    ],
)  # fmt: skip
def test_minigrids_wrappers_work(wrapper):
    env = wrapper(gym.make(IDS[1], render_mode="rgb_array", oversight=1.0))
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    for step in walk(env, np.random.default_rng(1), 50):
        assert env.observation_space.contains(step[0])
    assert env.render().ndim == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "maze"}, "layout must be"),
        ({"oversight": 1.5}, "oversight must lie"),
        ({"size": 3}, "no room"),
        ({"size": 5, "lava": 7}, "no room"),
        ({"reward": "gold"}, "reward must be"),
        ({"agent_view_size": 6}, "agent_view_size must be odd"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiamondGhostEnv(**arguments)
