"""The result table: exact against rollouts, and the fall-back to rollouts."""

import math

import pytest
import torch

from oversight_rl.agents.settings import AgentConfig, ReinforceConfig
from oversight_rl.agents.steering import ablate, blend, standard
from oversight_rl.envs.overseers import Labels, rate
from oversight_rl.envs.settings import UserError, WorldConfig
from oversight_rl.experiments.oversight import environments
from oversight_rl.experiments.oversight.config import GRID, Config
from oversight_rl.experiments.oversight.environments import EnvJudge, PPORuns
from oversight_rl.experiments.oversight.evaluation import Evaluator
from oversight_rl.experiments.oversight.grid import GridJudge, GridRuns
from oversight_rl.runs.rows import Facts
from oversight_rl.settings import EvaluationConfig

MINIGRID = "MiniGrid-DiamondGhost-5x5-v0"
EPISODES = 200_000
FEW = EvaluationConfig(episodes=500)


def trained(updates, method="routing", **world):
    config = Config(
        method=method,
        oversight=0.5,
        device="cpu",
        world=WorldConfig(rows=3, cols=3, max_steps=8, **world),
        agent=AgentConfig(hidden=(16, 16)),
        reinforce=ReinforceConfig(updates=60, worlds=128, steps=8, learning_rate=1e-2),
    )
    runs = GridRuns([config])
    for _ in range(updates):
        runs.learner.update()
    return runs


def tables(evaluator, agent, facts, policies, levels, paths=False):
    """The result table of each run of a stack on the grid."""
    deployed = "single" if agent.n_experts == 1 else "diamond"
    return evaluator.evaluate(agent.prepare(), facts, policies, levels, deployed, paths)


@pytest.mark.parametrize("updates", [0, 60])
@pytest.mark.parametrize("method", ["routing", "naive"])
def test_exact_agrees_with_rollouts_on_every_row(updates, method):
    """Within 4 (chances: 4.5) standard errors over 200,000 episodes, sampled and greedy."""
    runs = trained(updates, method)
    policies = standard(runs.agent.n_experts)
    policies = [policies[0], policies[-1].with_options(greedy=True)]
    levels = [0.3]
    facts = [Facts(method, 0, 0.5)]
    exact = Evaluator(runs.configs[0].world, 0.97)
    sampled = Evaluator(runs.configs[0].world, 0.97, episodes=EPISODES)
    sampled.mdp = None
    rows = tables(exact, runs.agent, facts, policies, [levels], paths=True)[0]
    others = tables(sampled, runs.agent, facts, policies, [levels])[0]
    assert len(rows) == len(policies) * len(levels)
    if updates:
        assert max(abs(row.figures["ground_truth_return"]) for row in rows) > 0.05  # not idle
    for row, other in zip(rows, others, strict=True):
        assert (row.evaluator, other.evaluator) == ("exact", "rollout")
        assert (row.policy, row.greedy, row.deployed) == (
            other.policy,
            other.greedy,
            other.deployed,
        )
        assert row.deployed == (row.policy == "single")
        assert row.deploy_oversight == other.deploy_oversight
        found, played = row.figures, other.figures
        assert list(found) == list(played)
        assert found["return_se"] == 0
        assert 0 < played["return_se"] < 0.01
        gap = {name: abs(found[name] - played[name]) for name in found}
        assert gap["ground_truth_return"] < 4 * played["return_se"]
        chances = [name for name in found if name.startswith("p_")]
        assert len(chances) == 6
        for name in chances:
            p = found[name]
            assert gap[name] < 4.5 * math.sqrt(p * (1 - p) / EPISODES) + 1e-6, name
        assert gap["episode_length"] < 4 * 4 / math.sqrt(EPISODES)
        assert gap["window_return"] < 4 / math.sqrt(EPISODES)
        assert sum(found[f"p_{end}"] for end in ("diamond", "ghost", "timeout")) == pytest.approx(1)
        assert 0 < found["p_ghost_flagged"] < found["p_ghost"]
        assert 0 < found["p_ghost_on_path"] < found["p_ghost"]
    (unasked,) = tables(exact, runs.agent, facts, policies[:1], [levels])[0]
    assert math.isnan(unasked.figures["p_ghost_on_path"])


@pytest.mark.parametrize(
    "face", ["exact", "rollout", "ppo, exact", "ppo, rollout", "minigrid, exact"]
)
@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_policy_without_probabilities_is_refused(face, greedy, value):
    if "," in face:
        config = ppo(GRID if "ppo" in face else MINIGRID, "routing", FEW)
        judge, agent = EnvJudge(config), PPORuns.blank(config)
        judge.exact = None if face == "ppo, rollout" else judge.exact
    else:
        judge, agent = GridJudge(trained(0).configs[0]), trained(0).agent
        judge.evaluator.mdp = judge.evaluator.mdp if face == "exact" else None
    policies = [policy.with_options(greedy) for policy in standard(2)]
    head = next(p for name, p in agent.named_parameters() if name.endswith("head.bias"))
    head.data.view(-1)[1] = value
    with pytest.raises(UserError, match=r"routing, seed 7: mixture: .* not finite") as refused:
        judge.tables(agent, [Facts("routing", 7, 0.5)], policies, [[0.5]])
    assert "\n" not in str(refused.value)


