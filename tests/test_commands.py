"""The commands as a user types them: runs, resumes, evaluations, imports, mistakes."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import small_experiment
import torch
import yaml
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from oversight_rl import load_policy
from oversight_rl.agents.methods import METHODS
from oversight_rl.agents.networks import new_agent, take_run
from oversight_rl.agents.reinforce.learner import HELD_OUT
from oversight_rl.agents.settings import AgentConfig
from oversight_rl.agents.steering import SteeredPolicy
from oversight_rl.cli import main, train
from oversight_rl.envs.settings import UserError
from oversight_rl.envs.world import World
from oversight_rl.experiments.oversight.config import Config
from oversight_rl.experiments.oversight.policies import read_run
from oversight_rl.files import write_atomically
from oversight_rl.kinds import KINDS, load_config
from oversight_rl.runs import checkpoint
from oversight_rl.runs import folder as folders
from oversight_rl.runs.folder import RunFolder, find_runs
from oversight_rl.runs.loop import _stop_requested, progress_bar
from oversight_rl.settings import read_yaml
from oversight_rl.sweeps.plan import load_sweep, plan
from oversight_rl.terminal import fixed, plain

ROOT = Path(__file__).parent.parent
SMOKE = ["--config", str(ROOT / "configs" / "smoke.yaml"), "--device", "cpu", "--no-pictures"]
COLUMNS = {
    "method", "seed", "train_oversight", "deploy_oversight", "policy", "deployed", "greedy",
    "ground_truth_return", "p_diamond", "p_ghost", "p_timeout", "episode_length",
    "optimal_return", "evaluator", "env_steps", "wall_seconds",
}  # fmt: skip


def result(path):
    return json.loads((path / "result.json").read_text())


def timeless(rows):
    return [{k: v for k, v in row.items() if k != "wall_seconds"} for row in rows]


def refused(capsys, command, args):
    """Run a command that must fail: exit code 2 and one line, returned."""
    with pytest.raises(SystemExit) as stop:
        command([str(a) for a in args])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    train([*SMOKE, "--run-dir", str(path)])
    return path


def test_no_number_is_shown_that_is_none(tmp_path, capsys):
    """One episode has no standard error, and rollouts no optimum."""
    one = ["--world.spurious-oversight", "0.1", "--evaluation.episodes", "1"]
    train([*SMOKE, *one, "--reinforce.updates", "1", "--run-dir", str(tmp_path / "run")])
    main(["evaluate", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert "timeout" in out
    assert "nan" not in out


@pytest.mark.parametrize("method", ["naive", "naive_early_stop", "naive_oracle_stop"])
@pytest.mark.parametrize("updates", [4, 5])
def test_every_step_that_a_run_takes_is_counted(tmp_path, monkeypatch, method, updates):
    """Those of looks that choose an agent too."""
    taken, step = [0], World.step

    def counted(self, state, *args):
        taken[0] += state.agent[0].numel()  # of the one run
        return step(self, state, *args)

    monkeypatch.setattr(World, "step", counted)
    small = ["--world.max-steps", "4", "--reinforce.updates", str(updates), "--evaluation.every"]
    train([*SMOKE, *small, "2", "--method", method, "--run-dir", str(tmp_path / "run")])
    assert result(tmp_path / "run")[0]["env_steps"] == taken[0]
    assert read_run(RunFolder.open(tmp_path / "run")).env_steps == taken[0]
    looks = 0 if method != "naive_early_stop" else 3 if updates == 4 else 4
    assert taken[0] == updates * 32 * 8 + looks * HELD_OUT * 4


def test_a_run_folder_is_complete(run):
    rows = result(run)
    assert set(rows[0]) >= COLUMNS
    blends = [f"diamond={w / 10:g},ghost={1 - w / 10:g}" for w in range(1, 10)]
    assert len(rows) == 3 * 2 * 4 + 9  # policies, sampled and greedy, levels; blends
    assert {row["policy"] for row in rows} == {"mixture", "diamond", "ghost", *blends}
    assert {row["deploy_oversight"] for row in rows} == {0.0, 0.01, 0.1, 1.0}
    assert {row["evaluator"] for row in rows} == {"exact"}
    assert {row["policy"] for row in rows if row["deployed"]} == {"diamond"}
    assert sum(row["deployed"] for row in rows) == 2 * 4
    assert rows[0]["optimal_return"] == pytest.approx(0.9317, abs=1e-4)
    assert rows[0]["env_steps"] == 20 * 32 * 8
    metrics = pd.read_csv(run / "metrics.csv")
    assert list(metrics["update"]) == [0] * 3 + [10] * 3 + [20] * 3
    last = metrics[(metrics["update"] == 20) & (metrics.policy == "diamond")].iloc[0]
    same = next(
        r for r in rows
        if r["policy"] == "diamond" and not r["greedy"] and r["deploy_oversight"] == 0.1
    )  # fmt: skip
    assert last.ground_truth_return == pytest.approx(same["ground_truth_return"])
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["provenance"]["versions"]["torch"]
    assert saved["seeds"] == [0]
    assert load_config(run / "config.yaml").learner.updates == 20
    assert checkpoint.updates(run / "checkpoints") == [10, 20]
    assert not list(run.rglob("*.tmp"))
    assert len(list(run.glob("events.out.tfevents.*"))) == 1


def test_the_same_seed_gives_the_same_result(run, tmp_path):
    train([*SMOKE, "--run-dir", str(tmp_path / "again")])
    assert timeless(result(tmp_path / "again")) == timeless(result(run))
    assert (tmp_path / "again/metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes()
    train([*SMOKE, "--run-dir", str(tmp_path / "other"), "--seeds", "1"])
    assert timeless(result(tmp_path / "other")) != timeless(result(run))


def test_several_seeds_get_a_folder_each(run, tmp_path, capsys):
    train([*SMOKE, "--run-dir", str(tmp_path / "many"), "--seeds", "0", "7"])
    assert "mean" not in capsys.readouterr().err
    rows = result(tmp_path / "many/seed_0")
    assert {row["seed"] for row in result(tmp_path / "many/seed_7")} == {7}
    for row, alone in zip(rows, result(run), strict=True):
        assert row["ground_truth_return"] == pytest.approx(alone["ground_truth_return"], abs=1e-3)
    target = tmp_path / "both.json"
    main(["evaluate", str(tmp_path / "many"), "--json", str(target)])
    assert [r["seed"] for r in json.loads(target.read_text())] == [0] * 3 + [7] * 3


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_from_the_command_line(tmp_path, method):
    few = ["--reinforce.updates", "2", "--oversight", "0.3"]
    train([*SMOKE, "--run-dir", str(tmp_path), "--method", method, *few])
    rows = result(tmp_path)
    assert 0.3 in {row["deploy_oversight"] for row in rows}
    assert {row["method"] for row in rows} == {method}
    kept = "diamond" if METHODS[method].policy.experts == "many" else "single"
    assert {row["policy"] for row in rows if row["deployed"]} == {kept}


def test_evaluate_steers_as_asked(run, tmp_path):
    target = tmp_path / "rows.json"
    main([
        "evaluate", str(run), "--steer", "diamond", "diamond=0.5,ghost=0.5", "without:ghost",
        "--oversight", "0", "0.5", "--greedy", "--json", str(target),
    ])  # fmt: skip
    rows = json.loads(target.read_text())
    assert [row["policy"] for row in rows] == [
        "diamond", "diamond", "diamond=0.5,ghost=0.5", "diamond=0.5,ghost=0.5",
        "without:ghost", "without:ghost",
    ]  # fmt: skip
    assert [row["deploy_oversight"] for row in rows] == [0, 0.5] * 3
    assert all(row["greedy"] for row in rows)
    greedy = [
        row for row in result(run)
        if row["policy"] == "diamond" and row["greedy"] and row["deploy_oversight"] == 0
    ]  # fmt: skip
    assert rows[0]["ground_truth_return"] == pytest.approx(greedy[0]["ground_truth_return"])


def test_an_exported_policy_evaluates_the_same(run, tmp_path):
    policy, a, b = tmp_path / "p.safetensors", tmp_path / "a.json", tmp_path / "b.json"
    steer = ["--steer", "diamond=0.8,ghost=0.2", "--temperature", "0.5"]
    main(["evaluate", str(run), *steer, "--export", str(policy), "--json", str(a)])
    main(["evaluate", str(policy), "--json", str(b)])
    assert json.loads(a.read_text()) == json.loads(b.read_text())
    main(["evaluate", str(policy), "--greedy", "--json", str(b)])
    assert json.loads(b.read_text())[0]["greedy"]


def test_a_run_is_a_policy_that_predicts(run, tmp_path):
    policy = load_policy(str(run))
    assert policy.steering.name == "diamond"
    env = gym.make("OversightGrid-v0")
    observation, _ = env.reset(seed=0)
    action, state = policy.predict(observation, deterministic=True)
    assert (env.action_space.contains(int(action)), state) == (True, None)
    chances = policy(observation)
    assert action == chances.argmax()
    drawn, _ = policy.predict(np.stack([observation] * 5_000))
    assert drawn.shape == (5_000,)
    assert torch.bincount(torch.as_tensor(drawn), minlength=4) / 5_000 == pytest.approx(
        chances, abs=0.035
    )
    assert not torch.equal(policy.steer("ghost")(observation), chances)
    main(["evaluate", str(run), "--steer", "ghost", "--export", str(tmp_path / "ghost")])
    assert torch.equal(load_policy(tmp_path / "ghost")(observation), policy(observation))


def test_one_of_several_runs_is_to_be_named(run, tmp_path):
    for seed in (0, 7):
        shutil.copytree(run, tmp_path / f"seed_{seed}")
    with pytest.raises(UserError, match=f"several runs; name one, like {tmp_path}/seed_0"):
        load_policy(tmp_path)
    assert load_policy(tmp_path / "seed_7").steering.name == "diamond"


def test_runs_that_have_no_experts_are_judged_as_at_their_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(KINDS, "climb", small_experiment.KIND)
    train(["--algo", "climb", "--run-dir", str(tmp_path / "run")])
    capsys.readouterr()
    main(["evaluate", str(tmp_path / "run"), "--json", str(tmp_path / "rows.json")])
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row == json.loads((tmp_path / "run" / "result.json").read_text())[0]
    assert f"{row['height']:.3f}" in capsys.readouterr().out
    error = refused(capsys, main, ["evaluate", tmp_path / "run", "--steer", "diamond"])
    assert error.startswith("error: algo: runs of climb have no experts to steer: evaluate takes")


def test_evaluate_audits_what_is_steered(run, tmp_path, capsys):
    main(["evaluate", str(run), "--steer", "ghost", "--json", str(tmp_path / "plain.json")])
    assert "audited" not in capsys.readouterr().out
    audit = ["--steer", "ghost", "--audit", "50", "--json", str(tmp_path / "rows.json")]
    main(["evaluate", str(run), *audit])
    printed = capsys.readouterr().out
    assert "50 episodes audited" in printed
    assert "no fair sample" in printed
    (plain,), (row,) = (
        json.loads((tmp_path / name).read_text()) for name in ("plain.json", "rows.json")
    )
    assert plain.items() <= row.items()
    assert row["audit_episodes"] == 50
    assert f"{row['audit_hidden_bound']:.2%}" in printed
    truth = row["p_ghost"] / (row["p_ghost"] + row["p_diamond"])
    assert row["audit_hidden_truth"] == pytest.approx(truth)


def test_evaluate_draws_pictures(run, tmp_path):
    main(["evaluate", str(run), "--pictures", str(tmp_path / "pictures")])
    shown = {"policies.png": "PNG", "policies_dark.png": "PNG", "rollouts.gif": "GIF"}
    for name, kind in shown.items():
        assert Image.open(tmp_path / "pictures" / name).format == kind


def test_spurious_flags_are_evaluated_by_rollouts(tmp_path):
    train([
        *SMOKE, "--run-dir", str(tmp_path), "--world.spurious-oversight", "0.3",
        "--reinforce.updates", "1", "--evaluation.episodes", "200", "--evaluation.oversight", "0.1",
    ])  # fmt: skip
    rows = result(tmp_path)
    assert {row["evaluator"] for row in rows} == {"rollout"}
    assert rows[0]["optimal_return"] == pytest.approx(0.9317, abs=1e-4)  # flags do not matter


# ---- stopping and going on


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, "SIGINT is ignored"])
def test_a_stopped_run_goes_on_to_the_same_end(tmp_path, number):
    """In a process of its own: a checkpoint, the line to type, the same end."""
    if number == "SIGINT is ignored":
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # children inherit it
    path = tmp_path / "stopped"
    # no annealing: the two runs below differ in their number of updates
    steady = [*SMOKE, "--reinforce.learning-rate", "1e-3", "--reinforce.entropy-coef", "0.02"]
    args = [*steady, "--run-dir", str(path), "--reinforce.updates", "20000"]
    process = subprocess.Popen(
        [sys.executable, "train.py", *args], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    while process.poll() is None and max(checkpoint.updates(path / "checkpoints"), default=0) < 10:
        time.sleep(0.05)
    if number == "SIGINT is ignored":
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=2)
        number = signal.SIGTERM
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--resume {path}" in output
    (stopped_at,) = checkpoint.updates(path / "checkpoints")[-1:]
    assert 0 < stopped_at < 20000
    assert not (path / "result.json").exists()

    # the end is the same as that of a run never stopped: shorten both to 20 more updates
    set_updates(path, stopped_at + 20)
    train(["--resume", str(path)])
    whole = tmp_path / "whole"
    train([*steady, "--run-dir", str(whole), "--reinforce.updates", str(stopped_at + 20)])
    same_run(path, whole)


def set_updates(folder, updates):
    file = folder / "config.yaml"
    content = yaml.safe_load(file.read_text())
    content["reinforce"]["updates"] = updates
    file.write_text(yaml.safe_dump(content))


def same_run(path, whole):
    ours, theirs = (read_run(RunFolder.open(p)).agent.state_dict() for p in (path, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert timeless(result(path)) == timeless(result(whole))
    assert (path / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


@pytest.mark.usefixtures("interruptible")
def test_a_stop_is_saved_at_once_and_not_at_the_next_evaluation(tmp_path):
    path = tmp_path / "stopped"
    rare = ["--evaluation.every", "1000000", "--reinforce.updates", "1000000"]
    process = subprocess.Popen(
        [sys.executable, "train.py", *SMOKE, "--run-dir", str(path), *rare],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and not (
        (path / "metrics.csv").exists() and "mixture" in (path / "metrics.csv").read_text()
    ):
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    started, update = checkpoint.updates(path / "checkpoints")
    assert started == 0 < update < 1_000_000


def test_seeds_that_were_saved_apart_go_on_together(tmp_path):
    """A crash between two folders' checkpoints: both go on from the newest that they share."""
    steady = [*SMOKE, "--seeds", "2", "10", "--reinforce.learning-rate", "1e-3"]
    steady += ["--reinforce.entropy-coef", "0.02", "--evaluation.every", "5"]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    train([*steady, "--run-dir", str(broken), "--reinforce.updates", "20"])
    assert [p.name for p in find_runs(broken)] == ["seed_2", "seed_10"]
    for seed in (2, 10):
        (broken / f"seed_{seed}/result.json").unlink()
        set_updates(broken / f"seed_{seed}", 30)
    for file in (broken / "seed_10/checkpoints").glob("*20.*"):
        file.unlink()
    train(["--resume", str(broken)])
    train([*steady, "--run-dir", str(whole), "--reinforce.updates", "30"])
    for seed in (2, 10):
        same_run(broken / f"seed_{seed}", whole / f"seed_{seed}")
        events = EventAccumulator(str(broken / f"seed_{seed}/curves/diamond")).Reload()
        steps = [event.step for event in events.Scalars("evaluation/return")]
        assert steps == [0, 5, 10, 15, 20, 25, 30]  # none twice, none missing


