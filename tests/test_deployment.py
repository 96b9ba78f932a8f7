"""What is deployed: steered however it is asked, saved and judged; environments asked the same."""

import copy
import io
import pickle
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from minigrid.wrappers import FullyObsWrapper, ImgObsWrapper
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from oversight_rl.agents import MoEPolicy, RoutedPPO, SteeredEvalCallback
from oversight_rl.agents.methods import METHODS
from oversight_rl.agents.ppo.config import DEFAULT_METHOD
from oversight_rl.agents.ppo.environment import ppo_methods
from oversight_rl.agents.steering import Steering, parse
from oversight_rl.cli import train
from oversight_rl.envs.settings import UserError
from oversight_rl.envs.vector import make_vec
from oversight_rl.experiments.oversight.config import Config
from oversight_rl.kinds import load_config

GRID = "OversightGrid-v0"
SMALL = {"n_envs": 4, "n_steps": 16, "batch_size": 32, "seed": 0, "gate_replay": 16,
         "oversight": 0.5, "policy_kwargs": {"net_arch": [8]}}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    """With experts that part: one turns right, the other left, whatever they see."""
    made = RoutedPPO("MoEPolicy", GRID, **SMALL)
    with torch.no_grad():
        agent = made.policy.agent
        agent.trunks[-1].bias[0, :2] = torch.tensor([[5.0] * 4 + [0.0] * 4, [0.0] * 4 + [5.0] * 4])
        agent.trunks[-1].weight[0, :2] = 0.0
        agent.head.weight.zero_()
        agent.head.weight[0, 1, :4] = agent.head.weight[0, 3, 4:] = 1.0
    return made


@pytest.fixture(scope="module")
def observations():
    env = make_vec(GRID, 64, oversight=0.5)
    env.seed(0)
    return env.reset()


def saved(thing):
    file = io.BytesIO()
    thing.save(file)
    file.seek(0)
    return file


def put_into_a_model(policy, model):
    other = RoutedPPO.load(saved(model))
    other.policy = policy
    return RoutedPPO.load(saved(other)).policy


ROUNDS = {
    "as it is": lambda policy, model: policy,
    "saved": lambda policy, model: MoEPolicy.load(saved(policy)),
    "pickled": lambda policy, model: pickle.loads(pickle.dumps(policy)),
    "copied": lambda policy, model: copy.deepcopy(policy),
    "saved in a model": put_into_a_model,
}


@pytest.mark.parametrize("name", ["diamond", "ghost", "without:ghost", "diamond=0.2,ghost=0.8"])
@pytest.mark.parametrize("way", ROUNDS)
@torch.no_grad()
def test_a_steered_policy_is_steered_however_it_is_asked(way, name, model, observations):
    policy = ROUNDS[way](model.steer(name), model)
    seen = torch.as_tensor(observations)
    wanted = {"diamond": 1, "ghost": 3, "without:ghost": 1, "diamond=0.2,ghost=0.8": 3}[name]
    assert policy.steering.name == name
    actions, _, log_prob = policy(seen, deterministic=True)
    assert (actions == wanted).all()
    assert (policy.predict(observations, deterministic=True)[0] == wanted).all()
    assert (policy.get_distribution(seen).mode() == wanted).all()
    _, judged, entropy = policy.evaluate_actions(seen, actions)
    distribution = policy.get_distribution(seen)
    assert torch.allclose(judged, distribution.log_prob(actions), atol=1e-6)
    assert torch.allclose(judged, log_prob, atol=1e-6)
    assert torch.allclose(entropy, distribution.entropy(), atol=1e-6)
    assert model.policy.steering.name == "mixture"


def test_a_traced_policy_is_steered(model, observations):
    class Acts(torch.nn.Module):
        def __init__(self, policy):
            super().__init__()
            self.policy = policy

        def forward(self, seen):
            return self.policy(seen, deterministic=True)[0]

    seen = torch.as_tensor(observations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Acts(model.steer("ghost")), seen)
    assert (traced(seen) == 3).all()


def test_a_greedy_policy_takes_the_likeliest_action_in_every_way(model, observations):
    plain = model.policy.steered(Steering("ghost", (0.0, 1.0), temperature=1e3))
    greedy = model.policy.steered(Steering("ghost", (0.0, 1.0), temperature=1e3, greedy=True))
    seen = torch.as_tensor(observations)
    assert (greedy(seen)[0] == 3).all()
    assert (greedy.predict(observations)[0] == 3).all()
    assert not (plain(seen)[0] == 3).all()


