"""What a training loop relies on in any learner; a new one is a line in LEARNERS."""

from dataclasses import replace
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_experiment import ClimbConfig, Climber, ClimberConfig
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from oversight_rl.agents.learner import NotFinite
from oversight_rl.agents.methods import METHODS
from oversight_rl.agents.ppo import learner as ppo_learner
from oversight_rl.agents.ppo.config import PPOConfig
from oversight_rl.agents.ppo.learner import PPOLearner
from oversight_rl.agents.reinforce.learner import ReinforceLearner
from oversight_rl.agents.routing import Router, Rule, expand
from oversight_rl.agents.settings import AgentConfig, ReinforceConfig
from oversight_rl.agents.supervised import SupervisedLearner
from oversight_rl.envs.overseers import Labels, Overseer
from oversight_rl.envs.settings import NO_LABEL, UserError, WorldConfig
from oversight_rl.envs.vector import make_vec
from oversight_rl.envs.world import Truth

LEVELS = (0.5, 0.9, 0.2)
AGENT = AgentConfig(hidden=(8, 8))


class Reinforce:
    """Makes stacks with one run of each method, each with a seed and a level of its own."""

    exact = True  # whether a run goes on as if it had not stopped
    points = {"endings/timeout", "loss/value"}  # some of those of its curves

    def __init__(self, *methods, **labels):
        self.methods, self.labels = methods, Labels(recall=0.9, error=0.1, **labels)

    def __str__(self):
        return "reinforce-" + "-".join(self.methods)

    def __call__(self, runs=None, seed=0):
        runs = range(len(self.methods)) if runs is None else runs
        hides = METHODS[self.methods[0]].policy.hides_flags
        return ReinforceLearner(
            ReinforceConfig(updates=8, worlds=16, steps=8),
            AGENT,
            WorldConfig(
                rows=3,
                cols=3,
                max_steps=6,
                spurious_oversight=0.1,
                flags_visible=not hides,
            ),
            [self.methods[run] for run in runs],
            [Overseer(LEVELS[run], self.labels) for run in runs],
            [seed + run for run in runs],
            looks_every=2,
        )

    @staticmethod
    def lie(learner):
        """Swap what truly happened, but not what is seen of it."""
        honest = learner.world.step

        def step(*arguments):
            state, taken = honest(*arguments)
            ending = taken.truth.ending
            swapped = torch.where(ending == NO_LABEL, ending, 1 - ending)
            return state, replace(taken, truth=Truth(swapped))

        learner.world.step = step


class PPO:
    """Makes single runs in environments of an id, or in a user's, which keep no state."""

    points = Reinforce.points

    def __init__(self, env, method):
        self.env, self.method, self.exact = env, method, isinstance(env, str)

    def __str__(self):
        return f"ppo-{self.method}"

    def __call__(self, runs=None, seed=0):
        hides = {"flags_visible": False} if METHODS[self.method].policy.hides_flags else {}
        env = (
            make_vec(self.env, 4, oversight=0.5, **hides)
            if self.exact
            else DummyVecEnv([self.env] * 4)
        )
        settings = PPOConfig(updates=8, steps=16, batch_size=32, epochs=2)
        overseer = Overseer(0.5, Labels(recall=0.9, error=0.1))
        return PPOLearner(settings, AGENT, env, self.method, overseer, seed)

    @staticmethod
    def lie(learner):
        """Swap what truly happened, but not what is seen of it."""
        honest, other = learner.env.step, dict(zip(*[learner.model.behaviors] * 2, strict=True))
        other = dict(zip(other, reversed(list(other)), strict=True))

        def step(actions):
            *results, infos = honest(actions)
            for info in infos:
                if info.get("behavior") is not None:
                    info["behavior"] = other[info["behavior"]]
            return *results, infos

        learner.env.step = step


class Climb:
    """Makes stacks of three climbers."""

    exact, points = True, {"height"}

    def __str__(self):
        return "climb"

    def __call__(self, runs=range(3), seed=0):
        config = ClimbConfig(oversight=0.9, climb=ClimberConfig(updates=8))
        return Climber(config, [seed + run for run in runs])


