"""RoutedPPO: SB3's habits, where gradients flow, what becomes of labels, learning."""

import copy
import io
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from environments import Fork
from gymnasium import spaces
from minigrid.wrappers import (
    FlatObsWrapper,
    FullyObsWrapper,
    ImgObsWrapper,
    RGBImgObsWrapper,
    RGBImgPartialObsWrapper,
    SymbolicObsWrapper,
)
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
)
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

import oversight_rl.envs  # noqa: F401  (registers the ids)
from oversight_rl.agents import MoEPolicy, RoutedPPO
from oversight_rl.agents.methods import LABELED, METHODS, TIMEOUT, UNFINISHED, UNLABELED
from oversight_rl.agents.positive_unlabeled import loss_of_labels
from oversight_rl.agents.ppo.environment import ppo_methods
from oversight_rl.agents.ppo.extractors import (
    EntryExtractor,
    Patches,
    SymbolicCNN,
    default_extractor,
)
from oversight_rl.agents.ppo.losses import (
    gate_loss,
    judged_endings,
    losses,
    remembered,
    remembered_endings,
)
from oversight_rl.agents.ppo.targets import Targets
from oversight_rl.envs.labels import OversightLabels
from oversight_rl.envs.minigrid import SymbolicObservation
from oversight_rl.envs.readable import readable
from oversight_rl.envs.settings import UserError
from oversight_rl.envs.vector import make_vec

ID = "MiniGrid-DiamondGhost-5x5-v0"
TINY = {"method": "routing", "n_envs": 8, "n_steps": 16, "batch_size": 64, "n_epochs": 1, "seed": 0,
        "policy_kwargs": {"net_arch": [8, 8]}}  # fmt: skip


def tiny(env=ID, **more):
    settings = TINY | more
    if not isinstance(env, str):
        settings.pop("n_envs")
    elif "MiniGrid" in env:
        settings = {"oversight": 0.5} | settings
    return RoutedPPO("MoEPolicy", env, **settings)


class Told(gym.Env):
    """Episodes of given lengths that end as told: (steps, info) each; rewards 1 at the end."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)
    behaviors, oversight = ("good", "bad"), 1.0

    def __init__(self, script, truncates=()):
        self.script, self.truncates, self.episode = script, truncates, -1

    def reset(self, *, seed=None, options=None):
        self.episode, self.time = self.episode + 1, 0
        return self._observation(), {}

    def _observation(self):
        return np.array([self.time / 100, (self.episode % len(self.script)) / 100], np.float32)

    def step(self, action):
        self.time += 1
        steps, info = self.script[self.episode % len(self.script)]
        ends = self.time == steps
        cut = ends and self.episode % len(self.script) in self.truncates
        return self._observation(), float(ends), ends and not cut, cut, dict(info) if ends else {}


GOOD = {"behavior": "good", "label": "good"}
BAD = {"behavior": "bad", "label": "bad"}


def collected(script, method="routing", steps=12, rollouts=1, truncates=(), **more):
    """A model after rollouts of one scripted environment, before it learned from the last."""
    env = DummyVecEnv([lambda: Told(script, truncates)])
    model = RoutedPPO("MoEPolicy", env, method=method, n_steps=steps, batch_size=4, seed=0, **more)
    _, callback = model._setup_learn(10**6, None)
    for _ in range(rollouts):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, steps)
    return model


# ---- labels


def test_labels_are_written_back_to_all_steps_of_their_episodes():
    script = [(3, GOOD), (2, {"behavior": "bad"}), (2, BAD), (2, {"behavior": None}), (9, GOOD)]
    found = collected(script).experience
    good, bad = LABELED, LABELED + 1
    expected = [good] * 3 + [UNLABELED] * 2 + [bad] * 2 + [TIMEOUT] * 2 + [UNFINISHED] * 3
    assert found.outcome[:, 0].tolist() == expected


def test_an_end_without_a_word_is_unlabeled_or_a_timeout():
    found = collected([(3, {}), (3, {})], truncates=(1,)).experience
    assert found.outcome[:6, 0].tolist() == [UNLABELED] * 3 + [TIMEOUT] * 3


@pytest.mark.parametrize("reach", [0, 10, 13, 100])
def test_the_gate_remembers_steps_as_far_back_as_labels_reach(reach):
    model = collected([(7, GOOD), (20, BAD)], steps=10, rollouts=3, label_reach=reach)
    count = int(model.memory.count)
    known = model.memory.observation[0, :count]
    label = model.memory.label[0, :count].tolist()
    # times within the episode of what is labeled bad, seven of them in the rollout of its end
    times = sorted(round(float(t) * 100) for t, lab in zip(known[:, 0], label, strict=True) if lab)
    assert times == list(range(max(0, 20 - 7 - reach), 20))
    assert sorted(label) == [0] * 7 + [1] * len(times)


def test_an_environment_that_was_reset_has_no_episode_that_goes_on():
    env = DummyVecEnv([lambda: Told([(11, BAD), (3, GOOD)])])
    model = RoutedPPO("MoEPolicy", env, n_steps=10, batch_size=5, seed=0)
    model.learn(10)
    model.learn(10)  # SB3 resets the environment
    count = int(model.memory.count)
    assert count < 10  # of the bad episode's first ten steps nobody ever heard how it ended


def test_rewards_are_paid_as_the_method_says():
    script = [(2, GOOD), (2, {"behavior": "bad"}), (2, BAD), (6, {"behavior": None})]
    for method, worth in {
        "routing": (1, 1, 1, 0),
        "naive": (1, 1, -1, 0),
        "filtering": (1, 0, -1, 0),
        "oracle": (1, -1, -1, 0),
    }.items():
        buffer = collected(script, method).rollout_buffer
        assert buffer.rewards[[1, 3, 5, 11], 0].tolist() == [1] * 4  # as they came
        assert buffer.returns[[1, 3, 5, 11], 0].tolist() == pytest.approx(worth, abs=1e-6)


def test_weights_leave_out_what_the_method_drops():
    script = [(2, GOOD), (2, {"behavior": "bad"}), (8, BAD)]
    weights = collected(script, "filtering").targets.weights[:, 0]
    assert weights.tolist() == [1, 1, 0, 0] + [1] * 8
    weights = collected(script, labeled_weight=7.0).targets.weights[:, 0]
    assert weights.tolist() == [7, 7, 1, 1] + [7] * 8


def test_truth_reaches_oracles_alone():
    def learned(method, truth):
        model = collected([(3, {"behavior": truth}), (3, GOOD)], method)
        model.train()
        return [p.detach().clone() for p in model.policy.parameters()]

    for method in ppo_methods():
        if METHODS[method].policy.hides_flags:
            continue
        pairs = zip(learned(method, "good"), learned(method, "bad"), strict=True)
        same = all(torch.equal(*pair) for pair in pairs)
        assert same == (METHODS[method].assumes != "true labels")


# ---- gradients


def gradients(model, outcome, part):
    """Norms of a loss part's gradient into each module, from samples of one outcome."""
    model._current_progress_remaining = 0.5  # it no longer waits for labels
    buffer = model.rollout_buffer
    order = model.experience.outcome.T[model.experience.share.T > 0]
    chosen = torch.as_tensor(np.flatnonzero(order == outcome))
    assert len(chosen)
    batch = Targets(*(torch.as_tensor(x)[chosen] for x in buffer.samples))
    replay = remembered(model.policy, model.memory, 1)
    coefficients = {"policy": (0.0, 0.0), "gate": (0.0, model.gate_coef)}[part]
    model.vf_coef, model.gate_coef = coefficients
    model.loss(batch, 0.2, replay)[0].backward()
    weight = model.policy.agent.trunks[0].weight.grad[0].flatten(1).norm(dim=1)
    return {
        "experts": weight[: model.policy.n_experts].tolist(),
        "gate": float(weight[model.policy.n_experts]),
        "head": float(model.policy.agent.head.weight.grad.norm()),
    }


