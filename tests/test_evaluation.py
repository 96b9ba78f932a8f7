"""The result table: exact against rollouts, and the fall-back to rollouts."""

import dataclasses
import math

import pytest

from oversight_rl.agents.settings import AgentConfig, ReinforceConfig
from oversight_rl.agents.steering import standard
from oversight_rl.envs.settings import UserError, WorldConfig
from oversight_rl.evaluation import Subject
from oversight_rl.experiments.oversight.config import Config
from oversight_rl.experiments.oversight.evaluation import Evaluator
from oversight_rl.experiments.oversight.grid import GridRuns as Trainer
from oversight_rl.experiments.oversight.rollouts import EnvEvaluator
from oversight_rl.runs import checkpoint

EPISODES = 200_000


def trained(updates, method="routing", **world):
    config = Config(
        method=method,
        oversight=0.5,
        device="cpu",
        world=WorldConfig(rows=3, cols=3, max_steps=8, **world),
        agent=AgentConfig(hidden=(16, 16)),
        training=ReinforceConfig(updates=60, worlds=128, steps=8, learning_rate=1e-2),
    )
    trainer = Trainer([config])
    for _ in range(updates):
        trainer.update()
    return trainer


@pytest.mark.parametrize("updates", [0, 60])
@pytest.mark.parametrize("method", ["routing", "naive"])
def test_exact_agrees_with_rollouts_on_every_row(updates, method):
    """Within 4 (chances: 4.5) standard errors over 200,000 episodes, sampled and greedy."""
    trainer = trained(updates, method)
    policies = standard(trainer.agent.n_experts)
    policies = [policies[0], policies[-1].with_options(greedy=True)]
    levels = [0.3]
    subject = [Subject(method, 0, 0.5)]
    exact = Evaluator(trainer.configs[0].world, 0.97)
    sampled = Evaluator(trainer.configs[0].world, 0.97, episodes=EPISODES)
    sampled.mdp = None
    rows = exact.evaluate(trainer.agent, subject, policies, [levels], paths=True)[0]
    others = sampled.evaluate(trainer.agent, subject, policies, [levels])[0]
    assert len(rows) == len(policies) * len(levels)
    if updates:
        assert max(abs(row.ground_truth_return) for row in rows) > 0.05  # it is not idle
    for row, other in zip(rows, others, strict=True):
        assert (row.evaluator, other.evaluator) == ("exact", "rollout")
        assert (row.policy, row.greedy) == (other.policy, other.greedy)
        assert row.deploy_oversight == other.deploy_oversight
        assert row.return_se == 0
        assert 0 < other.return_se < 0.01
        assert abs(row.ground_truth_return - other.ground_truth_return) < 4 * other.return_se
        chances = [field.name for field in dataclasses.fields(row) if field.name.startswith("p_")]
        assert len(chances) == 6
        for name in chances:
            p, estimate = getattr(row, name), getattr(other, name)
            assert abs(p - estimate) < 4.5 * math.sqrt(p * (1 - p) / EPISODES) + 1e-6, name
        assert abs(row.episode_length - other.episode_length) < 4 * 4 / math.sqrt(EPISODES)
        assert abs(row.window_return - other.window_return) < 4 / math.sqrt(EPISODES)
        assert row.p_diamond + row.p_ghost + row.p_timeout == pytest.approx(1)
        assert 0 < row.p_ghost_flagged < row.p_ghost
        assert 0 < row.p_ghost_on_path < row.p_ghost
    (unasked,) = exact.evaluate(trainer.agent, subject, policies[:1], [levels])[0]
    assert math.isnan(unasked.p_ghost_on_path)


@pytest.mark.parametrize("face", ["exact", "rollout", "environments"])
@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_policy_without_probabilities_is_refused(face, greedy, value):
    world = WorldConfig(rows=3, cols=3, max_steps=8)
    if face == "environments":
        config = Config(algo="ppo", world=world, device="cpu")
        evaluator, agent = EnvEvaluator(config, 500), checkpoint.new_policy(config)
    else:
        evaluator, agent = Evaluator(world, 0.97, episodes=500), trained(0).agent
    if face == "rollout":
        evaluator.mdp = None
    policies = [policy.with_options(greedy) for policy in standard(2)]
    head = next(p for name, p in agent.named_parameters() if name.endswith("head.bias"))
    head.data.view(-1)[1] = value
    with pytest.raises(UserError, match=r"routing, seed 7: mixture: .* not finite") as refused:
        evaluator.evaluate(agent, [Subject("routing", 7, 0.5)], policies, [[0.5]])
    assert "\n" not in str(refused.value)


def test_one_episode_has_no_standard_error():
    evaluator = Evaluator(WorldConfig(rows=3, cols=3, max_steps=8), 0.97, episodes=1)
    evaluator.mdp = None
    subject = [Subject("naive", 0, 0.5)]
    (row,) = evaluator.evaluate(trained(0, "naive").agent, subject, standard(1), [[0.5]])[0]
    assert math.isnan(row.return_se)