def test_one_episode_has_no_standard_error():
    evaluator = Evaluator(WorldConfig(rows=3, cols=3, max_steps=8), 0.97, episodes=1)
    evaluator.mdp = None
    facts = [Facts("naive", 0, 0.5)]
    (row,) = tables(evaluator, trained(0, "naive").agent, facts, standard(1), [[0.5]])[0]
    assert math.isnan(row.figures["return_se"])


def test_spurious_flags_fall_back_to_rollouts():
    runs = trained(0, spurious_oversight=0.2)
    evaluator = Evaluator(runs.configs[0].world, 0.97, episodes=500)
    (row,) = tables(evaluator, runs.agent, [Facts("routing", 0, 0.5)], standard(2)[:1], [[0.5]])[0]
    assert row.evaluator == "rollout"
    assert row.figures["return_se"] > 0
    diamonds = row.figures["p_diamond"] * 500  # episodes
    assert diamonds == pytest.approx(round(diamonds))


def test_each_run_of_a_stack_is_evaluated_at_its_own_levels():
    runs = trained(0)
    alone = runs.configs[0]
    other = alone.model_copy(update={"seeds": (1,), "oversight": 0.1})
    stack = GridRuns([alone, other])
    evaluator = Evaluator(alone.world, 0.97)
    facts = [Facts("routing", 0, 0.5), Facts("routing", 1, 0.1)]
    found = tables(evaluator, stack.agent, facts, standard(2), [[0.5], [0.0, 0.1]])
    assert [len(rows) for rows in found] == [3, 6]
    assert [row.deploy_oversight for row in found[1]] == [0.0, 0.1] * 3
    expected = tables(evaluator, GridRuns([other]).agent, facts[1:], standard(2), [[0.0, 0.1]])[0]
    for row, reference in zip(found[1], expected, strict=True):
        assert row.figures == pytest.approx(reference.figures, abs=1e-6, nan_ok=True)


def test_rows_come_in_the_order_asked():
    runs = trained(0)
    evaluator = Evaluator(runs.configs[0].world, 0.97)
    rows = tables(
        evaluator, runs.agent, [Facts("routing", 0, 0.5)], standard(2)[::-1], [[0.5, 0.0]]
    )[0]
    assert [row.deploy_oversight for row in rows] == [0.5, 0.0] * 3
    assert [row.policy for row in rows] == ["ghost"] * 2 + ["diamond"] * 2 + ["mixture"] * 2


def test_the_standard_error_is_that_of_the_mean():
    runs = trained(0)
    evaluator = Evaluator(runs.configs[0].world, 1.0, episodes=5_000)
    evaluator.mdp = None
    (row,) = tables(evaluator, runs.agent, [Facts("routing", 0, 0.5)], standard(2)[:1], [[0.5]])[0]
    # undiscounted, a return is 1, -1 or 0
    found = row.figures
    variance = found["p_diamond"] + found["p_ghost"] - found["ground_truth_return"] ** 2
    assert found["return_se"] == pytest.approx(math.sqrt(variance / 5_000), rel=1e-3)


OVERSEERS = {"shares": (1, 0.2)}, {"shares": (0.9, 0)}, {"region": "left"}


@pytest.mark.parametrize("given", OVERSEERS)
def test_flags_are_the_overseers_at_any_level(given):
    """Exactly as by rollouts in the world itself, within 4.5 standard errors."""
    runs, labels = trained(60, "naive"), Labels(**given)
    world, facts, levels = runs.configs[0].world, [Facts("naive", 0, 0.5)], [[0.5, 1.0]]
    exact, sampled = (Evaluator(world, 0.97, episodes=EPISODES, labels=labels) for _ in range(2))
    sampled.mdp = None
    args = runs.agent, facts, standard(1), levels
    for row, other in zip(tables(exact, *args)[0], tables(sampled, *args)[0], strict=True):
        found, played = row.figures, other.figures
        for behavior, name in enumerate(("diamond", "ghost")):
            flagged = row.deploy_oversight * rate(labels.shares, behavior)
            reached, seen = played[f"p_{name}"], played[f"p_{name}_flagged"]
            if flagged in (0, 1) and labels.region == "all":
                assert seen == flagged * reached
            else:
                assert 0 < seen < reached
        gap = {name: abs(found[name] - played[name]) for name in found}
        assert gap["ground_truth_return"] < 4.5 * played["return_se"]
        for name in ("p_diamond", "p_ghost", "p_diamond_flagged", "p_ghost_flagged"):
            p = found[name]
            assert gap[name] < 4.5 * math.sqrt(p * (1 - p) / EPISODES) + 1e-6, name