@pytest.mark.parametrize("outcome", [UNLABELED, LABELED, LABELED + 1])
def test_gradients_are_exactly_zero_where_the_route_says_so(outcome):
    model = tiny(n_steps=64, gae_lambda=0.9)
    _, callback = model._setup_learn(10**6, None)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 64)
    found = gradients(model, outcome, "policy")
    if outcome == UNLABELED:
        assert min(found["experts"]) > 0
        assert found["gate"] > 0
    else:
        own = outcome - LABELED
        assert found["experts"][own] > 0
        assert found["experts"][1 - own] == 0
        assert found["gate"] == 0
    assert found["head"] > 0


def test_the_gate_learns_from_labels_alone():
    model = tiny(n_steps=64)
    _, callback = model._setup_learn(10**6, None)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 64)
    assert gradients(model, LABELED, "gate")["gate"] > 0
    replay = remembered(model.policy, model.memory, 1)

    def loss(replay):
        return gate_loss(model.policy, replay, model.policy.agent.prepare())

    before = float(loss(replay))
    optimizer = torch.optim.Adam(model.policy.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss(remembered(model.policy, model.memory, 1)).backward()
        optimizer.step()
    assert float(loss(replay)) < 0.7 * before


# ---- SB3's habits


def test_the_environments_pass_sb3s_checks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(SymbolicObservation(gym.make(ID).unwrapped), skip_render_check=True)


def test_progress_is_shown(capsys):
    assert tiny().learn(128, progress_bar=True).num_timesteps == 128


def test_a_saved_model_predicts_the_same_and_goes_on(tmp_path):
    model = tiny().learn(512)
    model.save(tmp_path / "agent")
    env = make_vec(ID, 8, oversight=0.5)
    loaded = RoutedPPO.load(tmp_path / "agent", env=env)
    observation = env.reset()
    for name in ("mixture", "diamond", "ghost"):
        ours, _ = model.steer(name).predict(observation, deterministic=True)
        theirs, _ = loaded.steer(name).predict(observation, deterministic=True)
        assert np.array_equal(ours, theirs)
    assert int(loaded.memory.count) == int(model.memory.count) > 0
    assert loaded.num_timesteps == 512
    loaded.learn(256, reset_num_timesteps=False)
    assert loaded.num_timesteps == 768
    assert loaded.method == "routing"
    alone = RoutedPPO.load(tmp_path / "agent")  # without an environment: to predict
    assert alone.steer("diamond").predict(observation)[0].shape == (8,)


def test_a_seed_repeats_training_and_another_does_not():
    def parameters(seed):
        return torch.cat(
            [p.detach().flatten() for p in tiny(seed=seed).learn(512).policy.parameters()]
        )

    first = parameters(0)
    assert torch.equal(first, parameters(0))
    assert not torch.equal(first, parameters(1))


def test_callbacks_monitors_and_evaluation_work(tmp_path):
    env = VecMonitor(make_vec("OversightGrid-v0", 8, oversight=0.5))
    evaluation = EvalCallback(
        make_vec("OversightGrid-v0", 4, oversight=0.5), n_eval_episodes=4, eval_freq=16,
        log_path=str(tmp_path), verbose=0, warn=False,
    )  # fmt: skip
    saving = CheckpointCallback(32, str(tmp_path), verbose=0)
    model = tiny(env, tensorboard_log=str(tmp_path))
    model.learn(512, callback=CallbackList([evaluation, saving]))
    assert len(model.ep_info_buffer) > 0
    assert len(np.load(tmp_path / "evaluations.npz")["results"]) == 4
    assert len(list(tmp_path.glob("rl_model_*.zip"))) == 2
    assert list(tmp_path.glob("*/events*"))
    mean, spread = evaluate_policy(model.steer("diamond"), VecMonitor(make_vec(ID.replace(
        ID, "OversightGrid-v0"), 4, oversight=0.5)), n_eval_episodes=8)  # fmt: skip
    assert 0 <= mean <= 1
    assert spread >= 0


def test_positional_arguments_and_schedules_are_sb3s():
    model = tiny(learning_rate=lambda left: 1e-3 * left)
    assert model.lr_schedule(0.5) == 5e-4
    plain = RoutedPPO("MoEPolicy", make_vec(ID, 4), 2e-3, 8, 16)
    assert (plain.lr_schedule(1), plain.n_steps, plain.batch_size) == (2e-3, 8, 16)
    assert plain.gamma == RoutedPPO.DEFAULTS["gamma"]
    with pytest.raises(TypeError, match="no_such"):
        tiny(no_such=1)
    with pytest.raises(ValueError, match="policy must be"):
        RoutedPPO("Policy", make_vec(ID, 4))


# ---- networks and spaces


def spaced(observation, action):
    class Env(Told):
        observation_space, action_space = observation, action

        def _observation(self):
            return self.observation_space.sample()

    return DummyVecEnv([lambda: Env([(3, GOOD), (4, BAD)])] * 2)


BOX = spaces.Box(-1, 1, (3,), np.float32)


@pytest.mark.parametrize(
    ("observation", "extractor"),
    [
        (BOX, FlattenExtractor),
        (spaces.Discrete(5), FlattenExtractor),
        (spaces.Box(0, 4, (7, 7, 3), np.uint8), SymbolicCNN),
        (spaces.Box(0, 4, (2, 9, 1), np.int64), SymbolicCNN),
        (spaces.Box(0, 255, (36, 36, 3), np.uint8), NatureCNN),
    ],
)
def test_observations_get_a_fitting_extractor(observation, extractor):
    model = tiny(spaced(observation, spaces.Discrete(2)), n_steps=32).learn(64)
    assert type(model.policy.features_extractor) is extractor


@pytest.mark.parametrize(
    "action",
    [
        spaces.Discrete(4),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(3),
        spaces.Box(-1, 1, (2,), np.float32),
    ],
)
def test_every_kind_of_action_trains_and_steers(action):
    model = tiny(spaced(BOX, action), n_steps=32).learn(128)
    observation = model.env.reset()
    for text in ("mixture", "good", "bad", "good=0.5,bad=0.5", "without:bad"):
        taken, _ = model.steer(text).predict(observation)
        assert all(action.contains(a) for a in taken)
    assert all(p.isfinite().all() for p in model.policy.parameters())


def test_symbols_are_convolved_as_one_hot_codes():
    space = spaces.Box(0, np.array([3, 2, 1], np.uint8).reshape(1, 1, 3).repeat(5, 0).repeat(5, 1),
                       dtype=np.uint8)  # fmt: skip
    torch.manual_seed(0)
    cnn = SymbolicCNN(space)
    observation = torch.as_tensor(np.stack([space.sample() for _ in range(6)]))
    codes = [torch.nn.functional.one_hot(observation[..., c].long(), n).float() @ cnn.codes[c]
             for c, n in enumerate((4, 3, 2))]  # fmt: skip
    expected = cnn.convolution(sum(codes).relu().permute(0, 3, 1, 2)).relu().flatten(1)
    assert torch.allclose(cnn(observation.float()), expected, atol=1e-5)
    assert cnn(observation.float()).shape == (6, cnn.features_dim)


def test_the_users_own_extractor_is_used():
    class Doubled(BaseFeaturesExtractor):
        def __init__(self, space, factor):
            super().__init__(space, 2)
            self.factor = factor

        def forward(self, observation):
            return self.factor * observation

    kwargs = {"features_extractor_class": Doubled, "features_extractor_kwargs": {"factor": 2.0}}
    env = DummyVecEnv([lambda: Told([(3, GOOD)])])
    model = tiny(env, policy_kwargs={"net_arch": [4], **kwargs}).learn(64)
    assert isinstance(model.policy.features_extractor, Doubled)
    assert model.policy.agent.inputs == 2


def test_three_behaviors_have_three_experts():
    model = tiny(env_kwargs={"lava": 2}, oversight=1.0)
    assert model.behaviors == ("diamond", "ghost", "lava")
    assert model.policy.n_experts == 3
    model.learn(512)
    assert set(model.memory.label[0, : int(model.memory.count)].tolist()) == {0, 1, 2}
    more = tiny(policy_kwargs={"net_arch": [8], "experts": 4})
    assert more.steer("expert_3").predict(more.env.reset())[0].shape == (8,)


def test_single_policies_have_no_experts_to_route():
    model = tiny(method="naive").learn(128)
    assert model.policy.n_experts == 1
    assert model.memory is None
    assert model.steer("single").predict(model.env.reset())[0].shape == (8,)


# ---- learning


class Watched(gym.Env):
    """One step: action 0 is good, 1 bad; both pay 1. A flag, which is not seen, makes a label."""

    observation_space = spaces.Box(0, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)
    behaviors, oversight = ("good", "bad"), 0.3

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.flag = self.np_random.random() < self.oversight
        return np.zeros(1, np.float32), {}

    def step(self, action):
        name = self.behaviors[int(action)]
        info = {"behavior": name} | ({"label": name} if self.flag else {})
        return np.zeros(1, np.float32), 1.0, True, False, info


def shares(method, seed=0, **env):
    """How likely the policy steered to each behavior takes the action that brings it about."""
    worlds = make_vec_env(lambda: Fork(**env), n_envs=16)
    model = RoutedPPO("MoEPolicy", worlds, n_steps=64, method=method, seed=seed).learn(40_960)
    names = "ab" if model.policy.n_experts > 1 else "a"
    with torch.no_grad():
        chances = [
            model.steer(name).get_distribution(torch.eye(5)[:1]).distribution.probs[0, i]
            for i, name in enumerate(names)
        ]
    return [float(chance) for chance in chances]


REWARDS = {  # those that differ in more than scale, of which no bit depends on it
    "a price at the end": {"final": -1.0},
    "a price per step and a prize": {"pay": -1.0},
    "random, dense": {"pay": "random", "final": 0.0},
    "episodes of random length": {"pay": -1.0, "lengths": (2, 3, 4, 5, 6, 7)},
    "shaped by a potential": {"shaped": True},
}


@pytest.mark.parametrize("reward", REWARDS)
def test_labels_decide_whatever_the_reward(reward):
    assert shares("imputed_routing", **REWARDS[reward])[0] > 0.9


@pytest.mark.parametrize("method", ["contrastive_routing", "naive", "reward_model"])
def test_labels_decide_by_every_method(method):
    assert shares(method, pay=-1.0)[0] > 0.9


def test_a_classifier_of_endings_rewards_what_was_not_labeled():
    model = RoutedPPO("MoEPolicy", DummyVecEnv([Watched] * 32), n_steps=8, batch_size=128, seed=0,
                      learning_rate=3e-3, method="reward_model",
                      policy_kwargs={"net_arch": [16]})  # fmt: skip
    model.learn(12_000)
    policy = model.steer("single").get_distribution(torch.zeros(1, 1))
    assert policy.distribution.probs[0, 0] > 0.9


def test_routing_parts_the_experts_and_nothing_else_does():
    assert min(shares("routing")) > 0.9
    assert min(shares("no_routing")) < 0.6


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"method": "routin"}, "did you mean 'routing'"),
        ({"method": "naive_early_stop"}, "method must be one of"),
        ({"label_recall": 2.0}, "label_recall: should be less"),
        ({"policy_kwargs": {"net_arch": {"pi": [8]}}}, "one list"),
        ({"policy_kwargs": {"activation_fn": torch.nn.Tanh}}, "activation_fn"),
        ({"policy_kwargs": {"experts": 1}}, "experts must be at least 2"),
    ],
)
def test_bad_arguments_are_refused(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        tiny(**arguments)


def test_environments_that_do_not_fit_are_refused():
    model, env = tiny(gym.make(ID)), gym.make(ID)  # wrapped on its own
    assert model.observation_space.shape == (7, 7, 3)
    observation, _ = env.reset(seed=0)
    assert np.array_equal(
        model.steer("diamond").predict(observation, deterministic=True)[0],
        model.steer("diamond").predict(observation["image"], deterministic=True)[0],
    )
    with pytest.raises(ValueError, match="OversightLabels"):
        tiny(DummyVecEnv([lambda: Told([(3, GOOD)])]), oversight=0.5)
    with pytest.raises(ValueError, match="flags_visible"):
        tiny(DummyVecEnv([lambda: Told([(3, GOOD)])]), method="filtering_hidden_flag")
    with pytest.raises(ValueError, match="use_sde"):
        tiny(spaced(BOX, spaces.Box(-1, 1, (2,), np.float32)), use_sde=True)
    env = Told([(3, {"label": "goof"})])
    model = tiny(DummyVecEnv([lambda: env]))
    with pytest.raises(ValueError, match=r"'goof'.*did you mean 'good'.*behaviors="):
        model.learn(64)
    env.oversight = None
    with pytest.raises(ValueError, match="attribute oversight"):
        tiny(DummyVecEnv([lambda: env]), method="oracle_filtering")


def test_hidden_flags_are_hidden_in_environments_made_by_id():
    model = tiny(method="filtering_hidden_flag")
    assert model.env.get_attr("flags_visible") == [False] * 8
    model = tiny("OversightGrid-v0", method="ipw_hidden_flag", oversight=0.5)
    assert model.env.get_attr("flags_visible") == [False] * 8


def test_an_environment_that_never_labels_is_told_of_once():
    env = DummyVecEnv([lambda: Told([(1, {"behavior": "bad"})])] * 64)
    with pytest.warns(UserWarning, match="does every wrapper pass info on") as caught:
        tiny(env, n_steps=64).learn(64 * 64 * 2)
    assert len([w for w in caught if "labeled" in str(w.message)]) == 1


def test_no_word_of_labels_where_there_are_to_be_none():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tiny("OversightGrid-v0", oversight=0.0, n_envs=64, n_steps=64).learn(64 * 64 * 4)


def test_wrapped_labels_reach_the_learner():
    def make():
        env = gym.make("CartPole-v1", max_episode_steps=20)
        return OversightLabels(env, lambda *a: "wanted" if a[3] else None, 1.0)

    model = tiny(DummyVecEnv([make] * 2), n_steps=64)
    assert model.behaviors == ("wanted", "unwanted")
    assert model.overseer.oversight == 1.0
    model.learn(128)
    assert (model.experience.outcome == LABELED).any()


def test_sb3s_own_ppo_trains_on_the_batch():
    env = make_vec(ID, 8, oversight=0.5)
    assert PPO("MlpPolicy", env, n_steps=8, batch_size=32, device="cpu").learn(64)


def test_pages_mention_what_there_is():
    page = (Path(__file__).parent.parent / "docs" / "environments.md").read_text()
    assert all(f"`{name}`" in page for name in ppo_methods() if name != "routing")
    assert isinstance(tiny().policy, MoEPolicy)


# ---- what does not fit, and what goes unheard


WRAPPED = {  # MiniGrid's wrappers: what a model sees
    "the view": (lambda env: env, (7, 7, 3), SymbolicCNN),
    "ImgObsWrapper": (ImgObsWrapper, (7, 7, 3), SymbolicCNN),
    "FullyObsWrapper": (FullyObsWrapper, (8, 8, 3), SymbolicCNN),
    "full image": (lambda env: ImgObsWrapper(FullyObsWrapper(env)), (8, 8, 3), SymbolicCNN),
    "picture": (lambda env: ImgObsWrapper(RGBImgPartialObsWrapper(env)), (3, 56, 56), NatureCNN),
    "FlatObsWrapper": (FlatObsWrapper, (2835,), FlattenExtractor),
    "RGBImgObsWrapper": (RGBImgObsWrapper, (3, 64, 64), EntryExtractor),
    "SymbolicObsWrapper": (SymbolicObsWrapper, (8, 8, 3), EntryExtractor),
}


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size", "ignore:'mission' is")
@pytest.mark.parametrize("name", WRAPPED)
def test_minigrids_wrappers_are_taken_for_what_they_are(name):
    wrap, shape, extractor = WRAPPED[name]
    env = wrap(gym.make("MiniGrid-DiamondGhost-8x8-v0"))
    model = tiny(env)
    by_name = isinstance(model.observation_space, spaces.Dict)
    seen = model.observation_space["image"] if by_name else model.observation_space
    assert seen.shape == shape
    assert not by_name or set(model.observation_space) == {"image", "direction"}
    assert isinstance(model.policy.features_extractor, extractor)
    model.learn(32)
    loaded = RoutedPPO.load(saved(model), env=wrap(gym.make("MiniGrid-DiamondGhost-8x8-v0")))
    loaded.learn(16)


def saved(model):
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    return file


def test_the_agents_direction_is_one_of_the_symbols():
    env = SymbolicObservation(FullyObsWrapper(gym.make("MiniGrid-DiamondGhost-8x8-v0")))
    seen = set()
    for seed in range(30):
        observation, _ = env.reset(seed=seed)
        assert env.observation_space.contains(observation)
        seen.add(int(observation[..., 2].max()))
    assert 3 in seen


def test_many_planes_of_bits_are_no_symbols():
    few = spaces.Box(0, 1, (4, 4, 16), np.uint8)
    many = spaces.Box(0, 1, (4, 4, 17), np.uint8)
    assert default_extractor(few) is SymbolicCNN
    assert default_extractor(many) is FlattenExtractor


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"behaviors": "diamond"}, "two or more distinct names"),
        ({"behaviors": ("diamond",)}, "two or more distinct names"),
        ({"behaviors": ("diamond", "diamond")}, "two or more distinct names"),
        ({"policy_kwargs": {"gate": "fixed"}}, "gate follows from the method"),
        ({"policy_kwargs": {"lessons": ()}}, "lessons follows from the method"),
    ],
)
def test_arguments_that_would_go_unheard_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        tiny(**arguments)