def test_spurious_flags_fall_back_to_rollouts():
    trainer = trained(0, spurious_oversight=0.2)
    evaluator = Evaluator(trainer.configs[0].world, 0.97, episodes=500)
    (row,) = evaluator.evaluate(
        trainer.agent, [Subject("routing", 0, 0.5)], standard(2)[:1], [[0.5]]
    )[0]
    assert row.evaluator == "rollout"
    assert row.return_se > 0
    assert row.p_diamond * 500 == pytest.approx(round(row.p_diamond * 500))  # 500 episodes


def test_each_run_of_a_stack_is_evaluated_at_its_own_levels():
    trainer = trained(0)
    alone = trainer.configs[0]
    other = alone.model_copy(update={"seeds": (1,), "oversight": 0.1})
    stack = Trainer([alone, other])
    evaluator = Evaluator(alone.world, 0.97)
    subjects = [Subject("routing", 0, 0.5), Subject("routing", 1, 0.1)]
    tables = evaluator.evaluate(stack.agent, subjects, standard(2), [[0.5], [0.0, 0.1]])
    assert [len(rows) for rows in tables] == [3, 6]
    assert [row.deploy_oversight for row in tables[1]] == [0.0, 0.1] * 3
    expected = evaluator.evaluate(Trainer([other]).agent, subjects[1:], standard(2), [[0.0, 0.1]])[
        0
    ]
    for row, reference in zip(tables[1], expected, strict=True):
        assert row.ground_truth_return == pytest.approx(reference.ground_truth_return, abs=1e-6)


def test_rows_come_in_the_order_asked():
    trainer = trained(0)
    evaluator = Evaluator(trainer.configs[0].world, 0.97)
    rows = evaluator.evaluate(
        trainer.agent, [Subject("routing", 0, 0.5)], standard(2)[::-1], [[0.5, 0.0]]
    )[0]
    assert [row.deploy_oversight for row in rows] == [0.5, 0.0] * 3
    assert [row.policy for row in rows] == ["ghost"] * 2 + ["diamond"] * 2 + ["mixture"] * 2


def test_the_standard_error_is_that_of_the_mean():
    trainer = trained(0)
    evaluator = Evaluator(trainer.configs[0].world, 1.0, episodes=5_000)
    evaluator.mdp = None
    (row,) = evaluator.evaluate(
        trainer.agent, [Subject("routing", 0, 0.5)], standard(2)[:1], [[0.5]]
    )[0]
    # undiscounted, a return is 1, -1 or 0
    variance = row.p_diamond + row.p_ghost - row.ground_truth_return**2
    assert row.return_se == pytest.approx(math.sqrt(variance / 5_000), rel=1e-3)


@pytest.mark.parametrize("set_apart", [{"ghost_oversight": 0.1}, {"diamond_oversight": 0.9}])
def test_what_the_world_sets_apart_stays_so_at_any_level(set_apart):
    """Exactly as by rollouts in the world itself, within 4.5 standard errors."""
    trainer = trained(60, "naive", **set_apart)
    world, subject, levels = trainer.configs[0].world, [Subject("naive", 0, 0.5)], [[0.5, 1.0]]
    exact, sampled = (Evaluator(world, 0.97, episodes=EPISODES) for _ in range(2))
    sampled.mdp = None
    args = trainer.agent, subject, standard(1), levels
    for row, other in zip(exact.evaluate(*args)[0], sampled.evaluate(*args)[0], strict=True):
        chance = {"diamond": row.deploy_oversight, "ghost": row.deploy_oversight}
        for name, flagged in chance.items():
            flagged = set_apart.get(f"{name}_oversight", flagged)
            reached, seen = getattr(other, f"p_{name}"), getattr(other, f"p_{name}_flagged")
            if flagged == 1:
                assert seen == reached
            else:
                assert 0 < seen < reached
        assert abs(row.ground_truth_return - other.ground_truth_return) < 4.5 * other.return_se
        for name in ("p_diamond", "p_ghost", "p_diamond_flagged", "p_ghost_flagged"):
            p, estimate = getattr(row, name), getattr(other, name)
            assert abs(p - estimate) < 4.5 * math.sqrt(p * (1 - p) / EPISODES) + 1e-6, name


@pytest.mark.parametrize("face", ["exact", "rollout", "environments"])
@pytest.mark.parametrize("level", [0.0, 0.5])
def test_only_what_is_set_to_be_flagged_is(face, level):
    """Ghosts always, diamonds never, whatever the level."""
    size = {"rows": 3, "cols": 3, "max_steps": 8}
    world = WorldConfig(**size, ghost_oversight=1.0, diamond_oversight=0.0)
    if face == "environments":
        config = Config(algo="ppo", method="naive", world=world, device="cpu")
        evaluator, agent = EnvEvaluator(config, 500), checkpoint.new_policy(config)
    else:
        evaluator, agent = Evaluator(world, 0.97, episodes=500), trained(0, "naive").agent
    if face == "rollout":
        evaluator.mdp = None
    (row,) = evaluator.evaluate(agent, [Subject("naive", 0, 0.5)], standard(1), [[level]])[0]
    assert row.p_ghost > 0.1
    assert row.p_diamond > 0.1
    assert row.p_ghost_flagged == pytest.approx(row.p_ghost)
    assert row.p_diamond_flagged == 0
