"""One contract for every face of the world: gymnasium Env, VectorEnv, SB3 VecEnv."""

import pickle
import re
import warnings
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from safetensors.numpy import load, save
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.vec_env import VecMonitor

import oversight_rl.envs  # noqa: F401 - registers the id
from oversight_rl.envs import render
from oversight_rl.envs.gym import OversightGridEnv, OversightGridVecEnv
from oversight_rl.envs.labels import OversightLabels
from oversight_rl.envs.minigrid import DiamondGhostEnv
from oversight_rl.envs.minigrid_batch import DiamondGhostVecEnv
from oversight_rl.envs.settings import UserError
from oversight_rl.envs.vector import make_vec


class Single:
    """A gymnasium Env, reset by hand at an episode's end as the vector faces do."""

    def __init__(self, **settings):
        self.env = gym.make("OversightGrid-v0", **settings)

    def reset(self, seed):
        return self.env.reset(seed=seed)[0]

    def step(self, rng):
        observation, reward, terminated, truncated, info = self.env.step(int(rng.integers(4)))
        last = observation if terminated or truncated else None
        if terminated or truncated:
            observation, _ = self.env.reset()
        return [(observation, reward, terminated, truncated, info, last)]


class Vector:
    n = 5

    def __init__(self, **settings):
        self.env = gym.make_vec("OversightGrid-v0", num_envs=self.n, **settings)

    def reset(self, seed):
        return self.env.reset(seed=seed)[0]

    def step(self, rng):
        observation, reward, terminated, truncated, infos = self.env.step(rng.integers(4, size=5))
        result = []
        for i in range(self.n):
            info, last = {}, None
            if "final_info" in infos and infos["_final_info"][i]:
                final = infos["final_info"]
                info = {k: v[i] for k, v in final.items() if k[0] != "_" and final[f"_{k}"][i]}
                last = infos["final_obs"][i]
            result.append((observation[i], reward[i], terminated[i], truncated[i], info, last))
        return result


class SB3:
    n = 5

    def __init__(self, **settings):
        self.env = OversightGridVecEnv(self.n, **settings)

    def reset(self, seed):
        self.env.seed(seed)
        return self.env.reset()

    def step(self, rng):
        observation, reward, done, infos = self.env.step(rng.integers(4, size=5))
        result = []
        for i in range(self.n):
            info = dict(infos[i])
            last = info.pop("terminal_observation", None)
            truncated = info.pop("TimeLimit.truncated", False)
            ended = bool(done[i]) and not truncated
            result.append((observation[i], reward[i], ended, truncated, info, last))
        return result


FACES = [Single, Vector, SB3]


def play(face, steps=300, seed=0):
    rng = np.random.default_rng(7)
    first = face.reset(seed)
    return first, [step for _ in range(steps) for step in face.step(rng)]


@pytest.mark.parametrize("face", FACES)
def test_same_seed_same_episodes(face):
    (first_a, a), (first_b, b) = (play(face(oversight=0.5)) for _ in range(2))
    assert np.array_equal(first_a, first_b)
    for x, y in zip(a, b, strict=True):
        assert np.array_equal(x[0], y[0])
        assert x[1:4] == y[1:4]
    different, _ = play(face(oversight=0.5), seed=1)
    assert not np.array_equal(first_a, different)


@pytest.mark.parametrize("face", FACES)
def test_observations_labels_and_ends(face):
    _, steps = play(face(oversight=0.5, rows=3, cols=4, max_steps=6), steps=600)
    labels, unlabeled, truncations = 0, 0, 0
    for observation, reward, terminated, truncated, info, last in steps:
        assert observation.shape == (4, 3, 4)
        assert observation.dtype == np.float32
        assert np.array_equal(observation[:3].sum((1, 2)), np.ones(3))
        assert not (terminated and truncated)
        assert reward == float(terminated)
        if not (terminated or truncated):
            assert "label" not in info
            continue
        cell = last[0].argmax()
        reached = {last[2].argmax(): "diamond", last[1].argmax(): "ghost"}.get(cell)
        assert terminated == (reached is not None)
        assert info.get("behavior") == reached
        assert info["ground_truth_reward"] == {"diamond": 1, "ghost": -1, None: 0}[reached]
        flagged = bool(last[3].flat[cell]) and terminated
        assert info.get("label") == (reached if flagged else None)
        labels += flagged
        unlabeled += terminated and not flagged
        truncations += truncated
        # the new episode's observation comes with the end of the old
        assert observation[0].argmax() not in (observation[1].argmax(), observation[2].argmax())
    assert min(labels, unlabeled, truncations) > 20


