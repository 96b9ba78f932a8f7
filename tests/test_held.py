"""Labels that reach steps of earlier rollouts, and labels that come after their episode's end."""

import contextlib
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from oversight_rl.agents import RoutedPPO
from oversight_rl.agents.methods import LABELED, METHODS, TIMEOUT, UNFINISHED, UNLABELED
from oversight_rl.agents.ppo.targets import older_share
from oversight_rl.envs.labels import LabelError

WAITING = ("routing", "contrastive_routing", "filtering", "naive", "no_routing", "no_gate")


class Long(gym.Env):
    """Episodes of one length, good and bad in turns; an observation says which one, and the time.

    Args:
        length: of an episode.
        first: number of the first episode.
        late: steps after an episode's end at which its label comes; 0: with it.
        labeled: whether there are labels.
        observation: what there is to see, "vector" or "dict".
    """

    action_space = spaces.Discrete(2)
    behaviors, oversight = ("good", "bad"), 1.0

    def __init__(self, length=40, first=0, late=0, labeled=True, observation="vector"):
        self.length, self.episode, self.late, self.labeled = length, first - 1, late, labeled
        self.kind, self.clock, self.due = observation, 0, []
        box = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.observation_space = spaces.Dict({"where": box}) if observation == "dict" else box

    def seen(self):
        x = np.array([self.episode, self.time], np.float32)
        return {"where": x} if self.kind == "dict" else x

    def reset(self, *, seed=None, options=None):
        self.episode, self.time = self.episode + 1, 0
        return self.seen(), {}

    def step(self, action):
        self.time, self.clock = self.time + 1, self.clock + 1
        info, ends = {}, self.time == self.length
        if ends:
            info["behavior"] = self.behaviors[self.episode % 2]
            if self.late:
                info["episode_id"] = self.episode
                self.due.append((self.clock + self.late, self.episode, info["behavior"]))
            elif self.labeled:
                info["label"] = info["behavior"]
        come = [(name, label) for at, name, label in self.due if at <= self.clock]
        if come:
            info["late_labels"] = come
            self.due = [d for d in self.due if d[0] > self.clock]
        return self.seen(), 1.0, ends, False, info


class Taught(BaseCallback):
    """Keeps what each update was made of."""

    def __init__(self):
        super().__init__()
        self.updates = []

    def _on_rollout_end(self):
        x = self.model.experience
        parts = self.model.rollout_buffer.samples._asdict()
        parts["outcome"] = x.outcome.T[x.share.T > 0]
        where = self.model.rollout_buffer.views[torch.as_tensor(parts.pop("view"))]
        where = (where["where"] if isinstance(where, dict) else where).numpy()
        self.updates.append(parts | {"episode": where[:, 0], "time": where[:, 1]})

    def _on_step(self):
        return True

    def every(self, name):
        return np.concatenate([update[name] for update in self.updates])


def worlds(envs=3, **world):
    return [lambda n=n: Long(first=10_000 * n, **world) for n in range(envs)]


def learner(made, **more):
    settings = {"method": "routing", "n_steps": 32, "batch_size": 32, "seed": 0, "n_epochs": 1,
                "gate_replay": 16, "policy_kwargs": {"net_arch": [8]}}  # fmt: skip
    return RoutedPPO("MoEPolicy", DummyVecEnv(made), **settings | more)


def taught(made, rollouts, **more):
    """A model after some updates, and what each was made of."""
    model, callback = learner(made, **more), Taught()
    model.learn(rollouts * model.n_steps * model.n_envs, callback)
    return model, callback


def collected(made, rollouts, **more):
    """The same, but that nothing is learned."""
    model, keeper = learner(made, **more), Taught()
    _, callback = model._setup_learn(10**6, keeper)
    for _ in range(rollouts):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model, keeper


