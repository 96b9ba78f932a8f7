"""Sweeps: which runs, in which stacks; stopped, killed and failing ones; the same on Ray."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import Future
from pathlib import Path

import pytest
import small_experiment
import yaml
from rich.console import Console

from oversight_rl.cli import main
from oversight_rl.envs.settings import UserError
from oversight_rl.kinds import KINDS
from oversight_rl.runs import folder
from oversight_rl.runs.folder import METRICS, RunFolder, locked
from oversight_rl.runs.loop import fit
from oversight_rl.sweeps.drive import sweep
from oversight_rl.sweeps.plan import SWEEP, SweepConfig, load_sweep, plan, stacks
from oversight_rl.sweeps.workers import WorkerLost, local_workers, ray_workers

TINY = {
    "device": "cpu",
    "pictures": False,
    "world": {"rows": 3, "cols": 3, "max_steps": 6},
    "agent": {"hidden": [8, 8]},
    "reinforce": {"updates": 8, "worlds": 16, "steps": 4},
    "evaluation": {"every": 4, "oversight": [0.5]},
}
LONG = {"method": ["routing"], "oversight": [0.2], "seeds": [0, 1]}


def tiny(grid=None, updates=8, **more):
    grid = grid or {"method": ["routing", "naive"], "oversight": [0.1, 0.5], "seeds": [0, 1]}
    settings = TINY | {"reinforce": TINY["reinforce"] | {"updates": updates}}
    return SweepConfig(**{"settings": settings, "grid": grid, **more})


def written(config, path):
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def metrics(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob(METRICS))}


def quiet():
    return Console(file=open(os.devnull, "w"))


# ---- which runs, in which stacks


def test_a_run_for_every_combination(tmp_path):
    config = tiny(
        {"method": ["routing", "naive"], "oversight": [0.1, 0.5], "reinforce.gate_coef": [1, 2.5]},
        methods={"naive": {"reinforce": {"labeled_weight": 3, "gate_coef": 9}}},
    )
    runs = {str(run.path.relative_to(tmp_path)): run.config for run in plan(config, tmp_path)}
    assert len(runs) == 8
    one = runs["naive-0.5-reinforce.gate_coef=2.5/seed_0"]
    assert (one.method, one.oversight, one.seeds) == ("naive", 0.5, (0,))
    assert one.reinforce.gate_coef == (2.5,)  # the grid has the last word
    assert one.reinforce.labeled_weight == (3.0,)
    assert one.reinforce.updates == 8
    other = runs["routing-0.1-reinforce.gate_coef=1/seed_0"]
    assert other.reinforce.labeled_weight == (20.0,)


@pytest.mark.parametrize(
    ("grid", "more", "message"),
    [
        ({"method": ["ruting"]}, {}, "did you mean 'routing'"),
        ({"method": ["naive"], "world.rowz": [5]}, {}, "world.rowz; did you mean 'rows'"),
        ({"oversight": [2]}, {}, "oversight"),
        ({"method": ["naive", "naive"]}, {}, "distinct"),
        ({"method": ["naive"]}, {"methods": {"naiv": {}}}, "did you mean 'naive'"),
        ({"method": ["naive"], "seeds": [0, 0]}, {}, "distinct"),
        ({"method": [["naive"]]}, {}, "method"),
        ({"method": ["naive"]}, {"methods": {"naive": {"seeds": [1]}}}, "cannot set seeds"),
        ({}, {}, "grid"),
        ({"method": []}, {}, "grid"),
        ({"method": ["naive"]}, {"stack": 0}, "stack"),
        ({"pictures.x": [1]}, {}, "pictures is set to"),
        ({"method": ["ipw_hidden_flag"], "oversight": [0]}, {}, "must be above 0"),
    ],
)
def test_bad_sweeps_are_refused(tmp_path, grid, more, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.").replace("(", r"\(")):
        plan(SweepConfig(**{"settings": TINY, "grid": grid, **more}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_grid_leaves_out_comes_from_the_settings(tmp_path):
    config = SweepConfig(
        settings={"seeds": [3, 4], "method": "naive"},
        grid={"oversight": [0.5, 0.1234567, 0.1234568]},
        methods={"naive": {"world": {"rows": 3}}},
    )
    runs = plan(config, tmp_path)
    assert [run.config.seeds for run in runs] == [(3,), (4,)] * 3
    assert {run.config.world.rows for run in runs} == {3}
    assert len({run.path for run in runs}) == 6


def test_stacks_hold_runs_that_train_alike(tmp_path):
    config = tiny({"method": ["routing", "no_routing", "naive"], "seeds": list(range(7))})
    packed = stacks(plan(config, tmp_path), 5)
    assert sorted(map(len, packed)) == [3, 4, 4, 5, 5]  # 14 and 7 runs, shared out evenly
    for stack in packed:
        assert len({run.config.method == "naive" for run in stack}) == 1


def test_stacks_fit_memory():
    (small,) = (run.config for run in plan(tiny({"method": ["routing"]}), Path("x")))
    paper = small.model_copy(
        update={"reinforce": small.reinforce.model_copy(update={"worlds": 512, "steps": 32})}
    )
    assert small.most_runs(2**30) > paper.most_runs(2**30) > paper.most_runs(2**28)
    assert paper.most_runs(1.0) == 1  # one run is tried whatever it takes


def test_many_runs_cost_the_driver_little_memory(tmp_path):
    tracemalloc.start()
    plan(tiny({"method": ["routing"], "seeds": list(range(10))}), tmp_path)
    few = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    levels = [x / 1000 for x in range(100)]
    runs = plan(
        tiny({"method": ["routing"], "oversight": levels, "seeds": list(range(10))}), tmp_path
    )
    many = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(runs) == 1000
    assert many - few < 10 * 2**20


# ---- it runs


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished sweep of eight runs."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    assert sweep(tiny(), out, local_workers(2), quiet()) == {}
    return out


def test_a_sweep_trains_what_its_stacks_would_alone(done, tmp_path):
    runs = plan(tiny(), done)
    assert all(run.finished for run in runs)
    together = [run for run in runs if run.config.method == "routing"]
    paths = [tmp_path / f"{run.config.oversight}-{run.path.name}" for run in together]
    fit(dict(zip(paths, [run.config for run in together], strict=True)), quiet())
    for run, path in zip(together, paths, strict=True):
        assert (path / METRICS).read_bytes() == (run.path / METRICS).read_bytes()


def test_finished_runs_are_left_alone_and_values_can_be_added(done):
    before = {p: p.stat().st_mtime_ns for p in done.rglob("*.csv")}
    more = tiny({"method": ["routing", "naive"], "oversight": [0.1, 0.5], "seeds": [0, 1, 2]})
    assert sweep(more, done, local_workers(2), quiet()) == {}
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert len(metrics(done)) == 12
    reordered = {key: more.grid[0][key] for key in ("oversight", "method", "seeds")}
    for other in (
        tiny(updates=9),
        tiny({"method": ["routing"]}),
        tiny(reordered),
        tiny(dict(more.grid[0]), methods={"naive": {"reinforce": {"labeled_weight": 3}}}),
    ):
        with pytest.raises(UserError, match="holds another sweep"):
            sweep(other, done, local_workers(1), quiet())


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no sweep"):
        sweep(tiny(), tmp_path, local_workers(1), quiet())
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


def test_two_drivers_do_not_work_in_one_folder(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    written(tiny(), out / "sweep.yaml")
    monkeypatch.setattr(folder, "PATIENCE", 0.1)
    with locked(out), pytest.raises(UserError, match="another process"):
        sweep(tiny(), out, local_workers(1), quiet())


def test_a_run_broken_off_before_anything_was_written_starts_anew(tmp_path):
    config = tiny({"method": ["naive"]})
    out = tmp_path / "out"
    (out / "naive" / "seed_0").mkdir(parents=True)
    (out / "naive" / "seed_0" / "config.yaml.tmp").write_text("half")
    written(config, out / "sweep.yaml")
    assert sweep(config, out, local_workers(1), quiet()) == {}


def test_a_failing_run_does_not_take_others_along(tmp_path, capsys):
    config = tiny({"method": ["naive"], "seeds": [0, 1, 2]})
    out = tmp_path / "out"
    file = written(config, tmp_path / "sweep.yaml")
    out.mkdir()
    written(config, out / "sweep.yaml")
    (out / "naive").mkdir()
    (out / "naive" / "seed_1").write_text("in the way")
    with pytest.raises(SystemExit) as stop:
        main(["sweep", str(file), "--out", str(out), "--workers", "2"])
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert "seed_1: failed" in said
    assert "Traceback" not in said
    assert [run.finished for run in plan(config, out)[::2]] == [True, True]
    (out / "naive" / "seed_1").unlink()
    main(["sweep", str(file), "--out", str(out), "--workers", "1"])
    assert all(run.finished for run in plan(config, out))


@pytest.mark.parametrize("damage", ["half of a", '[{"policy": 1}]'])
def test_results_that_cannot_be_read_are_named_and_fail_the_sweep(tmp_path, capsys, damage):
    config = tiny({"method": ["naive"], "seeds": [0, 1]})
    out, file = tmp_path / "out", written(config, tmp_path / "sweep.yaml")
    command = ["sweep", str(file), "--out", str(out), "--workers", "1"]
    main(command)
    assert "all runs are finished" in capsys.readouterr().out
    (out / "naive" / "seed_1" / "result.json").write_text(damage)
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert f"failed: {out / 'naive' / 'seed_1'}: " in said
    assert "seed_0" not in said
    assert "finished" not in said


def test_a_worker_that_ends_without_a_result_has_failed(tmp_path):
    class Idle:
        def __enter__(self):
            def submit(job):
                future = Future()
                future.set_result(None)
                return future

            return submit

        def __exit__(self, *error):
            pass

    out = tmp_path / "out"
    failed = sweep(tiny(LONG), out, Idle(), quiet())
    assert {path.name for path in failed} == {"seed_0", "seed_1"}
    assert set(failed.values()) == {"ended without a result"}


# ---- sweeps of version 0.1, and of other experiments


def test_names_of_version_0_1_are_read_in_its_folders_and_mended_in_files(tmp_path, capsys):
    """The section `training` is called `reinforce` now, in a user's files, and nowhere else."""
    old = {
        "settings": {**TINY, "training": TINY["reinforce"]},
        "grid": {"method": ["naive"], "training.gate_coef": [1, 2]},
        "methods": {"naive": {"training": {"labeled_weight": 3}}},
    }
    del old["settings"]["reinforce"]
    file, out = tmp_path / "mine.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(old))
    with pytest.raises(SystemExit) as stop:
        main(["sweep", str(file), "--out", str(out)])
    assert stop.value.code == 2
    assert "training: is called reinforce since version 0.2" in capsys.readouterr().err
    assert not out.exists()
    out.mkdir()
    (out / SWEEP).write_text(yaml.safe_dump(SweepConfig(**old).model_dump(mode="json")))
    runs = plan(load_sweep(out / SWEEP), out)
    assert [str(run.path.relative_to(out)) for run in runs] == [
        "naive-training.gate_coef=1/seed_0",
        "naive-training.gate_coef=2/seed_0",
    ]
    assert [run.config.reinforce.gate_coef for run in runs] == [(1.0,), (2.0,)]
    assert {run.config.reinforce.labeled_weight for run in runs} == {(3.0,)}
    main(["sweep", str(file), "--out", str(out), "--workers", "1"])  # it goes on as it began
    assert all(run.finished for run in runs)


