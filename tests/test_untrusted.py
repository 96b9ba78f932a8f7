"""Files that somebody else wrote are data: whatever is in them, they are read or refused."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import fuzz
import pytest
import safetensors.torch
import torch
import yaml

from oversight_rl.agents.methods import METHODS
from oversight_rl.cli import main, train
from oversight_rl.envs.settings import UserError
from oversight_rl.experiments.oversight import reference
from oversight_rl.experiments.oversight.config import Config
from oversight_rl.experiments.oversight.grid import GridRuns
from oversight_rl.experiments.oversight.policies import POLICY, read, tensors_of
from oversight_rl.kinds import load_config
from oversight_rl.runs import checkpoint
from oversight_rl.runs.folder import EVENTS
from oversight_rl.settings import MOST_TEXT, read_yaml
from oversight_rl.sweeps.plan import SweepConfig, plan

ROOT = Path(__file__).parent.parent
SMOKE = ["--config", str(ROOT / "configs" / "smoke.yaml"), "--device", "cpu", "--no-pictures"]


def refused(capsys, command, *args):
    """Run a command that must end with exit code 2 and one printable line, returned."""
    with pytest.raises(SystemExit) as stop:
        command([str(arg) for arg in args])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert line.isprintable()
    return line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    train([*SMOKE, "--reinforce.updates", "2", "--run-dir", str(path)])
    return path


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def little_memory():
    """What is refused must be so before memory is taken for it."""
    before = fuzz.memory()
    yield
    assert fuzz.memory() - before < 60


# ---- thousands of damaged files


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("settings", 1500),
        ("sweep", 600),
        ("checkpoint of imputed_routing, evaluated", 600),
        ("checkpoint of naive_early_stop, evaluated", 500),
        ("checkpoint of ppo, evaluated", 100),
        ("checkpoint of imputed_routing, resumed", 600),
        ("checkpoint of naive_early_stop, resumed", 500),
        ("checkpoint of ppo, resumed", 400),
        ("exported imputed_routing", 500),
        ("exported ppo", 100),
        ("state dict", 500),
        ("report", 25),
        ("playground", 150),
    ],
)
def test_damaged_files_are_read_or_refused(tmp_path, kind, files):
    counts, slowest, grown = fuzz.fuzz_kind(kind, files, seed=files, folder=tmp_path)
    assert counts["refused"] > files // 4
    assert counts.total() == files
    assert slowest < 20
    assert grown < 60


def test_every_kind_of_file_is_damaged():
    (marked,) = test_damaged_files_are_read_or_refused.pytestmark
    assert [kind for kind, _ in marked.args[1]] == list(fuzz.KINDS)


@pytest.mark.parametrize("name", fuzz.RUNS)
def test_forged_checkpoints_are_gone_on_with_or_refused(tmp_path, name):
    counts = fuzz.fuzz_forged(150, 0, tmp_path, name)
    assert counts["refused"] > 20
    assert counts["gone on with"] > 20


def small_learner(methods, updates=3, **settings):
    """A stack with one run of each method, after some updates."""
    config = load_config(ROOT / "configs" / "smoke.yaml")
    configs = [
        Config.model_validate(config.model_dump() | {"method": m, "device": "cpu"} | settings)
        for m in methods
    ]
    learner = GridRuns(configs).learner
    for _ in range(updates):
        learner.update()
    learner.select([0.5] * len(configs))
    return learner


def whole_numbers(learner):
    """Saved tensors that hold no floats."""
    return {n: t for n, t in learner.state(0).items() if not t.is_floating_point()}


@pytest.mark.parametrize("spurious", [0.0, 0.1])
@pytest.mark.parametrize("method", METHODS)
def test_every_saved_whole_number_has_bounds(method, spurious):
    learner = small_learner([method], updates=0, world={"spurious_oversight": spurious})
    assert set(learner.bounds()) == set(whole_numbers(learner))


BOUNDS = {  # of a 5x5 world with a limit of 32, after 3 updates of 8 steps in 32 worlds
    "world.agent": (0, 24),
    "world.diamond": (0, 24),
    "world.ghost": (0, 24),
    "world.diamond_flag": (0, 1),
    "world.ghost_flag": (0, 1),
    "world.time": (0, 31),
    "gate_memory.observation": (0, 100),  # 100 inputs, and 100 itself for a flag that is off
    "gate_memory.label": (0, 1),
    "gate_memory.count": (0, 768),
    "reward_model.memory.observation": (0, 100),
    "reward_model.memory.label": (0, 1),
    "reward_model.memory.count": (0, 768),
    "selected.update": (0, 3),
}


KEEPER = {"selected": "naive_early_stop", "gate_memory": "routing"}  # of what others have not


@pytest.mark.parametrize(
    ("method", "name"), [(KEEPER.get(n.split(".")[0], "imputed_routing"), n) for n in BOUNDS]
)
def test_a_forged_whole_number_is_refused_beyond_its_bounds(method, name):
    learner = small_learner([method, method], seeds=[0])
    good = [{n: t.clone() for n, t in learner.state(run).items()} for run in range(2)]
    low, high = BOUNDS[name]
    for value in (low - 1, low, high, high + 1):
        forged = good[1][name].clone()
        raw = forged.view(torch.uint8) if forged.dtype == torch.bool else forged
        if raw.dtype == torch.uint8 and value < 0:
            continue
        raw.view(-1)[0] = value
        if low <= value <= high:
            learner.load([good[0], good[1] | {name: forged}], 3)
            assert torch.equal(learner.state(1)[name], forged)
        else:
            with pytest.raises(UserError, match=f"holds what cannot be: {name}"):
                learner.load([good[0], good[1] | {name: forged}], 3)


def test_bit_flips_anywhere_in_a_checkpoint_are_noticed(run):
    folder = run / "checkpoints"
    (saved,) = read(run)
    good = (folder / "update_00000002.safetensors").read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    where = json.loads(good[8:header])["agent.head.weight"]["data_offsets"]
    for at in (*where[:1], where[1] - 1, sum(where) // 2):
        bad = bytearray(good)
        bad[header + at] ^= 1
        (folder / "update_00000002.safetensors").write_bytes(bad)
        with pytest.raises(UserError, match=r"is damaged: agent\.head\.weight"):
            checkpoint.load(folder, 2, tensors_of(saved))


def test_a_changed_digit_beside_the_tensors_is_noticed(run, capsys):
    facts = run / "checkpoints/update_00000002.json"
    text = facts.read_text()
    facts.write_text(text.replace('"env_steps": 512', '"env_steps": 513'))
    assert facts.read_text() != text
    assert "update_00000002.json: is damaged" in refused(capsys, main, "evaluate", run)


# ---- hostile ones


class Code:
    """A pickle of it makes a file when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("kind", ["archive", "old torch", "plain"])