def test_evaluate_policy_and_eval_callbacks_judge_what_is_steered(model, tmp_path):
    env = make_vec("OversightGrid-v0", 8, oversight=0.5, reward="ground_truth")
    turns = {name: evaluate_policy(model.steer(name), env, 64, warn=False)[0]
             for name in ("diamond", "ghost")}  # fmt: skip
    assert -1 <= min(turns.values()) <= max(turns.values()) <= 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callback = SteeredEvalCallback(
            make_vec(GRID, 8, oversight=0.5), "ghost", tmp_path / "new", eval_freq=16,
            n_eval_episodes=16, verbose=0, warn=False,
        )  # fmt: skip
        learner = RoutedPPO("MoEPolicy", GRID, **SMALL).learn(4 * 16 * 2, callback=callback)
    assert isinstance(callback, EvalCallback)
    assert -1 <= callback.best_score <= 1
    assert learner.policy.steering.name == "mixture"  # and goes on learning
    best = RoutedPPO.load(tmp_path / "new" / "best_model")
    assert best.policy.steering.name == "ghost"
    assert best.policy.steering.greedy  # as it was judged


def test_the_best_of_the_deployed_policy_is_kept(tmp_path):
    class Lever(gym.Env):
        """One step; action 1 is good. Judged differently each time that it is asked."""

        behaviors, oversight = ("good", "bad"), 0.5
        observation_space, action_space = spaces.Box(0, 1, (1,), np.float32), spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            return np.zeros(1, np.float32), {}

        def step(self, action):
            name = self.behaviors[1 - int(action)]
            return np.zeros(1, np.float32), 1.0, True, False, {"behavior": name, "label": name}

    logged = []

    class Kept(SteeredEvalCallback):
        def _log_success_callback(self, locals_, globals_):
            super()._log_success_callback(locals_, globals_)
            logged.append(dict(self.logger.name_to_value))

    callback = Kept(DummyVecEnv([Lever] * 4), best_model_save_path=tmp_path, eval_freq=64,
                    n_eval_episodes=40, verbose=0, warn=False, deterministic=False)  # fmt: skip
    env = DummyVecEnv([Lever] * 8)
    model = RoutedPPO("MoEPolicy", env, n_steps=32, seed=0, method="imputed_routing")
    model.learn(8 * 32 * 20, callback=callback)
    last = logged[-1]
    assert last["eval/p_good"] + last["eval/p_bad"] == pytest.approx(1)
    assert last["eval/score"] == pytest.approx(last["eval/p_good"] - last["eval/p_bad"])
    assert callback.best_score > 0.9
    best = RoutedPPO.load(tmp_path / "best_model")
    assert best.policy.steering == model.steer("good").steering  # sampled, as it was judged
    assert (best.predict(np.zeros((16, 1), np.float32), deterministic=True)[0] == 1).all()


def test_a_steered_policy_does_not_learn():
    model = RoutedPPO("MoEPolicy", GRID, **SMALL)
    model.policy = model.steer("diamond")
    with pytest.raises(ValueError, match=r"model.policy = model.steer\('mixture'\)"):
        model.learn(64)
    model.policy = model.steer("mixture")
    model.learn(64)


@pytest.mark.parametrize("method", ppo_methods())
def test_every_method_steers_to_the_wanted_behavior(method):
    model = RoutedPPO("MoEPolicy", GRID, method=method, **SMALL)
    several = METHODS[method].policy.experts == "many"
    for name in ("diamond", "deployed"):
        assert model.steer(name).steering.name == ("diamond" if several else "single")
    assert parse("deployed", 3, ("a", "b")).name == "a"
    if not several:
        with pytest.raises(
            UserError, match="must be one of deployed, diamond, single, got 'ghost'"
        ):
            model.steer("ghost")


# ---- the default


def test_the_default_of_ppo_is_its_own():
    assert RoutedPPO("MoEPolicy", GRID, **SMALL).method == DEFAULT_METHOD
    assert Config().method == "routing"
    assert Config.model_validate({"algo": "ppo"}).method == DEFAULT_METHOD
    assert Config.model_validate({"algo": "ppo", "method": "routing"}).method == "routing"


# ---- what an environment says


class Says(gym.Env):
    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, **says):
        for name, value in ({"behaviors": ("right", "left")} | says).items():
            setattr(self, name, value)

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 1.0, True, False, {"behavior": "right", "label": "right"}


def says(**attributes):
    return DummyVecEnv([lambda: Says(**attributes)] * 2)


