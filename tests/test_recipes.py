"""The recipes of CONTRIBUTING.md, run as they stand there, and what else the pages say of code."""

import re
import sys
from importlib import import_module, util
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv
from test_methods import reinforce
from test_ppo_targets import Random
from test_promises import python_blocks

from oversight_rl import RoutedPPO
from oversight_rl.agents.methods import METHODS
from oversight_rl.cli import main, train
from oversight_rl.envs.settings import WorldConfig
from oversight_rl.envs.world import World
from oversight_rl.experiments.oversight import figures
from oversight_rl.kinds import KINDS
from oversight_rl.runs.folder import RunFolder

ROOT = Path(__file__).parent.parent
SMALL = {
    "reinforce": ["--reinforce.updates", "1", "--reinforce.worlds", "4", "--agent.hidden", "4"],
    "ppo": ["--ppo.updates", "1", "--ppo.worlds", "4", "--agent.hidden", "4"],
}
RECIPES = {re.match("# ([a-z]+)[.]py:", b)[1]: b for b in python_blocks("CONTRIBUTING.md")}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a recipe as a file of its own, in an empty folder; what it adds goes afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(figures, "REPORT", figures.REPORT)

    def paste(name):
        (tmp_path / f"{name}.py").write_text(RECIPES[name])
        return import_module(name)

    with patch.dict(METHODS), patch.dict(KINDS):
        yield paste
    for name in RECIPES:
        sys.modules.pop(name, None)


def the_run(tmp_path):
    (path,) = (config.parent for config in tmp_path.glob("runs/*/config.yaml"))
    return RunFolder.open(path)


def test_a_method(run, tmp_path):
    run("leaky")
    rows = the_run(tmp_path).result()
    assert {(row.method, row.policy) for row in rows if row.deployed} == {
        ("leaky_routing", "diamond")
    }
    _, targets, _ = reinforce("leaky_routing", 1).latest
    assert np.isclose(targets.routes.numpy(), 0.1).any()
    assert RoutedPPO("MoEPolicy", DummyVecEnv([Random]), method="leaky_routing", n_steps=8)


def test_a_figure_of_the_report(run, tmp_path, capsys):
    train([*SMALL["reinforce"], "--no-pictures"])
    run("lengths")
    assert "How long episodes take" in (tmp_path / "runs" / "report.html").read_text()
    drawn = (tmp_path / "runs" / "figures" / "lengths.svg").read_text()
    assert "steps of an episode" in drawn
    assert "routing" in drawn


def test_an_experiment_with_other_figures(run, tmp_path, capsys):
    run("parting")
    folder = the_run(tmp_path)
    metrics = pd.read_csv(folder.path / "metrics.csv")
    assert list(metrics["update"]) == [0, 40]
    assert metrics["distance"].is_monotonic_increasing
    (row,) = folder.result()
    assert row.figures == {name: metrics[name].iloc[-1] for name in ("distance", "sureness")}
    main(["report", "runs"])
    summary = pd.read_csv(tmp_path / "runs" / "summary.csv")
    assert list(summary["iqm"]) == [row.figures["distance"]]
    assert list(summary["sureness"]) == [row.figures["sureness"]]


def test_a_learner(run, tmp_path, capsys):
    run("climb")
    folder = the_run(tmp_path)
    before = (folder.path / "metrics.csv").read_text()
    heights = pd.read_csv(folder.path / "metrics.csv")["height"]
    assert heights.iloc[0] == pytest.approx(-np.hypot(3, 2))
    assert -0.5 < heights.iloc[-1] <= 0
    (folder.path / "result.json").unlink()
    for path in folder.checkpoints.glob("update_00000100.*"):
        path.unlink()
    train(["--resume", str(folder.path)])  # from update 50
    assert (folder.path / "metrics.csv").read_text() == before


@pytest.mark.parametrize("algo", SMALL)
def test_the_readmes_policy_acts(algo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(["--algo", algo, *SMALL[algo], "--no-pictures", "--run-dir", "runs/x"])
    (block,) = (text for text in python_blocks("README.md") if "load_policy" in text)
    world = World(WorldConfig())
    seen = world.observe(world.reset(torch.rand(5, world.noise_channels))).numpy()
    for observation, shape in ((seen[0], ()), (seen, (5,))):
        scope = {"observation": observation}
        exec(compile(block, "README.md", "exec"), scope)
        assert scope["policy"].steering.name == "diamond"
        assert np.shape(scope["action"]) == shape
    assert scope["policy"].steer("ghost").steering.name == "ghost"


def test_files_and_modules_that_the_pages_name_are_there():
    named = 0
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text()
        if page.name == "migration.md":  # what stands left had that name before
            text = "\n".join(line.rpartition(" | ")[2] for line in text.splitlines())
        folders = "envs|agents|oversight_rl|benchmarks|tests|docs|configs"
        paths = set(re.findall(rf"`(?:python )?((?:{folders})/[\w/.]*\w)", text))
        assert not [path for path in paths if not (ROOT / path).exists()], page
        dotted = set(re.findall(r"`(?:import |from )?(oversight_rl(?:\.\w+)+)", text))
        for name in dotted:
            module, _, last = name.rpartition(".")
            found = hasattr(import_module(module), last) or util.find_spec(name)
            assert found, (page, name)
        named += len(paths) + len(dotted)
    assert named > 80
