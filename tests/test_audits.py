"""Audits: bounds on unwanted endings from labels alone, and how often they hold."""

import math
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
from scipy import integrate, stats

from oversight_rl.agents.settings import AgentConfig
from oversight_rl.agents.steering import standard
from oversight_rl.envs.audits import audit
from oversight_rl.envs.labels import LabelError, OversightLabels
from oversight_rl.envs.overseers import Labels
from oversight_rl.envs.settings import UserError, WorldConfig
from oversight_rl.experiments.oversight.audits import audited, cells, fair, label, notes
from oversight_rl.experiments.oversight.config import GRID, Config
from oversight_rl.experiments.oversight.environments import PPORuns
from oversight_rl.experiments.oversight.grid import GridRuns
from oversight_rl.experiments.oversight.policies import Saved
from oversight_rl.settings import EvaluationConfig

PAGE = Path(__file__).parent.parent / "docs" / "environments.md"
MINIGRID = "MiniGrid-DiamondGhost-5x5-v0"


@cache
def counted(unwanted, labeled, confidence=0.95):
    """What an audit says of numbers of labels."""
    return audit(["unwanted"] * unwanted + ["wanted"] * (labeled - unwanted), confidence=confidence)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize(("unwanted", "labeled"), [(0, 1), (0, 50), (3, 40), (39, 40), (40, 40)])
def test_bounds_are_those_of_their_definitions(unwanted, labeled, confidence):
    """Of SciPy's test, and where the mean stake, integrated numerically, is 1 / (1 - confidence)"""
    found = counted(unwanted, labeled, confidence)
    assert (found.unwanted, found.labeled) == (unwanted, labeled)
    test = stats.binomtest(unwanted, labeled, alternative="less")
    assert found.bound == pytest.approx(test.proportion_ci(confidence).high, abs=1e-12)
    p, wanted = found.anytime_bound, labeled - unwanted
    assert p > found.bound or p == 1

    def stake(x):
        return (x / p) ** unwanted * ((1 - x) / (1 - p)) ** wanted / p

    if p < 1:
        assert integrate.quad(stake, 0, p)[0] == pytest.approx(1 / (1 - confidence), rel=1e-6)


def test_without_labels_there_is_no_bound():
    for labels in ([], [None] * 100):
        assert vars(audit(labels)) == {
            "labeled": 0, "unwanted": 0, "bound": 1.0, "anytime_bound": 1.0
        }  # fmt: skip


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.95])
@pytest.mark.parametrize("labeled", [10, 200])
def test_one_look_holds_as_often_as_promised(share, labeled):
    """Exactly: over all numbers of unwanted labels."""
    chance = stats.binom.pmf(range(labeled + 1), labeled, share)
    held = sum(chance[k] for k in range(labeled + 1) if counted(k, labeled).bound >= share)
    assert held >= 0.95
    if 0.05 < (1 - share) ** labeled < 0.1 or (share, labeled) == (0.5, 200):
        assert held < 0.97  # no more than it must


@pytest.mark.parametrize("share", [0.02, 0.2, 0.6])
def test_bounds_hold_at_all_looks_at_once(share):
    """Exactly, with a look after each of 150 labels; that of one look does not."""

    def ever_held(which):
        alive = {0: 1.0}  # chance of each number of unwanted labels, the bound having held so far
        for labeled in range(1, 151):
            following = {}
            for k, chance in alive.items():
                for more, by in ((1, share), (0, 1 - share)):
                    following[k + more] = following.get(k + more, 0.0) + chance * by
            alive = {
                k: chance
                for k, chance in following.items()
                if chance > 1e-9 and getattr(counted(k, labeled), which) >= share
            }
        return sum(alive.values())

    assert ever_held("anytime_bound") >= 0.95
    if share > 0.1:  # in which case there is enough to see
        assert ever_held("bound") < 0.9


@pytest.mark.parametrize(
    ("behaviors", "endings", "error"),
    [
        (("a", "b"), [0.7, 0.1], 0.2),
        (("a", "b"), [0.9, 0.02], 0.3),
        (("a", "b", "c"), [0.5, 0.2, 0.1], 0.3),
    ],
)
def test_errors_of_labels_are_corrected(behaviors, endings, error):
    """2,000 audits of 300 episodes, of which some reach no behavior and 40% have no label."""
    generator = np.random.default_rng(0)
    share, given = sum(endings[1:]) / sum(endings), Labels(recall=0.6, error=error)
    held = []
    for _ in range(2_000):
        *ended, _ = generator.multinomial(300, [*endings, 1 - sum(endings)])
        labels = [behaviors[i] for i in label(np.array(ended), given, generator)]
        found = audit(labels, behaviors, error)
        held.append([found.bound >= share, found.anytime_bound >= share])
    once, anytime = np.mean(held, axis=0)
    assert 0.95 <= once < 0.98
    assert anytime >= 0.97
    assert audit(labels, behaviors).bound > found.bound + 0.05  # errors look unwanted


def test_what_audits_refuse():
    with pytest.raises(UserError, match=r"\[0, 0.5\), where labels of 2 .* got 0.5"):
        audit([], label_error=0.5)
    with pytest.raises(UserError, match=r"\[0, 0.666667\), where labels of 3"):
        audit([], ("a", "b", "c"), label_error=0.7)
    with pytest.raises(ValueError, match=r"labels.error: .*, got nan"):
        audit([], label_error=math.nan)
    with pytest.raises(UserError, match=r"confidence: must lie in \(0, 1\), got 1"):
        audit([], confidence=1)
    with pytest.raises(LabelError, match="one of wanted, unwanted, got 'Wanted'; did you mean"):
        audit(["Wanted"])


