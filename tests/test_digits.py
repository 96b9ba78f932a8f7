"""The partition experiment: its data, what routing does to parts, runs that go on, its report."""

import base64
import gzip
import io
import json
import os
import struct
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from oversight_rl.cli import main, train
from oversight_rl.envs.settings import UserError
from oversight_rl.experiments.partition.config import PartitionConfig, PartitionSettings, classes
from oversight_rl.experiments.partition.data import Images, load, read_idx
from oversight_rl.experiments.partition.evaluation import Viewer, judge, probe
from oversight_rl.experiments.partition.model import METHODS, SplitAutoencoder, correlation
from oversight_rl.experiments.partition.runs import Partition
from oversight_rl.playground.gather import run_of
from oversight_rl.reports import page
from oversight_rl.runs.folder import RunFolder
from oversight_rl.runs.loop import judged_again
from oversight_rl.runs.rows import Facts

SMALL = {"hidden": [12], "code": 3, "updates": 40, "batch_size": 16, "certificate_steps": 40}


def idx(content, kind=8):
    """An idx file of an array of bytes."""
    return struct.pack(f">HBB{content.ndim}I", 0, kind, content.ndim, *content.shape) + bytes(
        content.tobytes()
    )


def write_data(folder, train=120, test=40, prefix="train"):
    """Noisy images, 4 x 5, of classes 0 to 3; the test's are gzipped, under other endings."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    ideal = rng.integers(0, 256, (4, 4, 5))
    for name, count in ((prefix, train), ("t10k", test)):
        label = np.arange(count) % 4
        images = (ideal[label] + rng.integers(-30, 30, (count, 4, 5))).clip(0, 255)
        for what, x in (("images-idx3", images), ("labels-idx1", label)):
            content = idx(x.astype(np.uint8))
            if name == "t10k":
                (folder / f"{name}-{what.replace('-', '.')}-ubyte.gz").write_bytes(
                    gzip.compress(content)
                )
            else:
                (folder / f"{name}-{what}-ubyte").write_bytes(content)
    return folder


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def refused(capsys, command, args):
    """Run a command that must fail: exit code 2 and one line, returned."""
    with pytest.raises(SystemExit) as stop:
        command([str(a) for a in args])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# ---- data


def test_idx_files_are_read_gzipped_or_not(tmp_path):
    content = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "plain").write_bytes(idx(content))
    (tmp_path / "zipped").write_bytes(gzip.compress(idx(content)))
    for name in ("plain", "zipped"):
        np.testing.assert_array_equal(read_idx(tmp_path / name, 3), content)


HEAD = struct.pack(">HBB", 0, 8, 1)
HOSTILE = {
    "is not an idx file": b"\x89PNG" + b"x" * 40,
    "is not an idx file ": HEAD,
    "has type 13 in 1 axes": idx(np.zeros(3, np.uint8), kind=13),
    "has type 8 in 3 axes": idx(np.zeros((1, 1, 1), np.uint8)) + b"more than a header of one axis",
    "claims 9 bytes and has 3": HEAD + struct.pack(">I", 9) + b"abc",
    "claims 2 bytes and has more": HEAD + struct.pack(">I", 2) + b"abc",
    "claims 4,294,967,295 bytes, not 1 to": HEAD + struct.pack(">I", 2**32 - 1) + b"abc",
    "claims 0 bytes": HEAD + struct.pack(">I", 0),
    "claims 5 bytes and has more": gzip.compress(HEAD + struct.pack(">I", 5) + bytes(10**8)),
    "cannot read the file": gzip.compress(idx(np.zeros(999, np.uint8)))[:30],
    "cannot read the file (Error": gzip.compress(b"")[:10] + b"\xff" * 99,
}


@pytest.mark.parametrize("words", HOSTILE)
def test_idx_files_that_lie_are_refused(tmp_path, words):
    (tmp_path / "file").write_bytes(HOSTILE[words])
    with pytest.raises(UserError) as refusal:
        read_idx(tmp_path / "file", 1)
    assert words.strip() in str(refusal.value)
    assert str(refusal.value).startswith(str(tmp_path / "file"))


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a plain file"):
        read_idx(tmp_path / "pipe", 1)


def test_images_are_grouped_by_class(data):
    train_images, test_images = load(str(data), ("3,0", "2"))
    assert (len(train_images), len(test_images), train_images.shape) == (90, 30, (4, 5))
    groups = {0: 0, 3: 0, 2: 1}
    assert [groups[c] for c in train_images.label.tolist()] == train_images.group.tolist()
    raw = read_idx(data / "train-images-idx3-ubyte", 3)
    assert torch.allclose(
        train_images.pixels[0], torch.as_tensor(raw[0].flatten() / 127.5 - 1).float()
    )
    for path in data.glob("t10k*"):
        path.unlink()
    train_images, test_images = load(str(data), ("0-1", "2-3"))
    assert (len(train_images), len(test_images)) == (96, 24)  # a fifth is held out
    both = torch.cat([train_images.pixels, test_images.pixels])
    assert len(both.unique(dim=0)) == 120


def test_folders_that_do_not_hold_together_are_refused(data, capsys):
    def refusal(groups="0-1 2-3"):
        args = ["--algo", "partition", "--data", data, "--groups", *groups.split()]
        return refused(capsys, train, [*args, "--run-dir", data.parent / "run"])

    assert "too few images of 7" in refusal("0-3 7")
    assert "no class may be in two groups, got" in refusal("0-2 2-3")
    assert "must be classes like 0-4 or 0,2,7-9" in refusal("0-1 two")
    assert "at least 2 items" in refusal("0-3")
    assert "nothing to set but every" in refusal("0-1 2-3 --evaluation.episodes 7")
    test_labels = next(data.glob("t10k-labels*"))
    short = idx(np.zeros(3, np.uint8))
    test_labels.write_bytes(short)
    assert "40 t10k images have 3 labels" in refusal()
    test_labels.unlink()
    assert "t10k-images... and t10k-labels... belong together" in refusal()
    test_labels.write_bytes(idx(np.arange(2, dtype=np.uint8)))
    next(data.glob("t10k-images*")).write_bytes(idx(np.zeros((2, 3, 3), np.uint8)))
    assert "images of (4, 5) to train and of (3, 3) to test" in refusal()
    (data / "train-images-again").write_bytes(b"")
    assert "holds 2 files train-images..., not one" in refusal()
    for path in data.glob("train*"):
        path.unlink()
    assert "must hold train-images... and train-labels..." in refusal()
    assert not (data.parent / "run").exists()


def test_a_missing_scikit_learn_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    args = ["--config", "digits", "--run-dir", tmp_path / "run"]
    assert "pip install 'oversight-rl[digits]'" in refused(capsys, train, args)


def test_groups_of_classes():
    assert classes("0-4") == {0, 1, 2, 3, 4}
    assert classes("0, 2,7-9") == {0, 2, 7, 8, 9}
    assert PartitionConfig(groups=(7, "1-2")).groups == ("7", "1-2")
    for wrong in ("4-0", "", "1-", "256", "-1"):
        with pytest.raises(ValueError, match="must be classes"):
            classes(wrong)


# ---- what is learned


def small_model(method, groups=2, **settings):
    torch.manual_seed(0)
    own = PartitionSettings(**(SMALL | {"sparsity": 0.0, "correlation": 0.0} | settings))
    return SplitAutoencoder(own, 20, groups, METHODS[method]).double()


def test_an_images_error_updates_its_own_part_alone():
    """Against the definition: what is not to learn from an image is held constant for it."""
    model = small_model("routed", groups=3)
    images, group = torch.rand(6, 20).double(), torch.tensor([0, 1, 2, 3, 3, 1])
    model.backward((images, group), 0.0)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for x, g in zip(images, group.tolist(), strict=True):
        parts = list(model.encoder(x).split(3))
        kept = [part if g in (i, 3) else part.detach() for i, part in enumerate(parts)]
        ((model.decoders[0](torch.cat(kept)) - x).abs().mean() / 6).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("method", "group", "learns"),
    [
        ("routed", 1, [False, True]),
        ("routed", 2, [True, True]),
        ("one_group_routed", 0, [True, False]),
        ("one_group_routed", 1, [True, True]),
        ("separate_decoders", 0, [True, False]),
        ("separate_decoders", 2, [True, True]),
        ("not_routed", 0, [True, True]),
    ],
)
def test_which_parts_learn_from_a_label(method, group, learns):
    model = small_model(method)
    model.backward((torch.rand(4, 20).double(), torch.full((4,), group)), 0.0)
    rows = model.encoder[-1].weight.grad.abs().sum(1).unflatten(0, (2, 3))
    assert (rows.sum(1) > 0).tolist() == learns
    if method == "separate_decoders":
        decoders = [decoder[0].weight.grad.abs().sum() > 0 for decoder in model.decoders]
        assert decoders == learns


def test_penalties_reach_every_part_and_rise():
    model = small_model("routed", sparsity=1.0, sparsity_ramp=0.5)
    batch = torch.rand(4, 20).double(), torch.zeros(4, dtype=torch.int64)
    sizes = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        model.zero_grad()
        model.backward(batch, progress)
        sizes.append(float(model.encoder[-1].bias.grad[3:].abs().sum()))
    assert sizes[0] == 0
    assert sizes[1] == pytest.approx(sizes[2] / 2)
    assert sizes[2] == sizes[3] > 0


def test_correlations_are_numpys():
    x = torch.randn(9, 4).double()
    np.testing.assert_allclose(correlation(x), np.corrcoef(x.T), atol=1e-6)
    assert not correlation(torch.ones(5, 2)).any()


# ---- judging


def made_up(count):
    label = torch.arange(count) % 4
    pixels = torch.eye(4)[label] * 2 - 1
    return Images(pixels, label, label // 2, (2, 2))


def test_viewers_are_judged_by_what_they_get_wrong():
    """One restores all, one its own group, one nothing: errors are shares of wrong pixels."""
    train_images, test_images = made_up(40), made_up(20)

    def own(images):
        return torch.where(images.group[:, None] == 0, images.pixels, -images.pixels)

    viewers = {
        "0-1": Viewer(own, lambda x: x.pixels * (x.group == 0)[:, None]),
        "2-3": Viewer(lambda x: -x.pixels, lambda x: x.pixels[:, :1] * 0),
        "whole": Viewer(lambda x: x.pixels, lambda x: x.pixels),
        "constant": Viewer(lambda x: torch.zeros(()) * x.pixels, lambda x: x.pixels[:, :1] * 0),
    }
    found = judge(viewers, ["0-1", "2-3"], train_images, test_images)
    assert {k: found["0-1"][k] for k in ("own_error", "foreign_error", "gap")} == {
        "own_error": 0.0,
        "foreign_error": 2.0,
        "gap": 2.0,
    }
    assert found["0-1"]["leakage"] == -1.0  # twice as bad as the constant
    assert (found["0-1"]["p_own_class"], found["0-1"]["p_foreign_class"]) == (1.0, 0.5)
    assert (found["whole"]["leakage"], found["constant"]["leakage"]) == (1.0, 0.0)
    assert found["whole"]["p_foreign_class"] == 1.0
    assert found["2-3"]["gap"] == found["constant"]["gap"] == 0.0
    assert found["parts"]["gap"] == 1.0
    assert found["0-1"]["error_2-3"] == 2.0


def test_a_probe_is_asked_about_images_that_it_did_not_learn_from():
    train_images, test_images = made_up(40), made_up(8)
    seen = train_images.pixels, 1 - test_images.pixels  # elsewhere it is all the other way round
    every = torch.ones(40, dtype=torch.bool), torch.ones(8, dtype=torch.bool)
    assert probe(seen, train_images, test_images, *every) == 0.0


@pytest.mark.parametrize(
    ("method", "within"), [("routed", (0.08, 0.3)), ("not_routed", (-0.05, 0.05))]
)
def test_routing_parts_what_is_known_of_real_digits(method, within):
    few = {"updates": 250, "certificate_steps": 200, "hidden": [128]}
    run = Partition([PartitionConfig(method=method, partition=few)])
    assert len(run.train) + len(run.test) == 1797
    while run.learner.updates < run.learner.total:
        run.learner.update()
    ((parts, *_),) = run.evaluate([Facts(method, 0, 1.0)])
    assert within[0] < parts.figures["gap"] < within[1]


# ---- runs


def flags(data, **more):
    found = ["--algo", "partition", "--data", data, "--groups", "0-1", "2", "3"]
    settings = {f"partition.{name}": value for name, value in SMALL.items()}
    settings |= {"evaluation.every": 20, "oversight": 0.5, "seeds": 3} | more
    for name, value in settings.items():
        found += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [value])]
    return [str(flag) for flag in found]


def files(path):
    """Every file of a run that must be the same each time, checkpoints with what they hold."""
    found = {}
    for file in sorted(path.rglob("*")):
        if file.suffix in (".csv", ".safetensors"):
            found[str(file.relative_to(path))] = file.read_bytes()
    rows = json.loads((path / "result.json").read_text())
    return found, [{k: v for k, v in row.items() if k != "wall_seconds"} for row in rows]


def test_a_run_is_trained_goes_on_and_is_evaluated_again(data, tmp_path, capsys):
    whole, again = tmp_path / "whole", tmp_path / "again"
    train([*flags(data), "--run-dir", str(whole)])
    train([*flags(data), "--run-dir", str(again)])
    (again / "result.json").unlink()
    for file in (again / "checkpoints").glob("*00000040*"):
        file.unlink()
    train(["--resume", str(again)])
    assert files(whole) == files(again)
    rows = json.loads((whole / "result.json").read_text())
    assert [row["policy"] for row in rows] == ["parts", "0-1", "2", "3", "whole", "constant"]
    assert [row["deployed"] for row in rows] == [True] + [False] * 5
    assert rows[0]["gap"] == pytest.approx(np.mean([row["gap"] for row in rows[1:4]]))
    assert rows[0]["env_steps"] == 40 * 16
    events = EventAccumulator(str(whole), size_guidance={"images": 0})
    events.Reload()
    pictures = events.Images("pictures/restored")
    assert [picture.step for picture in pictures] == [0, 20, 40]
    assert pictures[-1].encoded_image_string != pictures[0].encoded_image_string
    capsys.readouterr()
    args = ["evaluate", str(whole), "--json", str(tmp_path / "rows.json")]
    main([*args, "--pictures", str(tmp_path / "drawn")])
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert (tmp_path / "drawn" / "restored.png").read_bytes() == pictures[-1].encoded_image_string
    assert f"{rows[0]['gap']:.3f}" in capsys.readouterr().out


def test_a_page_shows_what_each_part_makes_of_images(data, tmp_path):
    train([*flags(data), "--run-dir", str(tmp_path / "run")])
    told = run_of(RunFolder.open(tmp_path / "run"), history=True)
    with judged_again(RunFolder.open(tmp_path / "run")) as (run, (_, *rows)):
        images, viewers = run.examples(), run.viewers
    names = ["all parts", "0-1 alone", "2 alone", "3 alone", "none: the best constant"]
    assert [view["name"] for view in told["views"]] == names
    (height, width), count, seen = images.shape, len(images), set()
    for view, who in zip(told["views"], ["whole", "0-1", "2", "3", "constant"], strict=True):
        drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(view["image"]))).convert("L"))
        framed = drawn.reshape(2, drawn.shape[0] // 2, count, -1)[:, 2:-2, :, 2:-2]
        zoom = framed.shape[1] // height
        small = framed[:, zoom // 2 :: zoom, :, zoom // 2 :: zoom].transpose(0, 2, 1, 3)
        small = small.reshape(2, count, height * width)
        for row, pixels in zip(small, (images.pixels, viewers[who].restore(images)), strict=True):
            expected = ((pixels.clamp(-1, 1) + 1) * 127.5).round().numpy()
            assert np.abs(row - expected).max() <= 1
        seen.add(small.tobytes())
    assert len(seen) == 5
    assert [line[0] for line in told["figures"]][1:] == [row.policy for row in rows]


def test_labels_are_as_many_as_the_level_says(data):
    """Of images, not of updates: a seed's are the same each time."""
    config = PartitionConfig(data=str(data), groups=("0-1", "2-3"), partition=SMALL)
    shares = {}
    for level in (0.0, 0.5, 1.0):
        run = Partition([config.model_copy(update={"oversight": level})])
        told = torch.cat([run.learner.draw(0)[1] for _ in range(40)])
        shares[level] = float((told < 2).double().mean())
    assert (shares[0.0], shares[1.0]) == (0.0, 1.0)
    assert shares[0.5] == pytest.approx(0.5, abs=0.15)


def test_help_is_of_what_is_to_be_trained(capsys):
    for args in (["--config", "digits", "--help"], ["-h", "--algo", "partition"]):
        with pytest.raises(SystemExit) as stop:
            train(args)
        assert stop.value.code == 0
        said = capsys.readouterr().out
        assert "--partition.sparsity-ramp" in said
        assert "--reinforce." not in said


def test_a_report_says_what_parts_know(data, tmp_path, capsys):
    for method in ("routed", "not_routed"):
        args = flags(data, **{"partition.updates": 2}, method=method)
        train([*args, "--no-pictures", "--run-dir", str(tmp_path / "runs" / method)])
    (found,) = (each.found for each in page.write(tmp_path / "runs"))
    assert found.names == ["routed", "not_routed"]
    table = pd.read_csv(tmp_path / "runs" / "summary.csv")
    assert {"own_error", "foreign_error", "leakage", "p_own_class"} <= set(table)
    drawn = {path.stem for path in (tmp_path / "runs" / "figures").iterdir()}
    assert drawn == {"headline", "scores", "certificates", "improvement"}
    text = (tmp_path / "runs" / "report.html").read_text()
    assert "What parts know" in text
    assert "diamond" not in text