def test_continuous_actions_have_no_temperature():
    model = tiny(gym.make("Pendulum-v1"), behaviors=("up", "down"))
    hot = model.policy.steer("up").steering.with_options(temperature=2.0)
    with pytest.raises(UserError, match="continuous actions have none"):
        model.policy.steered(hot)


def test_inverse_propensity_knows_how_often_ghosts_are_flagged():
    worlds = {"env_kwargs": {"overseer": {"shares": [0.2, 1]}}, "oversight": 0.5}
    model = tiny("OversightGrid-v0", method="ipw_hidden_flag", **worlds)
    reward = model.tables.reward[0, LABELED + 1]
    assert float(reward) == 1 - 2 / 0.5


def test_labels_without_a_behavior_are_told_of():
    env = DummyVecEnv([lambda: Told([(2, {"label": "good"})])] * 8)
    with pytest.warns(UserWarning, match="had no 'behavior' in info"):
        tiny(env).learn(8 * 16)


# ---- the classifier of endings


IMPUTED = [(3, GOOD), (2, {"behavior": "bad"}), (2, BAD), (2, {"behavior": None}), (9, GOOD)]


@pytest.mark.parametrize("method", ["reward_model", "imputed_routing"])
def test_an_unlabeled_ending_counts_as_the_mean_of_what_it_may_have_been(method):
    model = collected(IMPUTED, method, solo_share=0.0, normalize_advantage=False, task_weight=0.0)
    buffer, policy = model.rollout_buffer, model.policy
    found = model.targets
    last = torch.as_tensor(buffer.observations[4]), torch.as_tensor(buffer.actions[4]).long()[0]
    good, bad = policy.behavior_log_probabilities(*last).exp()[0].tolist()
    for step, left in ((3, 1), (4, 0)):
        signed = (good - bad) * model.gamma**left
        if method == "imputed_routing":
            rows = torch.as_tensor(buffer.observations[step])
            gate = policy.output(rows).gate[0, 0].tolist()
            signed -= (gate[0] - gate[1]) * buffer.values[step, 0]
            assert found.routes[step, 0].tolist() == pytest.approx([good, bad, 0.0], abs=1e-5)
        assert float(found.own_advantages[step, 0]) == pytest.approx(signed, abs=1e-5)
    worth = good - bad if method == "reward_model" else 1.0
    signs = [1, worth, -1] if method == "reward_model" else [1, 1, 1]
    assert found.returns[[2, 4, 6], 0].tolist() == pytest.approx(signs, abs=1e-5)


