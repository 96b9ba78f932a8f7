"""A method is a row: one of each kind, added while the tests run, trains with every learner."""

import re
from functools import partial

import pytest
from stable_baselines3.common.vec_env import DummyVecEnv
from test_ppo_targets import Random

from oversight_rl.agents.methods import (
    EXPERTS,
    FILTERED,
    METHODS,
    ROUTED,
    Method,
    OutcomeTable,
    PolicyShape,
    own_expert_only,
)
from oversight_rl.agents.ppo.config import PPOConfig
from oversight_rl.agents.ppo.learner import PPOLearner
from oversight_rl.agents.reinforce.learner import ReinforceLearner
from oversight_rl.agents.settings import AgentConfig, ReinforceConfig
from oversight_rl.cli import train
from oversight_rl.envs.overseers import Overseer
from oversight_rl.envs.settings import WorldConfig
from oversight_rl.runs.folder import RunFolder

AGENT = AgentConfig(hidden=(8,))
LEAKY = OutcomeTable(routes=partial(own_expert_only, other=0.25), reward=(0.5, 1, 2))
ROWS = {
    "a table": Method("routing that lets a little through", LEAKY, EXPERTS, ("gate",)),
    "a shape": Method("blind, under a gate that no label teaches", ROUTED,
                      PolicyShape("many", hides_flags=True)),
    "lessons": Method("everything on one policy", FILTERED, lessons=("contrast", "reward_model")),
    "an expert alone": Method("practice without imputing", ROUTED, EXPERTS, ("gate", "acts_alone")),
    "a deployed one": Method("routing, stopped early", ROUTED, EXPERTS, ("gate",), "best_labeled"),
}  # fmt: skip


@pytest.fixture(params=ROWS)
def added(request, monkeypatch):
    monkeypatch.setitem(METHODS, request.param, ROWS[request.param])
    return request.param


def reinforce(method, updates=3):
    settings = ReinforceConfig(updates=updates, worlds=16, steps=16, gate_replay=64)
    world = WorldConfig(max_steps=8, flags_visible=not METHODS[method].policy.hides_flags)
    learner = ReinforceLearner(settings, AGENT, world, [method], [Overseer(0.5)], [0])
    learner.select([0.0])
    for _ in range(updates):
        learner.update()
    return learner


def ppo(method, updates=3):
    class Unseen(Random):
        flags_visible = False

    env = DummyVecEnv([lambda: Unseen(oversight=1.0)] * 4)
    settings = PPOConfig(updates=updates, worlds=4, steps=32, batch_size=64, gate_replay=16)
    learner = PPOLearner(settings, AGENT, env, method, Overseer(0.3), seed=0)
    for _ in range(updates):
        learner.update()
    return learner


def test_a_row_trains_with_reinforce(added):
    learner, row = reinforce(added), ROWS[added]
    assert all(x.isfinite().all() for x in learner.numbers().values())
    ((curves),) = learner.curves()
    assert ("loss/gate" in curves) == ("gate" in row.lessons)
    assert ("loss/contrast" in curves) == ("contrast" in row.lessons)
    assert (learner.reward_model is not None) == ("reward_model" in row.lessons)
    assert learner.agent.n_experts == (2 if row.policy.experts == "many" else 1)
    assert (learner.selected is not None) == (row.deploys != "last")


def test_a_row_trains_with_ppo(added):
    row = ROWS[added]
    if row.deploys != "last":
        with pytest.raises(ValueError, match="method must be one of"):
            ppo(added)
        return
    learner = ppo(added)
    assert all(x.isfinite().all() for x in learner.numbers().values())
    model = learner.model
    assert (model.memory is not None) == ("gate" in row.lessons)
    assert ("reward_model_loss" in str(model.logger.name_to_value)) == (
        "reward_model" in row.lessons
    )
    assert model.rollout_buffer.alone.any() == ("acts_alone" in row.lessons)
    assert model.policy.n_experts == (2 if row.policy.experts == "many" else 1)


@pytest.mark.parametrize("algo", ["reinforce", "ppo"])
def test_a_row_can_be_trained_and_evaluated_by_command(added, algo, tmp_path):
    if algo == "ppo" and ROWS[added].deploys != "last":
        return
    small = {"reinforce": ["--reinforce.worlds", "16"], "ppo": ["--ppo.worlds", "16",
             "--ppo.steps", "16"]}[algo]  # fmt: skip
    train(["--algo", algo, "--method", added, "--run-dir", str(tmp_path / "run"), "--no-pictures",
           "--oversight", "0.5", "--world.rows", "3", "--world.cols", "3", "--agent.hidden", "8",
           f"--{algo}.updates", "2", "--evaluation.episodes", "20", *small])  # fmt: skip
    rows = RunFolder.open(tmp_path / "run").result()
    several = METHODS[added].policy.experts == "many"
    assert {row.policy for row in rows if row.deployed} == {"diamond" if several else "single"}


def test_what_a_table_pays_and_where_it_leaks_is_what_is_learned_from(monkeypatch):
    monkeypatch.setitem(METHODS, "leaky", ROWS["a table"])
    _, targets, _ = reinforce("leaky", 1).latest
    routes = {tuple(r) for r in targets.routes.flatten(0, 2).tolist()}
    assert routes == {(1.0, 1.0, 1.0), (1.0, 0.25, 0.0), (0.25, 1.0, 0.0)}
    found = ppo("leaky", 1).model.targets
    assert {tuple(r) for r in found.routes.reshape(-1, 3).tolist()} == routes


def test_an_expert_that_acts_alone_learns_from_that_and_not_from_the_mixture(monkeypatch):
    monkeypatch.setitem(METHODS, "alone", ROWS["an expert alone"])
    monkeypatch.setitem(METHODS, "contrast", Method("", ROUTED, EXPERTS, ("contrast",)))
    model = ppo("alone", 1).model
    learned = model.rollout_buffer.samples
    assert learned.alone.any()
    assert not learned.own_weights[~learned.alone].any()
    assert model.logger.name_to_value["train/contrast_loss"] != 0
    assert not ppo("contrast", 1).model.rollout_buffer.samples.alone.any()


def test_a_gate_that_no_label_teaches_learns_from_what_the_mixture_did(monkeypatch):
    rows = {"taught": ("gate",), "untaught": ()}
    for name, lessons in rows.items():
        monkeypatch.setitem(METHODS, name, Method("", OutcomeTable(), EXPERTS, lessons))
    losses = [float(reinforce(name, 1).latest[2].gate.detach()) for name in rows]
    losses += [ppo(name, 1).model.logger.name_to_value["train/gate_loss"] for name in rows]
    assert [loss > 0 for loss in losses] == [True, False] * 2
    for agent in (reinforce("untaught", 1).agent, ppo("untaught", 1).policy.agent):
        assert agent.gate_out.weight.grad.any()


@pytest.mark.parametrize(
    ("shape", "lessons"),
    [("one", ("gate",)), ("one", ("acts_alone",)), ("many", ("gte",))],
)
def test_lessons_that_nobody_would_hear_are_refused(shape, lessons):
    with pytest.raises(ValueError, match=re.escape(str(lessons))):
        Method("", policy=PolicyShape(shape), lessons=lessons)
    with pytest.raises(ValueError, match="gate"):
        Method("", policy=PolicyShape("many", "fixed"), lessons=("gate",))
