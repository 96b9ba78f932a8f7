"""Gradient routing for any network, against gradients that are made sample by sample."""

import pytest
import torch
from routing import next_word, transformer
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from oversight_rl.agents.routing import Region, Router, Rule
from oversight_rl.experiments.unlearning.model import LanguageModel

WEIGHTS = {0: 0.0, 1: 1.0, 2: 0.3, 3: -0.75}
RULES = {label: Rule({"part": w, "rest": 1 - w / 3}) for label, w in WEIGHTS.items()}
B = 8


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class Residual(nn.Module):
    """Adds an RMSNorm and a convolution without bias to what it gets."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.RMSNorm(5), nn.Conv1d(4, 4, 3, padding=1, bias=False)

    def forward(self, x):
        return x + self.conv(self.norm(x))


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def cnn():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, 2, padding=1),
        nn.GroupNorm(2, 4),
        nn.GELU(),
        nn.Conv2d(4, 6, (2, 1), stride=(2, 1), dilation=1, groups=2),
        nn.Flatten(),
        nn.Linear(24, 20),
        nn.Unflatten(1, (4, 5)),
        Residual(),
        nn.Flatten(),
        nn.Linear(20, 3),
    )


def squares(model, batch):
    x, y = batch
    return ((model(x) - y) ** 2).mean(-1)


def rows(*names, at):
    """By hand: entries of the region in the rows of these parameters."""
    return {name: (slice(at.start, at.stop),) for name in names}


class Shared(nn.Module):
    """One MLP, used twice, by two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
        self.second, self.head = self.first, nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.second(x + self.first(x)))


ALL = (...,)
CASES = {
    "mlp": (mlp, Region(units={"2": slice(3, 6)}), rows("2.weight", "2.bias", at=slice(3, 6))),
    "mlp: columns": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)),
        Region(units={"": [0, -1]}),
        {"0.weight": ([0, 7],), "0.bias": ([0, 7],), "2.weight": (slice(None), [0, 7])},
    ),
    "mlp: whole": (
        mlp,
        Region(params=["0.*", "4.bias"]),
        {"0.weight": ALL, "0.bias": ALL, "4.bias": ALL},
    ),
    "shared": (
        Shared,
        Region(units={"first": [1]}),
        {"first.0.weight": ([1],), "first.0.bias": ([1],), "first.2.weight": (slice(None), [1])},
    ),
    "cnn": (
        cnn,
        Region(units={"1": [2], "4": slice(-2, None)}, params=["2.weight", "8.norm.*"]),
        {
            "1.weight": ([2],), "1.bias": ([2],), "4.weight": ([4, 5],), "4.bias": ([4, 5],),
            "2.weight": ALL, "8.norm.weight": ALL,
        },
    ),
    "transformer": (
        transformer,
        Region(units={"blocks.*.mlp": slice(100, 128)}, heads={"blocks.1.attention": [3]}),
        {
            **{f"blocks.{i}.mlp.0.{p}": (slice(100, 128),) for i in (0, 1)
               for p in ("weight", "bias")},
            **{f"blocks.{i}.mlp.2.weight": (slice(None), slice(100, 128)) for i in (0, 1)},
            **{f"blocks.1.attention.qkv.{p}": ([36 + j + 48 * k for k in range(3)
                                                for j in range(12)],) for p in ("weight", "bias")},
            "blocks.1.attention.out.weight": (slice(None), slice(36, 48)),
        },
    ),
}  # fmt: skip


def data(model):
    ids = torch.tensor([0, 1, 2, 3, 0, 2, 1, 3])[:B]
    if isinstance(model, LanguageModel):
        return next_word, torch.randint(0, 268, (B, 9)), ids
    return squares, (torch.randn(B, 6), torch.randn(B, 3)), ids


