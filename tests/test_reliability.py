"""What docs/reliability.md promises, by breaking things: kills, full disks, bad numbers."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import soak
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from oversight_rl.agents.reinforce import learner, losses
from oversight_rl.agents.reinforce.learner import ReinforceLearner
from oversight_rl.cli import main, train
from oversight_rl.envs.gym import OversightGridVecEnv
from oversight_rl.experiments.oversight.config import Config
from oversight_rl.experiments.oversight.grid import GridRuns
from oversight_rl.experiments.oversight.policies import read_run
from oversight_rl.kinds import load_config
from oversight_rl.reports.gather import gather
from oversight_rl.runs import checkpoint
from oversight_rl.runs import folder as folders
from oversight_rl.runs.folder import EVENTS, RunFolder
from oversight_rl.runs.loop import Watch, _Training
from oversight_rl.terminal import STOPPED

ROOT = Path(__file__).parent.parent
SMOKE = ["--config", str(ROOT / "configs" / "smoke.yaml"), "--device", "cpu", "--no-pictures"]


def refused(capsys, args):
    """Train where that must end with exit code 2 and one line, which is returned."""
    with pytest.raises(SystemExit) as stop:
        train([str(arg) for arg in args])
    *before, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert all("going on without TensorBoard" in line for line in before)
    return error


# ---- kills


def test_killed_runs_go_on_as_if_nothing_had_happened():
    """A short form of the soak; see there what is compared."""
    command = [sys.executable, "benchmarks/soak.py", "kill", "--kills", "8", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("8 kills of")


@pytest.mark.parametrize("stop", [2, 3])
def test_ppo_on_the_grid_goes_on_to_the_same_bytes(tmp_path, monkeypatch, stop):
    """Stopped by a signal, at an evaluation or between two, and resumed."""
    small = ["--device", "cpu", "--no-pictures", "--algo", "ppo", "--oversight", "0.5"]
    small += ["--agent.hidden", "8", "--ppo.updates", "5", "--ppo.worlds", "8", "--ppo.steps", "8"]
    small += ["--evaluation.every", "2", "--evaluation.episodes", "16", "--run-dir"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    train([*small, str(whole)])
    assert {row.evaluator for row in RunFolder.open(whole).result()} == {"exact"}
    steps, honest = itertools.count(1), OversightGridVecEnv.step_wait

    def step_wait(self):
        if self.num_envs == 8 and next(steps) == 8 * stop - 4:  # in training, not in evaluation
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(self)

    monkeypatch.setattr(OversightGridVecEnv, "step_wait", step_wait)
    with pytest.raises(SystemExit) as stopped:
        train([*small, str(run)])
    assert stopped.value.code == STOPPED
    assert max(checkpoint.updates(run / "checkpoints")) == stop
    train(["--resume", str(run)])
    assert soak.differences(run, whole) == []


# ---- bad numbers


def small(seed=0, **more):
    base = load_config(ROOT / "configs" / "smoke.yaml").model_dump() | {"device": "cpu"}
    return Config.model_validate(base | {"seeds": (seed,), "pictures": False} | more)


def poisoned(monkeypatch, part, value, run, update):
    """Give one part of one run's loss a bad value at one update."""
    honest = learner.loss
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

    monkeypatch.setattr(learner, "loss", loss)


def in_training(configs):
    """A stack in the hands of the loop, without folders."""
    return _Training(GridRuns(configs), [], Console(), lambda: False)


def learned(training, run):
    tensors = training.learner.state(run)
    names = [n for n in tensors if n.startswith(("agent.", "adam."))]
    return {name: tensors[name].clone() for name in names}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_number_stops_the_run_at_that_update(tmp_path, capsys, monkeypatch, value):
    poisoned(monkeypatch, "value", value, 0, 13)
    error = refused(capsys, [*SMOKE, "--run-dir", tmp_path / "run"])
    assert "update 13: the value loss is " in error
    assert "the checkpoint of update 10 is kept" in error
    assert checkpoint.updates(tmp_path / "run/checkpoints") == [0, 10]
    agent = read_run(RunFolder.open(tmp_path / "run")).agent
    assert all(parameter.isfinite().all() for parameter in agent.parameters())