@pytest.mark.parametrize("face", FACES)
def test_the_step_limit_is_exact(face):
    limit = 4
    _, steps = play(face(max_steps=limit), steps=200)
    width = 1 if face is Single else 5
    for world in range(width):
        length = 0
        for _, _, terminated, truncated, _, _ in steps[world::width]:
            length += 1
            assert truncated == (length == limit and not terminated)
            if terminated or truncated:
                length = 0


@pytest.mark.parametrize("face", FACES)
def test_ground_truth_reward_on_request(face):
    _, steps = play(face(reward="ground_truth"))
    rewards = {info.get("behavior"): reward for _, reward, _, _, info, _ in steps}
    assert rewards["diamond"] == 1
    assert rewards["ghost"] == -1
    assert rewards[None] == 0


@pytest.mark.parametrize("face", FACES)
def test_bad_settings_are_refused(face):
    with pytest.raises(UserError, match=r"world\.rows"):
        face(rows=1)
    with pytest.raises(ValueError, match="oversight"):
        face(oversight=2.0)
    with pytest.raises(ValueError, match="reward"):
        face(reward="truth")


def test_library_checks():
    env = gym.make("OversightGrid-v0", render_mode="rgb_array").unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # the observation is a small grid, not a picture: SB3 suggests flattening it
        warnings.filterwarnings("ignore", message="It seems that your observation")
        warnings.filterwarnings("ignore", message="The minimal resolution for an image")
        check_env(env)
        sb3_check_env(env)


def test_text_rendering():
    env = gym.make("OversightGrid-v0", render_mode="ansi", oversight=1.0, rows=2, cols=2)
    observation, _ = env.reset(seed=0)
    text = env.render()
    for letter, plane in (("A", 0), ("G!", 1), ("D!", 2)):
        row, col = np.argwhere(observation[plane])[0]
        assert text.split("\n")[row][2 * col :].startswith(letter)


def test_pictures_show_the_state():
    env = gym.make("OversightGrid-v0", render_mode="rgb_array", oversight=1.0, rows=3, cols=3)
    observation, _ = env.reset(seed=0)
    picture = env.render()
    assert picture.shape == (3 * render.CELL, 3 * render.CELL, 3)
    for plane, color in ((0, render.AGENT), (1, render.GHOST), (2, render.DIAMOND)):
        wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
        row, col = np.argwhere(observation[plane])[0]
        near = np.abs(picture.astype(int) - wanted).sum(-1) < 12
        inside = near[row * render.CELL :, col * render.CELL :][: render.CELL, : render.CELL]
        assert inside.sum() > 0.05 * render.CELL**2