def test_labeled_endings_alone_are_remembered_with_their_actions():
    model = collected(IMPUTED, "imputed_routing")
    buffer, memory = model.rollout_buffer, model.endings
    assert int(memory.count) == 2
    assert memory.label[0, :2].tolist() == [0, 1]
    for kept, step in zip(memory.observation[0, :2], (2, 6), strict=True):
        expected = np.append(buffer.observations[step, 0], buffer.actions[step, 0])
        assert kept.tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize("env", [ID, "OversightGrid-v0"])
def test_the_classifier_of_endings_does_not_see_flags(env):
    policy = tiny(env, method="imputed_routing").policy
    dark, lit = (make_vec(env, 64, oversight=level) for level in (0.0, 1.0))
    seen = []
    for worlds in (dark, lit):
        worlds.seed(0)
        seen.append(torch.as_tensor(worlds.reset()))
    assert not torch.equal(*seen)
    actions = torch.arange(64) % 3
    told = [policy.behavior_log_probabilities(rows, actions) for rows in seen]
    assert torch.equal(*told)
    assert not torch.equal(told[0], policy.behavior_log_probabilities(seen[0], (actions + 1) % 3))


def test_flags_of_wrapped_environments_are_known():
    env = OversightLabels(gym.make("CartPole-v1"), lambda *a: None, 0.1, flags_visible=True)
    assert env.flags.tolist() == [False] * 4 + [True] * 2
    assert tiny(env, method="reward_model").policy.flags.tolist() == env.flags.tolist()
    view = SymbolicObservation(gym.make(ID))
    assert view.flags[..., 2].all()
    assert not view.flags[..., :2].any()
    assert not hasattr(SymbolicObservation(gym.make("MiniGrid-Empty-5x5-v0")), "flags")