def test_a_pickle_runs_no_code(tmp_path, capsys, kind):
    source, marker = tmp_path / "state.pt", tmp_path / "made"
    if kind == "plain":
        source.write_bytes(pickle.dumps(Code(marker)))
    else:
        state = {"diamond_expert.1.layers.0.weight": Code(marker)}
        torch.save(state, source, _use_new_zipfile_serialization=kind == "archive")
    args = ["import-reference", source, tmp_path / "run", "--oversight", "0.1"]
    assert "not a state dict" in refused(capsys, main, *args)
    assert not marker.exists()
    assert not (tmp_path / "run").exists()


def test_an_archive_that_unpacks_to_more_is_refused(tmp_path, capsys, little_memory):
    source = tmp_path / "state.pt"
    good = io.BytesIO()
    torch.save({"x": torch.zeros(100)}, good)
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            large = entry.filename.endswith("data/0")
            new.writestr(entry.filename, bytes(2**28) if large else old.read(entry))
    assert source.stat().st_size < 2**20
    args = ["import-reference", source, tmp_path / "run", "--oversight", "0.1"]
    assert "not a state dict" in refused(capsys, main, *args)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(2**20, 2**20),  # four bytes that claim 2^42
        torch.zeros(2**30, device="meta"),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(4, dtype=torch.complex64),
    ],
)
def test_tensors_that_are_not_what_they_claim_are_refused(tmp_path, tensor, little_memory):
    torch.save({"neural_net.1.1.layers.0.weight": tensor}, tmp_path / "state.pt")
    with pytest.raises(UserError):
        reference.import_state_dict(tmp_path / "state.pt", tmp_path / "run", 0.1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("length", [2**60, 2**63, 2**27])
def test_a_header_that_claims_too_much_is_refused(run, capsys, little_memory, length):
    file = run / "checkpoints/update_00000002.safetensors"
    with file.open("r+b") as raw:
        raw.write(struct.pack("<Q", length))
        raw.truncate(2**28)  # room for the last of them
    assert "header claims" in refused(capsys, main, "evaluate", run)
    assert "header claims" in refused(capsys, main, "evaluate", file)


def test_tensors_larger_than_the_networks_are_not_read(run, capsys, little_memory):
    file = run / "checkpoints/update_00000002.safetensors"
    tensors = safetensors.torch.load_file(file)
    shape = [2**14, 2**14]
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 2**30]}
    header = json.dumps({"agent.trunks.0.weight": entry}).encode()
    with file.open("wb") as raw:
        raw.write(struct.pack("<Q", len(header)) + header)
        raw.truncate(8 + len(header) + 2**30)
    assert len(tensors) > 5
    line = refused(capsys, main, "evaluate", run)
    assert "agent.trunks.0.weight has shape (16384, 16384)" in line


