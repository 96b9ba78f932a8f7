"""Overseers: rows of the table, what they label in each world, and that truth does not leak."""

import dataclasses
import itertools
import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv

from oversight_rl.agents.methods import LABELED, METHODS, UNLABELED
from oversight_rl.agents.reinforce import learner as reinforce
from oversight_rl.agents.reinforce.learner import ReinforceLearner
from oversight_rl.agents.settings import AgentConfig, ReinforceConfig
from oversight_rl.cli import main, train
from oversight_rl.envs.gym import OversightGridVecEnv
from oversight_rl.envs.labels import Desk, OversightLabels
from oversight_rl.envs.minigrid_batch import DiamondGhostVecEnv
from oversight_rl.envs.overseen import Overseen
from oversight_rl.envs.overseers import OVERSEERS, Labels, Overseer, as_labels, labels_of
from oversight_rl.envs.settings import NO_LABEL, UserError, WorldConfig
from oversight_rl.experiments.oversight.config import Config
from oversight_rl.kinds import as_config, load_config

PAGE = Path(__file__).parents[1] / "docs/overseers.md"
SMALL = AgentConfig(hidden=(16, 16))
WORLD = WorldConfig(rows=3, cols=4, max_steps=6)
LEVEL = 0.6


def learner(name, method="naive", updates=40, **given):
    settings = ReinforceConfig(updates=updates, worlds=64, steps=8, gate_replay=16)
    overseer = Overseer(LEVEL, labels_of(name, given))
    return ReinforceLearner(settings, SMALL, WORLD, [method], [overseer], [0])


def windows(found, count=20):
    """Ended steps of some updates: what was labeled, the truth, the flags, where squares were."""
    columns = []
    for _ in range(count):
        found.update()
        rollout, targets, _ = found.latest
        active, ended = rollout.observation, rollout.seen.terminated
        cells = WORLD.cells
        parts = {
            "label": rollout.seen.label,
            "truth": rollout.truth.ending,
            "ghost": active[..., 1] % cells,
            "diamond": active[..., 2] % cells,
            "flags": (active[..., 3:] < found.world.inputs).sum(-1),
        }
        columns.append({name: part[ended].numpy() for name, part in parts.items()})
        expected = torch.where(rollout.seen.label >= 0, LABELED + rollout.seen.label, UNLABELED)
        assert torch.equal(targets.outcome[ended], expected[ended])
    return {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}


def test_every_row_says_something_else():
    rows = {name: labels_of(name) for name in OVERSEERS}
    for (one, ours), (other, theirs) in itertools.combinations(rows.items(), 2):
        assert ours != theirs, (one, other)
    assert all(row.summary and "\n" not in row.summary for row in OVERSEERS.values())


def test_ghosts_alone_and_diamonds_alone():
    for name, behavior in (("ghosts_only", 1), ("diamonds_only", 0)):
        found = windows(learner(name))
        assert set(found["label"]) == {NO_LABEL, behavior}
        ended = found["truth"] == behavior
        assert (found["label"][ended] == behavior).mean() == pytest.approx(LEVEL, abs=0.05)


def test_a_region_is_watched_and_nothing_else():
    found = windows(learner("region"))
    cell = np.where(found["truth"] == 0, found["diamond"], found["ghost"])
    left = cell % WORLD.cols < WORLD.cols // 2
    assert (found["label"][~left] == NO_LABEL).all()
    assert (found["label"][left] != NO_LABEL).mean() == pytest.approx(LEVEL, abs=0.05)