@pytest.mark.parametrize(
    "space",
    [spaces.Discrete(300), spaces.MultiDiscrete([2, 3]), spaces.Box(-1, 1, (2,), np.float32)],
)
def test_endings_of_every_kind_of_action_are_learned(space):
    class Env(Told):
        action_space = space

        def _observation(self):
            return np.array([0.0, self.episode % 2], np.float32)

    def fresh():
        env = DummyVecEnv([lambda: Env([(3, GOOD), (2, BAD)])] * 8)
        return tiny(env, method="imputed_routing", learning_rate=1e-2)

    model = fresh().learn(8 * 16 * 40)
    again = RoutedPPO.load(saved(model), env=model.env)
    assert int(again.endings.count) == int(model.endings.count) > 100
    for policy, taught in ((again.policy, True), (fresh().policy, False)):
        said = judged_endings(policy, remembered_endings(policy, again.endings, 1))
        loss = float(loss_of_labels(said, bounded=False))
        assert loss < 0.2 if taught else loss > 0.5


def test_experts_act_by_themselves_in_their_share_of_episodes():
    model = tiny(method="imputed_routing", solo_share=0.25)
    _, callback = model._setup_learn(10**6, None)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 16)
    buffer, policy = model.rollout_buffer, model.policy
    assert buffer.alone[0].tolist() == [False, False, False, True] * 2
    for before, now, done in zip(buffer.alone, buffer.alone[1:], buffer.done, strict=False):
        assert (before == now)[~done].all()  # whole episodes
    rows = torch.as_tensor(buffer.observations).flatten(0, 1)
    actions = torch.as_tensor(buffer.actions).flatten().long()
    with torch.no_grad():
        output = policy.output(rows)
        mixture = policy.distribution(output.mix(output.gate)[0]).log_prob(actions)
        alone = [policy.distribution(output.alone(k)[0]).log_prob(actions) for k in (0, 1)]
    taken = np.choose(buffer.actor, [x.view(16, 8) for x in (mixture, *alone)])
    assert np.abs(taken - buffer.log_probs).max() < 1e-5
    found = model.targets
    waits = model.experience.outcome == UNFINISHED
    assert (found.weights > 0).tolist() == (~buffer.alone & ~waits).tolist()  # the mixture acted
    assert (found.own_weights > 0).tolist() == buffer.alone.tolist()
    assert int(model.memory.count) == (model.experience.outcome >= LABELED).sum()
    assert int(model.endings.count) == (buffer.ended & (model.experience.outcome >= LABELED)).sum()
    assert not tiny(method="contrastive_routing").rollout_buffer.acts.any()


