"""What version 0.1 left behind: read as it was, or refused in one line that names the version."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from oversight_rl.agents import RoutedPPO
from oversight_rl.cli import main, train
from oversight_rl.envs.vector import make_vec
from oversight_rl.experiments.oversight.environments import EnvJudge
from oversight_rl.experiments.oversight.policies import read
from oversight_rl.kinds import load_config
from oversight_rl.runs.folder import RunFolder
from oversight_rl.runs.rows import Facts

ARCHIVE = Path(__file__).parent / "data" / "version_0_1.tar.xz"
GRID = ("contrastive_routing", "imputed_routing", "ipw_hidden_flag", "naive", "naive_early_stop",
        "reward_model", "routing")  # fmt: skip
PPO = ("imputed_routing", "naive", "reward_model", "routing")
RUNS = [f"grid/{m}" for m in GRID] + [f"{k}/{m}" for k in ("ppo_grid", "ppo_minigrid") for m in PPO]


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """The folder with everything in it; tests do not write there."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "out"


def figures(rows):
    """What a policy was found to do, without what a version may call differently."""
    names = ("policy", "deploy_oversight", "ground_truth_return", "p_diamond", "p_ghost")
    return [[row[name] for name in names] for row in rows]


def wanted(name):
    """The policy that a run deploys."""
    return "diamond" if "routing" in name else "single"


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_evaluated_as_they_were(old, name, tmp_path):
    main(["evaluate", str(old / name), "--json", str(tmp_path / "rows.json")])
    ours = json.loads((tmp_path / "rows.json").read_text())
    before = json.loads((old / name / "evaluated.json").read_text())
    assert [row["policy"] for row in ours if row["deployed"]] == [wanted(name)]
    assert {row["evaluator"] for row in ours} == {"exact"}
    if name.startswith("ppo"):  # which was sampled then
        (saved,) = read(old / name)
        facts, policies = Facts(saved.config.method, 0, 0.5), saved.steerings((), False, 1.0)
        judge = EnvJudge(saved.config)
        judge.exact = judge.room = judge.one = None  # by the same episodes as then
        (rows,) = judge.tables(saved.agent, [facts], policies, [[0.5]])
        for row, exact in zip(rows, ours, strict=True):
            error = row.figures["return_se"]
            assert (
                abs(exact["ground_truth_return"] - row.figures["ground_truth_return"]) < 4 * error
            )
        ours = [row.record for row in rows]
    for row, was in zip(figures(ours), figures(before), strict=True):
        assert row[0] == was[0]
        # PPO's are sampled: a rounding of probabilities may turn a few of the actions
        close = 1e-6 if name.startswith("grid") else 0.2
        assert row[1:] == pytest.approx(was[1:], abs=close)


@pytest.mark.parametrize("name", RUNS)
def test_settings_and_results_are_read(old, name):
    """Settings by the names that they had; rows that do not say what is deployed."""
    config = load_config(old / name / "config.yaml")
    assert (config.agent.hidden, config.learner.updates) == ((8,), 4)
    assert config.reinforce.updates == (4 if name.startswith("grid") else 400)
    records = json.loads((old / name / "result.json").read_text())
    assert not any("deployed" in record for record in records)
    rows = RunFolder.open(old / name).result()
    assert {row.policy for row in rows if row.deployed} == {wanted(name)}
    for row, record in zip(rows, records, strict=True):
        known = {key: value for key, value in record.items() if value is not None}
        assert row.record | known == pytest.approx(row.record, nan_ok=True)


def test_exported_policies_are_read(old, tmp_path):
    for name, steering in (("grid", "diamond=0.7,ghost=0.3"), ("ppo", "ghost")):
        main(["evaluate", str(old / f"{name}.safetensors"), "--json", str(tmp_path / "rows.json")])
        (row,) = json.loads((tmp_path / "rows.json").read_text())
        assert row["policy"] == steering


def test_runs_are_reported(old, tmp_path):
    copy = tmp_path / "grid"
    copy.mkdir()
    for name in GRID:
        (copy / name).symlink_to(old / "grid" / name)
    (copy / "real").mkdir()
    for file in (old / "grid" / "routing").iterdir():
        if file.is_file():
            (copy / "real" / file.name).write_bytes(file.read_bytes())
    main(["report", str(copy)])
    assert "routing" in (copy / "summary.csv").read_text()


def test_a_run_on_the_grid_goes_on_to_the_same_end(old, tmp_path):
    ours = tmp_path / "run"
    for path in sorted((old / "halfway" / "grid" / "routing").rglob("*")):
        target = ours / path.relative_to(old / "halfway" / "grid" / "routing")
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            target.write_bytes(path.read_bytes())
    train(["--resume", str(ours)])
    before = old / "grid" / "routing"
    tables = [pd.read_csv(folder / "metrics.csv") for folder in (ours, before)]
    pd.testing.assert_frame_equal(*tables, rtol=0, atol=1e-6)  # another processor rounds otherwise
    rows, were = (json.loads((p / "result.json").read_text()) for p in (ours, before))
    for row, was in zip(figures(rows), figures(were), strict=True):
        assert row == pytest.approx(was, abs=1e-6)
    curve = EventAccumulator(str(ours / "curves/diamond")).Reload().Scalars("evaluation/return")
    steps = list(pd.read_csv(ours / "metrics.csv")["update"].unique())
    assert 0 < len(curve) < len(steps)  # what came before is where it was
    assert [event.step for event in curve] == steps[-len(curve) :]


@pytest.mark.parametrize("kind", ["ppo_grid", "ppo_minigrid"])
def test_a_run_of_ppo_cannot_go_on_and_says_so(old, kind, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(["--resume", str(old / "halfway" / kind / "imputed_routing")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "version 0.1.0" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("env_id", ["OversightGrid-v0", "MiniGrid-DiamondGhost-5x5-v0"])
@pytest.mark.parametrize("method", ["routing", "imputed_routing", "reward_model"])
def test_zips_act_as_they_did_and_learn_on(old, method, env_id):
    path = old / "zips" / f"{method}-{env_id}"
    kept = np.load(f"{path}.npz")
    env = make_vec(env_id, 4, oversight=0.5)
    model = RoutedPPO.load(f"{path}.zip", env=env)
    for name in set(kept.files) - {"observation"}:
        taken, _ = model.steer(name).predict(kept["observation"], deterministic=True)
        assert np.array_equal(taken, kept[name])
    model.learn(128, reset_num_timesteps=False)