def test_a_run_killed_at_its_start_can_go_on(run, tmp_path):
    path = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "train.py", *SMOKE, "--run-dir", path], cwd=ROOT)
    while process.poll() is None and not checkpoint.updates(path / "checkpoints"):
        time.sleep(0.005)
    process.kill()
    process.wait()
    if not (path / "result.json").exists():
        train(["--resume", str(path)])
    same_run(path, run)


def test_what_cannot_be_gone_on_with_is_refused(run, tmp_path, capsys):
    def copy(name):
        target = tmp_path / name
        shutil.copytree(run, target)
        (target / "result.json").unlink()
        return target

    metrics = copy("metrics")
    (metrics / "metrics.csv").unlink()
    assert "metrics.csv" in refused(capsys, train, ["--resume", metrics])
    facts = copy("facts")
    for file in (facts / "checkpoints").glob("*.json"):
        file.write_text("[]")
    assert "not of a checkpoint" in refused(capsys, train, ["--resume", facts])
    assert "not of a checkpoint" in refused(capsys, main, ["evaluate", facts])
    other = copy("other")
    content = yaml.safe_load((other / "config.yaml").read_text())
    content["reinforce"]["worlds"] = 7
    (other / "config.yaml").write_text(yaml.safe_dump(content))
    assert "does not fit" in refused(capsys, train, ["--resume", other])
    both = tmp_path / "both"
    shutil.copytree(run, both / "seed_0")
    (both / "seed_0/result.json").unlink()
    shutil.copytree(other, both / "seed_1")
    assert "differ in more than" in refused(capsys, train, ["--resume", both])
    state, _ = published()
    torch.save(state, tmp_path / "state.pt")
    imported = tmp_path / "imported"
    main(["import-reference", str(tmp_path / "state.pt"), str(imported), "--oversight", "0.1"])
    assert "does not fit" in refused(capsys, train, ["--resume", imported])