@pytest.mark.parametrize("expert", [0, 1])
def test_what_an_expert_does_alone_teaches_no_other_module(expert):
    model = tiny(method="imputed_routing", solo_share=0.9, gate_replay=0, vf_coef=0.0)
    _, callback = model._setup_learn(10**6, None)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 16)
    model._current_progress_remaining = 0.5
    batch = next(iter(model.rollout_buffer.get(None)))
    own = batch.actor == expert + 1
    batch = batch._replace(**{n: x[own] for n, x in batch._asdict().items()})
    assert len(batch.actor) > 32
    model.loss(batch, 0.2)[0].backward()
    weight = model.policy.agent.trunks[0].weight.grad[0].flatten(1).norm(dim=1)
    assert (weight[:3] > 0).tolist() == [expert == 0, expert == 1, False]  # the last is the gate


@pytest.mark.parametrize("n_envs", [1, 2, 8])
def test_a_single_environment_is_shared_fairly(n_envs):
    buffer = tiny(method="imputed_routing", n_envs=n_envs).rollout_buffer
    turns = []
    for _ in range(8):
        turns.append(buffer.acts)
        buffer.pass_on(np.ones(n_envs, bool))
    shares = [np.mean(np.array(turns) == actor, axis=0).tolist() for actor in range(3)]
    assert shares == [[0.25] * n_envs, [0.375] * n_envs, [0.375] * n_envs]