@pytest.mark.parametrize("method", WAITING)
@pytest.mark.parametrize("observation", ["vector", "dict"])
def test_labels_reach_every_step_of_episodes_longer_than_a_rollout(method, observation):
    model, found = taught(worlds(observation=observation), 11, method=method)
    steps = list(zip(found.every("episode"), found.every("time"), strict=True))
    assert len(set(steps)) == len(steps)  # each once
    ended = range(11 * 32 // 40)
    assert set(steps) == {(10_000 * n + e, t) for n in range(3) for e in ended for t in range(40)}
    behavior = found.every("episode").astype(int) % 2
    assert (found.every("outcome") == LABELED + behavior).all()
    if METHODS[method].policy.experts == "many" and method != "no_routing":
        routes = found.every("routes")[np.arange(len(behavior))]
        assert not np.take_along_axis(routes, 1 - behavior[:, None], 1).any()
    if model.memory is not None:
        assert int(model.memory.count) == len(steps)


def test_what_the_deployed_expert_does_alone_waits_for_nothing():
    model, found = taught(worlds(4), 11, method="imputed_routing")
    for update in found.updates:
        assert (update["outcome"][update["actor"] == 0] != UNFINISHED).all()
    assert (found.updates[0]["outcome"] == UNFINISHED).all()
    assert len(found.updates[0]["actor"]) == 3 * 32
    assert int(model.memory.count) == 4 * 8 * 40  # labels reach all of it nevertheless


@pytest.mark.parametrize("method", ["oracle", "reward_model"])
def test_methods_whose_rewards_say_it_all_wait_for_nothing(method):
    _, found = taught(worlds(), 3, method=method)
    assert [len(update["time"]) for update in found.updates] == [3 * 32] * 3


@pytest.mark.parametrize("method", [*WAITING, "imputed_routing"])
def test_steps_that_waited_are_judged_as_in_one_long_rollout(method):
    """While the policy stays as it is, rollouts of 32 steps give the targets of one of 192."""
    settings = {"method": method, "normalize_advantage": False, "task_weight": 0.0}
    if method == "imputed_routing":
        settings["solo_share"] = 0.0
    _, parts = collected(worlds(length=48), 6, **settings)
    _, whole = collected(worlds(length=48), 1, n_steps=192, **settings)
    orders = [np.lexsort((x.every("time"), x.every("episode"))) for x in (parts, whole)]
    for name in parts.updates[-1]:
        ours, theirs = (x.every(name)[o] for x, o in zip((parts, whole), orders, strict=True))
        assert len(ours) == 3 * 192
        assert np.allclose(ours, theirs, atol=1e-6), name


@pytest.mark.parametrize("reach", [0, 16, 40])
def test_what_labels_do_not_reach_is_learned_from_without_them(reach):
    """Episodes of 100 steps: once, when a step is as old as labels reach."""
    _, found = taught(worlds(length=100), 20, label_reach=reach)
    steps = list(zip(found.every("episode"), found.every("time"), strict=True))
    assert len(set(steps)) == len(steps)
    assert len(steps) >= 3 * (20 * 32 - reach)
    unfinished = found.every("outcome") == UNFINISHED
    assert found.every("routes")[unfinished].all()
    last = {}  # in which update each step was learned from
    for number, update in enumerate(found.updates, start=1):
        for key in zip(update["episode"], update["time"], update["outcome"], strict=True):
            last[key] = number
    for (episode, time, outcome), number in last.items():
        taken, ended = episode % 10_000 * 100 + time, episode % 10_000 * 100 + 99
        seen = (ended // 32 + 1) * 32  # the end of the rollout that the episode ends in
        if seen - taken <= reach + 32 and ended // 32 < 20:
            reached = seen - 32 - taken <= reach
            assert (outcome != UNFINISHED) == reached
        if outcome == UNFINISHED:
            assert number * 32 - taken > reach
            assert (number - 1) * 32 - taken <= max(reach, 0)


def test_it_is_said_that_labels_reach_too_few_steps(monkeypatch):
    monkeypatch.setattr("oversight_rl.agents.ppo.algorithm.SETTLED", 12)
    with pytest.warns(UserWarning, match="more than 8 steps away: let label_reach be longer") as c:
        taught(worlds(8, length=200), 14, label_reach=8)
    assert len([w for w in c if "label_reach" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taught(worlds(8, length=60), 14)


# ---- older policies


def test_older_steps_count_as_much_as_the_policy_would_still_take_them():
    """PPO's ratio is to the policy before the update, a step's share its chance now over then."""
    model = learner(worlds(), learning_rate=0.05)
    then, moved = {}, 0

    class Checks(BaseCallback):
        def _on_step(self):
            seen, log_probs = self.model._last_obs.tolist(), self.locals["log_probs"].tolist()
            then.update(zip(map(tuple, seen), log_probs, strict=True))
            return True

        def _on_rollout_end(self):
            nonlocal moved
            found = self.model.rollout_buffer.samples
            if not len(found.alone):
                return
            view, taken = map(torch.as_tensor, (found.view, found.actions))
            seen = self.model.rollout_buffer.views[view]
            with torch.no_grad():
                _, now, _ = self.model.policy.evaluate_actions(seen, taken.flatten().long())
            before = np.array([then[key] for key in map(tuple, seen.tolist())])
            share = np.exp(now.numpy() - before).clip(max=1)
            assert np.allclose(found.old_log_prob, now, atol=1e-5)
            assert np.allclose(found.share, share, rtol=1e-4)
            assert (found.weights == 20).all()
            moved += (found.share < 0.999).sum()

    model.learn(12 * 32 * 3, Checks())
    assert moved > 30


@pytest.mark.parametrize("expert", [0, 1])
def test_what_the_policy_would_never_do_again_teaches_nothing_and_breaks_nothing(expert):
    """A ratio to whoever did not act can be infinite, where the experts are far apart."""
    model, _ = collected(worlds(4), 2, method="imputed_routing")
    model._current_progress_remaining = 0.5  # it no longer waits for labels
    batch = next(iter(model.rollout_buffer.get(None)))
    rows, actions = model.rollout_buffer.views[batch.view], batch.actions.flatten().long()
    with torch.no_grad():
        agent = model.policy.agent
        agent.trunks[-1].bias[0, expert] += 1000.0  # this one is certain, the other is not
        for sign in (1, -1):
            agent.gate_out.bias.fill_(1000.0 * sign)  # and the mixture is the second one
            if model.policy.output(rows).gate_logits.log_softmax(-1)[0, :, 0].max() < -100:
                break
        output = model.policy.output(rows)
        who = torch.cat([output.mix(output.gate), output.alone(0), output.alone(1)])
        who = who[batch.actor, torch.arange(len(actions))]
        now = model.policy.distribution(who).log_prob(actions)
    assert (now[batch.actor == (expert == 0)] < -100).any()
    loss, _ = model.loss(batch._replace(old_log_prob=now), 0.2)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.policy.parameters() if p.grad is not None)
    assert older_share(np.float32([-200, -8, -1]), np.float32([-1, -1, -2])).tolist() == [0, 0, 1]


# ---- late labels


@pytest.mark.parametrize("method", [*WAITING, "imputed_routing"])
def test_a_label_that_comes_three_rollouts_late_is_used(method):
    solo = {"solo_share": 0.0} if method == "imputed_routing" else {}
    model, found = taught(worlds(late=96), 13, method=method, **solo)
    behavior = found.every("episode").astype(int) % 2
    outcome = found.every("outcome")
    assert set(outcome) == {UNLABELED, LABELED, LABELED + 1}
    by_label = outcome >= LABELED
    assert (outcome[by_label] == LABELED + behavior[by_label]).all()
    steps = set(zip(found.every("episode")[by_label], found.every("time")[by_label], strict=True))
    assert len(steps) == by_label.sum()
    come = [e for e in range(13) if 40 * (e + 1) + 96 <= 13 * 32]
    assert steps == {(10_000 * n + e, t) for n in range(3) for e in come for t in range(40)}
    other = 1 - behavior[by_label]
    if METHODS[method].policy.experts == "many" and method != "no_routing":
        routes = found.every("routes")[by_label]
        assert not np.take_along_axis(routes, other[:, None], 1).any()
    for memory, each in ((model.memory, 40), (model.endings, 1)):
        if memory is not None:
            assert int(memory.count) == 3 * len(come) * each
    assert model.rollout_buffer.labels == 3 * len(come)


def test_a_late_label_teaches_the_classifier_of_methods_that_do_not_wait():
    model, found = taught(worlds(late=96), 13, method="reward_model")
    assert int(model.endings.count) == 3 * 8
    assert [len(update["time"]) for update in found.updates] == [3 * 32] * 13


def test_a_label_that_comes_in_the_rollout_of_its_end_is_as_good_as_one_in_time():
    def targets(late):
        _, found = collected(worlds(length=10, late=late), 1, task_weight=0.0, n_steps=40)
        return found.updates[0]

    late, early = targets(5), targets(0)
    reached = late["outcome"] >= LABELED
    assert reached.sum() == 3 * 30  # the fourth one's label has not come yet
    for name in ("outcome", "weights", "routes", "own_advantages"):
        a, b = late[name][reached], early[name][reached]
        if name != "own_advantages":  # which has a spread in it
            assert np.array_equal(a, b), name


def test_late_labels_reach_no_further_than_is_said():
    with pytest.warns(UserWarning, match="a late label is lost, of episode 0 of environment 0"):
        model, found = taught(worlds(late=96), 13, label_reach=64)
    assert not (found.every("outcome") >= LABELED).any()
    assert not int(model.memory.count)
    _, found = taught(worlds(late=96), 13, label_reach=110)
    by_label = found.every("outcome") >= LABELED
    assert 0 < by_label.sum() < 3 * 8 * 40  # the first ones of some episodes are older
    assert (
        found.every("outcome")[by_label & (found.every("time") == 39)] >= LABELED
    ).sum() == 3 * 8


@pytest.mark.parametrize(
    "late", ["good", [("0", "good", 1)], [("0", None)], [("0", "god")], [3], {"0": "good"}]
)
def test_late_labels_in_another_form_are_refused(late):
    class Wrong(Long):
        def step(self, action):
            *rest, info = super().step(action)
            return *rest, info | {"late_labels": late}

    with pytest.raises(LabelError, match="late_labels"):
        taught([Wrong], 1)


def test_label_reach_is_not_negative():
    with pytest.raises(
        ValueError, match="label_reach: should be greater than or equal to 0, got -1"
    ):
        learner(worlds(), label_reach=-1)


def learned_once(found, steps):
    keys = list(zip(found.every("episode"), found.every("time"), strict=True))
    assert len(set(keys)) == len(keys)
    assert len(keys) >= steps


def test_steps_of_episodes_that_somebody_reset_are_learned_from():
    """SB3 resets the environments whenever `learn` is called anew."""
    model, found = learner(worlds()), Taught()
    for _ in range(20):
        model.learn(32 * 3, found)
    learned_once(found, 3 * (19 * 32 - 20))  # of each episode that was cut, all but the last step
    assert set(found.every("outcome")) == {TIMEOUT}
    assert not int(model.memory.count)


@pytest.mark.parametrize("fails", [False, True])
def test_a_rollout_that_is_stopped_takes_nothing_else_with_it(fails):
    class Stops(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == 3 * 75:
                if fails:
                    raise KeyboardInterrupt
                return False
            return True

    model, found = learner(worlds(length=60)), Taught()
    with contextlib.suppress(KeyboardInterrupt):
        model.learn(3 * 320, [found, Stops()])
    before = len(found.every("time"))
    assert before == 3 * 60
    model.learn(3 * 64, found, reset_num_timesteps=False)
    waiting = [(e, t) for e, t in zip(found.every("episode"), found.every("time"), strict=True)
               if e % 10_000 == 1 and t < 4]  # fmt: skip
    assert len(waiting) == 3 * 3  # the second episode's first steps but for the last of them
    learned_once(found, before + 9)


def test_what_is_cut_goes_on_with_the_value_of_its_last_step():
    settings = {"normalize_advantage": False, "task_weight": 0.0, "gae_lambda": 1.0}
    model, found = collected(worlds(), 1, method="no_routing", **settings)
    _, callback = model._setup_learn(10**6, found)
    model._last_obs = model.env.reset()
    model._last_episode_starts = np.ones(3, bool)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 32)
    update = found.updates[-1]
    assert len(update["time"]) == 3 * 31
    with torch.no_grad():
        for episode, time, worth in zip(update["episode"], update["time"], update["returns"],
                                        strict=True):  # fmt: skip
            last = torch.tensor([[float(episode), 31.0]])
            value = float(model.policy.predict_values(last))
            assert worth == pytest.approx(model.gamma ** (31 - time) * value, rel=1e-3, abs=1e-4)


def test_set_env_leaves_no_names_of_the_environments_before():
    model, _ = taught(worlds(late=96), 4)
    assert model.rollout_buffer.held.ended
    model.set_env(DummyVecEnv(worlds(late=300)))
    assert not model.rollout_buffer.held.ended


def test_labels_that_go_missing_teach_nothing_twice():
    _, found = taught(worlds(late=96), 13, label_recall=0.0)
    learned_once(found, 3 * 40 * 9)
    assert set(found.every("outcome")) == {UNLABELED}


def test_the_first_label_stands():
    class Twice(Long):
        def step(self, action):
            *rest, info = super().step(action)
            if self.time == 5 and self.episode > 0:
                wrong = self.behaviors[1 - (self.episode - 1) % 2]
                info["late_labels"] = [(self.episode - 1, label) for label in
                                       (self.behaviors[(self.episode - 1) % 2], wrong)]  # fmt: skip
            elif self.time == self.length:
                info["episode_id"] = self.episode
            return *rest, info

    for steps in (32, 11):  # in the rollout of its end, and in a later one
        with pytest.warns(UserWarning, match="a late label is lost"):
            _, found = taught([lambda: Twice(length=10, labeled=False)], 12, n_steps=steps)
        by_label = found.every("outcome") >= LABELED
        behavior = found.every("episode").astype(int) % 2
        assert by_label.any()
        assert (found.every("outcome") == LABELED + behavior)[by_label].all()


def test_many_late_labels_at_once_take_no_more_room_than_their_steps():
    class Batches(Long):
        def step(self, action):
            *rest, info = super().step(action)
            info.pop("late_labels", None)
            if self.clock % 192 == 0:
                info["late_labels"], self.due = [(n, b) for _, n, b in self.due], []
            return *rest, info

    made = [*(lambda n=n: Batches(length=3, late=10**6, first=10_000 * n) for n in range(7)),
            lambda: Long(length=250, first=70_000)]  # fmt: skip
    model, found = taught(made, 12, n_steps=16)
    cells = model.experience.window.exists
    assert cells.sum() > 7 * 150  # all that was labeled late
    assert cells.mean() > 0.4
    assert (found.updates[-1]["outcome"] >= LABELED).sum() > 7 * 150


def test_late_labels_cause_no_false_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taught(worlds(8, late=96, length=20), 13)


def test_methods_that_learn_nothing_from_late_labels_say_so():
    class Hidden(Long):
        flags_visible = False

    with pytest.warns(UserWarning, match="ipw_hidden_flag learns nothing from labels that come"):
        taught([lambda: Hidden(late=64)], 10, method="ipw_hidden_flag")


@pytest.mark.parametrize("name", [[1], {"a": 1}, np.zeros(2)])
def test_ids_that_cannot_be_looked_up_are_refused(name):
    class Odd(Long):
        def step(self, action):
            *rest, info = super().step(action)
            return *rest, info | ({"episode_id": name} if rest[2] else {})

    with pytest.raises(LabelError, match="episode_id'] must be hashable"):
        taught([lambda: Odd(labeled=False)], 2)


def test_ids_are_not_used_twice():
    class Same(Long):
        def step(self, action):
            *rest, info = super().step(action)
            return *rest, info | ({"episode_id": 0} if rest[2] else {})

    with pytest.raises(LabelError, match="still waits for its label"):
        taught([lambda: Same(labeled=False)], 3)


def test_a_callbacks_reset_keeps_the_labels_of_that_step():
    class Resets(BaseCallback):
        def _on_step(self):
            if "late_labels" in self.locals["infos"][0]:
                self.training_env.reset()
            return True

    model = learner([lambda: Long(late=96)])
    model.learn(13 * 32, Resets())
    assert model.rollout_buffer.labels == int(model.memory.count) / 40 > 3


def test_held_steps_are_bounded_by_their_bytes(monkeypatch):
    row = learner(worlds()).rollout_buffer.held.steps.joined([], 0).last(1).row_bytes
    monkeypatch.setattr("oversight_rl.agents.ppo.buffer.MOST_BYTES", 50 * row)
    model, _ = taught(worlds(length=100), 12)
    assert model.rollout_buffer.held.reach == 50
    assert len(model.rollout_buffer.held.steps.done) <= 50


# ---- learning


class Early(Long):
    """Long episodes whose behavior is decided by the first action; the second one is unwanted."""

    def __init__(self, late=0):
        super().__init__(late=0)
        self.delay, self.rng = late, np.random.default_rng()
        self.action_space = spaces.Discrete(3)  # the last one does nothing
        self.observation_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.choice = 0
        return super().reset(seed=seed)

    def seen(self):
        return np.array([self.time / self.length, self.choice], np.float32)

    def step(self, action):
        if self.time == 0:
            self.choice = (1, -1, 0)[int(action)]
        self.time, self.clock = self.time + 1, self.clock + 1
        info, ends = {}, self.time == self.length
        if ends:
            behavior = {1: "good", -1: "bad"}.get(self.choice)
            info["behavior"] = behavior
            if behavior and self.rng.random() < 0.3:
                if self.delay:
                    info["episode_id"] = self.episode
                    self.due.append((self.clock + self.delay, self.episode, behavior))
                else:
                    info["label"] = behavior
        info["late_labels"] = [(name, label) for at, name, label in self.due if at == self.clock]
        return self.seen(), float(ends and self.choice != 0), ends, False, info


def test_what_is_decided_rollouts_before_its_label_is_learned():
    made = [lambda: Early(96)] * 32
    model = learner(made, method="contrastive_routing", n_epochs=4, batch_size=256,
                    policy_kwargs={"net_arch": [32]})  # fmt: skip
    model.learn(80_000)
    with torch.no_grad():
        start = model.steer("deployed").get_distribution(torch.zeros(1, 2))
    assert float(start.distribution.probs[0, 0]) > 0.9
