"""An experiment that has no behaviors: commands, files, curves, sweeps and reports take it."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import small_experiment
import torch
import yaml
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from oversight_rl.agents.learner import Learner
from oversight_rl.cli import main, train
from oversight_rl.envs.settings import Settings, UserError
from oversight_rl.kinds import KINDS
from oversight_rl.reports import page
from oversight_rl.reports.figures import STANDARD, draw_levels, new_panels
from oversight_rl.reports.gather import Part
from oversight_rl.runs.rows import Row
from oversight_rl.sweeps.drive import sweep
from oversight_rl.sweeps.plan import load_sweep


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(KINDS, "climb", small_experiment.KIND)


def refused(capsys, command, args):
    """Run a command that must fail: exit code 2 and one line, returned."""
    with pytest.raises(SystemExit) as stop:
        command([str(a) for a in args])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_it_is_trained_and_goes_on(tmp_path, capsys):
    train(["--algo", "climb", "--evaluation.every", "10", "--run-dir", str(tmp_path)])
    metrics = pd.read_csv(tmp_path / "metrics.csv")
    assert list(metrics["update"]) == [0, 10, 20, 30, 40]
    assert metrics["height"].is_monotonic_increasing
    assert pd.read_csv(tmp_path / "training.csv")["height"].iloc[-1] == metrics["height"].iloc[-1]
    (row,) = json.loads((tmp_path / "result.json").read_text())
    assert (row["height"], row["method"]) == (metrics["height"].iloc[-1], "careful")
    assert not [name for name in row if "diamond" in name or name.startswith("p_")]
    events = EventAccumulator(str(tmp_path / "curves/climber")).Reload()
    points = events.Scalars("evaluation/height")
    assert [point.value for point in points] == pytest.approx(list(metrics["height"]))
    (tmp_path / "result.json").unlink()
    for file in (tmp_path / "checkpoints").iterdir():
        if "00000040" in file.name:
            file.unlink()
    train(["--resume", str(tmp_path)])
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "metrics.csv"), metrics)
    with pytest.raises(SystemExit):
        main(["play", str(tmp_path)])
    assert "runs of climb show nothing on a page" in capsys.readouterr().err
    assert not (tmp_path / "play.html").exists()


def test_sweeps_and_reports_take_it(tmp_path, capsys):
    grid = {"method": ["careful", "careless"], "oversight": [0.1, 0.9], "seeds": [0, 1, 2, 3]}
    settings = {"algo": "climb", "evaluation": {"every": 10}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"settings": settings, "grid": grid}))
    out = tmp_path / "out"
    quiet = Console(quiet=True)
    assert sweep(load_sweep(tmp_path / "s.yaml"), out, small_experiment.in_here(), quiet) == {}
    main(["report", str(out)])
    said = capsys.readouterr().out
    assert "by IQM of the height: careful leads, not told apart from careless, at 10%" in said
    assert "careful wins at 90%" in said
    table = pd.read_csv(out / "summary.csv").set_index(["method", "train_oversight"])
    assert list(table["n_seeds"]) == [4] * 4
    assert table.loc[("careful", 0.9), "iqm"] > table.loc[("careful", 0.1), "iqm"]
    assert table.loc[("careful", 0.9), "east"] == pytest.approx(3, abs=0.5)
    assert not [name for name in table if "return" in name or name.startswith("p_")]
    text = (out / "report.html").read_text()
    for word in (
        "Score against oversight",
        "Height of the deployed policy",
        "Learning curves",
        "takes every step",
    ):
        assert word in text
    for word in ("diamond", "ghost", "routing", "return"):
        assert word not in text
    drawn = {file.stem for file in (out / "figures").iterdir()}
    assert drawn == {"headline", "scores", "learning", "improvement"}
    assert text.count('role="img"') == 5  # learning has a panel for each level


def east(found):
    figure, (axes,) = new_panels(1, 1, 5.0, 4.0)
    for name in found.names:
        draw_levels(found, axes, name, "east")
    return figure


REPORT = replace(
    STANDARD, parts=(*STANDARD.parts, Part("east", "How far east", "The peak is at 3.", east))
)


def test_a_report_draws_what_an_experiment_adds(tmp_path, monkeypatch):
    monkeypatch.setattr(small_experiment.Climb, "report", f"{__name__}:REPORT")
    train(["--algo", "climb", "--run-dir", str(tmp_path / "run")])
    page.write(tmp_path)
    assert (tmp_path / "figures" / "east.svg").is_file()
    assert "The peak is at 3." in (tmp_path / "report.html").read_text()


def test_runs_of_another_kind_are_left_out_of_a_report_and_named(tmp_path):
    train(["--algo", "climb", "--run-dir", str(tmp_path / "a")])
    flags = ["--reinforce.updates", "1", "--reinforce.worlds", "2", "--reinforce.steps", "2"]
    for name in ("b", "c"):
        train([*flags, "--agent.hidden", "4", "--no-pictures", "--run-dir", str(tmp_path / name)])
    (found,) = (each.found for each in page.write(tmp_path))
    assert found.names == ["careful"]
    (line,) = found.missing
    assert line.startswith("Left out: b and 1 more, of another kind of experiment than a;")


def test_rows_that_could_not_be_read_again_are_refused_at_once(tmp_path, capsys, monkeypatch):
    """Not after a whole training, by the report."""
    known = {"height": 1.0, "east": 2.0}
    wrong = {
        "height cannot be nan": [{"height": math.nan}],
        "height is missing": [{"east": 1.0}],
        "p_up cannot be 3.0": [known | {"p_up": 3.0}],
        "east cannot be inf": [known | {"east": math.inf}],
        "a figure cannot be called 'seed'": [known | {"seed": 1.0}],
        r"a figure cannot be called 'a\nb'": [known | {"a\nb": 1.0}],
        "rows of other figures: height": [known, {"height": 1.0}],
        "of the deployed policy as trained, got 2": [known, known],
        "of the deployed policy as trained, got 0": [],
    }
    for i, (why, tables) in enumerate(wrong.items()):
        monkeypatch.setattr(
            small_experiment.Climb,
            "evaluate",
            lambda self, facts, tables=tables: [[Row.of(facts[0], "a", x) for x in tables]],
        )
        path = tmp_path / str(i)
        assert why in refused(capsys, train, ["--algo", "climb", "--run-dir", path])
        assert not (path / "result.json").exists()


def test_a_method_that_is_none_and_settings_without_updates_are_refused(tmp_path, capsys):
    config = small_experiment.ClimbConfig().model_copy(update={"method": "carefull"})
    with pytest.raises(UserError, match="got 'carefull'; did you mean 'careful'"):
        small_experiment.Climb.try_out(config)
    config = config.model_copy(update={"method": "careful", "climb": Settings()})
    with pytest.raises(UserError, match="climb: must be settings that say how many updates"):
        small_experiment.Climb.try_out(config)


def test_methods_need_not_assume_and_policies_may_have_any_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        small_experiment.Climb, "methods", {"careful": SimpleNamespace(summary="climbs")}
    )
    monkeypatch.setattr(
        small_experiment.Climb,
        "evaluate",
        lambda self, facts: [
            [
                Row.of(facts[0], "k=1 [best]", {"height": np.float32(1), "east": torch.ones(())}),
                Row.of(facts[0], "b", {"height": 2, "east": 1}, greedy=True, deployed=False),
            ]
        ],
    )
    train(["--algo", "climb", "--run-dir", str(tmp_path / "run")])
    main(["report", str(tmp_path)])
    assert "k=1" in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "summary.csv")["assumes"].tolist() == ["labels"]


def test_a_learner_without_its_update_is_not_made():
    class Idle(Learner):
        def learned(self):
            return []

    with pytest.raises(TypeError, match="update"):
        Idle()


def test_a_learner_that_does_not_count_its_updates_ends_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(small_experiment.Climber, "update", lambda self: None)
    with pytest.raises(TypeError, match=r"Climber\.update must count itself in updates"):
        train(["--algo", "climb", "--run-dir", str(tmp_path)])


def test_a_sweep_says_where_shared_settings_stand(tmp_path, capsys):
    (tmp_path / "s.yaml").write_text("algo: climb\ngrid: {seeds: [0]}\n")
    line = refused(capsys, main, ["sweep", tmp_path / "s.yaml", "--out", tmp_path / "out"])
    assert "unknown setting sweep.algo (what all runs share stands under settings)" in line
