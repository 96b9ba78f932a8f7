"""What PPO makes of a rollout: two parts of an advantage, whatever the reward, whoever stops it."""

import contextlib

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from oversight_rl.agents import RoutedPPO
from oversight_rl.agents.methods import LABELED, TIMEOUT, UNFINISHED, UNLABELED
from oversight_rl.agents.outcomes import tables
from oversight_rl.agents.ppo.held import Steps, Window
from oversight_rl.agents.ppo.targets import Experience, gae, moments, targets
from oversight_rl.envs.overseers import Overseer


class Random(gym.Env):
    """Observations, lengths and behaviors at random, from a stream of its own; rewards as told.

    Args:
        reward: (generator, time, whether the episode ends) -> reward.
        oversight: chance of a label.
        cut: whether episodes that end in a behavior are truncated, and not terminated.
    """

    behaviors = ("good", "bad")
    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, reward=lambda rng, time, ends: 1.0, oversight=0.3, cut=False):
        self.reward, self.oversight, self.cut = reward, oversight, cut
        self.rng, self.rewards = np.random.default_rng(0), np.random.default_rng(1)

    def reset(self, *, seed=None, options=None):
        self.time, self.length = 0, int(self.rng.integers(1, 9))
        return self.rng.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action):
        self.time += 1
        ends = self.time == self.length
        observation = self.rng.uniform(-1, 1, 2).astype(np.float32)
        kind, seen = self.rng.integers(3), self.rng.random() < self.oversight
        info = {}
        if ends:
            info["behavior"] = None if kind == 2 else self.behaviors[kind]
            if kind < 2 and seen:
                info["label"] = info["behavior"]
        reward = float(self.reward(self.rewards, self.time, ends))
        cut = ends and (kind == 2 or self.cut)
        return observation, reward, ends and not cut, cut, info


def learner(env=Random, method="imputed_routing", envs=4, **more):
    settings = {"n_steps": 32, "batch_size": 64, "seed": 0, "gate_replay": 16,
                "policy_kwargs": {"net_arch": [8]}}  # fmt: skip
    made = DummyVecEnv([env] * envs)
    return RoutedPPO("MoEPolicy", made, method=method, **settings | more)


def collected(env=Random, rollouts=1, **more):
    model = learner(env, **more)
    _, callback = model._setup_learn(10**6, None)
    for _ in range(rollouts):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model


def parameters(model):
    return {name: p.detach().clone() for name, p in model.policy.named_parameters()}


def same(ours, theirs):
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- any reward


EVERY = ("routing", "contrastive_routing", "imputed_routing", "naive", "filtering", "reward_model")


@pytest.mark.parametrize("method", EVERY)
def test_a_power_of_two_in_the_reward_is_in_its_scale_and_nowhere_else(method):
    def trained(k):
        def reward(rng, time, ends):
            return rng.normal() * 2.0**k

        return learner(lambda: Random(reward), method).learn(4 * 32 * 4)

    plain = trained(0)
    for k in (-10, 10):
        scaled = trained(k)
        assert same(parameters(plain), parameters(scaled))
        square = float(scaled.policy.task_square[0]) / float(plain.policy.task_square[0])
        assert square == 4.0**k


@pytest.mark.parametrize("method", EVERY)
def test_no_reward_is_a_task_without_weight(method):
    def noise(rng, time, ends):
        return rng.normal()

    nothing = learner(lambda: Random(lambda *a: 0.0), method).learn(4 * 32 * 4)
    unweighted = learner(lambda: Random(noise), method, task_weight=0.0).learn(4 * 32 * 4)
    assert same(parameters(nothing), parameters(unweighted))
    weighted = learner(lambda: Random(noise), method).learn(4 * 32 * 4)
    assert not same(parameters(nothing), parameters(weighted))