def test_networks_larger_than_the_file_are_not_made(run, capsys, little_memory):
    content = yaml.safe_load((run / "config.yaml").read_text())
    content["agent"] |= {"hidden": [16384, 16384], "experts": 64}
    content["world"] |= {"rows": 64, "cols": 64}
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    assert "does not fit its configuration" in refused(capsys, main, "evaluate", run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "aliases are not allowed"),
        ("x: !!python/object/apply:os.mkdir [made]", "not valid YAML"),
        ("x: !!python/name:os.system", "not valid YAML"),
        ("x: " + "[" * 20 + "]" * 20, "more than 16 levels"),
        ("x: " + "{a: " * 100_000, "more than 16 levels"),
        ("x: " + "y" * MOST_TEXT, "is longer than"),
        ("x: !!int z", "not valid YAML"),
        ("x: !!timestamp z", "not valid YAML"),
        ("x: \x00", "not valid YAML"),
        ("\x1b[31mred\x1b[0m: 1", "not valid YAML"),
        ('"a\\e[31m\\nb": 1', r"unknown setting a\x1b[31m b"),
        ("method: " + "m" * 100_000, "method: must be one of"),
    ],
)
def test_settings_that_would_do_more_than_set(tmp_path, capsys, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(text)
    line = refused(capsys, train, "--config", "bad.yaml", "--run-dir", "run")
    assert message in line
    assert len(line) < 700
    assert [file.name for file in tmp_path.iterdir()] == ["bad.yaml"]


def test_a_sweep_of_endless_runs_is_refused(tmp_path):
    values = tuple(range(1000))
    with pytest.raises(UserError, match="combines to 1,000,000,000 runs"):
        plan(SweepConfig(grid={"a": values, "b": values, "c": values}), tmp_path)


@pytest.mark.parametrize("name", ["metrics.csv", "training.csv", "result.json", "config.yaml"])
def test_links_out_of_a_run_folder_are_not_followed(run, tmp_path, capsys, name):
    outside = tmp_path / "outside"
    (run / name).rename(outside)
    (run / name).symlink_to(outside)
    before = outside.read_bytes()
    assert f"{name}: is not a plain file" in refused(capsys, main, "evaluate", run)
    if name != "result.json":
        (run / "result.json").unlink()
        assert f"{name}: is not a plain file" in refused(capsys, train, "--resume", run)
    assert outside.read_bytes() == before


@pytest.mark.parametrize("name", ["checkpoints", "curves", "curves/diamond"])
def test_folders_elsewhere_are_left_alone(run, tmp_path, capsys, name):
    (run / name).rename(tmp_path / "outside")
    (run / name).symlink_to(tmp_path / "outside")
    before = {p: p.read_bytes() for p in (tmp_path / "outside").rglob("*") if p.is_file()}
    (run / "result.json").unlink()
    assert "is not a plain folder" in refused(capsys, train, "--resume", run)
    assert {p: p.read_bytes() for p in (tmp_path / "outside").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("there", [True, False])
def test_a_curve_elsewhere_is_left_alone(run, tmp_path, capsys, there):
    curve, outside = run / "curves/diamond" / EVENTS, tmp_path / "outside"
    curve.unlink()
    curve.symlink_to(outside)
    if there:
        outside.write_text("mine")
    (run / "result.json").unlink()
    assert "is not a plain file" in refused(capsys, train, "--resume", run)
    assert outside.exists() is there
    assert not there or outside.read_text() == "mine"


def test_a_link_in_a_new_run_folder_is_refused(tmp_path, capsys):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / EVENTS).write_text("mine")
    (tmp_path / "new/curves").mkdir(parents=True)
    (tmp_path / "new/curves/x.tmp").symlink_to(outside)
    line = refused(capsys, train, "--config", "smoke", "--run-dir", tmp_path / "new")
    assert "is not empty" in line
    assert (outside / EVENTS).read_text() == "mine"


def test_a_planted_link_is_not_written_through(run, tmp_path):
    (tmp_path / "precious").write_text("mine")
    (run / "checkpoints/update_00000003.safetensors.tmp").symlink_to(tmp_path / "precious")
    facts = {"env_steps": 0, "wall_seconds": 0.0}
    checkpoint.save(run / "checkpoints", 3, {"x": torch.zeros(1)}, facts)
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (run / "checkpoints/update_00000003.safetensors").is_symlink()


@pytest.mark.parametrize("name", ["update_00000002.json", "update_00000002.safetensors"])
def test_a_pipe_in_place_of_a_file_does_not_hang(run, capsys, name):
    (run / "checkpoints" / name).unlink()
    os.mkfifo(run / "checkpoints" / name)
    assert "is not a plain file" in refused(capsys, main, "evaluate", run)


@pytest.mark.parametrize("name", ["update_²²²²²²²².json", "update_5.json", "update_../x.json"])
def test_odd_names_are_no_checkpoints(run, name):
    for suffix in ("json", "safetensors"):
        odd = run / "checkpoints" / name.replace("json", suffix)
        odd.parent.mkdir(exist_ok=True)
        odd.write_text("{}")
    assert checkpoint.updates(run / "checkpoints") == [0, 2]


def forge(run, value):
    """Give the newest checkpoint a head of `value`s, and right checksums."""
    facts = json.loads((run / "checkpoints/update_00000002.json").read_text())
    tensors = safetensors.torch.load_file(run / "checkpoints/update_00000002.safetensors")
    tensors["agent.head.bias"][:] = value
    shutil.rmtree(run / "checkpoints")
    checkpoint.save(
        run / "checkpoints", 2, tensors, {k: facts[k] for k in ("env_steps", "wall_seconds")}
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("flags", [[], ["--greedy"]])
def test_a_forged_policy_that_is_none_is_not_evaluated(run, tmp_path, capsys, value, flags):
    forge(run, value)
    written = ["--json", tmp_path / "rows.json", "--export", tmp_path / "policy", "--pictures"]
    args = ["evaluate", run, "--steer", "diamond=9,ghost=900", *flags, *written, tmp_path / "drawn"]
    if value == 3e38:  # large, but a policy: all actions alike
        main([str(arg) for arg in args])
        return
    assert "routing, seed 0: diamond=9,ghost=900: its action" in refused(capsys, main, *args)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_a_result_without_a_number_is_no_result(run, capsys):
    rows = json.loads((run / "result.json").read_text())
    for row in rows:
        row["ground_truth_return"] = None
    (run / "result.json").write_text(json.dumps(rows))
    line = refused(capsys, main, "report", run)
    assert "no finished run below it" in line
    assert "ground_truth_return cannot be nan" in line


def rename(run, figure, rows):
    """Give a figure another name in some rows of a result."""
    found = json.loads((run / "result.json").read_text())
    for row in found[rows]:
        row["x"] = row.pop(figure)
    (run / "result.json").write_text(json.dumps(found))


@pytest.mark.parametrize("figure", ["p_diamond", "p_ghost_flagged", "return_se"])
def test_rows_of_a_result_have_the_same_figures(run, capsys, figure):
    rename(run, figure, slice(1))
    assert "rows of other figures" in refused(capsys, main, "report", run)


@pytest.mark.parametrize(
    "figure",
    ["p_diamond", "p_ghost", "p_timeout", "p_diamond_flagged", "p_ghost_on_path", "episode_length"],
)
def test_reports_leave_out_what_there_are_no_figures_of(run, figure):
    rename(run, figure, slice(None))
    main(["report", str(run)])
    assert (run / "report.html").is_file()


@pytest.mark.parametrize("figure", ["optimal_return", "return_se"])
def test_figures_that_all_runs_have_are_asked_for(run, capsys, figure):
    rename(run, figure, slice(None))
    assert "rows of other figures" in refused(capsys, main, "report", run)


@pytest.mark.parametrize("deployed", [True, False, "yes", None])
def test_a_result_of_which_nobody_knows_what_is_deployed_is_none(run, capsys, deployed):
    rows = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps([row | {"deployed": deployed} for row in rows]))
    line = refused(capsys, main, "report", run)
    assert "no finished run below it" in line
    assert "result.json: not a readable result" in line


@pytest.mark.parametrize(
    "steering",
    [
        {"weights": [1.0]},
        {"weights": [1.0, None]},
        {"ablated": [7]},
        {"ablated": [-1]},
        {"temperature": 0.0},
        {"temperature": 1e-320},
        {"temperature": 1e308},
        {"weights": [1e38, -1e38]},
        {"name": ["x"]},
    ],
)
def test_an_exported_policy_is_steered_as_its_experts_allow(run, tmp_path, capsys, steering):
    file = tmp_path / "policy.safetensors"
    main(["evaluate", str(run), "--steer", "diamond", "--export", str(file)])
    (saved,) = read(run)
    like = tensors_of(saved)
    tensors, metadata = checkpoint.read_tensors(file, like, checkpoint.checksums(like))
    about = json.loads(metadata[POLICY])
    about["steering"] |= steering
    metadata[POLICY] = json.dumps(about)
    file.write_bytes(safetensors.torch.save(tensors, metadata=metadata))
    capsys.readouterr()
    assert str(file) in refused(capsys, main, "evaluate", file)


def test_what_is_read_is_no_longer_than_it_may_be(tmp_path):
    (tmp_path / "fits.yaml").write_text("#" * (MOST_TEXT - 1) + "\n")
    assert read_yaml(tmp_path / "fits.yaml") == {}
    with (tmp_path / "sparse.yaml").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="longer than"):
        read_yaml(tmp_path / "sparse.yaml")