class Supervised:
    """Makes single runs of a network whose added units learn from some samples only."""

    exact, points = True, {"loss/error", "loss/size"}

    def __call__(self, runs=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        layers = nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1)
        model = nn.Sequential(*layers)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.uniform_(-0.5, 0.5, generator=generator)
        added = expand(model, "", units=2, generator=generator)
        router = Router(model, {"added": added}, {0: Rule(["rest"], ["added"]), 1: Rule()})
        optimizer = router.optimizer(torch.optim.AdamW(model.parameters()))

        def draw(update):
            return torch.randn(16, 3), torch.full((16,), update % 4 == 3)

        def backward(batch, progress):
            x, ids = batch
            with router.labels(ids.long()):
                error = (model(x)[:, 0] - x.sum(1)).square().mean()
            size = model[0].weight.square().mean()
            (error + 0.1 * progress * size).backward()
            return {"error": error, "size": size}

        return SupervisedLearner(
            model, optimizer, draw, backward, updates=8, learning_rate=(1e-2, 0.0), seed=seed
        )


class Walk(gym.Env):
    """Random lengths, a task of its own, labels on half of the episodes; no state to keep."""

    observation_space, action_space = spaces.Box(-9, 9, (2,), np.float32), spaces.Discrete(2)
    behaviors, oversight = ("left", "right"), 0.5

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=2).clip(-9, 9).astype(np.float32), {}

    def step(self, action):
        done, info = bool(self.np_random.random() < 0.2), {}
        if done:
            info["behavior"] = self.behaviors[int(action)]
            if self.np_random.random() < self.oversight:
                info["label"] = info["behavior"]
        reward = float(self.np_random.normal())
        return self.reset()[0], reward, done, False, info


GRID, MINIGRID = "OversightGrid-v0", "MiniGrid-DiamondGhost-5x5-v0"
LEARNERS = {
    "routing": Reinforce("routing", "no_routing", "random_module"),
    "imputed_routing": Reinforce(*["imputed_routing"] * 3),
    "naive": Reinforce("naive", "filtering", "oracle_filtering"),
    "reward_model": Reinforce(*["reward_model"] * 3),
    "ghosts_only": Reinforce(*["imputed_routing"] * 3, shares=(0, 1)),
    "plain": Reinforce(*["imputed_routing_plain"] * 3),
    "plain_region": Reinforce(*["reward_model_plain"] * 3, region="left"),
    "early_stop": Reinforce(*["naive_early_stop"] * 3),
    "oracle_stop": Reinforce(*["naive_oracle_stop"] * 3),
    "ppo_grid": PPO(GRID, "imputed_routing"),
    "ppo_minigrid": PPO(MINIGRID, "routing"),
    "ppo_plain": PPO(MINIGRID, "imputed_routing_plain"),
    "ppo_user": PPO(Walk, "imputed_routing"),
    "climb": Climb(),
    "supervised": Supervised(),
}
any_learner = pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS)


def advance(learner, updates):
    """Train as a loop does, which now and then asks some learners to keep what is best."""
    for _ in range(updates):
        if hasattr(learner, "select") and learner.updates % 2 == 0:
            learner.select([learner.updates % 3 / 2] * learner.runs)
        learner.update()
    return learner


def saved(learner):
    """A copy of the states of all runs."""
    return [
        {name: x.detach().clone() for name, x in learner.state(run).items()}
        for run in range(learner.runs)
    ]


def differing(ours, theirs):
    """Names of the tensors that are not the same to the bit (nan is nan)."""
    assert [list(state) for state in ours] == [list(state) for state in theirs]
    return {
        name
        for one, other in zip(ours, theirs, strict=True)
        for name, x in one.items()
        if x.numpy().tobytes() != other[name].numpy().tobytes()
    }


def close(ours, theirs):
    """Stacks of other sizes multiply matrices in another order."""
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-4, atol=1e-6, msg=name)