@pytest.mark.parametrize("method", EVERY)
def test_the_behavior_part_is_the_same_for_any_reward(method):
    rewards = (
        lambda *a: 0.0,
        lambda *a: -1.0,
        lambda r, t, e: 1000.0 * e,
        lambda r, t, e: r.normal(),
    )
    parts = []
    for reward in rewards:
        model = collected(lambda reward=reward: Random(reward), method=method, task_weight=0.0)
        with_task = collected(lambda reward=reward: Random(reward), method=method)
        found = with_task.targets
        behavior = model.targets
        for name in ("weights", "own_weights", "routes", "returns", "own_returns"):
            assert np.array_equal(getattr(found, name), getattr(behavior, name))
        parts.append((behavior.advantages, behavior.own_advantages))
    for advantages, signed in parts[1:]:
        assert np.array_equal(advantages, parts[0][0])
        assert np.array_equal(signed, parts[0][1])


def test_worlds_whose_reward_is_a_behavior_have_no_task():
    model = RoutedPPO("MoEPolicy", "OversightGrid-v0", n_envs=4, n_steps=16, oversight=0.5)
    assert model.policy.task_value_net is None
    told = RoutedPPO(
        "MoEPolicy", "OversightGrid-v0", n_envs=4, n_steps=16,
        env_kwargs={"reward": "ground_truth"},
    )  # fmt: skip
    assert told.policy.task_value_net is not None


def test_what_filtering_drops_still_teaches_the_tasks_values():
    model = collected(method="filtering")
    found, outcome = model.targets, model.experience.outcome
    dropped = outcome == UNLABELED
    assert dropped.any()
    assert not found.weights[dropped].any()
    batch = next(iter(model.rollout_buffer.get(None)))
    model.policy.zero_grad()
    loss, parts = model.loss(batch._replace(weights=torch.zeros_like(batch.weights)), 0.2)
    loss.backward()
    assert parts["task_value_loss"] > 0
    assert any(
        p.grad is not None and p.grad.any() for p in model.policy.task_value_net.parameters()
    )
    assert not model.policy.agent.head.weight.grad.any()


# ---- against plain loops


def plain_gae(reward, value, after, done, discount, trace):
    steps, envs = reward.shape
    found = np.zeros_like(reward)
    for n in range(envs):
        for t in range(steps):
            factor = 1.0
            for u in range(t, steps):
                delta = reward[u, n] + discount * after[u, n] - value[u, n]
                found[t, n] += factor * delta
                if done[u, n]:
                    break
                factor *= discount * trace
    return found


def experience(rng, steps=12, envs=6, **more):
    done = rng.random((steps, envs)) < 0.3
    outcome = np.zeros((steps, envs), np.int64)
    left = np.zeros((steps, envs), np.int64)
    for n in range(envs):
        kind, end = UNFINISHED, steps
        for t in reversed(range(steps)):
            if done[t, n]:
                kind, end = int(rng.choice([TIMEOUT, UNLABELED, LABELED, LABELED + 1])), t
            outcome[t, n], left[t, n] = kind, end - t
    value, after = rng.normal(size=(2, steps, envs)).astype(np.float32)
    ended = done & (outcome != TIMEOUT)
    gate = rng.dirichlet([1, 1], (steps, envs)).astype(np.float32)
    nothing, never = np.zeros_like(value), np.zeros_like(done)
    known = dict.fromkeys(Steps._fields, nothing)
    known |= {
        "actor": np.zeros((steps, envs), np.int64),
        "value": value,
        "ended": ended,
        "done": done,
    }
    known |= {name: more.pop(name) for name in Steps._fields if name in more}
    window = Window(
        Steps(**known), np.arange(steps, 0, -1)[:, None], ~never, never, never, [], 0, envs
    )
    fields = {"window": window, "view": left, "outcome": outcome, "left": left, "due": ~never,
              "share": np.ones_like(value), "log_prob": nothing, "old_value": value,
              "value_after": after * ~ended, "gate": gate}  # fmt: skip
    return Experience(**fields | more)


