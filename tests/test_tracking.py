"""What TensorBoard gets: read back from the event file."""

import io
import re

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from oversight_rl.cli import train
from oversight_rl.runs.experiment import experiment_of
from oversight_rl.runs.folder import EVENTS, Events, RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    smoke = ["--config", "configs/smoke.yaml", "--device", "cpu"]
    train([*smoke, "--run-dir", str(path), "--world.rows", "3", "--world.cols", "4"])
    return path


def read(folder):
    """One file: one run on the page."""
    (file,) = folder.glob("events.out.tfevents.*")
    sizes = {"images": 0, "tensors": 0, "scalars": 0}
    return EventAccumulator(str(file), size_guidance=sizes).Reload()


@pytest.fixture(scope="module")
def page(run):
    return read(run)


@pytest.fixture(scope="module")
def curves(run):
    return {folder.name: read(folder) for folder in (run / "curves").iterdir()}


def values(page, tag):
    return [event.value for event in page.Scalars(tag)]


def test_curves(page, curves):
    tags = set(page.Tags()["scalars"])
    policies = {"mixture", "diamond", "ghost"}
    assert set(curves) == {*policies, "optimum"}  # a folder each: a color each
    assert values(page, "deployed/return") == values(curves["diamond"], "evaluation/return")
    assert min(tags) == "deployed/return"  # first on the page
    for policy in policies:
        assert set(curves[policy].Tags()["scalars"]) == {
            f"evaluation/{name}"
            for name in ("return", "p_diamond", "p_ghost", "p_timeout", "steps")
        }
    outcomes = ("timeout", "unlabeled", "labeled_diamond", "labeled_ghost")
    assert {f"training/endings/{outcome}" for outcome in outcomes} <= tags
    assert {f"training/gate/{outcome}" for outcome in outcomes} <= tags
    assert {f"training/loss/{part}" for part in ("policy", "value", "entropy", "gate")} <= tags
    assert "training/env_steps_per_second" in tags
    steps = [event.step for event in curves["diamond"].Scalars("evaluation/return")]
    assert steps == [0, 10, 20]
    assert [event.step for event in page.Scalars("training/loss/policy")] == [10, 20]
    shares = [page.Scalars(f"training/endings/{outcome}")[-1].value for outcome in outcomes]
    assert sum(shares) == pytest.approx(1)
    best = values(curves["optimum"], "evaluation/return")
    assert best == values(curves["optimum"], "deployed/return")
    assert best[0] > values(curves["mixture"], "evaluation/return")[0]


def test_pictures_move_and_have_the_panels(page):
    arrows = Image.open(io.BytesIO(page.Images("pictures/policies")[-1].encoded_image_string))
    assert arrows.format == "PNG"
    events = page.Images("pictures/rollouts")
    assert [event.step for event in events] == [0, 10, 20]
    animation = Image.open(io.BytesIO(events[-1].encoded_image_string))
    assert animation.format == "GIF"
    assert animation.n_frames > 20
    assert animation.size == (events[-1].width, events[-1].height)
    assert animation.width > 3 * 4 * 48  # mixture, diamond, ghost side by side


def test_charts_have_few_curves(page, curves):
    (tensor,) = page.Tensors("custom_scalars__config__")
    layout = Layout.FromString(tensor.tensor_proto.string_val[0])
    tags = [tag for one in (page, *curves.values()) for tag in one.Tags()["scalars"]]
    assert layout.category[0].title == "Deployed"
    for category in layout.category:
        for chart in category.chart:
            (pattern,) = chart.multiline.tag
            found = [tag for tag in tags if re.fullmatch(pattern, tag)]
            assert 1 < len(found) < 5, chart.title


def test_hyperparameters_and_text(page, curves):
    tensors = set(page.Tags()["tensors"])
    assert {"run/text_summary", "custom_scalars__config__"} <= tensors
    deployed = page.Scalars("hparam/deployed_return")[-1].value
    assert deployed == values(curves["diamond"], "evaluation/return")[-1]
    text = page.Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "gradient routing" in text
    assert "10.00% oversight" in text
    content = page.summary_metadata["_hparams_/experiment"].plugin_data.content
    names = [info.name for info in HParamsPluginData.FromString(content).experiment.hparam_infos]
    assert sorted(names)[:3] == ["Method", "Oversight", "Seed"]  # as the page has them


@pytest.mark.parametrize(
    ("policy", "folder"),
    [("diamond=0.8,ghost=0.2", "diamond=0%2E8,ghost=0%2E2"), ("../x", "%2E%2E%2Fx"), ("..", None),
     ("a/b", None), ("\udcff", None), ("", None), ("\u754c" * 90, None), ("0," * 200, None)],
)  # fmt: skip
def test_no_policys_name_leads_elsewhere_or_is_too_long(tmp_path, policy, folder):
    events = Events(tmp_path)
    other = policy + "x"
    for name in (policy, other):
        events.add(Summary(value=[Summary.Value(tag="x", simple_value=1.0)]), 0, name)
    assert len(events.sync()) == 3
    assert {p.parent.parent for p in tmp_path.rglob("*tfevents*")} == {tmp_path / "curves"}
    names = {p.name for p in (tmp_path / "curves").iterdir()}
    assert len(names) == 2
    assert folder is None or folder in names
    assert Events(tmp_path).lengths == events.lengths | {EVENTS: 0}


SMALL = {
    "partition": ["--partition.updates", "400", "--partition.hidden", "32", "--partition.code", "4",
                  "--partition.certificate-steps", "100"],
    "stories": ["--stories.updates", "2", "--stories.stories", "300", "--stories.relearn-steps",
                "2", "--stories.tune-steps", "2"],
}  # fmt: skip


@pytest.mark.parametrize("algo", SMALL)
def test_charts_of_other_experiments_show_something(tmp_path, algo):
    train(["--algo", algo, *SMALL[algo], "--device", "cpu", "--run-dir", str(tmp_path / "run")])
    pages = [read(file.parent) for file in (tmp_path / "run").rglob("events.out.tfevents.*")]
    tags = {tag for one in pages for tag in one.Tags()["scalars"]}
    kind = experiment_of(RunFolder.open(tmp_path / "run").config())
    for patterns in kind.charts.values():
        for title, pattern in patterns.items():
            assert any(re.fullmatch(pattern, tag) for tag in tags), title