def test_what_went_bad_first_is_named(tmp_path, capsys):
    steep = [*SMOKE, "--run-dir", tmp_path / "run", "--reinforce.learning-rate", "1e30"]
    assert "update 1: the parameter agent.trunks.0.weight is inf" in refused(capsys, steep)


def test_the_first_bad_number_of_each_run_is_kept():
    watch = Watch(2, torch.device("cpu"))
    good, bad = torch.zeros(2), torch.tensor([0.0, torch.nan])
    assert watch.look(1, {"x": good, "y": good}).tolist() == [True, True]
    assert watch.seen() == {}
    assert watch.look(2, {"x": good, "y": bad}).tolist() == [True, False]
    assert watch.look(3, {"x": torch.tensor([1, -torch.inf]), "y": bad}).tolist() == [True, False]
    assert watch.seen() == {1: "update 2: the y is nan"}
    watch.look(4, {"x": torch.tensor([-torch.inf, 0]), "y": bad.flip(0)})
    assert watch.seen()[0] == "update 4: the x is -inf"


def test_a_bad_gradient_is_told_from_a_bad_loss(monkeypatch):
    training = in_training([small()])
    # the square root has no derivative at 0
    monkeypatch.setattr(
        losses.Loss, "total", lambda self, *_: self.policy + (self.value * 0).sqrt()
    )
    training._update()
    assert "gradient of agent." in training.watch.seen()[0]


def test_an_update_is_left_out_of_the_bad_run_alone(monkeypatch):
    configs = [small(seed, on_nan="skip") for seed in (0, 1)]
    healthy, training = in_training(configs), in_training(configs)
    poisoned(monkeypatch, "policy", torch.nan, 1, 2)
    for update in (1, 2, 3):
        before = learned(training, 1)
        training._update()
        after = learned(training, 1)
        same = [torch.equal(before[name], after[name]) for name in before]
        assert all(same) if update == 2 else not any(same)
    assert list(training.watch.seen()) == [1]
    monkeypatch.undo()
    for _ in range(3):
        healthy._update()
    theirs = healthy.learner.state(0)
    ours = training.learner.state(0)
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


def test_leaving_updates_out_is_said_once_and_the_run_ends(tmp_path, capsys, monkeypatch):
    poisoned(monkeypatch, "gate", torch.nan, 0, 4)
    steep = ["--run-dir", str(tmp_path / "run"), "--on-nan", "skip", "--reinforce.updates", "8"]
    train([*SMOKE, *steep])
    assert capsys.readouterr().out.count("update 4: the gate loss is nan; left out") == 1
    assert (tmp_path / "run/result.json").exists()


def test_a_healthy_run_is_the_same_whatever_is_done_about_bad_numbers():
    stop, skip = in_training([small()]), in_training([small(on_nan="skip")])
    for training in (stop, skip):
        for _ in range(3):
            training._update()
    theirs = skip.learner.state(0)
    assert all(torch.equal(x, theirs[name]) for name, x in stop.learner.state(0).items())


# ---- disks that are full, read-only, gone