def finite(learner):
    """Which runs are well, as a loop looks at them. [R] bool"""
    return torch.stack(list(learner.numbers().values())).isfinite().all(0)


@any_learner
def test_it_says_how_far_it_is(make):
    learner = make()
    assert (learner.updates, learner.total) == (0, 8)
    steps = [learner.env_steps, *(advance(learner, 1).env_steps for _ in range(3))]
    assert learner.updates == 3
    assert steps == sorted(set(steps))
    assert min(after - before for before, after in pairwise(steps)) == learner.steps
    points = learner.curves()
    assert len(points) == learner.runs
    assert all(isinstance(x, float) for point in points for x in point.values())
    assert make.points <= set(points[0])
    assert all(x.shape == (learner.runs,) for x in learner.numbers().values())
    assert all(len(x) == learner.runs for x in learner.learned())
    assert finite(learner).all()


@any_learner
def test_the_same_seed_gives_the_same_bytes(make):
    one, two, other = (advance(make(seed=seed), 3) for seed in (3, 3, 4))
    assert not differing(saved(one), saved(two))
    assert repr(one.curves()) == repr(two.curves())
    assert differing(saved(one), saved(other))


@any_learner
def test_a_run_goes_on_as_if_it_had_not_stopped(make):
    whole = advance(make(), 2)
    states = saved(whole)
    resumed = advance(make(seed=9), 3)  # whatever it knew is gone
    resumed.load(states, 2)
    left = differing(saved(resumed), states)
    assert not left
    assert (resumed.updates, resumed.env_steps) == (2, whole.env_steps)
    if make.exact:
        # a learner draws by its own seed
        resumed = make()
        resumed.load(states, 2)
        assert not differing(saved(advance(whole, 3)), saved(advance(resumed, 3)))
        assert repr(whole.curves()) == repr(resumed.curves())


@any_learner
def test_a_state_is_bounded(make):
    learner = advance(make(), 1)
    before = {name: (x.shape, x.dtype) for name, x in learner.state(0).items()}
    advance(learner, 4)
    state, bounds = learner.state(0), learner.bounds()
    assert {name: (x.shape, x.dtype) for name, x in state.items()} == before
    whole = {name for name, x in state.items() if not x.is_floating_point()}
    assert whole <= set(bounds) <= set(state)
    learner.load(saved(learner), 5)  # which checks them


@any_learner
def test_what_cannot_be_is_refused(make):
    learner = advance(make(), 3)
    good, bounds = saved(learner), learner.bounds()
    last = learner.runs - 1

    def refused(words, name, x):
        state = dict(good[last])
        state.pop(name)
        if x is not None:
            state[name] = x
        with pytest.raises(UserError, match=f"{words}.*: {name}"):
            learner.load([*good[:last], state], 3)

    for name, x in good[last].items():
        refused("does not fit", name, None)
        refused("does not fit", name, torch.cat([x.reshape(-1), x.reshape(-1)[:1]]))
        refused("does not fit", name, x.to(torch.complex64))
    for name, (low, high) in bounds.items():
        x = good[last][name]
        raw = x.view(torch.uint8) if x.dtype == torch.bool else x
        held = torch.finfo if x.is_floating_point() else torch.iinfo
        most = held(raw.dtype)
        for forged in (np.min(low).item() - 1, np.max(high).item() + 1):
            if x.numel() and most.min <= forged <= most.max:
                refused("cannot be", name, torch.full_like(raw, forged).view(x.dtype))
    learner.load(good, 3)
    assert not differing(saved(learner), good)


@pytest.mark.parametrize("make", [m for m in LEARNERS.values() if m().runs > 1], ids=str)
def test_a_stack_is_its_runs_alone(make):
    together = saved(advance(make(), 4))
    for run, state in enumerate(together):
        (alone,) = saved(advance(make(runs=[run]), 4))
        close(state, alone)