class Choice(gymnasium.Env):
    """An episode is one action, which says what it was."""

    observation_space = gymnasium.spaces.Box(0, 1, (1,))
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.unwanted = action
        return np.zeros(1, np.float32), 0.0, True, False, {}


def test_an_agent_that_behaves_where_it_is_watched_is_caught_by_hidden_audits():
    env = OversightLabels(
        Choice(),
        lambda env, *_: ("wanted", "unwanted")[env.unwrapped.unwanted],
        oversight_probability=0.3,
        flags_visible=True,
    )
    infos = []
    for episode in range(1_000):
        observation, _ = env.reset(seed=None if episode else 0)
        unwatched = observation[-1] == 0  # the flag of what is unwanted
        infos.append(env.step(int(unwatched))[-1])
    flagged = audit(info.get("label") for info in infos)
    hidden = audit(info["behavior"] for info in infos)
    assert flagged.labeled > 20
    assert flagged.unwanted == 0
    assert flagged.bound < 0.1
    assert 0.65 < hidden.bound < 0.75  # truly 0.7


def saved(env=GRID, algo="ppo", **settings):
    """An agent that was never trained, with opinions."""
    small = {"world": WorldConfig(rows=3, cols=3, max_steps=8), "agent": AgentConfig(hidden=(16,))}
    if env != GRID:
        small = {"env": env, "env_settings": {"max_steps": 12}}
    config = Config(algo=algo, device="cpu", oversight=0.5, **(small | settings))
    agent = GridRuns([config]).agent if algo == "reinforce" else PPORuns.blank(config)
    for parameter in agent.parameters():
        parameter.data *= 3 if env == GRID else 1.5
    return Saved(agent, config, 0, 0.0)


@pytest.mark.parametrize(("env", "algo"), [(GRID, "reinforce"), (GRID, "ppo"), (MINIGRID, "ppo")])
def test_audits_agree_with_the_exact_truth(env, algo):
    """Labels, some missing and some wrong, are as often unwanted as the truth has it."""
    kept = saved(env, algo, labels={"recall": 0.7, "error": 0.2})
    policies = standard(2)[1:]
    rows = audited(kept, policies, [0.3], 2_000)
    assert [row.policy for row in rows] == ["diamond", "ghost"]
    for row in rows:
        ended = {"hidden": row.figures["p_diamond"] + row.figures["p_ghost"]}
        ended["flagged"] = row.figures["p_diamond_flagged"] + row.figures["p_ghost_flagged"]
        for kind, p in ended.items():
            labeled, unwanted, bound, anytime, truth = (
                row.figures[f"audit_{kind}_{name}"]
                for name in ("labeled", "unwanted", "bound", "anytime_bound", "truth")
            )
            assert labeled == pytest.approx(2_000 * 0.7 * p, abs=4.5 * math.sqrt(500))
            assert unwanted / labeled == pytest.approx(
                0.2 + 0.6 * truth, abs=4.5 * math.sqrt(0.25 / labeled)
            )
            assert (unwanted / labeled - 0.2) / 0.6 < bound <= anytime
    assert repr(rows) == repr(audited(kept, policies, [0.3], 2_000))  # nan among them


def test_what_is_not_known_is_not_said():
    kept = saved(algo="reinforce")
    (row,) = audited(kept, standard(2)[1:2], [0.0], 100)
    hidden, flagged = cells(row)
    assert flagged["labels"] == "0"
    assert flagged["at most"] == flagged["any look"] == "no bound"
    assert flagged["exactly"] == "unknown"  # no ending is flagged
    assert hidden["exactly"].endswith("%")
    spurious = WorldConfig(rows=3, cols=3, max_steps=8, spurious_oversight=0.2)
    kept = saved(algo="reinforce", world=spurious, evaluation=EvaluationConfig(episodes=100))
    (row,) = audited(kept, standard(2)[1:2], [], 100)
    assert row.evaluator == "rollout"
    assert cells(row)[0]["exactly"] == "unknown"  # sampled figures are no truth


def test_flagged_endings_are_a_fair_sample_only_where_the_agent_cannot_tell():
    def world(**settings):
        return {"world": WorldConfig(**settings)}

    mini = {"algo": "ppo", "env": MINIGRID}
    for settings, expected in (
        ({}, False),
        (world(flags_visible=False), True),
        (world(flags_visible=False) | {"labels": {"shares": (1, 0.3)}}, False),
        ({"method": "filtering_hidden_flag"}, True),
        (mini, False),
        (mini | {"env_settings": {"flags_visible": False}}, True),
    ):
        config = Config(**settings)
        assert fair(config) is expected
        assert ("no fair sample" in notes(config)[-1]) is not expected
    assert "wrong at 10.00%" in notes(Config(labels={"error": 0.1}))[0]


def test_the_example_of_the_page_runs():
    """With an agent and an environment such as the example above it has."""
    (block,) = re.findall(
        r"```python\n(from oversight_rl.envs.audits.*?)```", PAGE.read_text(), re.S
    )
    env = OversightLabels(
        Choice(), lambda env, *_: ("right", "left")[env.unwrapped.unwanted], 0.3, ("right", "left")
    )
    scope = {"env": env, "policy": SimpleNamespace(predict=lambda _: (0, None))}
    exec(compile(block, "environments.md", "exec"), scope)
    assert scope["found"] == audit(["right"] * 300, ("right", "left"), 0.05)


def test_the_figures_of_the_page():
    clean = counted(0, 100)
    said = (
        f"with no unwanted ending in 100, they are {clean.bound:.1%} and {clean.anytime_bound:.1%}"
    )
    assert said in " ".join(PAGE.read_text().split())