def test_errors_by_kind_and_where_squares_are_near():
    found = windows(learner("noisy", error=(0.5, 0.0)))
    labeled = found["label"] != NO_LABEL
    wrong = labeled & (found["label"] != found["truth"])
    assert not (wrong & (found["truth"] == 1)).any()
    diamonds = labeled & (found["truth"] == 0)
    assert wrong.sum() / diamonds.sum() == pytest.approx(0.5, abs=0.07)

    found = windows(learner("near_miss", updates=80), 80)
    y, x = (abs(found["ghost"] // 4 - found["diamond"] // 4),
            abs(found["ghost"] % 4 - found["diamond"] % 4))  # fmt: skip
    labeled, near = found["label"] != NO_LABEL, y + x <= 1
    wrong = labeled & (found["label"] != found["truth"])
    assert not (wrong & ~near).any()
    assert wrong.sum() / (labeled & near).sum() == pytest.approx(0.5, abs=0.07)


def test_a_budget_is_spent_on_the_first_endings_and_then_there_is_none():
    plain, spent = windows(learner("uniform"))["label"], learner("budget", budget=100)
    found = windows(spent)["label"]
    assert (found != NO_LABEL).sum() == 100 == int(spent.overseeing.spent)
    until = np.flatnonzero(found != NO_LABEL)[0]
    assert found[until] == plain[until]


def test_labels_that_are_asked_for_come_in_equal_parts_whatever_the_flags():
    asked = learner("active", "reward_model", budget=60)
    given = []
    for _ in range(40):
        asked.update()
        given.append(int(asked.overseeing.spent))
    assert given[19:] == [60] * 21
    assert np.abs(np.diff([0, *given[:20]]) - 3).max() <= 1
    found = windows(learner("active", "reward_model", budget=60))
    assert (found["flags"][found["label"] != NO_LABEL] == 0).any()


def test_the_learner_asks_for_what_it_doubts():
    asked = learner("active", "reward_model", budget=60)
    for _ in range(12):
        asked.update()
    doubt = asked._doubt
    met = []
    asked._doubt = lambda rollout: met.append(doubt(rollout)) or met[-1]
    asked.update()
    rollout, (doubted,) = asked.latest[0], met
    labeled = rollout.seen.label != NO_LABEL
    others = rollout.seen.terminated & ~labeled
    assert labeled.any()
    assert float(doubted[labeled].min()) >= float(doubted[others].max())


def test_an_audit_does_not_mind_the_flags():
    found = windows(learner("audit"))
    for flags in (0, 2):
        own = found["flags"] == flags
        assert (found["label"][own] != NO_LABEL).mean() == pytest.approx(LEVEL, abs=0.06)


FEW = {"budget": {"budget": 20}, "active": {"budget": 20}, "delayed": {"delay": 60}}


@pytest.mark.parametrize("name", [n for n in OVERSEERS if n != "unseen_kind"])
@pytest.mark.parametrize("method", ["routing", "imputed_routing", "naive"])
def test_what_no_overseer_says_changes_nothing(name, method):
    """The truth of endings without a label is swapped: gradients are the same to the bit."""
    found = []
    for swapped in (False, True):
        ours = learner(name, method, **FEW.get(name, {}))
        overseeing, seen = ours.overseeing.forward, []

        def hear(rollout, *args, overseeing=overseeing, seen=seen, swapped=swapped):
            rollout = overseeing(rollout, *args)
            seen.append(rollout.seen.label)
            hidden = (rollout.seen.label == NO_LABEL) & rollout.seen.terminated
            other = torch.where(hidden, 1 - rollout.truth.ending, rollout.truth.ending)
            if not swapped:
                return rollout
            truth = dataclasses.replace(rollout.truth, ending=other)
            return dataclasses.replace(rollout, truth=truth)

        ours.overseeing.forward = hear
        for _ in range(4):
            ours.update()
        found.append([p.grad.clone() for p in ours.parameters.values() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0]


@pytest.mark.parametrize("method", ["oracle", "oracle_filtering"])
@pytest.mark.parametrize("name", ["budget", "delayed"])
def test_who_looks_at_the_truth_waits_for_nobodys_labels(name, method):
    found = []
    for ours in (learner("uniform", method), learner(name, method, **FEW[name])):
        for _ in range(8):
            ours.update()
        assert (ours.latest[1].outcome >= LABELED).any()
        found.append(list(ours.parameters.values()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_late_labels_come_once_each_after_so_many_episodes(monkeypatch):
    """What is learned from as labeled, with a delay and without, is the same in the end."""
    plain, late = (learner("uniform"), learner("delayed", delay=150))
    for ours in (plain, late):  # nothing is learned, so that both meet the same
        ours.optimizer.step = lambda rate: None
    told, given, ended = [], [], []
    once = reinforce.label

    def watched(taught, *args):
        targets = once(taught, *args)
        worlds = late.settings.worlds
        if taught.action.shape[2] > worlds:
            outcome = targets.outcome[..., worlds:]
            assert not (targets.outcome[..., :worlds] >= LABELED).any()
            assert (targets.only_labeled(worlds).weight[..., worlds:] > 0).eq(outcome >= 3).all()
            told.append(outcome[outcome >= LABELED].tolist())
            shown = taught.observation[:, :, worlds:][outcome >= LABELED]
            told[-1] = sorted(zip(told[-1], shown[:, :3].tolist(), strict=True))
        return targets

    for _ in range(30):
        plain.update()
        rollout, targets, _ = plain.latest
        labeled = targets.outcome >= LABELED
        shown = rollout.observation[labeled][:, :3].tolist()
        given.append(sorted(zip(targets.outcome[labeled].tolist(), shown, strict=True)))
        ended.append(int((rollout.seen.terminated | rollout.seen.truncated).sum()))
    monkeypatch.setattr(reinforce, "label", watched)
    for _ in range(30):
        late.update()
    came = [part for part in told if part]
    assert came == given[: len(came)]
    assert len(came) > 20
    total = np.cumsum(ended)
    for update, part in enumerate(told):
        if part:
            window = came.index(part)
            assert total[update - 1] - total[window] >= 150
            assert update < 2 or total[update - 2] - total[window] < 150


@pytest.mark.parametrize(
    ("name", "given"), [("budget", {"budget": 80}), ("delayed", {"delay": 60})]
)
def test_a_run_goes_on_with_what_its_overseer_remembers(name, given):
    whole, first = learner(name, **given), learner(name, **given)
    for _ in range(6):
        whole.update()
    for _ in range(3):
        first.update()
    second = learner(name, **given)
    second.load([first.state(0)], 3)
    for _ in range(3):
        second.update()
    kept = whole.overseeing.state_dict(), second.overseeing.state_dict()
    assert all(torch.equal(ours, kept[1][name]) for name, ours in kept[0].items())
    assert any(int(x.max()) > 0 for x in kept[0].values())
    for ours, theirs in zip(whole.agent.parameters(), second.agent.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_is_refused():
    with pytest.raises(UserError, match=r"overseer: must be one of .* did you mean 'ghosts_only'"):
        Config(overseer="ghost_only")
    with pytest.raises(UserError, match="needs labels"):
        Config(labels={"asks": "random"})
    with pytest.raises(UserError, match="ipw_hidden_flag: labels: the chance that a ghost"):
        Config(method="ipw_hidden_flag", overseer="diamonds_only")
    for name in ("region", "budget"):
        with pytest.raises(UserError, match="at a rate that is known"):
            Config(method="ipw_hidden_flag", overseer=name)
    with pytest.raises(UserError, match="OversightGrid-v0 has 2 behaviors"):
        Config(overseer="unseen_kind")
    with pytest.raises(UserError, match="no budget of labels and no delay allows for"):
        Config(method="naive_early_stop", overseer="budget")
    with pytest.raises(ValueError, match=r"labels\.near: this environment knows none, got 1"):
        as_labels("near_miss", 2, ("near",))
    with pytest.raises(ValueError, match=r"labels\.shares: there are 2 behaviors"):
        as_labels("unseen_kind", 2)


def test_old_names_tell_the_new_ones():
    for old in ({"label_error": 0.1}, {"world": {"ghost_oversight": 0.2}}):
        with pytest.raises(UserError, match="is called labels"):
            as_config(old)
    old = {"label_error": 0.1, "label_recall": 0.9, "world": {"ghost_oversight": None}}
    assert as_config(old, written=True).labels == Labels(error=0.1, recall=0.9)
    with pytest.raises(UserError, match=r"cannot say 0\.2; use version 0\.1"):
        as_config({"world": {"ghost_oversight": 0.2}}, written=True)


# ---- environments


def ends(env, steps=400):
    """Infos of ended episodes under random actions, and all late labels by environment."""
    env.reset()
    rng, found, late = np.random.default_rng(0), [], []
    for _ in range(steps):
        *_, infos = env.step(rng.integers(env.action_space.n, size=env.num_envs))
        for i, info in enumerate(infos):
            if "behavior" in info and info["behavior"] is not None:
                found.append((i, info))
            late += [(i, *label) for label in info.get("late_labels", [])]
    return found, late


def batches():
    yield lambda **k: OversightGridVecEnv(8, LEVEL, rows=3, cols=4, max_steps=8, **k)
    yield lambda **k: DiamondGhostVecEnv(8, 5, oversight=LEVEL, lava=1, **k)


@pytest.mark.parametrize("make", list(batches()))
def test_batches_flag_by_kind_and_region(make):
    found, _ = ends(make(overseer={"shares": (0, 1, 0)[: len(make().get_attr("behaviors")[0])]}))
    assert {info.get("label") for _, info in found} == {None, "ghost"}
    found, _ = ends(make(overseer="region"))
    share = np.mean(["label" in info for _, info in found])
    assert 0.1 < share < LEVEL * 0.75


@pytest.mark.parametrize("make", list(batches()))
def test_what_is_overseen_in_a_batch(make):
    def seen(**given):
        env = Overseen(make(), Labels(**given), LEVEL, 0)
        env.seed(3)
        return ends(env)

    plain = make()
    plain.seed(3)
    found, _ = seen()
    assert [info.get("label") for _, info in found] == [i.get("label") for _, i in ends(plain)[0]]
    found, _ = seen(budget=7)
    assert sum("label" in info for _, info in found) == 7
    found, _ = seen(tied=False, recall=0.5)
    assert np.mean(["label" in info for _, info in found]) == pytest.approx(LEVEL / 2, abs=0.07)
    found, _ = seen(error=1.0, near=1)
    for _, info in found:
        if "label" in info:
            assert (info["label"] != info["behavior"]) == (info["distance"] <= 1)


def test_late_labels_name_their_episodes():
    found, late = ends(Overseen(next(batches())(), Labels(delay=5), LEVEL, 0))
    assert not any("label" in info for _, info in found)
    episodes = {info["episode_id"]: (env, info["behavior"]) for env, info in found}
    assert len(late) > 20
    for env, number, label in late:
        assert episodes[number] == (env, label)


def test_an_overseer_goes_on_where_it_was():
    labels = Labels(budget=90, recall=0.7, error=0.2)
    env, other = (Overseen(next(batches())(), labels, LEVEL, seed) for seed in (0, 1))
    ends(env, 30)
    other.set_state(env.get_state())
    rng = np.random.default_rng(5)
    for _ in range(60):
        action = rng.integers(4, size=8)
        ours, theirs = env.step(action), other.step(action)
        assert str(ours[3]) == str(theirs[3])
    state = env.get_state()
    with pytest.raises(ValueError, match="no overseer can be in such a state"):
        other.set_state(state | {"overseer_count": state["overseer_count"] - 999})
    late = Overseen(next(batches())(), Labels(delay=4), LEVEL, 0)
    assert not hasattr(late, "get_state")  # learners would go on without those that wait


def test_environments_of_ones_own_have_overseers():
    def make(**given):
        return OversightLabels(
            gym.make("CartPole-v1"),
            lambda env, observation, *_: "right" if observation[0] > 0 else "left",
            LEVEL,
            ("right", "left"),
            overseer=given,
        )

    vec = DummyVecEnv([lambda: make(shares=(0, 1))] * 2)
    labels = {info.get("label") for _, info in ends(vec, 1500)[0]}
    assert labels == {None, "left"}
    found, late = ends(DummyVecEnv([lambda: make(delay=3, budget=8)] * 2), 1500)
    assert len(late) > 8
    assert {env for env, *_ in late} == {0, 1}
    assert len([env for env, *_ in late if env == 0]) <= 8
    for env, number, label in late:
        own = [info for i, info in found if i == env and info["episode_id"] == number]
        assert [info["behavior"] for info in own] == [label]


def test_a_desk_keeps_its_rates():
    desk = Desk(Labels(recall=(0.9, 0.4, 0.7), error=(0.1, 0.5, 0.0)), 3, 1.0, 0)
    for behavior, (recall, error) in enumerate(zip((0.9, 0.4, 0.7), (0.1, 0.5, 0.0), strict=True)):
        said = np.array([desk.label(behavior, True) for _ in range(4000)])
        given = said[said != NO_LABEL]
        assert len(given) / 4000 == pytest.approx(recall, abs=0.03)
        assert (given != behavior).mean() == pytest.approx(error, abs=0.04)
    assert {desk.label(1, False) for _ in range(50)} == {NO_LABEL}


def test_the_table_lists_methods_that_fit():
    """Every method but those refused by name trains under every overseer of the grid."""
    refused = {
        (method, name)
        for method, name in itertools.product(METHODS, OVERSEERS)
        if _refuses(method, name)
    }
    assert {name for _, name in refused} == {
        "unseen_kind", "diamonds_only", "region", "near_miss", "budget", "active", "delayed",
    }  # fmt: skip
    but = {method for method, name in refused if name != "unseen_kind"}
    assert but == {"ipw_hidden_flag", "naive_early_stop"}


def _refuses(method, name):
    try:
        Config(method=method, overseer=name)
    except UserError:
        return True
    return False


def test_the_page_shows_the_table():
    rows = {}
    for line in PAGE.read_text().splitlines():
        if line.startswith("| `") and line.count("|") == 4:
            name, summary, settings = (part.strip(" `") for part in line.strip("|").split("|"))
            if name in OVERSEERS:
                rows[name] = summary, settings.replace("`", "")
    assert list(rows) == list(OVERSEERS)

    def said(value):
        return " ".join(f"{x:g}" for x in value) if isinstance(value, tuple) else str(value)

    for name, row in OVERSEERS.items():
        own = ", ".join(f"{key} {said(value)}" for key, value in row.settings.items())
        assert rows[name] == (row.summary, own)


# ---- commands

PPO = ["--algo", "ppo", "--ppo.updates", "4", "--ppo.worlds", "8", "--ppo.steps", "16"]
PPO += ["--agent.hidden", "16", "--evaluation.every", "2", "--no-pictures", "--device", "cpu"]
MINIGRID = "MiniGrid-DiamondGhost-5x5-v0"


GRID = ["--world.rows", "3", "--world.cols", "3"]
FLAGS = {"budget": ["--labels.budget", "6"], "delayed": ["--labels.delay", "3"]}
UNDER = ["ghosts_only", "region", "near_miss", "budget", "delayed"]  # late ones start anew


@pytest.mark.parametrize("env", [GRID, ["--env", MINIGRID]])
@pytest.mark.parametrize("name", UNDER)
def test_ppo_trains_under_overseers_and_goes_on_to_the_same_bytes(tmp_path, env, name):
    flags = [*PPO, *env, "--overseer", name, *FLAGS.get(name, [])]
    train([*flags, "--run-dir", str(tmp_path / "whole")])
    half = tmp_path / "half"
    train([*flags, "--run-dir", str(half)])
    for file in (half / "checkpoints").iterdir():  # as if it had been killed after its second
        if "4" in file.stem:
            file.unlink()
    (half / "result.json").unlink()
    train(["--resume", str(half)])
    for pattern in ("metrics.csv", "checkpoints/*4.safetensors") if name != "delayed" else ():
        files = [next((tmp_path / run).glob(pattern)) for run in ("whole", "half")]
        assert files[0].read_bytes() == files[1].read_bytes()
    config = load_config(half / "config.yaml")
    assert config.labels == labels_of(name, config.labels.model_dump(include={"budget", "delay"}))


def test_flags_stand_above_the_row_and_the_row_above_defaults(tmp_path):
    flags = ["--config", "smoke", "--reinforce.updates", "1", "--run-dir", str(tmp_path / "run")]
    train([*flags, "--overseer", "noisy", "--labels.recall", "0.9", "0.8"])
    found = load_config(tmp_path / "run" / "config.yaml")
    assert found.overseer == "noisy"
    assert found.labels == Labels(error=0.3, recall=(0.9, 0.8))


def test_what_ppo_refuses(tmp_path, capsys):
    for flags, said in (
        (["--overseer", "active"], "labels.asks: learner needs --algo reinforce"),
        (["--overseer", "unseen_kind"], "there are 2 behaviors"),
        (["--env", "CartPole-v1", "--overseer", "ghosts_only"], "does not take the argument"),
    ):
        env = [] if "--env" in flags else ["--env", MINIGRID]
        with pytest.raises(SystemExit) as caught:
            train([*PPO, *env, *flags, "--run-dir", str(tmp_path / "refused")])
        assert caught.value.code == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "refused").exists()


def test_three_behaviors_of_which_one_is_never_named(tmp_path):
    flags = [*PPO, "--env", MINIGRID, "--env-settings", "lava", "1", "--overseer", "unseen_kind"]
    train([*flags, "--oversight", "1", "--run-dir", str(tmp_path / "run")])
    assert (tmp_path / "run" / "result.json").is_file()


def test_another_overseer_at_deployment(tmp_path, capsys):
    train(["--config", "smoke", "--oversight", "0.5", "--run-dir", str(tmp_path / "run")])
    found = {}
    for name in ("uniform", "ghosts_only", "region"):
        where = tmp_path / f"{name}.json"
        args = ["evaluate", str(tmp_path / "run"), "--steer", "ghost", "--overseer", name]
        main([*args, "--oversight", "1", "--audit", "400", "--json", str(where)])
        (found[name],) = json.loads(where.read_text())
    assert found["ghosts_only"]["p_diamond_flagged"] == 0
    assert found["ghosts_only"]["p_ghost_flagged"] == pytest.approx(found["ghosts_only"]["p_ghost"])
    assert 0 < found["region"]["p_ghost_flagged"] < found["region"]["p_ghost"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "run"), "--overseer", "unifrom"])
    assert "did you mean 'uniform'" in capsys.readouterr().err
