"""The batch of MiniGrid worlds: equal to the real ones, and SB3's habits."""

import gymnasium as gym
import numpy as np
import pytest
from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX
from minigrid.wrappers import FlatObsWrapper
from safetensors.numpy import load, save
from scipy.stats import chi2_contingency, chisquare
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecMonitor,
    VecTransposeImage,
    is_vecenv_wrapped,
)

import oversight_rl.envs  # noqa: F401 - registers the ids
from oversight_rl.envs.gym import OversightGridVecEnv
from oversight_rl.envs.minigrid import DiamondGhostEnv, Square, SymbolicObservation
from oversight_rl.envs.minigrid_batch import DiamondGhostVecEnv
from oversight_rl.envs.settings import UserError
from oversight_rl.envs.vector import make_vec

SB3_KEYS = {"terminal_observation", "TimeLimit.truncated", "episode"}
# Settings, and how many random steps to compare; small views are the quickest for MiniGrid.
COMPARED = [
    ({"size": 5, "oversight": 0.5, "max_steps": 30}, 10_000),
    ({"size": 8}, 10_000),
    ({"size": 19, "layout": "four_rooms", "oversight": 0.25}, 20_000),
    (
        {"size": 8, "lava": 3, "flags_visible": False, "oversight": 0.5, "agent_view_size": 5},
        10_000,
    ),
    ({"size": 10, "layout": "four_rooms", "agent_view_size": 9, "oversight": 1.0}, 5_000),
    ({"size": 9, "layout": "four_rooms", "lava": 2, "agent_view_size": 5}, 10_000),
    ({"size": 7, "layout": "four_rooms", "reward": "ground_truth", "agent_view_size": 3}, 20_000),
    ({"size": 6, "lava": 1, "oversight": 1.0, "max_steps": 9, "agent_view_size": 3}, 15_000),
]


