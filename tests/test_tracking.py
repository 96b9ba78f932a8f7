"""What TensorBoard gets: read back from the event file."""

import io
import re

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from oversight_rl.cli import train


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    smoke = ["--config", "configs/smoke.yaml", "--device", "cpu"]
    train([*smoke, "--run-dir", str(path), "--world.rows", "3", "--world.cols", "4"])
    (file,) = path.glob("events.out.tfevents.*")  # one file: one run on the page
    sizes = {"images": 0, "tensors": 0, "scalars": 0}
    return EventAccumulator(str(file), size_guidance=sizes).Reload()


def test_curves(page):
    tags = set(page.Tags()["scalars"])
    policies = ("mixture", "diamond", "ghost")
    deployed = page.Scalars("evaluation/return/diamond")
    assert [e.value for e in page.Scalars("deployed/return")] == [e.value for e in deployed]
    assert min(tags) == "deployed/return"  # first on the page
    for group in ("return", "p_diamond", "p_ghost", "p_timeout"):
        assert {f"evaluation/{group}/{policy}" for policy in policies} <= tags
    outcomes = ("timeout", "unlabeled", "labeled_diamond", "labeled_ghost")
    assert {f"training/endings/{outcome}" for outcome in outcomes} <= tags
    assert {f"training/gate/{outcome}" for outcome in outcomes} <= tags
    assert {f"training/loss/{part}" for part in ("policy", "value", "entropy", "gate")} <= tags
    assert {"evaluation/return/optimum", "training/env_steps_per_second"} <= tags
    assert [event.step for event in page.Scalars("evaluation/return/diamond")] == [0, 10, 20]
    assert [event.step for event in page.Scalars("training/loss/policy")] == [10, 20]
    shares = [page.Scalars(f"training/endings/{outcome}")[-1].value for outcome in outcomes]
    assert sum(shares) == pytest.approx(1)
    assert (
        page.Scalars("evaluation/return/optimum")[0].value
        > page.Scalars("evaluation/return/mixture")[0].value
    )


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


def test_charts_have_few_curves(page):
    (tensor,) = page.Tensors("custom_scalars__config__")
    layout = Layout.FromString(tensor.tensor_proto.string_val[0])
    tags = page.Tags()["scalars"]
    assert layout.category[0].title == "Deployed"
    for category in layout.category:
        for chart in category.chart:
            (pattern,) = chart.multiline.tag
            found = [tag for tag in tags if re.fullmatch(pattern, tag)]
            assert 1 < len(found) < 5, chart.title


def test_hyperparameters_and_text(page):
    tensors = set(page.Tags()["tensors"])
    assert {"run/text_summary", "custom_scalars__config__"} <= tensors
    deployed = page.Scalars("hparam/deployed_return")[-1].value
    assert deployed == page.Scalars("evaluation/return/diamond")[-1].value
    text = page.Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "gradient routing" in text
    assert "10.00% oversight" in text
    content = page.summary_metadata["_hparams_/experiment"].plugin_data.content
    names = [info.name for info in HParamsPluginData.FromString(content).experiment.hparam_infos]
    assert sorted(names)[:3] == ["Method", "Oversight", "Seed"]  # as the page has them
