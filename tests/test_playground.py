"""Snapshots in a run folder, and what a playground's page is told; the page itself: see beside."""

import os
import shutil
import signal
from pathlib import Path

import packed
import pytest
import safetensors.torch
import torch

from oversight_rl.agents.reinforce import learner as learners
from oversight_rl.agents.steering import MIXTURE, keep, standard
from oversight_rl.cli import main, train
from oversight_rl.envs.settings import UserError
from oversight_rl.envs.world import World
from oversight_rl.experiments.oversight.evaluation import Evaluator
from oversight_rl.experiments.oversight.policies import read_run
from oversight_rl.playground import gather, page
from oversight_rl.playground.pack import COARSE, STEPS, pack
from oversight_rl.runs import snapshots
from oversight_rl.runs.folder import RunFolder
from oversight_rl.runs.rows import Facts
from oversight_rl.terminal import STOPPED

SMOKE = ["--config", "smoke", "--device", "cpu"]
UPDATES = [0, 10, 20]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    train([*SMOKE, "--run-dir", str(path)])
    return path


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def refused(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line


# ---- snapshots


def parameters(agent):
    return {name: parameter.detach()[0] for name, parameter in agent.named_parameters()}


def test_there_is_a_snapshot_of_each_evaluation(trained):
    folder = RunFolder.open(trained)
    assert snapshots.updates(folder.snapshots) == UPDATES
    last = parameters(read_run(folder).agent)
    found = snapshots.load(folder.snapshots, 20, last)
    for name, tensor in last.items():
        assert torch.equal(found[name], tensor.half().float()), name
    first = snapshots.load(folder.snapshots, 0, last)
    assert not torch.equal(first["head.weight"], found["head.weight"])
    size = sum(file.stat().st_size for file in folder.snapshots.iterdir())
    assert size < 3 * 2.2 * sum(tensor.numel() for tensor in last.values())


def test_without_pictures_there_are_none(tmp_path):
    train([*SMOKE, "--no-pictures", "--reinforce.updates", "2", "--run-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "snapshots").exists()
    assert not (tmp_path / "run" / "play.html").exists()


def test_a_run_that_goes_on_has_the_same_snapshots(trained, tmp_path, monkeypatch):
    """Stopped after an evaluation, with a newer snapshot left by a kill before its checkpoint."""
    honest, calls = learners.ReinforceLearner.update, 0

    def update(self):
        nonlocal calls
        calls += 1
        if calls == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        honest(self)

    run = tmp_path / "run"
    monkeypatch.setattr(learners.ReinforceLearner, "update", update)
    with pytest.raises(SystemExit) as stopped:
        train([*SMOKE, "--run-dir", str(run)])
    assert stopped.value.code == STOPPED
    left = run / "snapshots" / "update_00000020.safetensors"
    for path in (left, left.with_name("update_00000030.safetensors")):
        path.write_bytes(b"of a run that went elsewhere")
    left.with_name("update_00000020.safetensors.tmp").write_bytes(b"half of one")
    train(["--resume", str(run)])
    files = {path.name: path.read_bytes() for path in (trained / "snapshots").iterdir()}
    assert {path.name: path.read_bytes() for path in (run / "snapshots").iterdir()} == files
    assert (run / "metrics.csv").read_bytes() == (trained / "metrics.csv").read_bytes()


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda x: x["head.weight"].fill_(torch.inf), "finite"),
        (lambda x: x["head.weight"][0].fill_(torch.nan), "finite"),
        (lambda x: x.update({"head.bias": x["head.bias"].float()}), "float32"),
        (lambda x: x.update({"head.weight": x["head.weight"][:2].clone()}), "shape"),
        (lambda x: x.pop("trunks.0.weight"), "missing"),
    ],
)
def test_forged_snapshots_are_refused(run, capsys, spoil, word):
    path = run / "snapshots" / "update_00000010.safetensors"
    tensors = safetensors.torch.load_file(path)
    spoil(tensors)
    safetensors.torch.save_file(tensors, path)
    before = (run / "play.html").read_bytes()
    assert word in refused(capsys, "play", run)
    assert (run / "play.html").read_bytes() == before


