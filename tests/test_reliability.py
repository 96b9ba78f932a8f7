"""What docs/reliability.md promises, by breaking things: kills, full disks, bad numbers."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agents import reinforce
from oversight_rl import checkpoint
from oversight_rl.cli import train
from oversight_rl.config import Config, load_yaml
from oversight_rl.tracking import RunFolder
from oversight_rl.training import Trainer

ROOT = Path(__file__).parent.parent
SMOKE = ["--config", str(ROOT / "configs" / "smoke.yaml"), "--device", "cpu", "--no-pictures"]


def refused(capsys, args):
    """Train where that must end with exit code 2 and one line, which is returned."""
    with pytest.raises(SystemExit) as stop:
        train([str(arg) for arg in args])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1, error
    return error


# ---- kills


def test_killed_runs_go_on_as_if_nothing_had_happened():
    """A short form of the soak; see there what is compared."""
    command = [sys.executable, "benchmarks/soak.py", "kill", "--kills", "5", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("5 kills of")


# ---- bad numbers


def small(seed=0, **more):
    base = load_yaml(ROOT / "configs" / "smoke.yaml").model_dump() | {"device": "cpu"}
    return Config.model_validate(base | {"seeds": (seed,), "pictures": False} | more)


def poisoned(monkeypatch, part, value, run, update):
    """Give one part of one run's loss a bad value at one update."""
    honest = reinforce.loss
    calls = 0

    def loss(*args):
        nonlocal calls
        calls += 1
        losses = honest(*args)
        if calls != update:
            return losses
        factor = torch.ones_like(getattr(losses, part))
        factor[run] = value
        return replace(losses, **{part: getattr(losses, part) * factor})

    monkeypatch.setattr(reinforce, "loss", loss)


def learned(trainer, run):
    tensors = trainer.tensors(run)
    names = [n for n in tensors if n.startswith(("agent.", "adam."))]
    return {name: tensors[name].clone() for name in names}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_number_stops_the_run_at_that_update(tmp_path, capsys, monkeypatch, value):
    poisoned(monkeypatch, "value", value, 0, 13)
    error = refused(capsys, [*SMOKE, "--run-dir", tmp_path / "run"])
    assert "update 13: the value loss is " in error
    assert "the checkpoint of update 10 is kept" in error
    assert checkpoint.updates(tmp_path / "run/checkpoints") == [0, 10]
    agent = RunFolder.open(tmp_path / "run").load().agent
    assert all(parameter.isfinite().all() for parameter in agent.parameters())


def test_what_went_bad_first_is_named(tmp_path, capsys):
    steep = [*SMOKE, "--run-dir", tmp_path / "run", "--training.learning-rate", "1e30"]
    assert "update 1: the parameter agent.trunks.0.weight is inf" in refused(capsys, steep)


def test_a_bad_gradient_is_told_from_a_bad_loss(monkeypatch):
    trainer = Trainer([small()])
    # the square root has no derivative at 0
    monkeypatch.setattr(
        reinforce.Loss, "total", lambda self, *_: self.policy + (self.value * 0).sqrt()
    )
    trainer.update()
    assert "gradient of agent." in trainer.watch.seen()[0]


def test_an_update_is_left_out_of_the_bad_run_alone(monkeypatch):
    configs = [small(seed, on_nan="skip") for seed in (0, 1)]
    healthy, trainer = Trainer(configs), Trainer(configs)
    poisoned(monkeypatch, "policy", torch.nan, 1, 2)
    for update in (1, 2, 3):
        before = learned(trainer, 1)
        trainer.update()
        after = learned(trainer, 1)
        same = [torch.equal(before[name], after[name]) for name in before]
        assert all(same) if update == 2 else not any(same)
    assert list(trainer.watch.seen()) == [1]
    monkeypatch.undo()
    for _ in range(3):
        healthy.update()
    theirs = healthy.tensors(0)
    assert all(torch.equal(x, theirs[name]) for name, x in trainer.tensors(0).items())


def test_leaving_updates_out_is_said_once_and_the_run_ends(tmp_path, capsys, monkeypatch):
    poisoned(monkeypatch, "gate", torch.nan, 0, 4)
    steep = ["--run-dir", str(tmp_path / "run"), "--on-nan", "skip", "--training.updates", "8"]
    train([*SMOKE, *steep])
    assert capsys.readouterr().out.count("update 4: the gate loss is nan; left out") == 1
    assert (tmp_path / "run/result.json").exists()


def test_a_healthy_run_is_the_same_whatever_is_done_about_bad_numbers():
    stop, skip = Trainer([small()]), Trainer([small(on_nan="skip")])
    for trainer in (stop, skip):
        for _ in range(3):
            trainer.update()
    theirs = skip.tensors(0)
    assert all(torch.equal(x, theirs[name]) for name, x in stop.tensors(0).items())