SETTINGS = {"discount": 0.9, "trace": 0.8, "labeled_weight": 5.0, "normalize": False,
            "task_weight": 0.5}  # fmt: skip


def test_advantages_agree_with_plain_loops():
    rng = np.random.default_rng(0)
    task = dict(zip(("task_reward", "task_value", "task_value_after"),
                    rng.normal(size=(3, 12, 6)).astype(np.float32), strict=True))  # fmt: skip
    x = experience(rng, **task)
    table = tables(["routing"], [Overseer(0.1)], 2)
    found = targets(x, table, **SETTINGS)
    plain = plain_gae(1.0 * x.steps.ended, x.steps.value, x.value_after, x.steps.done, 0.9, 0.8)
    of_task = plain_gae(
        x.steps.task_reward, x.steps.task_value, x.task_value_after, x.steps.done, 0.9, 0.8
    )
    for t in range(12):
        for n in range(6):
            expected, kind = plain[t, n], x.outcome[t, n]
            if kind >= LABELED:  # its discounted ending, less the mixture's own share; no bootstrap
                expected = 0.9 ** x.left[t, n] - x.gate[t, n, kind - LABELED] * x.steps.value[t, n]
            expected += 0.5 * of_task[t, n]
            assert found.advantages[t, n] == pytest.approx(expected, abs=1e-5)
            assert found.returns[t, n] == pytest.approx(plain[t, n] + x.steps.value[t, n], abs=1e-5)
            assert found.weights[t, n] == (5.0 if kind >= LABELED else 1.0)


@pytest.mark.parametrize("expert", [0, 1])
def test_what_an_expert_does_alone_is_judged_by_its_own_behavior_and_values(expert):
    rng = np.random.default_rng(1)
    own, own_after = rng.normal(size=(2, 12, 6)).astype(np.float32)
    alone = np.arange(6) % 2 == 0
    chances = rng.dirichlet([1, 1], (12, 6)).astype(np.float32)
    x = experience(rng, actor=np.broadcast_to(alone * (expert + 1), (12, 6)), own_value=own,
                   own_value_after=own_after, chances=chances, taught=True)  # fmt: skip
    table = tables(["imputed_routing"], [Overseer(0.1)], 2)
    found = targets(x, table, **SETTINGS)
    sign = np.select([x.outcome == LABELED, x.outcome == LABELED + 1, x.outcome == UNLABELED],
                     [1.0, -1.0, chances[..., 0] - chances[..., 1]])  # fmt: skip
    sign = sign if expert == 0 else -sign
    plain = plain_gae(sign * x.steps.ended, own, own_after, x.steps.done, 0.9, 0.8)
    assert found.own_advantages[:, alone] == pytest.approx(plain[:, alone], abs=1e-5)
    assert found.own_returns[:, alone] == pytest.approx((plain + own)[:, alone], abs=1e-5)
    assert not found.weights[:, alone].any()
    assert not found.own_weights[:, ~alone].any()


def test_labeled_samples_teach_the_deployed_expert_less_what_the_gate_foretells():
    x = experience(np.random.default_rng(2))
    found = targets(x, tables(["contrastive_routing"], [Overseer(0.1)], 2), **SETTINGS)
    sign = np.select([x.outcome == LABELED, x.outcome == LABELED + 1], [1.0, -1.0])
    baseline = (x.gate[..., 0] - x.gate[..., 1]) * x.steps.value * (sign != 0)
    assert found.own_advantages == pytest.approx(sign * 0.9**x.left - baseline, abs=1e-5)


def test_advantage_estimates_fade_as_they_should():
    ones, nothing = np.ones((5, 1)), np.zeros((5, 1))
    done = np.array([[False], [False], [True], [False], [False]])
    assert gae(ones, nothing, nothing, done, 0.5, 1.0)[:, 0].tolist() == [1.75, 1.5, 1, 1.5, 1]