@pytest.fixture
def mount(tmp_path):
    """A small file system of its own, where mounting is allowed: `mount(options)` changes it."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def call(*args):
        done = subprocess.run(args, capture_output=True)
        if done.returncode:
            pytest.skip("mounting is not allowed here")

    call("mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk))
    yield lambda options: call("mount", "-o", f"remount,{options}", str(disk))
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def at_update(monkeypatch, number, act):
    """Do something just before an update, the first time."""
    update = ReinforceLearner.update
    todo = [act]

    def wrapped(self):
        if self.updates + 1 == number and todo:
            todo.pop()()
        update(self)

    monkeypatch.setattr(ReinforceLearner, "update", wrapped)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run to which nothing happened."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    train([*SMOKE, "--run-dir", str(path)])
    return path


def same_end(path, whole):
    assert soak.differences(path, whole) == []


@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_a_disk_that_cannot_be_written_stops_the_run_whole(
    tmp_path, capsys, monkeypatch, mount, whole, kind
):
    disk = tmp_path / "disk"

    def fill():
        with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    spoil = fill if kind == "full" else lambda: mount("ro")
    at_update(monkeypatch, 15, spoil)
    error = refused(capsys, [*SMOKE, "--run-dir", disk / "run"])
    assert f"{disk / 'run'}: cannot write there" in error
    assert ("No space left" if kind == "full" else "Read-only") in error
    mount("rw")
    (disk / "filler").unlink(missing_ok=True)
    assert checkpoint.updates(disk / "run/checkpoints") == [0, 10]
    train(["--resume", str(disk / "run")])
    same_end(disk / "run", whole)


@pytest.mark.parametrize("file", ["metrics.csv", "checkpoints", "training.csv"])
def test_a_full_device_stops_the_run_whole(tmp_path, capsys, monkeypatch, whole, file):
    """As above, where mounting is not allowed: writes go to a device that is always full."""
    path = tmp_path / "run"
    target = path / file

    def spoil():
        target.rename(tmp_path / "aside")
        target.symlink_to("/dev/full" if target.suffix else "/proc")

    at_update(monkeypatch, 15, spoil)
    assert f"{path}: cannot write there" in refused(capsys, [*SMOKE, "--run-dir", path])
    assert "is not a plain" in refused(capsys, ["--resume", path])
    target.unlink()
    (tmp_path / "aside").rename(target)
    train(["--resume", str(path)])
    same_end(path, whole)


def test_a_file_size_limit_stops_the_run_whole(tmp_path, whole):
    path = tmp_path / "run"
    program = (
        "import resource, sys; from oversight_rl.cli import train;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY));"
        "train(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, *SMOKE, "--run-dir", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{path}: cannot write there (File too large)" in done.stderr
    train(["--resume", str(path)])
    same_end(path, whole)


def test_a_vanished_folder_stops_the_run_and_is_not_made_anew(tmp_path, capsys, monkeypatch):
    path = tmp_path / "run"
    at_update(monkeypatch, 15, lambda: path.rename(tmp_path / "elsewhere"))
    error = refused(capsys, [*SMOKE, "--run-dir", path])
    assert f"error: {path}: cannot write there (No such file or directory)" in error
    assert not path.exists()
    train(["--resume", str(tmp_path / "elsewhere")])
    assert (tmp_path / "elsewhere/result.json").exists()


def test_a_folder_that_vanishes_at_the_end_is_not_made_anew(tmp_path, capsys, monkeypatch):
    path, final = tmp_path / "run", GridRuns.final

    def moved(self, facts):
        path.rename(tmp_path / "elsewhere")
        return final(self, facts)

    monkeypatch.setattr(GridRuns, "final", moved)
    assert f"error: {path}: cannot write" in refused(capsys, [*SMOKE, "--run-dir", path])
    assert not path.exists()


@pytest.mark.parametrize("name", [EVENTS, f"curves/diamond/{EVENTS}"])
def test_without_tensorboard_a_run_goes_on_and_says_so_once(
    tmp_path, capsys, monkeypatch, whole, name
):
    path = tmp_path / "run"

    def spoil():
        (path / name).unlink()
        (path / name).symlink_to("/dev/full")

    at_update(monkeypatch, 15, spoil)
    train([*SMOKE, "--run-dir", str(path)])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{path / name}: No space left on device; going on without TensorBoard" in error
    for name in ("metrics.csv", "training.csv"):
        assert (path / name).read_bytes() == (whole / name).read_bytes()


def test_the_second_process_on_a_folder_is_refused(tmp_path, capsys, monkeypatch):
    path = tmp_path / "run"
    monkeypatch.setattr(folders, "PATIENCE", 0.1)
    errors = []

    def second():
        errors.append(refused(capsys, ["--resume", path]))
        errors.append(refused(capsys, [*SMOKE, "--run-dir", path]))

    at_update(monkeypatch, 5, second)
    train([*SMOKE, "--run-dir", str(path)])
    assert "another process is at work in it" in errors[0]
    assert "is not empty; go on with --resume" in errors[1]


# ---- kills at the very start, simulated by what they leave behind


def test_seeds_whose_folders_were_not_yet_there_are_not_forgotten(tmp_path):
    path = tmp_path / "many"
    few = [*SMOKE, "--seeds", "0", "7", "--reinforce.updates", "2"]
    train([*few, "--run-dir", str(tmp_path / "whole")])
    train([*few, "--run-dir", str(path)])
    (path / "seed_0/result.json").unlink()
    shutil.rmtree(path / "seed_7")
    for name in ("metrics.csv", "training.csv"):
        (path / "seed_0" / name).write_bytes(b"")
    shutil.rmtree(path / "seed_0/checkpoints")
    train(["--resume", str(path)])
    assert soak.differences(path, tmp_path / "whole") == []
    shutil.rmtree(path / "seed_0")
    shutil.rmtree(path / "seed_7")
    train(["--resume", str(path)])
    assert soak.differences(path, tmp_path / "whole") == []


def test_a_checkpoint_that_the_other_seed_has_not_is_dropped(tmp_path, monkeypatch):
    """It may be of other numbers than those that the resumed run will come to."""
    path = tmp_path / "many"
    train([*SMOKE, "--seeds", "0", "7", "--run-dir", str(path)])
    for seed in (0, 7):
        (path / f"seed_{seed}/result.json").unlink()
    for file in (path / "seed_7/checkpoints").glob("*20.*"):
        file.unlink()
    left = path / "seed_0/checkpoints/update_00000005.safetensors.tmp"
    left.write_text("half of a fi")
    found = []
    folder = path / "seed_0/checkpoints"
    at_update(monkeypatch, 11, lambda: found.extend(checkpoint.updates(folder)))
    train(["--resume", str(path)])
    assert found == [10]
    assert checkpoint.updates(folder) == [10, 20]
    assert not left.exists()


def test_a_run_with_results_and_no_checkpoint_is_not_begun_again(tmp_path, whole, capsys):
    path = Path(shutil.copytree(whole, tmp_path / "run"))
    (path / "result.json").unlink()
    shutil.rmtree(path / "checkpoints")
    before = (path / "metrics.csv").read_bytes()
    assert "no checkpoint to resume from" in refused(capsys, ["--resume", path])
    assert (path / "metrics.csv").read_bytes() == before


def test_what_a_kill_before_the_settings_leaves_is_no_obstacle(tmp_path):
    (tmp_path / "run/seed_0").mkdir(parents=True)
    (tmp_path / "run/seed_0/config.yaml.tmp").write_text("half of a fi")
    train([*SMOKE, "--run-dir", str(tmp_path / "run"), "--reinforce.updates", "1"])
    assert (tmp_path / "run/result.json").exists()


def test_half_a_line_is_cut_off(tmp_path, whole):
    """Half of `20,...` reads as update 2; and half a record ends what TensorBoard reads."""
    path = Path(shutil.copytree(whole, tmp_path / "run"))
    (path / "result.json").unlink()
    events = [file.relative_to(path) for file in path.rglob(EVENTS)]
    assert len(events) == 5
    for name in ("metrics.csv", "training.csv", *events):
        with (path / name).open("ab") as file:
            file.write(b"2")
    train(["--resume", str(path)])
    same_end(path, whole)
    for name in events:
        assert (path / name).stat().st_size == (whole / name).stat().st_size


# ---- reading what is being written


def test_a_run_that_is_being_written_can_be_read(tmp_path, whole):
    path = tmp_path / "runs/busy"
    shutil.copytree(whole, tmp_path / "runs/done")
    often = ["--evaluation.every", "1", "--reinforce.updates", "100000", "--agent.hidden", "4"]
    command = [sys.executable, "train.py", *SMOKE, "--run-dir", str(path), *often]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        mixture = path / "curves/mixture"
        while not checkpoint.updates(path / "checkpoints") or not mixture.exists():
            assert process.poll() is None
            time.sleep(0.05)
        events = EventAccumulator(str(mixture), size_guidance={"scalars": 0})
        steps, end = [], time.monotonic() + 8
        while time.monotonic() < end or len(set(steps)) < 5:
            assert process.poll() is None
            steps.append(read_run(RunFolder.open(path)).env_steps)
            events.Reload()
        assert steps == sorted(steps)
        main(["evaluate", str(path), "--json", str(tmp_path / "rows.json")])
        found = gather(tmp_path / "runs")
        assert found.missing == ["Not finished and left out: busy."]
        seen = [event.step for event in events.Scalars("evaluation/return")]
        assert seen == list(range(len(seen)))
        assert len(seen) > 3
    finally:
        process.kill()
        process.wait()


def test_a_checkpoint_that_is_replaced_while_it_is_read(whole, monkeypatch):
    stale = [[4]]  # as listed before the run went on
    honest = checkpoint.updates
    monkeypatch.setattr(checkpoint, "updates", lambda p: stale.pop() if stale else honest(p))
    assert read_run(RunFolder.open(whole)).env_steps == 20 * 32 * 8