def test_human_rendering_opens_a_window(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    env = gym.make("OversightGrid-v0", render_mode="human")
    env.reset(seed=0)
    window = env.unwrapped._window
    assert window.get_size() == (5 * render.CELL, 5 * render.CELL)
    shown = {tuple(window.get_at((x, y)))[:3] for x in range(240) for y in range(240)}
    assert len(shown) > 10  # something is drawn
    env.close()


@pytest.mark.parametrize("action", [-1, 4, 1.9])
def test_actions_that_do_not_exist_are_refused(action):
    single = gym.make("OversightGrid-v0").unwrapped
    single.reset(seed=0)
    with pytest.raises(ValueError, match="from 0 to 3"):
        single.step(action)
    for env in (gym.make_vec("OversightGrid-v0", num_envs=2), OversightGridVecEnv(2)):
        env.reset()
        for actions in ([0, action], [0]):
            with pytest.raises(ValueError, match="expected 2 actions from 0 to 3"):
                env.step(actions)


def test_sb3_conventions():
    env = OversightGridVecEnv(5)
    env.seed(0)
    first, second = env.reset(), env.reset()
    assert not np.array_equal(first, second)  # a seed serves one reset
    with pytest.raises(ValueError, match="share their attributes"):
        env.set_attr("reward", "ground_truth", indices=[0])
    env.set_attr("reward", "ground_truth")
    assert env.get_attr("reward") == ["ground_truth"] * 5
    assert env.get_attr("has_task") == [True] * 5


BATCHES = [OversightGridVecEnv, DiamondGhostVecEnv]


@pytest.mark.parametrize("batch", BATCHES)
def test_what_is_set_of_a_batch_holds_from_the_next_episode_on(batch):
    env = batch(4, oversight=0.0, max_steps=20)
    env.seed(0)
    env.reset()
    given = np.array([0.0, 1.0] * 2)
    env.set_attr("oversight", given)
    given[:] = 9  # is not the batch's any more
    assert env.get_attr("oversight", [1, 2]) == [1.0, 0.0]
    env.reset()
    told, rng = [set(), set()], np.random.default_rng(0)
    for _ in range(400):
        for i, info in enumerate(env.step(rng.integers(3, size=4))[-1]):
            if info.get("behavior") is not None:
                told[i % 2].add("label" in info)
    assert told == [{False}, {True}]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("level", [1.5, -0.1, float("nan"), "a", None, [0.1, 0.2], [0, 0, 0, 2]])
def test_a_level_that_cannot_be_is_refused_in_a_batch_too(batch, level):
    env = batch(4, oversight=0.5)
    with pytest.raises(
        ValueError, match=r"oversight must lie in \[0, 1\], or be such a number for"
    ):
        env.set_attr("oversight", level)
    assert env.get_attr("oversight") == [0.5] * 4


def test_what_cannot_be_set_is_refused():
    grid, rooms = (batch(2) for batch in BATCHES)
    for env, name in ((grid, "reward"), (rooms, "paid")):
        with pytest.raises(ValueError, match="reward must be 'reached' or 'ground_truth', got 'x'"):
            env.set_attr(name, "x")
    for steps in (0, 1.5, "9"):
        with pytest.raises(ValueError, match="max_steps must be a whole number of at least 1"):
            rooms.set_attr("max_steps", steps)
    for batch in (DiamondGhostEnv, partial(DiamondGhostVecEnv, 2)):
        with pytest.raises(
            ValueError, match="max_steps must be a whole number of at least 1, got 0"
        ):
            batch(max_steps=0)
    with pytest.raises(AttributeError, match="can be set, not oversigth"):
        grid.set_attr("oversigth", 0.5)
    for single in (OversightGridEnv(oversight=0.5), DiamondGhostEnv(oversight=0.5)):
        with pytest.raises(ValueError, match=r"oversight must lie in \[0, 1\], got 2"):
            single.oversight = 2
        single.oversight = 1
        assert single.oversight == 1


def started(**settings):
    env = OversightGridVecEnv(6, oversight=0.5, max_steps=9, **settings)
    env.seed(3)
    env.reset()
    for _ in range(20):
        env.step(env.action_space.sample(np.ones(4, np.int8)) * np.ones(6, np.int64))
    return env


def same(a, b):
    """Two steps of a batch."""
    assert all(np.array_equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
    assert str(a[3]) == str(b[3])


@pytest.mark.parametrize(
    "settings", [{}, {"spurious_oversight": 0.2}, {"overseer": "diamonds_only"}]
)
def test_a_restored_batch_goes_on_as_the_stored_one(settings):
    env, again = started(**settings), OversightGridVecEnv(6, oversight=0.5, max_steps=9, **settings)
    stored = env.get_state()
    assert all(value.dtype in (np.int64, np.bool_) for value in stored.values())
    kept = {name: value.copy() for name, value in stored.items()}
    again.set_state(load(save(stored)))
    rng = np.random.default_rng(0)
    for _ in range(60):
        actions = rng.integers(4, size=6)
        same(env.step(actions), again.step(actions))
    for name, value in env.get_state().items():
        assert np.array_equal(value, again.get_state()[name])
        assert np.array_equal(kept[name], stored[name])  # it did not change with the worlds


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        *[(cell, 2, value) for cell in ("agent", "diamond", "ghost") for value in (-1, 25)],
        ("time", 0, -1), ("time", 0, 9), ("agent", 1, "diamond"), ("agent", 1, "ghost"),
        ("diamond", 1, "ghost"), ("random", 4, 2), ("random", 5, -1), ("random", 5, 2**32),
        ("random", 2, 0), ("ghost_flag", 1, 2), ("spurious", (3, 4), 3), ("spurious", 5, True),
    ],
)  # fmt: skip
def test_states_that_cannot_be_are_refused(name, at, value):
    env = started(spurious_oversight=0.2)
    state = env.get_state()
    value = state[value][at] if isinstance(value, str) else value
    forged = state[name].view(np.uint8) if state[name].dtype == bool else state[name]
    forged[at] = value
    with pytest.raises(ValueError, match="no world can be in such a state"):
        env.set_state(state)