def test_a_sweep_over_an_experiment_that_knows_no_behavior(tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, "climb", small_experiment.KIND)
    config = SweepConfig(
        settings={"algo": "climb", "climb": {"updates": 4}, "device": "cpu"},
        grid={"climb.stride": [1, 2], "oversight": [0.5, 1], "seeds": [0, 1]},
        methods={"careful": {"evaluation": {"every": 2}}},
    )
    out = tmp_path / "out"
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system=None)
    assert sweep(config, out, small_experiment.in_here(), terminal) == {}
    heights = {}
    for run in plan(config, out):
        alone = small_experiment.Climb([run.config]).learner
        for _ in range(4):
            alone.update()
        rows = RunFolder.open(run.path).result()
        assert [row.figures["height"] for row in rows] == alone.height.tolist()
        heights.setdefault(run.config.oversight, []).extend(alone.height.tolist())
    shown = terminal.file.getvalue()
    assert "deployed height" in shown
    assert all(f"{sum(own) / 4:+.2f} 4/4" in shown for own in heights.values())
    with pytest.raises(UserError, match="did you mean 'careful'"):
        plan(config.model_copy(update={"methods": {"carful": {}}}), out)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def workers_of(pid):
    """Process ids of the sweep workers below a process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            command = stat.with_name("cmdline").read_text()
        except (OSError, ValueError):
            continue
        if parent == pid and "oversight_rl.sweeps.workers" in command:
            found.append(int(stat.parent.name))
    return found


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """What an undisturbed sweep of longer runs ends with."""
    out = tmp_path_factory.mktemp("long") / "out"
    assert sweep(tiny(LONG, updates=300), out, local_workers(1), quiet()) == {}
    return metrics(out)


def started(run):
    return run.update >= 4


@pytest.mark.parametrize("who", ["worker", "driver politely", "driver"])
def test_a_broken_off_sweep_ends_as_if_nothing_had_happened(tmp_path, long, who):
    out, file = tmp_path / "out", written(tiny(LONG, updates=300), tmp_path / "sweep.yaml")
    command = [sys.executable, "-m", "oversight_rl", "sweep", str(file), "--out", str(out)]
    driver = subprocess.Popen([*command, "--workers", "1"], stdout=subprocess.PIPE, text=True)
    runs = plan(load_sweep(file), out)
    wait_for(lambda: all(map(started, runs)))
    (worker,) = workers_of(driver.pid)
    if who == "worker":
        os.kill(worker, signal.SIGKILL)
        said, _ = driver.communicate(timeout=120)
        assert driver.returncode == 0
        assert "all runs are finished" in said
    else:
        driver.send_signal(signal.SIGTERM if who == "driver politely" else signal.SIGKILL)
        said, _ = driver.communicate(timeout=120)
        if who == "driver politely":
            assert driver.returncode == 130
            assert "the same command goes on: oversight-rl sweep" in said
        wait_for(lambda: not Path(f"/proc/{worker}").exists())  # it stops with its driver
        assert not any(run.finished for run in runs)
        main(["sweep", str(file), "--out", str(out), "--workers", "1"])
    assert metrics(out) == long


def test_a_worker_that_keeps_dying_is_given_up(tmp_path, monkeypatch):
    jobs = []

    class Dying:
        def __enter__(self):
            def submit(job):
                jobs.append([Path(path).name for path, _ in json.loads(job)])
                future = Future()
                future.set_exception(WorkerLost("worker ended by signal 9"))
                return future

            return submit

        def __exit__(self, *error):
            pass

    failed = sweep(tiny(LONG), tmp_path / "out", Dying(), quiet())
    assert {path.name for path in failed} == {"seed_0", "seed_1"}
    assert set(failed.values()) == {"worker ended by signal 9"}
    assert jobs[:3] == [["seed_0", "seed_1"]] * 3  # together while that may help, then alone
    assert sorted(jobs[3:]) == [["seed_0"], ["seed_1"]]


# ---- on Ray


def test_ray_gives_the_same_results_though_a_worker_is_killed(tmp_path, long):
    out = tmp_path / "out"
    config = tiny(LONG, updates=300)
    runs = plan(config, out)
    killed = []

    class Killing:
        """Ray's workers, one of which is killed when it is under way."""

        def __enter__(self):
            self.workers = ray_workers("local")
            submit = self.workers.__enter__()

            def kill_one(job):
                future = submit(job)
                wait_for(lambda: all(map(started, runs)))
                for stat in Path("/proc").glob("[0-9]*/cmdline"):
                    try:
                        if stat.read_text().startswith("ray::call"):
                            killed.append(int(stat.parent.name))
                            os.kill(killed[-1], signal.SIGKILL)
                    except OSError:
                        continue
                return future

            return kill_one

        def __exit__(self, *error):
            return self.workers.__exit__(*error)

    assert sweep(config, out, Killing(), quiet()) == {}
    assert len(killed) == 1
    assert metrics(out) == long
    assert all(RunFolder.open(run.path).finished for run in runs)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "0"], "must be at least 1"),
        (["--ray", "127.0.0.1:1"], "no cluster at 127.0.0.1:1"),
    ],
)
def test_absent_workers_are_refused(tmp_path, capsys, flags, message):
    file, out = written(tiny(LONG), tmp_path / "sweep.yaml"), tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main(["sweep", str(file), "--out", str(out), *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert "--workers" not in flags or not out.exists()


def test_several_grids_are_one_sweep(tmp_path):
    grids = [
        {"method": ["routing", "naive"], "oversight": [0.1, 0.3], "seeds": [0, 1]},
        {"overseer": ["ghosts_only", "noisy"], "method": ["routing"], "seeds": [0]},
    ]
    runs = plan(SweepConfig(settings=TINY, grid=grids), tmp_path)
    names = [run.path.relative_to(tmp_path).as_posix() for run in runs]
    assert len(names) == 2 * 2 * 2 + 2
    assert "routing-0.3/seed_1" in names
    assert names[-2:] == ["overseer=ghosts_only-routing/seed_0", "overseer=noisy-routing/seed_0"]
    assert [run.config.overseer for run in runs[-2:]] == ["ghosts_only", "noisy"]
    assert runs[-1].config.labels.error == (0.3,)
    with pytest.raises(UserError, match="must be distinct"):
        plan(SweepConfig(settings=TINY, grid=[grids[0], grids[0]]), tmp_path)