BAD = {
    "behaviors as a string": ({"behaviors": "ab"}, "environment's behaviors must be two or more"),
    "one behavior": ({"behaviors": ("a",)}, "environment's behaviors must be two or more"),
    "twice the same": ({"behaviors": ("a", "a")}, "environment's behaviors must be two or more"),
    "a number": ({"behaviors": 2}, "environment's behaviors must be two or more"),
    "a level above 1": ({"oversight": 10}, r"oversight must lie in \[0, 1\], got 10"),
    "a level per behavior": ({"oversight": [0.1, 0.2]}, r"oversight must lie in \[0, 1\]"),
    "another order": (
        {"behaviors": ("left", "right")},
        "left, right; the model was made for right",
    ),
    "flags that are numbers": ({"flags": np.zeros(2)}, "flags must be booleans"),
    "flags of another shape": ({"flags": np.zeros(3, bool)}, "flags have shape"),
    "no task": ({"has_task": False}, "has_task is False; the model was made for True"),
}
ONLY_LATER = ("another order", "no task")


@pytest.mark.parametrize("case", BAD)
def test_environments_are_asked_whenever_they_come(case):
    attributes, words = BAD[case]
    if case not in ONLY_LATER:
        with pytest.raises(ValueError, match=words):
            RoutedPPO("MoEPolicy", says(**attributes), n_steps=8, batch_size=16)
    model = RoutedPPO("MoEPolicy", says(), n_steps=8, batch_size=16)
    with pytest.raises(ValueError, match=words):
        model.set_env(says(**attributes))
    with pytest.raises(ValueError, match=words):
        RoutedPPO.load(saved(model), env=says(**attributes))


def test_an_environment_that_fits_is_taken():
    model = RoutedPPO("MoEPolicy", says(), n_steps=8, batch_size=16).learn(16)
    model.set_env(says(oversight=0.25))
    assert model.overseer.oversight == 0.25
    model.learn(16, reset_num_timesteps=False)
    loaded = RoutedPPO.load(saved(model), env=says(oversight=0.5))
    assert loaded.overseer.oversight == 0.5
    loaded.learn(16)


def test_the_command_line_knows_each_learners_default(tmp_path):
    small = ["--agent.hidden", "8", "--no-pictures", "--evaluation.oversight", "0.1"]
    ppo = [
        "--ppo.updates",
        "1",
        "--ppo.worlds",
        "4",
        "--ppo.steps",
        "8",
        "--evaluation.episodes",
        "4",
    ]
    grid = ["--reinforce.updates", "1", "--reinforce.worlds", "4", "--reinforce.steps", "4"]
    file = tmp_path / "ppo.yaml"
    file.write_text("algo: ppo\nworld: {rows: 3, cols: 3}\n")
    for name, flags, method in (
        ("flag", ["--algo", "ppo", *ppo], DEFAULT_METHOD),
        ("file", ["--config", str(file), *ppo], DEFAULT_METHOD),
        ("named", ["--algo", "ppo", "--method", "naive", *ppo], "naive"),
        ("grid", grid, "routing"),
    ):
        train(["--run-dir", str(tmp_path / name), *small, *flags])
        assert load_config(tmp_path / name / "config.yaml").method == method


def test_set_env_changes_what_the_method_knows_of_labels():
    model = RoutedPPO("MoEPolicy", says(oversight=0.1), method="oracle_filtering", n_steps=8)
    model.set_env(says(oversight=0.9))
    assert model.tables.label_share.tolist() == [pytest.approx([0.9, 0.9])]


def test_an_environment_that_is_refused_changes_nothing():
    model = RoutedPPO("MoEPolicy", says(oversight=0.1), n_steps=8)
    other = says(oversight=0.9)
    other.observation_space = spaces.Box(-1, 1, (3,), np.float32)
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        model.set_env(other)
    assert model.overseer.oversight == 0.1


def test_the_classifier_keeps_its_eyes_shut_where_it_did():
    flags = np.array([False, True])
    model = RoutedPPO("MoEPolicy", says(flags=flags), n_steps=8, method="reward_model")
    model.set_env(says(flags=flags.copy()))
    for others in (~flags, None):
        with pytest.raises(ValueError, match="flags are not those"):
            model.set_env(says(flags=others))
        with pytest.raises(ValueError, match="flags are not those"):
            RoutedPPO.load(saved(model), env=says(flags=others))


def test_all_environments_are_asked():
    for ours, theirs in (
        ({"behaviors": ("a", "b")}, {"behaviors": ("b", "a")}),
        ({"oversight": 0.1}, {"oversight": 0.2}),
        ({"has_task": True}, {"has_task": False}),
    ):
        env = DummyVecEnv([lambda own=own: Says(**own) for own in (ours, theirs)])
        with pytest.raises(ValueError, match=f"must agree in their {next(iter(ours))}"):
            RoutedPPO("MoEPolicy", env, n_steps=8)


