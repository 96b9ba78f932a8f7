"""What the README and docs promise of other people's tools, on the real ones.

`benchmarks/third_party.py` does the same for environments and rl_zoo3, whose packages are many.
"""

import re
from collections import Counter
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import optuna
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

import oversight_rl.envs  # noqa: F401  (registers the ids)
from oversight_rl import OversightLabels, RoutedPPO, SteeredEvalCallback
from oversight_rl.envs.vector import make_vec

ROOT = Path(__file__).parent.parent
GRID, ROOM = "OversightGrid-v0", "MiniGrid-DiamondGhost-5x5-v0"
IDS = [GRID, *(f"MiniGrid-DiamondGhost-{name}-v0" for name in ("5x5", "8x8", "16x16", "FourRooms"))]
SMALL = {"n_steps": 32, "n_epochs": 1, "gate_replay": 32, "seed": 0,
         "policy_kwargs": {"net_arch": [8]}}  # fmt: skip
PLAIN = {"method": "contrastive_routing", "task_weight": 0}  # labels alone teach, at once

pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")


def leans(env, observation, reward, terminated, truncated, info):
    return "right" if observation[2] > 0 else "left"


def pole(flags_visible=False):
    env = gym.make("CartPole-v1", max_episode_steps=20)
    return OversightLabels(env, leans, 0.5, ("right", "left"), flags_visible)


class Lever(gym.Env):
    """One step, which pays for what is not wanted: the better a policy, the less reward."""

    behaviors, oversight = ("good", "bad"), 1.0
    observation_space, action_space = spaces.Box(0, 1, (1,), np.float32), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        name = self.behaviors[int(action)]
        info = {"behavior": name, "label": name}
        return np.zeros(1, np.float32), float(action), True, False, info


def levers(n):
    return VecMonitor(DummyVecEnv([Lever] * n))


def numbers(model):
    return [p.detach().clone() for p in model.policy.parameters()]


def same(some, others):
    return all(torch.equal(*pair) for pair in zip(some, others, strict=True))


# ---- environments side by side


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_processes_teach_the_same_as_one(start_method):
    def learned(kind, **more):
        env_id = f"oversight_rl.envs:{GRID}"  # a spawned process imports what stands before the id
        env = make_vec_env(env_id, 2, 3, env_kwargs={"oversight": 0.5}, vec_env_cls=kind, **more)
        try:
            return numbers(RoutedPPO("MoEPolicy", env, **SMALL).learn(2 * 2 * 32))
        finally:
            env.close()

    there = learned(SubprocVecEnv, vec_env_kwargs={"start_method": start_method})
    assert same(there, learned(DummyVecEnv))


def test_wrapped_labels_come_out_of_processes():
    env = make_vec_env(pole, 2, 0, vec_env_cls=SubprocVecEnv)
    try:
        model = RoutedPPO("MoEPolicy", env, **SMALL).learn(2 * 2 * 32)
        assert model.behaviors == ("right", "left")
        assert model.overseer.oversight == 0.5
        assert 0 < model.rollout_buffer.labels < model.rollout_buffer.episodes
        assert evaluate_policy(model.steer("right"), env, 4)[0] <= 20
    finally:
        env.close()