def per_sample(model, loss_fn, batch):
    """Gradients of the samples' losses by torch.func, `[B, ...]` each."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, sample):
        one = [s[None] for s in sample] if isinstance(sample, tuple) else sample[None]
        return loss_fn(
            lambda *x: functional_call(model, parameters, x, tie_weights=False), one
        ).sum()

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no batching rule
        return vmap(grad(loss), (None, 0))(parameters, batch)


def expected(model, loss_fn, batch, weights, entries, samples=None):
    """The sum of weighted gradients, from weights `[B, 2]` of rest and part."""
    total = {}
    for name, of_sample in (samples or per_sample(model, loss_fn, batch)).items():
        weight = weights[:, 0].view(-1, *[1] * (of_sample.ndim - 1)).repeat(1, *of_sample.shape[1:])
        if name in entries:
            inside = torch.zeros(of_sample.shape[1:], dtype=torch.bool)
            inside[entries[name]] = True
            weight[:, inside] = weights[:, 1:]
        total[name] = (weight * of_sample).sum(0) / len(of_sample)
    return total


def weights_of(ids):
    part = torch.tensor([WEIGHTS[i] for i in ids.tolist()])
    return torch.stack([1 - part / 3, part], 1)


def assert_gradients(model, wanted, tolerance=1e-12):
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, parameter in model.named_parameters():
        difference = (parameter.grad - wanted[name]).abs().max() / largest
        assert difference <= tolerance, (name, float(difference))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ["labels", "backward", "compiled"])
def test_gradients_are_those_of_samples_weighted(case, engine):
    make, region, entries = CASES[case]
    model = make()
    loss_fn, batch, ids = data(model)
    wanted = expected(model, loss_fn, batch, weights_of(ids), entries)
    plain = loss_fn(model, batch)
    with Router(model, {"part": region}, RULES) as router:
        if engine == "backward":
            assert torch.allclose(router.backward(loss_fn, batch, ids), plain.mean())
        else:
            run = torch.compile(model, backend="aot_eager", fullgraph=True)
            run = run if engine == "compiled" else model
            with router.labels(ids):
                losses = loss_fn(run, batch)
                assert torch.equal(losses, plain)
                losses.mean().backward()
        assert_gradients(model, wanted)
        if engine == "labels":
            assert router.check(loss_fn, batch, ids) < 1e-12


# ---- what would be silently wrong


def test_a_region_that_is_off_twice_comes_back():
    model = mlp()
    router = Router(model, {"part": Region(units={"0": slice(4)})}, {0: Rule(["rest"])})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for order in ((0, 1), (1, 0)):
        off = [router.ablate("part"), router.ablate("part")]
        assert not model[0].weight[:4].any()
        for which in order:
            off[which].restore()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_closed_router_routes_nothing_and_says_so():
    model = mlp()
    loss_fn, batch, ids = data(model)
    with Router(model, {"part": Region(units={"0": slice(4)})}, RULES) as router:
        pass
    with pytest.raises(ValueError, match="the router is closed"), router.labels(ids):
        pass
    with pytest.raises(ValueError, match="the router is closed"):
        router.backward(loss_fn, batch, ids)


def test_parameters_that_came_later_are_refused():
    model = mlp()
    loss_fn, batch, ids = data(model)
    router = Router(model, {"part": Region(units={"0": slice(4)})}, RULES)
    with pytest.raises(ValueError, match="none that the model had"):
        router.optimizer(torch.optim.SGD(mlp().parameters(), 0.1))
    model.load_state_dict(mlp().state_dict(), assign=True)
    with pytest.raises(ValueError, match="none that the model had"):
        router.backward(loss_fn, batch, ids)


@pytest.mark.parametrize("chance", [-0.5, 5.0, float("nan")])
def test_chances_are_chances(chance):
    model = mlp()
    loss_fn, batch, _ = data(model)
    router = Router(model, {"part": Region(units={"0": slice(4)})}, RULES)
    with pytest.raises(ValueError, match=r"chances must lie in \[0, 1\]"):
        router.backward(loss_fn, batch, torch.full((B, len(RULES)), chance))