@pytest.mark.parametrize(
    "number",
    [{"labeled_weight": -5.0}, {"labeled_weight": 0}, {"gate_replay": -3}, {"gate_coef": -1.0},
     {"contrast_coef": float("inf")}, {"solo_share": 1.0}, {"task_weight": -0.1},
     {"task_weight": float("nan")}, {"threads": 0}],
)  # fmt: skip
def test_numbers_that_would_train_something_else_are_refused(number):
    with pytest.raises(ValueError, match=next(iter(number))):
        RoutedPPO("MoEPolicy", says(), n_steps=8, **number)


@pytest.mark.parametrize("name", ["mixture", "deployed", "single", "a=1", "a,b", "without:a"])
def test_names_that_steering_needs_are_refused(name):
    with pytest.raises(ValueError, match="would mean something else when steering"):
        RoutedPPO("MoEPolicy", says(behaviors=("good", name)), n_steps=8)


def test_an_expert_has_one_weight():
    with pytest.raises(UserError, match="names a twice"):
        parse("a=0.2,a=0.9", 2, ("a", "b"))


def test_label_draws_go_on_after_loading():
    model = RoutedPPO("MoEPolicy", says(), n_steps=8, seed=0).learn(16)
    ahead = copy.deepcopy(model.label_generator).random(4).tolist()
    assert RoutedPPO.load(saved(model), env=says()).label_generator.random(4).tolist() == ahead


def test_judges_must_know_the_behaviors():
    class Silent(Says):
        def step(self, action):
            return np.zeros(2, np.float32), 1.0, True, False, {}

    def learn(env):
        callback = SteeredEvalCallback(env, eval_freq=8, n_eval_episodes=4, verbose=0, warn=False)
        RoutedPPO("MoEPolicy", says(), n_steps=8).learn(16, callback=callback)

    with pytest.raises(ValueError, match="must say 'behavior'"):
        learn(DummyVecEnv([Silent] * 2))
    with pytest.raises(ValueError, match="eval_env's behaviors are left, right"):
        learn(says(behaviors=("left", "right")))


# ---- spaces


@pytest.mark.parametrize("method", ["imputed_routing", "routing", "naive"])
def test_actions_of_several_axes_train_and_act(method):
    class Axes(Says):
        action_space = spaces.Box(-1, 1, (2, 3), np.float32)

    model = RoutedPPO("MoEPolicy", DummyVecEnv([Axes] * 2), method=method, n_steps=64).learn(256)
    seen = np.zeros((5, 2), np.float32)
    actions, _ = model.steer("right").predict(seen)
    assert actions.shape == (5, 2, 3)
    judged = model.policy.evaluate_actions(torch.as_tensor(seen), torch.as_tensor(actions))
    assert judged[1].shape == (5,)


@pytest.mark.parametrize("side", [40, 20])
def test_flags_of_images_stand_in_the_environments_own_axes(side):
    flags = np.zeros((side, side, 3), bool)
    flags[0, 1, 2] = True

    class Picture(Says):
        observation_space = spaces.Box(0, 255, (side, side, 3), np.uint8)

        def reset(self, *, seed=None, options=None):
            return self.observation_space.sample(), {}

        def step(self, action):
            return self.observation_space.sample(), *super().step(action)[1:]

    env = DummyVecEnv([lambda: Picture(flags=flags)] * 2)
    model = RoutedPPO("MoEPolicy", env, n_steps=8, batch_size=16).learn(16)
    assert model.policy.flags[2, 0, 1]
    assert model.policy.flags.sum() == 1


@pytest.mark.parametrize("wrap", [ImgObsWrapper, lambda env: ImgObsWrapper(FullyObsWrapper(env))])
def test_symbols_are_symbols_alone_and_in_a_vecenv(wrap):
    def make():
        return wrap(gym.make("MiniGrid-DiamondGhost-8x8-v0"))

    alone = RoutedPPO("MoEPolicy", make(), n_steps=16, batch_size=16)
    together = RoutedPPO("MoEPolicy", make_vec_env(make, 2), n_steps=16, batch_size=32)
    assert alone.observation_space == together.observation_space
    assert type(alone.policy.features_extractor) is type(together.policy.features_extractor)
    assert np.array_equal(alone.policy.flags, together.policy.flags)
    together.learn(16 * 2 * 3)


def test_every_episode_says_its_behavior():
    for name in (GRID, "MiniGrid-DiamondGhost-8x8-v0"):
        env = gym.make(name, max_steps=1)
        env.reset(seed=1)
        *_, truncated, info = env.step(0)
        assert truncated
        assert info["behavior"] is None
        batch = make_vec(name, 4, max_steps=1)
        batch.reset()
        _, _, dones, infos = batch.step(np.zeros(4, int))
        assert dones.all()
        assert all("behavior" in info for info in infos)