def walk(env, steps, seed=0):
    """Seeded random steps: (observation, reward, done, infos) each."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        yield env.step(rng.choice(3, env.num_envs, p=[0.2, 0.2, 0.6]))


def started(num_envs=8, seed=0, **settings):
    env = DiamondGhostVecEnv(num_envs, **settings)
    env.seed(seed)
    env.reset()
    return env


def test_the_comparison_is_long_enough():
    assert sum(steps for _, steps in COMPARED) == 100_000


@pytest.mark.parametrize(("settings", "steps"), COMPARED)
def test_equal_to_the_real_worlds(settings, steps):
    n = 20
    batch = started(n, **settings)
    real = [batch.world(i) for i in range(n)]
    rng = np.random.default_rng(0)
    ends = {"label": 0, "behavior": 0, "timeout": 0}
    for _ in range(steps // n):
        actions = rng.choice(3, n, p=[0.2, 0.2, 0.6])
        observation, reward, done, infos = batch.step(actions)
        for i, env in enumerate(real):
            wanted, paid, terminated, truncated, info = env.step(actions[i])
            assert (reward[i], done[i]) == (paid, terminated or truncated)
            assert {k: v for k, v in infos[i].items() if k not in SB3_KEYS} == info
            seen = observation[i]
            if done[i]:
                assert infos[i]["TimeLimit.truncated"] == truncated
                record = infos[i]["episode"]
                assert (record["r"], record["l"]) == (paid, env.step_count)
                ends["timeout"] += truncated
                for name in info.keys() & ends:
                    ends[name] += 1
                real[i] = batch.world(i)
                assert real[i].step_count == 0
                assert np.array_equal(seen, real[i].gen_obs()["image"])
                seen = infos[i]["terminal_observation"]
            assert np.array_equal(seen, wanted["image"])
    for i, env in enumerate(real):
        assert np.array_equal(batch.world(i).grid.encode(), env.grid.encode())
        assert batch.world(i).agent_pos == tuple(env.agent_pos)
    assert ends["behavior"] > 20
    assert ends["label"] > 0
    assert ends["timeout"] > 0 or batch.get_attr("max_steps")[0] > 50


def starts(env, resets):
    """Of each start: things as cell indices, the flags, the direction, and where walls are."""
    rows = []
    for _ in range(resets):
        env.reset()
        for one in [env] if isinstance(env, DiamondGhostEnv) else map(env.world, range(100)):
            squares = {c.type: c for c in one.grid.grid if isinstance(c, Square)}
            cells = [one.agent_pos, *(squares[kind].cur_pos for kind in sorted(squares))]
            flags = [squares[kind].flagged for kind in sorted(squares)]
            walls = [c is not None and c.type == "wall" for c in one.grid.grid]
            places = [int(y) * one.width + int(x) for x, y in cells]
            rows.append((*places, *flags, one.agent_dir, walls))
    *columns, walls = zip(*rows, strict=True)
    return np.array(columns), np.unique(np.array(walls), axis=0, return_inverse=True)


@pytest.mark.parametrize(
    "settings",
    [{"size": 5, "lava": 1, "oversight": 0.3}, {"size": 8, "layout": "four_rooms", "lava": 1}],
)
def test_starts_have_the_real_distribution(settings):
    real = DiamondGhostEnv(**settings)
    real.reset(seed=0)
    batch = started(100, **settings)
    (ours, (layouts, which)), (theirs, (real_layouts, real_which)) = (
        starts(batch, 30),
        starts(real, 3000),
    )
    assert np.array_equal(layouts, real_layouts)
    for x, y in zip([*ours, which.ravel()], [*theirs, real_which.ravel()], strict=True):
        counts = np.array([[np.sum(z == value) for value in np.union1d(x, y)] for z in (x, y)])
        assert chi2_contingency(counts).pvalue > 1e-4
    assert all(len(set(cells)) == 4 for cells in ours[:4].T)
    if settings["size"] == 5:  # agent and diamond are on any two cells alike
        pairs = np.unique(ours[0] * 25 + ours[1], return_counts=True)[1]
        assert len(pairs) == 72
        assert chisquare(pairs).pvalue > 1e-4
        flags = np.unique(ours[4:7], axis=1, return_counts=True)[1] / ours.shape[1]
        assert flags == pytest.approx(
            [0.7**3, *[0.147] * 2, 0.063, 0.147, *[0.063] * 2, 0.027], abs=0.03
        )


@pytest.mark.parametrize("layout", ["empty", "four_rooms"])
def test_a_restored_state_has_the_same_future(layout):
    settings = {"layout": layout, "oversight": 0.5, "lava": 1, "max_steps": 20}
    env = started(**settings)
    for _ in walk(env, 30):
        pass
    stored = load(save(env.get_state()))
    first = list(walk(env, 60, seed=1))
    again = DiamondGhostVecEnv(8, **settings)
    again.set_state(stored)
    assert sum(step[2].sum() for step in first) > 10
    for a, b in zip(first, walk(again, 60, seed=1), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
        for x, y in zip(a[3], b[3], strict=True):
            assert x.keys() == y.keys()
            assert x.get("label") == y.get("label")
            last = "terminal_observation"
            assert np.array_equal(x.get(last), y.get(last))
    for name, value in env.get_state().items():
        assert np.array_equal(value, again.get_state()[name])


def test_a_stored_state_does_not_change_with_the_worlds():
    env = started()
    stored = env.get_state()
    copies = {name: value.copy() for name, value in stored.items()}
    for _ in range(2):
        for _ in walk(env, 100):
            pass
        assert all(np.array_equal(stored[name], copies[name]) for name in copies)
        env.set_state(stored)


def test_same_seed_same_episodes():
    a, b, other = started(), started(), started(seed=1)
    for x, y in zip(walk(a, 100), walk(b, 100), strict=True):
        assert np.array_equal(x[0], y[0])
    assert not np.array_equal(a.get_state()["tiles"], other.get_state()["tiles"])
    first, second = a.reset(), a.reset()
    assert not np.array_equal(first, second)  # a seed serves one reset


def test_sb3_conventions():
    env = started(5, render_mode="rgb_array", max_steps=6)
    space = SymbolicObservation(DiamondGhostEnv()).observation_space
    assert (env.observation_space, env.action_space) == (space, gym.spaces.Discrete(3))
    for observation, reward, done, infos in walk(env, 50):
        assert reward.dtype == np.float32
        assert done.dtype == bool
        assert all(space.contains(x) for x in observation)
        for ended, info in zip(done, infos, strict=True):
            assert info.keys() >= SB3_KEYS if ended else info == {}
    assert env.get_attr("behaviors") == [("diamond", "ghost")] * 5
    assert env.get_attr("step_count", [1])[0] == env.get_state()["steps"][1]
    with pytest.raises(ValueError, match="share their attributes"):
        env.set_attr("oversight", 1.0, indices=[0])
    with pytest.raises(AttributeError, match="can be set, not lava"):
        env.set_attr("lava", 1)
    env.set_attr("oversight", 1.0)
    env.reset()
    assert all(
        square.flagged
        for i in range(5)
        for square in env.world(i).grid.grid
        if isinstance(square, Square)
    )
    with pytest.raises(AttributeError, match="no single world"):
        env.env_method("hash")
    assert env.env_is_wrapped(Monitor) == [True] * 5
    frames = env.get_images()
    assert len({frame.tobytes() for frame in frames}) == 5
    assert frames[0].shape == (8 * 32, 8 * 32, 3)
    assert env.render().ndim == 3
    env.close()
    assert env.get_images() == [None] * 5


def test_a_world_goes_on_by_itself():
    env = started(3)
    before = env.get_state()
    world = env.world(1)
    world.step(0)
    world.reset(seed=0)
    assert all(np.array_equal(value, before[name]) for name, value in env.get_state().items())
    assert world.get_frame().shape == env.world(1).get_frame().shape


@pytest.mark.filterwarnings("ignore:It seems that your observation", "ignore:The minimal res")
def test_symbols_are_not_taken_for_a_picture():
    env = SymbolicObservation(gym.make("MiniGrid-DiamondGhost-8x8-v0"))
    space = env.observation_space
    assert space.shape == (7, 7, 3)
    assert space.dtype == np.uint8
    assert space.high[0, 0].tolist() == [OBJECT_TO_IDX["ghost"], COLOR_TO_IDX["grey"], 3]
    assert not is_image_space(space)
    check_env(env)
    observation, _ = env.reset(seed=0)
    assert np.array_equal(observation, env.unwrapped.gen_obs()["image"])
    with pytest.raises(ValueError, match="MiniGrid's symbols"):
        SymbolicObservation(FlatObsWrapper(gym.make("MiniGrid-DiamondGhost-8x8-v0")))


@pytest.mark.parametrize("wrap", [lambda env: env, VecMonitor])
@pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`")
def test_sb3_trains_and_evaluates_on_it(wrap):
    env = wrap(DiamondGhostVecEnv(16, size=5))
    model = PPO("MlpPolicy", env, n_steps=64, batch_size=256, n_epochs=1, seed=0)
    assert not is_vecenv_wrapped(model.get_env(), VecTransposeImage)
    model.learn(2048)
    assert {episode["r"] for episode in model.ep_info_buffer} <= {0.0, 1.0}
    assert len(model.ep_info_buffer) > 50
    _, lengths = evaluate_policy(model, env, 20, return_episode_rewards=True)
    assert max(lengths) <= 40


def test_make_vec_makes_what_fits_the_id():
    env = make_vec("MiniGrid-DiamondGhost-FourRooms-v0", 3, oversight=0.25)
    assert isinstance(env, DiamondGhostVecEnv)
    assert (env.num_envs, env.get_attr("width")[0], env.get_attr("oversight")[0]) == (3, 19, 0.25)
    assert env.get_attr("layout")[0] == "four_rooms"
    assert isinstance(make_vec("OversightGrid-v0", 2, rows=3), OversightGridVecEnv)
    other = make_vec("CartPole-v1", 2)
    assert isinstance(other, DummyVecEnv)
    assert other.env_is_wrapped(Monitor) == [True, True]
    stock = make_vec("minigrid:MiniGrid-LavaCrossingS9N1-v0", 2, max_steps=5)
    assert stock.reset().shape == (2, 7, 7, 3)
    assert not is_image_space(stock.observation_space)
    assert "episode" in [stock.step(np.zeros(2, int)) for _ in range(5)][-1][3][0]


def test_a_registration_with_more_than_the_world_is_not_batched():
    gym.register("Limited-v0", "oversight_rl.envs.minigrid:DiamondGhostEnv", max_episode_steps=3)
    try:
        env = make_vec("Limited-v0", 1)
        env.reset()
        infos = [env.step(np.zeros(1, int))[3] for _ in range(3)]
    finally:
        gym.registry.pop("Limited-v0")
    assert infos[-1][0]["TimeLimit.truncated"]


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("MiniGrid-DiamondGhost-9x9-v0", "did you mean 'MiniGrid-DiamondGhost-8x8-v0'"),
        ("OversightGrid-v7", "did you mean 'OversightGrid-v0'"),
        ("no_such_module:CartPole-v1", "no environment 'no_such_module:CartPole-v1'"),
        ("what is this?", "no environment 'what is this"),
    ],
)
def test_unknown_ids_are_refused(env_id, message):
    with pytest.raises(UserError, match=message) as error:
        make_vec(env_id, 2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_envs": 0}, "num_envs must be at least 1"),
        ({"render_mode": "ansi"}, "render_mode must be"),
        ({"layout": "maze"}, "layout must be"),
        ({"oversight": 1.5}, "oversight must lie"),
        ({"size": 5, "lava": 7}, "no room"),
        ({"reward": "gold"}, "reward must be"),
        ({"agent_view_size": 1}, "agent_view_size must be odd"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiamondGhostVecEnv(**{"num_envs": 2, **arguments})


def test_misuse_is_refused():
    env = DiamondGhostVecEnv(2)
    for call in (lambda: env.step([0, 0]), env.get_state, lambda: env.world(0)):
        with pytest.raises(gym.error.ResetNeeded):
            call()
    env.reset()
    for actions in ([0], [0, 3], [-1, 0], [0.5, 1.0]):
        with pytest.raises(ValueError, match="expected 2 actions from 0 to 2"):
            env.step(actions)
    state = env.get_state()
    with pytest.raises(ValueError, match="expected a state of shapes"):
        DiamondGhostVecEnv(3).set_state(state)
    state.pop("random")
    with pytest.raises(ValueError, match="expected a state of shapes"):
        env.set_state(state)
    with pytest.raises(UserError, match="num_envs must be at least 1"):
        make_vec("CartPole-v1", 0)


def test_worlds_can_have_levels_of_their_own():
    env = started(6)
    env.set_attr("oversight", np.array([0.0, 1.0] * 3))
    for _ in range(5):
        env.reset()
        for i in range(6):
            world = env.world(i)
            assert world.oversight == i % 2
            flags = [cell.flagged for cell in world.grid.grid if isinstance(cell, Square)]
            assert flags == [bool(i % 2)] * 2
    for _, _, done, infos in walk(env, 400):  # started anew in the midst of a batch, too
        labeled = [i for i in np.flatnonzero(done) if "label" in infos[i]]
        reached = [i for i in np.flatnonzero(done) if infos[i]["behavior"]]
        assert labeled == [i for i in reached if i % 2]