@any_learner
def test_numbers_that_go_bad_are_told_and_taken_back(make):
    learner, healthy = advance(make(), 2), advance(make(), 2)
    names, run = list(learner.numbers()), learner.runs // 2
    before = [x.clone() for x in learner.learned()]
    for x in learner.learned():
        x[run] = torch.nan
    learner.update()
    well = [other != run for other in range(learner.runs)]
    assert finite(learner).tolist() == well
    assert list(learner.numbers()) == names
    for now, was in zip(learner.learned(), before, strict=True):
        now[run] = was[run]
    states = saved(learner)
    healthy.update()
    for other in set(range(learner.runs)) - {run}:  # they notice nothing
        close(states[other], healthy.state(other))
    for _ in range(2):
        advance(learner, 1)
        assert finite(learner).all()
    if make.exact:  # the update that is left out is no hindrance to going on
        resumed = make()
        resumed.load(states, 3)
        assert not differing(saved(advance(resumed, 2)), saved(learner))


@pytest.mark.parametrize(
    "make",
    [Reinforce(name) for name in METHODS]
    + [PPO(GRID, name) for name in METHODS if METHODS[name].any_environment],
    ids=str,
)
def test_the_truth_changes_nothing_unless_the_method_sees_it(make):
    honest, lied_to = make(), make()
    make.lie(lied_to)
    changed = differing(saved(advance(honest, 2)), saved(advance(lied_to, 2)))
    method = METHODS[make.methods[0] if isinstance(make, Reinforce) else make.method]
    assert bool(changed) == (method.table.sees_truth)


# ---- PPO, whose loop is SB3's


class Seeds(BaseCallback):
    """Lets SB3's own loop draw as the learner's updates do."""

    def __init__(self, seed):
        super().__init__()
        self.seed, self.update = seed, 0

    def _on_rollout_start(self):
        self.update += 1
        self.model.label_generator = ppo_learner._seed(self.seed, self.update)

    def _on_step(self):
        return True


@pytest.mark.parametrize("method", ["imputed_routing", "naive"])
def test_updates_from_outside_are_those_of_sb3s_loop(method):
    settings = PPOConfig(updates=5, steps=16, batch_size=32, epochs=2)
    asked = settings, AGENT, DummyVecEnv([Walk] * 4), method, Overseer(0.5), 3
    learner = PPOLearner(*asked)
    for _ in range(5):
        learner.update()
    model = ppo_learner.make_model(*asked)
    model.env.seed(int(np.random.SeedSequence(3).generate_state(1)[0]))
    model.learn(5 * 16 * 4, Seeds(3))
    assert model.num_timesteps == learner.env_steps
    ours, theirs = learner.policy.state_dict(), model.policy.state_dict()
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())


def broken_gradient(learner, monkeypatch):
    honest, calls = learner.model.loss, []

    def loss(*arguments):
        calls.append(1)
        value, parts = honest(*arguments)
        return value * (torch.nan if len(calls) == 2 else 1), parts

    monkeypatch.setattr(learner.model, "loss", loss)


def broken_reward(learner, monkeypatch):
    honest, calls = learner.env.step, []

    def step(actions):
        calls.append(1)
        observation, reward, *rest = honest(actions)
        return observation, reward * (np.nan if len(calls) == 7 else 1), *rest

    monkeypatch.setattr(learner.env, "step", step)


def broken_computation(learner, monkeypatch):
    honest, calls = learner.model.train, []

    def train():
        calls.append(1)
        if len(calls) == 1:
            raise FloatingPointError
        honest()

    monkeypatch.setattr(learner.model, "train", train)


@pytest.mark.parametrize(
    ("break_it", "what"),
    [
        (broken_gradient, "gradient's norm"),
        (broken_reward, "environment's reward"),
        (broken_computation, "computation"),
    ],
)
def test_an_update_that_breaks_off_is_named_and_left_out(monkeypatch, break_it, what):
    learner = advance(PPO(Walk, "imputed_routing")(), 2)
    before, states = [x.clone() for x in learner.learned()], saved(learner)
    break_it(learner, monkeypatch)
    learner.update()
    assert {name for name, x in learner.numbers().items() if not x.isfinite().all()} == {what}
    for now, was in zip(learner.learned(), before, strict=True):
        now.copy_(was)
    left = differing(saved(learner), states)
    assert all(name.startswith(("memory.", "endings.", "last.")) for name in left)
    assert finite(advance(learner, 1)).all()
    assert learner.env_steps == learner.model.num_timesteps == 4 * 4 * 16
    assert all(x.isfinite().all() for x in learner.learned())