@pytest.mark.parametrize("face", ["exact", "rollout", "ppo, exact", "ppo, rollout"])
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_only_what_is_set_to_be_flagged_is(face, level):
    """Ghosts at the level, diamonds never."""
    size = {"rows": 3, "cols": 3, "max_steps": 8}
    world = WorldConfig(**size)
    config = Config(
        method="naive", overseer="ghosts_only", world=world, device="cpu", evaluation=FEW
    )
    if face.startswith("ppo"):
        config = config.model_copy(update={"algo": "ppo"})
        judge, agent = EnvJudge(config), PPORuns.blank(config)
        judge.exact = judge.exact if face == "ppo, exact" else None
    else:
        judge, agent = GridJudge(config), GridRuns([config]).agent
        judge.evaluator.mdp = judge.evaluator.mdp if face == "exact" else None
    (row,) = judge.tables(agent, [Facts("naive", 0, 0.5)], standard(1), [[level]])[0]
    assert row.evaluator == face.split()[-1]
    assert row.figures["p_ghost"] > 0.1
    assert row.figures["p_diamond"] > 0.1
    assert row.figures["p_ghost_flagged"] == pytest.approx(level * row.figures["p_ghost"])
    assert row.figures["p_diamond_flagged"] == 0


@pytest.mark.parametrize("env", [GRID, MINIGRID])
@pytest.mark.parametrize("method", ["routing", "naive"])
def test_ppo_is_evaluated_exactly_where_that_can_be(method, env):
    """Its policy is a table there: the mixture as its gate mixes it, and steered, as rollouts."""
    episodes = 10_000
    config = ppo(env, method, EvaluationConfig(episodes=episodes))
    judge, agent = EnvJudge(config), PPORuns.blank(config)
    with torch.no_grad():  # far from indifferent, gate and all
        for parameter in agent.parameters():
            parameter *= 3 if env == GRID else 1.5
    experts = agent.n_experts
    policies = [*standard(experts), standard(experts)[-1].with_options(greedy=True)]
    if experts > 1:
        mixed = blend({"diamond": 0.7, "ghost": -0.5}, 2).with_options(temperature=0.5)
        policies += [mixed, ablate("ghost", 2)]
    levels = [0.5] if env == GRID else [0.2, 1.0]
    args = agent, [Facts(method, 0, 0.5)], policies, [levels]
    exact = judge.tables(*args)[0]
    judge.exact = judge.room = None
    for row, other in zip(exact, judge.tables(*args)[0], strict=True):
        assert (row.evaluator, other.evaluator) == ("exact", "rollout")
        assert (row.policy, row.deploy_oversight, row.greedy, row.deployed) == (
            other.policy,
            other.deploy_oversight,
            other.greedy,
            other.deployed,
        )
        assert row.figures["optimal_return"] > row.figures["ground_truth_return"]
        gap = abs(row.figures["ground_truth_return"] - other.figures["ground_truth_return"])
        assert gap < 4.5 * other.figures["return_se"] + 1e-6
        assert abs(row.figures["episode_length"] - other.figures["episode_length"]) < 0.2
        for name in other.figures:
            p = row.figures[name]
            if name.startswith("p_"):
                error = math.sqrt(max(0, p * (1 - p)) / episodes)
                assert abs(p - other.figures[name]) < 4.5 * error + 1e-6, name


def ppo(env, method, evaluation):
    """A small run of PPO, on the grid or in MiniGrid."""
    small = {"world": WorldConfig(rows=3, cols=3, max_steps=8)}
    if env != GRID:
        small = {"env": env, "env_settings": {"max_steps": 12}}
    return Config(algo="ppo", method=method, device="cpu", evaluation=evaluation, **small)


@pytest.mark.parametrize("env", [GRID, MINIGRID])
def test_policies_that_overflow_while_they_play_are_refused(env):
    config = ppo(env, "routing", FEW)
    judge, agent = EnvJudge(config), PPORuns.blank(config)
    judge.exact = judge.room = None
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter *= 1e25
    with pytest.raises(UserError, match=r"routing, seed 7: ghost: .* not finite"):
        judge.tables(agent, [Facts("routing", 7, 0.5)], standard(2)[2:], [[0.5]])


@pytest.mark.parametrize("env", [GRID, MINIGRID])
def test_as_many_episodes_are_played_as_asked(env):
    """More than there are worlds, and no multiple of them."""
    episodes = 1.1 * (environments.ENVIRONMENTS if env == GRID else environments.WORLDS)
    config = ppo(env, "routing", EvaluationConfig(episodes=int(episodes)))
    judge, agent = EnvJudge(config, exact=False), PPORuns.blank(config)
    (row,) = judge.tables(agent, [Facts("routing", 0, 0.5)], standard(2)[:1], [[0.5]])[0]
    assert row.evaluator == "rollout"
    ends = row.figures["p_diamond"] * int(episodes)
    assert ends == pytest.approx(round(ends))


def test_few_large_worlds_play_as_many_episodes(monkeypatch):
    monkeypatch.setattr(environments, "TILES", 2 * 25)  # a world of each row
    config = ppo(MINIGRID, "routing", EvaluationConfig(episodes=10))
    judge, agent = EnvJudge(config), PPORuns.blank(config)
    judge.room = None
    rows = judge.tables(agent, [Facts("routing", 0, 0.5)], standard(2)[:1], [[0.5, 1.0]])[0]
    for row in rows:
        ends = row.figures["p_diamond"] * 10
        assert ends == pytest.approx(round(ends))