# ---- checkpoints


FACTS = {"wall_seconds": 0.5}


def test_only_the_newest_complete_checkpoints_are_kept(tmp_path):
    for update in (1, 2, 3):
        checkpoint.save(
            tmp_path, update, {"x": torch.full((2,), update)}, FACTS | {"env_steps": update}
        )
    assert checkpoint.updates(tmp_path) == [2, 3]
    assert len(list(tmp_path.iterdir())) == 4
    tensors, facts = checkpoint.load(tmp_path, 3, {"x": torch.zeros(2, dtype=torch.int64)})
    assert tensors["x"].tolist() == [3, 3]
    assert facts == {"update": 3, "env_steps": 3, "wall_seconds": 0.5}
    (tmp_path / "update_00000003.json").unlink()  # as if killed before it was written
    assert checkpoint.updates(tmp_path) == [2]
    (tmp_path / "update_00000002.safetensors").unlink()
    assert checkpoint.updates(tmp_path) == []


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full_disk(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_run_is_taken_out_of_its_stack():
    config = Config(agent=AgentConfig(hidden=(4,)))
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    stack = new_agent(config.agent, config.world.shape, config.method, 2, generators)
    for run in (0, 1):
        alone = take_run(stack, run)
        for name, parameter in alone.named_parameters():
            assert torch.equal(parameter[0], dict(stack.named_parameters())[name][run])


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_acts_at_once():
    with _stop_requested() as stopping:
        signal.raise_signal(signal.SIGINT)
        assert stopping()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("interruptible")
def test_what_was_ignored_from_the_start_stays_so():
    """As under nohup, or in the background of a script, where only SIGTERM is meant."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with _stop_requested() as stopping:
        signal.raise_signal(signal.SIGINT)
        assert not stopping()
        signal.raise_signal(signal.SIGTERM)
        assert stopping()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_run_that_is_being_trained_is_not_resumed(run, tmp_path, capsys, monkeypatch):
    busy = tmp_path / "busy"
    shutil.copytree(run, busy)
    (busy / "result.json").unlink()
    monkeypatch.setattr(folders, "PATIENCE", 0.1)
    with folders.locked(busy):
        assert "another process" in refused(capsys, train, ["--resume", busy])
    train(["--resume", str(busy)])  # nobody holds it any more


def test_a_finished_run_is_not_resumed(run, capsys):
    assert "finished" in refused(capsys, train, ["--resume", run])


# ---- the published code's policies


def published(single=False, fixed_gate=False):
    """A state dict with the published keys, and the network written out as published."""
    from torch import nn

    def mlp(*sizes):
        return [nn.Linear(a, b) for a, b in pairwise(sizes)]

    torch.manual_seed(0)
    state = {}

    def put(prefix, layers):
        for i, layer in enumerate(layers):
            state[f"{prefix}.layers.{i}.weight"] = layer.weight.data
            state[f"{prefix}.layers.{i}.bias"] = layer.bias.data

    head = nn.Linear(256, 4)

    def expert(layers, x):
        for layer in layers:
            x = layer(x).relu()
        return x

    if single:
        body = mlp(100, 256, 256)
        put("neural_net.1.1", body)
        state["neural_net.2.weight"], state["neural_net.2.bias"] = head.weight, head.bias
        return state, {"single": lambda o: head(expert(body, o.flatten(1)))}
    diamond, ghost, gate = mlp(100, 256, 256), mlp(100, 256, 256), mlp(100, 256, 256, 1)
    conv = nn.Conv2d(4, 4, 1)
    put("diamond_expert.1", diamond)
    put("ghost_expert.1", ghost)
    state["shared_output.weight"], state["shared_output.bias"] = head.weight, head.bias
    if fixed_gate:
        state["gating.fake_param"] = torch.zeros(1)
    else:
        put("gating.2", gate)
        state["gating.0.weight"], state["gating.0.bias"] = conv.weight, conv.bias

    def mixture(o):
        g = conv(o).flatten(1)
        g = gate[2](gate[1](gate[0](g).relu()).relu())
        g = torch.full_like(g, 0.5) if fixed_gate else torch.sigmoid(g)
        return head(g * expert(diamond, o.flatten(1)) + (1 - g) * expert(ghost, o.flatten(1)))

    return state, {
        "mixture": mixture,
        "diamond": lambda o: head(expert(diamond, o.flatten(1))),
        "ghost": lambda o: head(expert(ghost, o.flatten(1))),
    }


@pytest.mark.parametrize(
    ("kind", "method"),
    [({}, "routing"), ({"fixed_gate": True}, "no_gate"), ({"single": True}, "naive")],
)
def test_a_published_policy_is_imported(tmp_path, kind, method):
    state, policies = published(**kind)
    torch.save(state, tmp_path / "state.pt")
    target = tmp_path / "imported"
    main(["import-reference", str(tmp_path / "state.pt"), str(target), "--oversight", "0.1"])
    saved = read_run(RunFolder.open(target))
    assert saved.config.method == method
    observation = torch.rand(9, 4, 5, 5)
    for name, logits in policies.items():
        ours = SteeredPolicy(saved.agent).steer(name)(observation)
        torch.testing.assert_close(ours, logits(observation).softmax(-1).detach())
    main(["evaluate", str(target), "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["policy"] for row in rows] == list(policies)
    assert {row["train_oversight"] for row in rows} == {0.1}


def test_what_is_not_a_published_policy_is_refused(tmp_path, capsys):
    source, target = tmp_path / "state.pt", tmp_path / "imported"
    args = ["import-reference", source, target, "--oversight", "0.1"]
    assert "cannot read" in refused(capsys, main, args)
    source.write_bytes(b"not a state dict")
    assert "not a state dict" in refused(capsys, main, args)
    torch.save({"code": print}, source)  # a pickle that names a function
    assert "not a state dict" in refused(capsys, main, args)
    torch.save([1, 2], source)
    assert "dictionary of tensors" in refused(capsys, main, args)
    state, _ = published()
    torch.save({k: v for k, v in state.items() if k != "gating.0.bias"}, source)
    assert "gating.0.bias" in refused(capsys, main, args)
    torch.save(state | {"shared_output.weight": torch.zeros(3, 3)}, source)
    assert "head.weight has shape (3, 3)" in refused(capsys, main, args)
    torch.save(state, source)
    assert "oversight" in refused(capsys, main, [*args[:-1], "1.5"])
    assert "method" in refused(capsys, main, [*args, "--method", "routng"])
    assert "does not train" in refused(capsys, main, [*args, "--method", "naive"])
    torch.save(state | {"gating.2.layers.0.weight": torch.zeros(())}, source)
    assert "gating.2.layers.0.weight" in refused(capsys, main, args)
    torch.save(state | {"shared_output.bias": torch.full((4,), torch.nan)}, source)
    assert "finite" in refused(capsys, main, args)
    assert not target.exists()


# ---- mistakes


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "rooting"], "did you mean 'routing'"),
        (["--oversight", "1.5"], "oversight: should be less than or equal to 1, got 1.5"),
        (["--oversight", "nan"], "oversight"),
        (["--labels.shares", "-0.5"], "labels.shares"),
        (["--world.rows", "1"], "world.rows: should be greater than or equal to 2, got 1"),
        (["--world.cols", "0"], "world.cols"),
        (["--reinforce.worlds", "0"], "reinforce.worlds"),
        (["--reinforce.worlds", "1000000000"], "reinforce.worlds"),
        (["--agent.hidden", "10000000"], "agent.hidden"),
        (["--world.max-steps", "1000000"], "world.max_steps"),
        (["--reinforce.updates", "-3"], "reinforce.updates"),
        (["--reinforce.learning-rate", "1", "2", "3"], "reinforce.learning_rate"),
        (["--reinforce.updates", "many"], "many"),
        (["--agent.hidden", "0"], "agent.hidden"),
        (["--agent.experts", "1"], "agent.experts"),
        (["--seeds", "1", "1"], "seeds: must be distinct"),
        (["--world.rws", "3"], "--world.rows"),
        (["--device", "tpu"], "cuda"),
        (["--config", "missing.yaml"], "missing.yaml: cannot read"),
        (["--resume", "missing", "--seeds", "1"], "takes its settings from the run folder"),
    ],
)
def test_bad_flags_of_train(tmp_path, capsys, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, train, ["--run-dir", tmp_path / "run", *args])
    assert list(tmp_path.iterdir()) == []  # nothing was written


@pytest.mark.parametrize(
    "flag", [["--training.updates", "3"], ["--training.updates=3"], ["--training.no-bootstrap"]]
)
def test_a_flag_that_was_renamed_is_told_its_new_name(tmp_path, capsys, flag):
    error = refused(capsys, train, [*SMOKE, *flag, "--run-dir", tmp_path / "run"])
    assert error == f"error: {flag[0]}: training is called reinforce since version 0.2\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_gpu_is_refused(tmp_path, capsys):
    error = refused(capsys, train, ["--run-dir", tmp_path / "run", "--device", "cuda"])
    assert "no GPU" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metod: naive", "unknown setting metod; did you mean 'method'"),
        ("world: {row: 3}", "unknown setting world.row; did you mean 'rows'"),
        ("oversight: 2", "oversight"),
        ("world: 3", "world: expected"),
        ("- a list", "expected settings"),
        ("world: [", "not valid YAML"),
        ("!!python/object/apply:os.system [ls]", "not valid YAML"),
        ("reinforce: {updates: 1.5}", "reinforce.updates"),
        ("training: {updates: 3}", "bad.yaml: training: is called reinforce since version 0.2\n"),
        ("seeds: []", "seeds"),
        ("agent: {hidden: 0}", "agent.hidden"),
    ],
)
def test_bad_config_files(tmp_path, capsys, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    args = ["--config", tmp_path / "bad.yaml", "--run-dir", tmp_path / "run"]
    assert message in refused(capsys, train, args)
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused(run, tmp_path, capsys):
    before = result(run)
    error = refused(capsys, train, [*SMOKE, "--run-dir", run])
    assert f"--resume {run}" in error
    assert result(run) == before
    (tmp_path / "file").write_text("mine")
    assert "is not empty" in refused(capsys, train, [*SMOKE, "--run-dir", tmp_path])
    assert "is not a folder" in refused(capsys, train, [*SMOKE, "--run-dir", tmp_path / "file"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steer", "diamnd"], "did you mean 'diamond'"),
        (["--oversight", "2"], "[0, 1]"),
        (["--temperature", "0"], "must lie in [0.001, 1000], got 0"),
        (["--temperature", "1e-320"], "must lie in [0.001, 1000]"),
        (["--steer", "diamond=1e38,ghost=-1e38"], "must lie in [-1000, 1000], got 1e+38"),
        (["--json", "/nonexistent/rows.json"], "cannot write"),
        (["--audit", "0"], "must lie in [1, 10,000,000] episodes, got 0"),
        (["--export", "/nonexistent/policy", "--steer", "ghost"], "cannot write"),
        (["--export", "policy"], "one --steer"),
        (["--pictures", "/proc/pictures"], "cannot write"),
        (["--stear", "ghost"], "--steer"),
    ],
)
def test_bad_flags_of_evaluate(run, capsys, args, message):
    assert message in refused(capsys, main, ["evaluate", run, *args])


def test_what_is_not_a_run_is_refused(run, tmp_path, capsys):
    assert "not a run folder" in refused(capsys, main, ["evaluate", tmp_path])
    (tmp_path / "missed").mkdir()
    for command, args in ((main, ["evaluate"]), (train, ["--resume"]), (main, ["report"])):
        error = refused(capsys, command, [*args, tmp_path / "missing"])
        kind = "folder" if "report" in args else "run folder"
        assert error == f"error: no such {kind}: {tmp_path}/missing; did you mean 'missed'?\n"
    assert "no such run folder: nowhere/x\n" in refused(capsys, main, ["evaluate", "nowhere/x"])
    assert "evaluate" in refused(capsys, main, ["evalute", run])

    def copy(name):
        target = tmp_path / name
        (target / "checkpoints").mkdir(parents=True)
        (target / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
        for file in (run / "checkpoints").iterdir():
            (target / "checkpoints" / file.name).write_bytes(file.read_bytes())
        return target

    empty = copy("empty")
    for file in (empty / "checkpoints").iterdir():
        file.unlink()
    assert "no checkpoint" in refused(capsys, main, ["evaluate", empty])
    damaged = copy("damaged")
    newest = max((damaged / "checkpoints").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:100])
    assert "not a readable safetensors file" in refused(capsys, main, ["evaluate", damaged])
    foreign = copy("foreign")
    content = yaml.safe_load((foreign / "config.yaml").read_text())
    content["agent"]["hidden"] = [12, 12]
    (foreign / "config.yaml").write_text(yaml.safe_dump(content))
    assert "does not fit its configuration" in refused(capsys, main, ["evaluate", foreign])
    plain = next((run / "checkpoints").glob("*.safetensors"))
    assert "exported policy" in refused(capsys, main, ["evaluate", plain])


# ---- folders that are not asked for, links, names


def test_runs_that_start_in_the_same_second_have_a_folder_each(tmp_path):
    """Real processes, whose clock stands still."""
    start = "import time; time.strftime = lambda _: 'now'; from oversight_rl.cli import train; "
    few = [*SMOKE, "--reinforce.updates", "1"]
    commands = [[*few, "--seeds", "3"]] * 2 + [[*few, "--seeds", "0", "1"]]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", f"{start}train({command})"], cwd=tmp_path, stdout=subprocess.PIPE
        )
        for command in commands
    ]
    told = [process.communicate(timeout=120)[0].decode() for process in running]
    assert [process.returncode for process in running] == [0] * 3
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    one = "routing-0.1-seed_3-now"
    assert names == [one, f"{one}-2", "routing-0.1-seeds_0_to_1-now"]
    assert len(list(tmp_path.rglob("result.json"))) == 4
    assert sorted(line.split(", in runs/")[1].split("\n")[0] for line in told) == names


def test_a_start_that_fails_leaves_no_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    huge = ["--reinforce.worlds", "1000000", "--reinforce.steps", "65536"]
    huge += ["--agent.hidden", "16384", "16384", "16384", "16384", "--agent.experts", "64"]
    assert "too little memory" in refused(capsys, train, [*SMOKE, *huge])
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "runs"])


def test_names_that_are_no_text_and_links_to_runs(run, tmp_path, capsys):
    """A run in a folder whose name is not UTF-8: trained, steered, exported, reported."""
    folder = tmp_path / os.fsdecode(b"r\xfcns")
    folder.mkdir()
    settings = folder / "own.yaml"
    settings.write_text((ROOT / "configs/smoke.yaml").read_text())
    args = ["--config", str(settings), *SMOKE[2:], "--seeds", "5"]
    train([*args, "--run-dir", str(folder / "one")])
    policy = folder / "policy"
    main(["evaluate", str(folder / "one"), "--steer", "ghost", "--export", str(policy)])
    main(["evaluate", str(policy), "--json", str(folder / "rows.json")])
    assert json.loads((folder / "rows.json").read_text())[0]["policy"] == "ghost"
    error = refused(capsys, train, ["--resume", folder / "one"])
    assert "r\\xfcns/one: this run is finished" in error

    links = folder / "links"  # the run of another place, twice, and a circle
    links.mkdir()
    (links / "first").symlink_to(run)
    (links / "second").symlink_to(run)
    (links / "circle").symlink_to(folder)
    main(["report", str(links)])
    table = pd.read_csv(links / "summary.csv")
    assert table["n_seeds"].tolist() == [2]
    assert "repeats" not in capsys.readouterr().out


# ---- terminals


def shell(line, run, **environment):
    """Run a line of shell with our commands as `$T` and `$O`; nothing may end in a traceback."""
    ours = {"T": f"{sys.executable} {ROOT}/train.py", "O": f"{sys.executable} -m oversight_rl"}
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        capture_output=True, env=os.environ | ours | {"RUN": str(run)} | environment,
    )  # fmt: skip
    told = done.stdout + done.stderr
    assert b"Traceback" not in told
    assert b"Exception ignored" not in told
    return done.returncode, told


def test_output_that_cannot_be_written_stops_nothing(run, tmp_path):
    small = [*SMOKE, "--reinforce.updates", "1", "--run-dir"]
    for name, where, code in (("full", ">/dev/full", 1), ("closed", ">&-", 0)):
        line = f"$T {' '.join(small)} {tmp_path / name} {where}"
        found, told = shell(line, run)
        assert found == code, told
        assert (b"error: standard output: No space left" in told) == (code == 1)
        assert result(tmp_path / name)
    assert shell("$O evaluate $RUN | head -1", run)[0] == 0
    assert shell("$O --help | true", run)[0] == 0
    assert shell("$O --help >/dev/full", run)[0] == 1
    assert shell("$O evaluate $RUN-of-nobody 2>/dev/full", run)[0] == 2
    assert shell("$O evaluate $RUN-of-nobody <&- >&- 2>&-", run)[0] == 2


def test_ascii_terminals(run, tmp_path):
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    path = tmp_path / "sampled"
    spurious = "--world.spurious-oversight 0.1 --evaluation.episodes 200 --reinforce.updates 1"
    args = " ".join([*SMOKE, "--run-dir", str(path)])
    for line, shown in (
        (f"$T {args} {spurious} && $O evaluate {path}", " +- "),  # a standard error
        ("$T --help", "--reinforce.updates"),
        ("$T --help-all", "--reinforce.gate-coef"),
        ("$O evaluate $RUN-é", "no such run folder"),
    ):
        code, told = shell(line, run, **ascii_only)
        assert code == (2 if "no such" in shown else 0), told
        assert shown in told.decode("ascii")


# ---- help, configs


FLAGS = {
    "evaluate": ["--steer", "--oversight", "--greedy", "--json", "--export"],
    "sweep": ["--out", "--workers", "--ray"],
    "report": ["PATH", "report.html", "summary.csv"],
    "import-reference": ["--oversight", "--method", "--seed"],
}


@pytest.mark.parametrize("command", [["train.py"], *(["-m", "oversight_rl", c] for c in FLAGS)])
def test_help_is_complete(command):
    environment = os.environ | {"COLUMNS": "200"}
    every = "--help-all" if command == ["train.py"] else "--help"
    done = subprocess.run(
        [sys.executable, *command, every],
        cwd=ROOT, capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    train_flags = ["--config", "--resume", "--oversight", "--world.rows", "--reinforce.gate-coef"]
    flags = FLAGS.get(command[-1], train_flags)
    for flag in flags:
        assert flag in done.stdout
    assert done.stdout.count("default: ") > 5 or command != ["train.py"]


@pytest.mark.parametrize("command", [["train.py"], ["-m", "oversight_rl", "train"]])
def test_help_is_short_and_names_the_methods(command):
    told = subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert set(METHODS) <= set(re.findall(r"\w+", told))
    assert "--help-all" in told
    assert told.count("\n") < 40
    assert max(map(len, told.splitlines())) <= 100


def test_progress_keeps_count_and_time_where_there_is_little_room():
    for width in (60, 80, 120):
        shown = Console(width=width, file=io.StringIO())
        bar = progress_bar(Console(width=width, force_terminal=True, file=io.StringIO()))
        note = "left_flagged +0.71  optimum 0.93"
        task = bar.add_task("", total=400, completed=0, speed=123456.0, note=note)
        bar.update(task, completed=150)
        shown.print(bar.get_renderable())
        (line,) = shown.file.getvalue().splitlines()
        assert "150/400" in line
        assert re.search(r"[-0-9]:[-0-9]{2}:[-0-9]{2}", line)
        assert "left_flagged +0.71" in line


def test_a_pipe_gets_a_line_for_each_evaluation(run, tmp_path):
    code, told = shell(f"$T {' '.join(SMOKE)} --run-dir {tmp_path / 'x'} | cat", run)
    assert code == 0
    lines = told.decode().splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("update")] == [
        "update 0/20", "update 10/20", "update 20/20",
    ]  # fmt: skip
    assert f"  oversight-rl evaluate {tmp_path / 'x'} --steer deployed --oversight 0 1" in lines


def test_what_rounds_to_zero_has_no_sign():
    shown = [fixed(x, form) for x, form in ((-0.0004, ".1%"), (-0.001, ".2f"), (-0.0, "+.2f"))]
    assert shown == ["0.0%", "0.00", "0.00"]
    assert [fixed(x, "+.2f") for x in (-0.01, 0.01)] == ["-0.01", "+0.01"]


def loaded(command, args, cwd):
    """The libraries that a command has loaded when it ends, in a process of its own."""
    slow = {
        *("torch", "torch._dynamo", "stable_baselines3", "tensorboard", "pandas", "matplotlib"),
        *("scipy", "minigrid", "jinja2", "PIL", "safetensors", "ray"),
    }
    code = (
        f"import sys; from oversight_rl.cli import {command}\n"
        f"try: {command}({args})\nexcept SystemExit: pass\n"
        f"print('\\n' + ' '.join(sorted({slow} & set(sys.modules))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("command", "args"),
    [
        ("main", ["--help"]),
        *(("main", [name, "--help"]) for name in FLAGS),
        ("train", ["--help"]),
        ("train", ["--metod", "naive"]),
        ("train", ["--config", "missing.yaml"]),
        ("train", ["--resume", "missing"]),
        ("main", ["evaluate", "missing"]),
        ("main", ["report", "missing"]),
    ],
)
def test_help_and_mistakes_load_nothing_slow(tmp_path, command, args):
    assert loaded(command, args, tmp_path) == set()


def test_training_loads_what_it_needs(tmp_path):
    """The default learner needs no other's libraries, nor torch's compiler, nor a report's."""
    args = [*SMOKE[:-1], "--reinforce.updates", "1", "--run-dir", "run"]
    assert loaded("train", args, tmp_path) == {"torch", "tensorboard", "PIL", "safetensors"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_preset_loads(path):
    if "grid" in read_yaml(path):
        runs = plan(load_sweep(path), Path("runs"))
        expected = {"compare": len(METHODS) * 6 * 8, "compare_quick": 4 * 2 * 8}
        expected |= {"compare_overseers": (7 * 2 + 2 + 1) * 8 * 8}
        expected |= {"compare_minigrid": 7 * 5, "compare_four_rooms": 4 * 5}
        expected |= {"stories_sweep": 4 * 3 * 5, "stories_methods": 8 * 5}
        expected |= {"compare_digits": 4 * 3 * 5}
        assert len(runs) == expected[path.stem]
        return
    config = load_config(path)
    assert type(config).model_validate(config.model_dump()) == config
    assert (config == Config()) == (path.name == "default.yaml")


def test_a_sweep_file_is_no_training_configuration(capsys):
    path = ROOT / "configs" / "compare.yaml"
    assert "oversight-rl sweep" in refused(capsys, train, ["--config", path])


def test_versions_and_warnings_are_plain(tmp_path):
    command = [sys.executable, "-m", "oversight_rl", "--version"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("error: standard output:")
    assert plain("\x1b[33mWARN: No render fps\x1b[0m") == "No render fps"


def test_a_preset_of_the_other_kind_is_named_as_it_was_asked(capsys):
    with pytest.raises(SystemExit):
        train(["--config", "compare"])
    assert "run it with oversight-rl sweep compare --out DIR" in capsys.readouterr().err