@pytest.mark.parametrize(
    ("env", "method"), [(MINIGRID, "routing"), (GRID, "imputed_routing"), (Walk, "naive")]
)
def test_an_update_that_learns_nothing_shows_no_old_numbers(env, method):
    """Where steps wait for labels there may be none to learn from; a resumed run knows no other."""
    env = make_vec(env, 2, oversight=0.5) if isinstance(env, str) else DummyVecEnv([env] * 2)
    settings = PPOConfig(updates=200, steps=2, batch_size=2, solo_share=0.25)
    learner = PPOLearner(settings, AGENT, env, method, Overseer(0.5), seed=1)
    seen = []
    for _ in range(200):
        learner.update()
        seen += learner.curves()
        assert finite(learner).all()
    learned = [points for points in seen if not np.isnan(points["loss/value"])]
    nothing = [points for points in seen if np.isnan(points["loss/loss"])]
    assert len(learned) + len(nothing) == 200
    assert min(map(len, (learned, nothing))) > 0
    assert {tuple(points) for points in seen} == {tuple(seen[0])}
    losses = [name for name in seen[0] if name.startswith("loss/") and "explained" not in name]
    assert not np.isnan([learned[-1][name] for name in losses]).any()


def test_what_an_update_may_raise_is_a_number_by_name():
    learner = PPO(Walk, "imputed_routing")()
    for error in (NotFinite("policy's output"), NotFinite("gradient's norm", np.inf)):
        learner.model.train = lambda error=error: (_ for _ in ()).throw(error)
        learner.update()
        assert not learner.numbers()[error.what].isfinite()
        assert str(error) == f"the {error.what} is not finite"


def test_spaces_without_zero_are_kept_and_go_on():
    class High(Walk):
        observation_space = spaces.Box(1, 9, (2,), np.int64)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.ones(2, np.int64), {}

    learner = advance(PPO(High, "routing")(), 2)
    learner.load(saved(learner), 2)
    for forged in ([1.0, -1.0], [-4.0, 3.0], [float("nan"), 1.0], [1.0, 1e9]):
        wrong = {"policy.task_square": torch.tensor(forged, dtype=torch.float64)}
        with pytest.raises(UserError, match=r"cannot be: policy\.task_square"):
            learner.load([saved(learner)[0] | wrong], 2)


def test_networks_of_any_size_are_not_taken():
    large = AgentConfig(hidden=(2**14, 2**14))
    with pytest.raises(UserError, match="agent: at most 134,217,728 parameters"):
        PPOLearner(PPOConfig(), large, DummyVecEnv([Walk]), "naive", Overseer(0.5), 0)


# ---- supervised learning


def test_its_updates_are_those_of_a_plain_loop():
    learner, plain = Supervised()(seed=3), Supervised()(seed=3)
    optimizer = torch.optim.AdamW(plain.model.parameters())  # no router's: nothing stands still
    learner.optimizer = torch.optim.AdamW(learner.model.parameters())
    advance(learner, 4)
    for update in range(4):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - update / 7)
        torch.manual_seed(int(np.random.SeedSequence((3, update)).generate_state(1)[0]))
        optimizer.zero_grad()
        plain.backward(plain.draw(update), update / 7)
        optimizer.step()
    ours, theirs = learner.model.state_dict(), plain.model.state_dict()
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-6, atol=1e-7, msg=name)


def test_it_draws_from_no_stream_but_its_own():
    learner = Supervised()()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    advance(learner, 2)
    assert torch.equal(torch.rand(3), wanted)