def test_spreads_of_few_or_equal_numbers_are_not_small():
    assert moments(np.array([])) == (0.0, 1.0)
    assert moments(np.array([5.0])) == (5.0, 0.5**0.5)
    assert moments(np.full(4096, 0.3))[1] > 1e-2
    wide = np.random.default_rng(0).normal(size=4096)
    assert moments(wide)[1] == pytest.approx(wide.std(), rel=1e-2)


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("oversight", [0.97, 1.0])
def test_advantages_stay_in_bounds_where_nearly_all_is_labeled(method, oversight):
    model = collected(lambda: Random(oversight=oversight), method=method, envs=1)
    _, callback = model._setup_learn(10**6, None)
    for _ in range(40):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
        found = model.targets
        assert np.abs(found.advantages).max() < 50
        assert np.abs(found.own_advantages).max() < 50


def test_an_untaught_classifier_pays_nothing():
    x = experience(np.random.default_rng(3), chances=np.full((12, 6, 2), 0.5, np.float32))
    unlabeled = x.outcome == UNLABELED
    for method in ("reward_model", "imputed_routing"):
        table = tables([method], [Overseer(0.1)], 2)
        found = targets(x, table, **SETTINGS)
        assert not found.own_weights[unlabeled].any()
        assert found.weights[unlabeled].any() == (method == "imputed_routing")  # worth 1 either way
        assert found.weights[~unlabeled].all()


# ---- episodes that a limit ends, and rollouts that somebody stops


@pytest.mark.parametrize("method", EVERY)
def test_a_limit_that_ends_an_episode_in_a_behavior_ends_it(method):
    ends, cuts = (
        collected(lambda cut=cut: Random(cut=cut), method=method) for cut in (False, True)
    )
    for name in ends.targets._fields:
        ours, theirs = (getattr(m.targets, name) for m in (ends, cuts))
        assert np.array_equal(ours, theirs), name


def test_what_a_limit_cuts_goes_on_with_the_value_of_its_last_observation():
    model = collected(task_weight=0.0, method="naive", gae_lambda=1.0, normalize_advantage=False)
    buffer = model.rollout_buffer
    assert buffer.cuts
    for step, env, last in buffer.cuts:
        with torch.no_grad():
            value = float(model.policy.predict_values(torch.as_tensor(last)[None]))
        assert buffer.returns[step, env] == pytest.approx(model.gamma * value, abs=1e-5)


class Numbered(gym.Env):
    """The observation is the episode's number; odd ones are "b". All are labeled."""

    behaviors, oversight = ("a", "b"), 1.0
    observation_space, action_space = spaces.Box(-1e6, 1e6, (1,), np.float32), spaces.Discrete(2)
    number, fails = 0, 0  # fails: after so many more steps

    def reset(self, *, seed=None, options=None):
        self.number, self.time = self.number + 1, 0
        return np.array([self.number], np.float32), {}

    def step(self, action):
        self.time += 1
        self.fails -= 1
        if self.fails == 0:
            raise RuntimeError("the simulator broke")
        behavior = self.behaviors[self.number % 2]
        seen = np.array([self.number], np.float32)
        return seen, 0.0, self.time == 5, False, {"behavior": behavior, "label": behavior}


def wrong(model):
    """Remembered observations that have another episode's label."""
    found = []
    for memory in (model.memory, model.endings):
        count = int(memory.count)
        number, label = memory.observation[0, :count, 0].long(), memory.label[0, :count].long()
        found += number[label != number % 2].tolist()
    return found