def test_snapshots_that_lead_elsewhere_are_refused(run, capsys, tmp_path):
    path = run / "snapshots" / "update_00000010.safetensors"
    moved = path.rename(tmp_path / "elsewhere")
    path.symlink_to(moved)
    assert "not a plain file" in refused(capsys, "play", run)
    path.unlink()
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    assert "header" in refused(capsys, "play", run)
    folder = run / "snapshots"
    folder.rename(tmp_path / "folder")
    folder.symlink_to(tmp_path / "folder")
    assert "not a plain folder" in refused(capsys, "play", run)


def test_names_that_are_none_are_no_snapshots(run):
    for name in ("update_x.safetensors", "update_1.safetensors", "update_00000015.safetensors.tmp"):
        (run / "snapshots" / name).write_bytes(b"")
    assert snapshots.updates(run / "snapshots") == UPDATES
    main(["play", str(run)])


# ---- what is packed


def test_packed_numbers_are_as_near_as_promised():
    generator = torch.Generator().manual_seed(0)
    moments = [
        {"a": torch.randn(3, 5, generator=generator), "b": torch.randn(4, generator=generator)}
        for _ in range(3)
    ]
    for moment in moments:
        moment["a"][1] = 0  # a row that no step divides
    run = vars(pack(moments)) | {"coarse": COARSE}
    for i, (found, wanted) in enumerate(zip(packed.moments_of(run), moments, strict=True)):
        for name in wanted:
            most = torch.stack([moment[name].abs() for moment in moments]).amax(0)
            step = most.amax(-1, keepdim=True) / STEPS * (1 if i == 2 else COARSE)
            assert ((found[name] - wanted[name]).abs() <= 0.51 * step + 1e-6).all()
    assert [list(shape) for _, shape in run["layout"]] == [[3, 5], [4]]


def test_packing_costs_a_thousandth_of_return(trained):
    """Of the agent that is deployed, and of its experts."""
    saved = read_run(RunFolder.open(trained))
    (run,) = packed.data_of(trained / "play.html")["runs"]
    assert run["updates"] == UPDATES
    policies = standard(saved.agent.n_experts)
    exact = [row.figures["ground_truth_return"] for row in saved.rows(policies, [0, 0.1, 1])]
    saved.agent.load_state_dict(packed.agent_of(run, packed.moments_of(run)[-1]).state_dict())
    near = [row.figures["ground_truth_return"] for row in saved.rows(policies, [0, 0.1, 1])]
    assert near == pytest.approx(exact, abs=1e-3)
    assert near != exact


def test_a_run_begins_where_it_shows_most(trained):
    """By chances whose mean over all starts is that of exact evaluation."""
    saved = read_run(RunFolder.open(trained))
    agent, world = saved.agent, World(saved.config.world)
    pairs = torch.tensor([(d, g) for d in range(25) for g in range(25) if d != g])
    policies = [MIXTURE, keep("diamond", 2)]
    chances = {flags: gather._p_diamond(agent, world, pairs, policies, flags) for flags in (0, 3)}
    start = torch.tensor([[c not in pair for c in range(25)] for pair in pairs.tolist()])
    for flags, level in ((0, 0.0), (3, 1.0)):
        rows = saved.rows(policies, [level])
        for found, row in zip(chances[flags], rows, strict=True):
            assert found[start].mean().item() == pytest.approx(row.figures["p_diamond"], abs=1e-5)
    chosen = gather._start(agent, saved.config)
    at = pairs.tolist().index([chosen["diamond"], chosen["ghost"]]), chosen["agent"]
    gain = torch.minimum(chances[3][0], chances[0][1]) - chances[0][0]
    assert start[at]
    assert gain[at] >= gain[start].quantile(0.99)


# ---- the command


def test_train_writes_it_and_says_so(tmp_path, capsys):
    run = tmp_path / "run"
    few = ["--reinforce.updates", "2", "--world.rows", "2", "--seeds", "0", "1"]
    train([*SMOKE, *few, "--run-dir", str(run)])
    assert str(run / "play.html") in capsys.readouterr().out.replace("\n", "")
    assert len(packed.data_of(run / "play.html")["runs"]) == 2


