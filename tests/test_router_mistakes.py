"""What people give a router by mistake, and copies of what it routes."""

import copy
import re

import pytest
import torch
from torch import nn

from oversight_rl.agents.routing import Region, Router, Rule, expand


def test_copies_of_a_routed_model_are_models_of_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    region = Region(units={"0": range(2)})
    x, ids = torch.randn(5, 3), torch.zeros(5, dtype=torch.int64)
    with Router(model, {"a": region}, {0: Rule(["rest"], ["a"])}) as router:
        twin = copy.deepcopy(model)
        with router.labels(ids):
            assert not torch.equal(twin(x), model(x))  # nothing is off in the copy
        twin(x).sum().backward()
        assert twin[0].weight.grad[:2].any()
        with Router(twin, {"a": region}, {0: Rule(["rest"], ["a"])}) as other, other.labels(ids):
            off = twin(x)
        with router.labels(ids):
            assert torch.equal(off, model(x))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.inner(x) * self.scale


def test_what_no_single_pass_knows_is_named():
    model = nn.Sequential(Scaled())
    router = Router(model, {"a": Region(params=["0.scale"])}, {0: Rule(["rest"])})
    with pytest.raises(ValueError, match=r"'0\.scale' is a parameter of a Scaled, .*backward"):
        router.labels(torch.zeros(2, dtype=torch.int64)).__enter__()


MODEL = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
MISTAKES = {
    "units must be indices by globs": lambda: Region(units=["0"]),
    "params must be a list of globs, got '0.*'": lambda: Region(params="0.*"),
    "regions must be given by name": lambda: Router(MODEL, Region(units={"0": [0]}), {0: Rule()}),
    "regions must be given by name, ": lambda: Router(MODEL, {"a": {"0": [0]}}, {0: Rule()}),
    "rules must be given by labels": lambda: Router(MODEL, {}, {}),
    "rules must be given by labels ": lambda: Router(MODEL, {}, {0: ["rest"]}),
    "'0': 4 goes past the end, there are 4": lambda: Router(
        MODEL, {"a": Region(units={"0": range(1_000)})}, {0: Rule()}
    ),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_told_in_a_line(words):
    with pytest.raises(ValueError, match=re.escape(words.strip())) as refusal:
        MISTAKES[words]()
    assert len(str(refusal.value)) < 200


def test_one_region_is_switched_off_by_its_name():
    assert Rule(ablate="added").ablate == ("added",)


def test_labels_of_positions_are_not_taken_for_chances():
    """There may be as many positions as labels."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with Router(model, {"a": Region(units={"0": [0]})}, {0: Rule(), 1: Rule(["a"])}) as router:
        ids = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
        for refuses in (router.labels(ids).__enter__, lambda: router.backward(None, None, ids)):
            with pytest.raises(ValueError, match="add up to 1 for each sample; labels are ints"):
                refuses()


def test_batches_without_samples_are_refused():
    x, none = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

    def losses(model, x):
        return model(x).sum(1)

    with Router(model, {"a": Region(units={"0": [0]})}, {0: Rule(), 1: Rule(["a"])}) as router:
        for refuses in (
            router.labels(none).__enter__,
            lambda: router.backward(losses, x, none),
            lambda: router.check(losses, x, none),
        ):
            with pytest.raises(ValueError, match="labels are of no samples: leave empty batches"):
                refuses()


@pytest.mark.parametrize("mixing", [nn.LayerNorm(6), nn.Softmax(-1), nn.BatchNorm1d(6)])
def test_mlps_whose_hidden_units_mix_get_no_more(mixing):
    model = nn.Sequential(nn.Linear(3, 6), mixing, nn.Linear(6, 2))
    with pytest.raises(ValueError, match="or has a norm or softmax that mixes its units"):
        expand(model, "", units=2)
    around = nn.Sequential(
        nn.LayerNorm(3), nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2), nn.Softmax(-1)
    )
    x = torch.randn(4, 3)
    before = around(x)
    expand(around, "", units=2)
    torch.testing.assert_close(around(x), before)