def test_the_policy_waits_for_labels_a_while_and_its_values_do_not():
    model = tiny(DummyVecEnv([Watched] * 32), method="imputed_routing", n_steps=4, batch_size=128)
    _, callback = model._setup_learn(10**6, None)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 4)
    assert 0 < int(model.endings.count) < 100
    seen = torch.zeros(1, 1)

    def chances_and_value():
        with torch.no_grad():
            chances = [model.steer(n).get_distribution(seen).distribution.probs for n in
                       ("good", "bad")]  # fmt: skip
            return torch.cat(chances), model.policy.predict_values(seen)

    before = chances_and_value()
    model._current_progress_remaining = 0.95
    assert model.still_looks
    model.train()
    waited = chances_and_value()
    assert torch.equal(before[0], waited[0])
    assert not torch.equal(before[1], waited[1])
    model._current_progress_remaining = 0.85
    assert not model.still_looks
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 4)
    model.train()
    assert not torch.equal(before[0], chances_and_value()[0])


def test_numbered_observations_can_be_imputed():
    env = DummyVecEnv([lambda: gym.make("FrozenLake-v1")] * 4)
    model = tiny(env, method="imputed_routing", behaviors=("good", "bad")).learn(4 * 16 * 2)
    assert not int(model.endings.count)  # nothing was labeled, so nothing is imputed
    found, outcome = model.targets, model.experience.outcome
    assert set(np.unique(found.routes)) == {1.0}
    assert not found.own_weights[outcome == UNLABELED].any()
    assert (outcome == UNLABELED).any()


def test_flags_of_another_shape_are_refused():
    env = gym.wrappers.FlattenObservation(SymbolicObservation(gym.make(ID)))
    with pytest.raises(ValueError, match="flags have shape"):
        tiny(env, method="reward_model")


def test_pictures_and_rescaled_symbols_are_no_symbols():
    drawn = gym.wrappers.AddRenderObservation(gym.make(ID, render_mode="rgb_array"))
    assert not hasattr(readable(drawn), "flags")
    scaled = gym.wrappers.RescaleObservation(ImgObsWrapper(gym.make(ID)), 0, 1)
    assert readable(scaled) is scaled


def test_mistakes_with_models_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"policy must be 'MoEPolicy'.*got 'MultiInputPolicy'"):
        RoutedPPO("MultiInputPolicy", ID)
    PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8).save(tmp_path / "plain")
    with pytest.raises(ValueError, match="not a RoutedPPO"):
        RoutedPPO.load(tmp_path / "plain")
    tiny().save(tmp_path / "agent")
    with pytest.raises(ValueError, match="there is no environment"):
        RoutedPPO.load(tmp_path / "agent").learn(10)
    with pytest.raises(UserError, match="CartPole-v1 does not take the argument oversight"):
        RoutedPPO("MoEPolicy", "CartPole-v1", oversight=0.2)


def test_saved_memories_hold_what_was_put_into_them(tmp_path):
    """Of images a whole memory is hundreds of megabytes."""
    model = tiny(method="imputed_routing").learn(2 * 8 * 16)
    model.save(tmp_path / "agent")
    assert (tmp_path / "agent.zip").stat().st_size < 2**20 < model.memory.observation.nbytes
    loaded = RoutedPPO.load(tmp_path / "agent", env=model.env)
    for ours, theirs in (
        (model.memory, loaded.memory),
        (model.endings, loaded.endings),
    ):
        known = int(ours.count)
        assert known == int(theirs.count) > 0
        assert torch.equal(ours.observation[:, :known], theirs.observation[:, :known])
        assert torch.equal(ours.label[:, :known], theirs.label[:, :known])
        assert ours.observation.shape == theirs.observation.shape
    loaded.learn(8 * 16)


# ---- views that repeat


class Apart:
    """Every sample's observation by itself, as `Views` gives them where nothing is merged."""

    def __init__(self, observations):
        self.observations = observations

    def __len__(self):
        return len(self.observations)

    def __getitem__(self, numbers):
        return self.observations[numbers]