def test_several_runs_stand_on_one_page(run, tmp_path, monkeypatch):
    other = tmp_path / "other"
    train([*SMOKE, "--method", "naive", "--reinforce.updates", "2", "--run-dir", str(other)])
    out = tmp_path / "both.html"
    main(["play", str(run), str(other), "--out", str(out)])
    routing, naive = packed.data_of(out)["runs"]
    assert (routing["method"], naive["method"]) == ("routing", "naive")
    assert (routing["names"], naive["names"]) == (["diamond", "ghost"], ["single"])
    monkeypatch.chdir(tmp_path)
    main(["play", "run", "other"])
    assert packed.data_of(tmp_path / "play.html")["runs"][1]["path"] == "other"
    monkeypatch.setattr(page, "MOST_HISTORIES", 1)
    main(["play", "run", "other"])
    assert [run["moments"] for run in packed.data_of(tmp_path / "play.html")["runs"]] == [1, 1]
    monkeypatch.setattr(page, "MOST_RUNS", 1)
    with pytest.raises(UserError, match="1 runs at most, got 2"):
        page.write([run, other], out)


@pytest.mark.parametrize("method", ["imputed_routing", "naive"])
def test_ppo_on_the_grid_has_one_too(tmp_path, method):
    """What the page holds returns what the run does; its training is there as well."""
    few = ["--ppo.updates", "30", "--evaluation.every", "10", "--agent.hidden", "16"]
    path = tmp_path / "run"
    train(["--algo", "ppo", "--device", "cpu", *few, "--method", method, "--run-dir", str(path)])
    (told,) = packed.data_of(path / "play.html")["runs"]
    assert told["updates"] == [0, 10, 20, 30]
    agents = [packed.agent_of(told, tensors) for tensors in packed.moments_of(told)]
    saved = read_run(RunFolder.open(path))
    policies = standard(agents[0].n_experts)
    facts, at = [Facts(method, 0, 0.1)], [0.1]
    evaluator = Evaluator(saved.config.world, told["discount"])
    rows = saved.rows(policies, at)
    first, *_, last = (
        evaluator.evaluate(agent.prepare(), facts, policies, [at], "diamond")[0] for agent in agents
    )
    for row, shown, before in zip(rows, last, first, strict=True):
        assert shown.figures["ground_truth_return"] == pytest.approx(
            row.figures["ground_truth_return"], abs=1e-3
        )
        assert before.figures != shown.figures
    (curve, *_) = told["curve"]
    assert [update for update, _ in curve["points"]] == told["updates"]


def test_many_snapshots_are_thinned(run):
    content = (run / "snapshots/update_00000010.safetensors").read_bytes()
    for update in range(1, 19):
        (run / f"snapshots/update_{update:08d}.safetensors").write_bytes(content)
    main(["play", str(run)])
    (told,) = packed.data_of(run / "play.html")["runs"]
    assert len(told["updates"]) == told["moments"] == gather.MOST_MOMENTS
    assert told["updates"][0] == 0
    assert told["updates"][-2:] == [18, 20]
    assert told["updates"] == sorted(set(told["updates"]))


def test_what_has_no_playground_is_said(run, capsys, tmp_path):
    assert "name a run folder" in refused(capsys, "play")
    assert "no such run folder" in refused(capsys, "play", tmp_path / "runn")
    assert "cannot write" in refused(capsys, "play", run, "--out", "/proc/play.html")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("rows: 5", "rows: 25"))
    assert "100 cells at most, got 25x5" in refused(capsys, "play", run)


@pytest.mark.parametrize(
    "line", ["x,routing,0,0.1,0.1,mixture", "1", "0,routing,0,.1,.1,nobody,True"]
)
def test_damaged_curves_are_refused(run, capsys, line):
    with (run / "metrics.csv").open("a") as file:
        file.write(line + "\n")
    assert "metrics.csv: is damaged" in refused(capsys, "play", run)


def test_nothing_that_is_told_is_html(trained):
    """The page's own tags alone are tags, whatever a run is called."""
    runs = packed.data_of(trained / "play.html")["runs"]
    plain = page.render(runs, "run")
    hostile = [
        run | {"name": "</script><script>hit()</script>", "path": "<!--<script>"} for run in runs
    ]
    spoilt = page.render(hostile, "</title><script>hit()</script>")
    assert spoilt.count("<script") == plain.count("<script")
    assert spoilt.count("</script") == plain.count("</script")
    assert "<script>hit" not in spoilt
    assert "<!--" not in spoilt