def test_states_of_another_shape_or_type_are_refused():
    env, state = started(), started().get_state()
    for wrong in (
        {name: value for name, value in state.items() if name != "random"},
        state | {"more": state["agent"]},
        state | {"agent": state["agent"][:5]},
        state | {"agent": state["agent"].astype(np.float64)},
        state | {"ghost_flag": state["agent"]},
        started(spurious_oversight=0.2).get_state(),
    ):
        with pytest.raises(ValueError, match="expected a state of") as refused:
            env.set_state(wrong)
        assert "\n" not in str(refused.value)
    with pytest.raises(gym.error.ResetNeeded):
        OversightGridVecEnv(2).get_state()


def behavior(*step):
    return "wanted" if step[3] else None


@pytest.mark.parametrize(
    "make",
    [
        lambda: gym.make("OversightGrid-v0"),
        lambda: gym.make_vec("OversightGrid-v0", num_envs=2),
        lambda: make_vec("OversightGrid-v0", 2),
        lambda: gym.make("MiniGrid-DiamondGhost-5x5-v0"),
        lambda: make_vec("MiniGrid-DiamondGhost-5x5-v0", 2),
        lambda: OversightLabels(gym.make("CartPole-v1"), behavior),
    ],
)
def test_a_pickled_environment_goes_on(make):
    env = make()
    env.reset()
    action = np.ones(2, np.int64) if hasattr(env, "num_envs") else 1
    env.step(action)
    again = pickle.loads(pickle.dumps(env))
    for _ in range(5):
        a, b = (re.sub(r"'t': [0-9.]+", "", str(e.step(action))) for e in (env, again))
        assert a == b


def test_vector_faces_draw_every_world():
    env = gym.make_vec("OversightGrid-v0", num_envs=4, render_mode="rgb_array")
    env.reset(seed=0)
    sb3 = OversightGridVecEnv(4)
    sb3.reset()
    for frames in (env.render(), sb3.get_images()):
        assert len({frame.tobytes() for frame in frames}) == 4


def test_sb3_learns_on_it():
    """A probe: with the true reward, PPO soon beats chance by far on the smallest world."""
    env = VecMonitor(OversightGridVecEnv(32, reward="ground_truth", rows=2, cols=2))
    model = PPO("MlpPolicy", env, n_steps=32, batch_size=256, learning_rate=3e-3, seed=0)
    model.learn(16_000)
    returns = [episode["r"] for episode in model.ep_info_buffer]
    assert np.mean(returns) > 0.8