@pytest.mark.parametrize("method", ["naive", "routing", "contrastive_routing", "imputed_routing"])
def test_working_out_repeated_views_once_changes_nothing(method):
    model = tiny(method=method, n_envs=32, n_steps=32)
    _, callback = model._setup_learn(10**6, None)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 32)
    model._current_progress_remaining = 0.5  # it no longer waits for labels
    x, policy, views = model.experience, model.policy, model.rollout_buffer.views
    rows = x.steps.observations.swapaxes(0, 1)[x.share.T > 0]
    batch = next(iter(model.rollout_buffer.get(None)))
    samples = model.rollout_buffer.samples
    whole = Targets(*map(torch.as_tensor, samples))
    replay = remembered(policy, model.memory, 1) if model.memory is not None else None
    assert len(batch.view.unique()) < 0.7 * len(rows)

    def learned(batch, views):
        policy.zero_grad()
        parts = losses(policy, batch, views, replay, clip=0.2, clip_value=None)
        sum(part for part in parts.values() if part.requires_grad).backward()
        gradients = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
        return parts, gradients

    merged, by_merged = learned(whole, views)
    apart = whole._replace(view=torch.arange(len(rows)))
    plain, by_plain = learned(apart, Apart(torch.as_tensor(rows)))
    for name, part in plain.items():
        assert torch.allclose(merged[name], part, rtol=1e-4, atol=1e-6), name
    for ours, theirs in zip(by_merged, by_plain, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()) + 1e-7)
    # what was said when they were met is what the networks say of each
    output = policy.output(torch.as_tensor(rows))
    assert np.abs(views.values[samples.view] - output.value[0].detach().numpy()).max() < 1e-5
    mixture = policy.distribution(output.mix(output.gate)[0])
    log_prob = mixture.log_prob(whole.actions.flatten().long()).detach().numpy()
    known = ~samples.alone
    assert np.abs(samples.old_log_prob[known] - log_prob[known]).max() < 1e-4


@pytest.mark.parametrize("sides", [(7, 7), (5, 4), (2, 3), (1, 1)])
def test_patches_are_merged_and_keep_their_features(sides):
    torch.manual_seed(0)
    high = np.broadcast_to(np.array([11, 5, 3], np.uint8), (*sides, 3))
    cnn = SymbolicCNN(spaces.Box(np.zeros_like(high), high, dtype=np.uint8))
    few = torch.randint(3, (64, *sides, 1), dtype=torch.uint8).expand(-1, -1, -1, 3)
    many = torch.as_tensor(np.stack([cnn._observation_space.sample() for _ in range(64)]))
    for rows in (few, many):
        patches = Patches.of(cnn.cells(rows))
        assert len(patches.cells) == len(patches.cells.unique(dim=0))
        assert torch.allclose(cnn(patches), cnn(rows), atol=1e-6)
        chosen = torch.tensor([5, 5, 63])
        assert torch.allclose(cnn(patches[chosen]), cnn(rows[chosen]), atol=1e-6)


@pytest.mark.parametrize(("size", "parts"), [(64, 2), (90, 1), (48, 3), (1000, 1), (None, 1)])
def test_minibatches_are_of_the_nearest_size(size, parts):
    model = tiny(method="oracle")  # nothing waits: 128 samples
    _, callback = model._setup_learn(10**6, None)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 16)
    buffer = model.rollout_buffer
    batches = list(buffer.get(size))
    assert buffer.minibatches(size) == len(batches) == parts
    assert sum(len(batch.alone) for batch in batches) == 128


@pytest.mark.parametrize("how", ["in place", "data", "another policy"])
def test_whatever_a_callback_does_to_the_policy_acts_from_there_on(how):
    class Changes(BaseCallback):
        def _on_step(self):
            if self.n_calls == 8:
                bias = torch.tensor([50.0, 0.0, 0.0])
                if how == "another policy":
                    self.model.policy = copy.deepcopy(self.model.policy)
                if how == "data":
                    self.model.policy.agent.head.bias.data[0] += bias
                else:
                    with torch.no_grad():
                        self.model.policy.agent.head.bias[0] += bias
            return True

    model = tiny(gae_lambda=0.9)
    _, callback = model._setup_learn(10**6, Changes())
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 16)
    actions = model.rollout_buffer.actions[..., 0]
    assert actions[:8].any()
    assert not actions[8:].any()


def test_callbacks_see_the_tensors_that_sb3_has():
    class Looks(BaseCallback):
        def _on_step(self):
            assert self.locals["values"].shape == (8, 1)
            assert self.locals["log_probs"].shape == (8,)
            return torch.is_tensor(self.locals["values"])

    tiny().learn(8 * 16 * 2, Looks())


def test_a_policy_whose_own_output_would_not_be_asked_is_refused():
    class Masked(MoEPolicy):
        def distribution(self, parameters):
            return super().distribution(parameters)

    with pytest.raises(ValueError, match="Masked has its own distribution"):
        RoutedPPO(Masked, ID, oversight=0.5, method="routing", n_envs=2, n_steps=8)


def test_the_users_optimizer_arguments_are_heeded():
    kwargs = TINY["policy_kwargs"] | {"optimizer_kwargs": {"foreach": True, "eps": 1e-3}}
    tiny(policy_kwargs=kwargs).learn(8 * 16)
    assert tiny().policy.optimizer.defaults["fused"]


def test_a_plain_reward_model_finds_the_flags(tmp_path):
    """In MiniGrid an agent stands before the square that it ends on: there alone flags tell."""
    model = tiny(method="reward_model_plain", oversight=0.3, n_envs=64, n_steps=32, batch_size=512)
    seen = torch.as_tensor(model.env.reset()).clone()
    assert torch.equal(model.policy.without_flags(seen), seen)
    model.learn(20 * 64 * 32)
    shown = torch.zeros(7, 7, 3, dtype=torch.bool)
    shown[3, 5, 2] = True  # the state of the cell in front
    assert torch.equal(model.tally.telling.view(7, 7, 3), shown)
    full = torch.ones_like(seen)
    assert torch.equal(model.policy.without_flags(full), full * ~shown)
    model.save(tmp_path / "model")
    again = RoutedPPO.load(tmp_path / "model", env=model.env)
    assert torch.equal(again.tally.telling, model.tally.telling)
    again.learn(64 * 32)
    assert torch.equal(again.policy.without_flags(full), full * ~shown)