@pytest.mark.parametrize(
    ("env_id", "mode"),
    [
        (GRID, "vector_entry_point"),
        *((env_id, mode) for mode in ("sync", "async") for env_id in IDS),
    ],
)
def test_gymnasium_makes_many_of_each_id(env_id, mode):
    # the space of missions is MiniGrid's own, which cannot be put into shared memory
    apart = {"vector_kwargs": {"shared_memory": False}} if mode == "async" else {}
    env = gym.make_vec(env_id, 2, mode, max_steps=20, oversight=1.0, **apart)
    told, labeled, ended = Counter(), Counter(), 0
    try:
        env.reset(seed=0)
        env.action_space.seed(0)
        for _ in range(200):
            *_, terminated, truncated, infos = env.step(env.action_space.sample())
            ended += int((terminated | truncated).sum())
            infos = infos.get("final_info", infos)
            told.update(infos.get("behavior", [None] * 2))
            labeled.update(infos.get("label", [None] * 2))
    finally:
        env.close()
    assert ended >= 2 * (200 // 21)
    assert all(told[name] == labeled[name] for name in ("diamond", "ghost"))  # all are watched
    if env_id in (GRID, ROOM):  # small enough to be crossed at random
        assert min(told["diamond"], told["ghost"]) > 0


@pytest.mark.parametrize("env_id", IDS)
def test_our_batches_of_each_id_are_what_one_is(env_id):
    env, one = make_vec(env_id, 3, oversight=1.0), gym.make(env_id, oversight=1.0)
    model = RoutedPPO("MoEPolicy", env, **SMALL).learn(3 * 32)
    observation, _ = one.reset(seed=0)
    action, _ = model.steer("diamond").predict(observation, deterministic=True)
    assert one.action_space.contains(action)


# ---- wrappers that have numbers of their own


@pytest.mark.parametrize("stacked", [False, True])
def test_normalized_and_stacked_environments_go_with_the_model(tmp_path, stacked):
    def wrapped():
        return make_vec_env(partial(pole, flags_visible=True), 4, seed=0)

    env = VecNormalize(wrapped(), gamma=0.97)
    env = VecFrameStack(env, 3) if stacked else env
    model = RoutedPPO("MoEPolicy", env, **SMALL).learn(4 * 4 * 32)
    shown = [False] * 4 + [True] * 2  # where the pole is, and who watches
    assert model.policy.flags.tolist() == shown * (3 if stacked else 1)
    model.save(tmp_path / "agent")
    normalized = model.get_vec_normalize_env()
    normalized.save(str(tmp_path / "normalize.pkl"))
    loaded_env = VecNormalize.load(str(tmp_path / "normalize.pkl"), wrapped())
    assert np.array_equal(loaded_env.obs_rms.mean, normalized.obs_rms.mean)
    assert loaded_env.obs_rms.count > 4 * 4 * 32
    loaded_env.training = normalized.training = False
    loaded_env = VecFrameStack(loaded_env, 3) if stacked else loaded_env
    loaded = RoutedPPO.load(tmp_path / "agent", env=loaded_env)
    for policies in ((model, loaded), (model.steer("right"), loaded.steer("right"))):
        env.seed(5)
        loaded_env.seed(5)
        returns = [
            evaluate_policy(policy, where, 8, return_episode_rewards=True)
            for policy, where in zip(policies, (env, loaded_env), strict=True)
        ]
        assert returns[0] == returns[1]
    loaded.get_vec_normalize_env().training = True
    loaded.learn(4 * 32, reset_num_timesteps=False)
    assert loaded.num_timesteps == model.num_timesteps + 4 * 32


def test_the_judges_environment_is_normalized_like_the_learners(tmp_path):
    env = VecNormalize(make_vec_env(pole, 4, seed=0))
    judged = VecNormalize(make_vec_env(pole, 2, seed=1), training=False, norm_reward=False)
    callback = SteeredEvalCallback(judged, eval_freq=32, n_eval_episodes=4, verbose=0, warn=False)
    saving = CheckpointCallback(64, tmp_path, save_vecnormalize=True)
    RoutedPPO("MoEPolicy", env, **SMALL).learn(4 * 64, callback=[callback, saving])
    assert np.array_equal(judged.obs_rms.mean, env.obs_rms.mean)
    kept = VecNormalize.load(str(tmp_path / "rl_model_vecnormalize_256_steps.pkl"), env.venv)
    model = RoutedPPO.load(tmp_path / "rl_model_256_steps", env=kept)
    assert model.learn(4 * 32, reset_num_timesteps=False).num_timesteps == 4 * 96


# ---- callbacks


def test_who_asks_for_a_new_best_is_told_when_the_steered_model_is_kept(tmp_path):
    kept = tmp_path / "best_model.zip"
    best, after = [], []

    class Best(BaseCallback):
        def _on_step(self):
            model = RoutedPPO.load(kept)
            best.append((self.parent.best_mean_reward, self.parent.last_mean_reward))
            assert model.num_timesteps == self.num_timesteps
            assert model.policy.steering == self.model.policy.steering
            assert model.policy.steering.name == "good"
            return True

    class After(BaseCallback):
        def _on_step(self):
            after.append(self.parent.best_mean_reward)
            assert self.model.policy.steering.name == "mixture"
            return True

    callback = SteeredEvalCallback(
        levers(4), best_model_save_path=tmp_path, callback_on_new_best=Best(),
        callback_after_eval=After(), eval_freq=32, n_eval_episodes=100, deterministic=False,
        verbose=0, warn=False,
    )  # fmt: skip
    model = RoutedPPO("MoEPolicy", levers(8), **SMALL, **PLAIN, learning_rate=1e-3)
    model.learn(8 * 32 * 20, callback=callback)
    scores, rewards = zip(*best, strict=True)
    assert len(best) > 2
    assert list(scores) == sorted(set(scores))
    assert list(rewards) == sorted(set(rewards), reverse=True)  # it fell, and did not decide
    assert len(after) == 20
    assert sorted(set(after)) == list(scores)
    assert callback.best_score == scores[-1]


def test_training_stops_when_the_steered_model_is_good_or_gets_no_better(tmp_path):
    def stopped(total=8 * 32 * 60, **callbacks):
        judge = SteeredEvalCallback(
            levers(4), best_model_save_path=tmp_path, eval_freq=32, n_eval_episodes=100,
            deterministic=False, verbose=0, warn=False, **callbacks,
        )  # fmt: skip
        model = RoutedPPO("MoEPolicy", levers(8), **SMALL, **PLAIN)
        model.learn(total, callback=judge)
        assert model.policy.steering.name == "mixture"
        assert model.num_timesteps < total
        return judge

    good = stopped(callback_on_new_best=StopTrainingOnRewardThreshold(0.9))
    assert good.best_score >= 0.9
    assert good.last_mean_reward <= 0.1  # the reward of a policy that leaves what pays
    best = RoutedPPO.load(tmp_path / "best_model").policy
    assert (best.predict(np.zeros((9, 1), np.float32), deterministic=True)[0] == 0).all()
    last = stopped(callback_after_eval=StopTrainingOnNoModelImprovement(2, 3))
    assert last.n_calls > 4 * 32  # the reward is best at first


def test_sb3s_callbacks_look_at_the_mixture(tmp_path):
    judge = EvalCallback(
        levers(4), best_model_save_path=str(tmp_path), eval_freq=32, n_eval_episodes=10, verbose=0,
        callback_on_new_best=StopTrainingOnRewardThreshold(2.0), warn=False,
    )  # fmt: skip
    saving = CheckpointCallback(64, tmp_path)
    model = RoutedPPO("MoEPolicy", levers(8), **SMALL).learn(8 * 96, callback=[judge, saving])
    assert RoutedPPO.load(tmp_path / "best_model").policy.steering.name == "mixture"
    resumed = RoutedPPO.load(tmp_path / "rl_model_512_steps", env=levers(8))
    resumed.learn(8 * 32, reset_num_timesteps=False)
    assert resumed.num_timesteps == model.num_timesteps


# ---- searches, pages


def test_optuna_searches_and_prunes():
    class Pruning(BaseCallback):
        """As Optuna's example for SB3 and rl_zoo3 have it."""

        parent: SteeredEvalCallback

        def __init__(self, trial):
            super().__init__()
            self.trial = trial

        def _on_step(self):
            self.trial.report(self.parent.best_mean_reward, self.parent.n_calls)
            if self.trial.should_prune():
                raise optuna.TrialPruned
            return True

    def objective(trial):
        model = RoutedPPO(
            "MoEPolicy",
            levers(8),
            **SMALL,
            task_weight=0,
            method=trial.suggest_categorical("method", ["contrastive_routing", "naive"]),
            learning_rate=trial.suggest_float("learning_rate", 1e-7, 1e-2, log=True),
        )
        judge = SteeredEvalCallback(
            levers(4), callback_after_eval=Pruning(trial), eval_freq=32 * 18, n_eval_episodes=64,
            deterministic=False, verbose=0, warn=False,
        )  # fmt: skip
        model.learn(8 * 32 * 18, callback=judge)
        return judge.best_score

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=optuna.pruners.ThresholdPruner(lower=0.8),
    )
    good = {"method": "contrastive_routing", "learning_rate": 5e-3}
    study.enqueue_trial(good)
    study.enqueue_trial(good | {"learning_rate": 1e-7})
    study.optimize(objective, n_trials=3)
    states = [trial.state.name for trial in study.trials]
    assert states[:2] == ["COMPLETE", "PRUNED"]
    assert set(states[2:]) <= {"COMPLETE", "PRUNED"}
    assert study.best_value >= study.trials[0].value >= 0.8


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def test_the_readmes_lines_for_sb3_run(tmp_path, monkeypatch):
    (block,) = (text for text in python_blocks("README.md") if "RoutedPPO(" in text)
    monkeypatch.chdir(tmp_path)
    small = block.replace("500_000", "128 * 32").replace("8x8", "5x5")
    assert small.count("5x5") == 1
    env = gym.make(ROOM)
    scope = {"observation": env.reset(seed=0)[0]}
    exec(compile(small, "README.md", "exec"), scope)
    assert env.action_space.contains(scope["action"])


def test_the_pages_lines_for_callbacks_run(tmp_path, monkeypatch):
    (block,) = (
        text for text in python_blocks("docs/environments.md") if "SteeredEvalCallback(" in text
    )
    monkeypatch.chdir(tmp_path)
    small = block.replace("eval_freq=500", "eval_freq=32, verbose=0")
    assert small != block
    model = RoutedPPO("MoEPolicy", levers(8), **SMALL)
    scope = {"model": model, "eval_env": levers(2), "total": 8 * 64, "RoutedPPO": RoutedPPO}
    exec(compile(small, "environments.md", "exec"), scope)
    assert scope["policy"].steering.name == "good"