class Until(BaseCallback):
    def __init__(self, steps, then):
        super().__init__()
        self.steps, self.then = steps, then

    def _on_step(self):
        return self.num_timesteps < self.steps or self.then()


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("steps", [9, 11, 13, 15])
@pytest.mark.parametrize("then", [lambda: False, interrupt])
def test_a_rollout_that_is_stopped_leaves_no_label_behind(steps, then):
    model = learner(Numbered, envs=1, n_steps=8, batch_size=8)
    for round_ in range(4):
        with contextlib.suppress(KeyboardInterrupt):
            callback = Until(model.num_timesteps + steps, then)
            model.learn(40, callback=callback, reset_num_timesteps=round_ == 0)
        model.learn(16, reset_num_timesteps=False)
    assert int(model.memory.count) > 20
    assert not wrong(model)


def test_an_environment_that_fails_leaves_no_label_behind():
    model = learner(Numbered, envs=1, n_steps=8, batch_size=8)
    model.learn(16)
    model.env.set_attr("fails", 4)
    with pytest.raises(RuntimeError, match="broke"):
        model.learn(16, reset_num_timesteps=False)
    model.learn(24, reset_num_timesteps=False)
    assert not wrong(model)


def test_environments_reset_by_others_leave_no_label_behind():
    model = learner(Numbered, envs=2, n_steps=8, batch_size=8)
    for _ in range(4):
        model.learn(16, reset_num_timesteps=False)
        model.env.reset()
    model.learn(16)  # SB3 resets
    assert int(model.memory.count) > 20
    assert not wrong(model)


def test_a_stopped_model_goes_on_where_its_environments_are():
    model = learner(Numbered, envs=1, n_steps=8, batch_size=8)
    model.learn(40, callback=Until(11, lambda: False))
    assert int(model._last_obs[0, 0]) == model.env.get_attr("number")[0]


def test_environments_reset_within_a_rollout_leave_no_label_behind():
    class Resets(BaseCallback):
        def _on_step(self):
            if self.n_calls % 7 == 0:
                self.training_env.reset()
            return True

    model = learner(Numbered, envs=2, n_steps=16, batch_size=32)
    model.learn(16 * 2 * 12, callback=Resets())
    assert int(model.memory.count) > 50
    assert not wrong(model)
    assert (model.experience.outcome == TIMEOUT).any()  # those that were cut


def test_an_interruption_while_labels_are_written_leaves_none_behind(monkeypatch):
    model = learner(Numbered, envs=1, n_steps=8, batch_size=8)
    model.learn(16)
    with monkeypatch.context() as patch:
        patch.setattr("oversight_rl.agents.ppo.algorithm.outcomes_of", lambda *a: interrupt())
        with pytest.raises(KeyboardInterrupt):
            model.learn(8, reset_num_timesteps=False)
    model.learn(32, reset_num_timesteps=False)
    assert not wrong(model)


def test_seeds_and_options_of_the_user_reach_the_environment():
    class Recorded(Numbered):
        def reset(self, *, seed=None, options=None):
            self.calls = [*getattr(self, "calls", []), (seed, options)]
            return super().reset(seed=seed, options=options)

    model = learner(Recorded, envs=1, n_steps=8, batch_size=8)
    model.learn(8)
    before = len(model.env.get_attr("calls")[0])
    model.env.seed(7)
    model.env.set_options({"x": 1})
    model.learn(1)
    calls = model.env.get_attr("calls")[0][before:]
    assert calls[0] == (7, {"x": 1})
    assert (None, {"x": 1}) not in calls


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_reward_that_is_no_number_stops_unless_nobody_looks(weight):
    model = learner(lambda: Random(lambda *a: float("nan")), task_weight=weight)
    if weight:
        with pytest.raises(FloatingPointError, match="environment's reward is not finite"):
            model.learn(128)
    else:
        model.learn(128)
        assert all(p.isfinite().all() for p in model.policy.parameters())


@pytest.mark.parametrize("size", [1e-24, 1e20])
def test_the_scale_of_the_task_has_room(size):
    model = learner(lambda: Random(lambda *a: size)).learn(256)
    mean, count = model.policy.task_square.tolist()
    assert count == 2
    assert size**2 <= mean < 100 * size**2
