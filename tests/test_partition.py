"""Parts of networks: added, removed, switched off, left where they are; and what is refused."""

import copy

import pytest
import torch
from routing import next_word, transformer
from torch import nn

from oversight_rl.agents.routing import Region, Router, Rule, expand, merge

FORGET = {0: Rule(["rest"]), 1: Rule(["part"])}
WORDS = torch.randint(0, 268, (6, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trained(model, steps=3):
    """Where nothing is zero any more."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        next_word(model, WORDS).mean().backward()
        optimizer.step()
    model.zero_grad()
    return model


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


# ---- added and removed


@pytest.mark.parametrize("how", [{"units": 32}, {"rank": 8}])
def test_what_is_added_changes_nothing_and_is_removed_again(how):
    model = transformer()
    before, names = model(WORDS), [name for name, _ in model.named_parameters()]
    region = expand(model, "blocks.*.mlp", **how, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(WORDS), before, rtol=0, atol=1e-6)
    trained(model)
    assert not torch.allclose(model(WORDS), before, atol=1e-2)
    with Router(model, {"part": region}, FORGET) as router:
        small = router.contract("part")
        assert [name for name, _ in small.named_parameters()] == names
        with router.ablate("part"):
            off = model(WORDS)
        assert not torch.allclose(model(WORDS), off, atol=1e-3)
    torch.testing.assert_close(small(WORDS), off)
    assert sum(p.numel() for p in small.parameters()) == sum(
        p.numel() for p in transformer().parameters()
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())
    sizes = small.blocks[0].mlp[0].out_features, small.blocks[0].mlp[2].in_features
    assert sizes == (128, 128)


def test_units_of_a_gated_mlp():
    model = nn.Sequential(Gated())
    x = torch.randn(5, 4)
    before = model(x)
    region = expand(model, "0", units=2)
    torch.testing.assert_close(model(x), before)
    with torch.no_grad():
        model[0].down.weight.normal_()
    router = Router(model, {"part": region}, FORGET)
    assert not torch.allclose(model(x), before)
    small = router.contract("part")
    router.ablate("part")
    torch.testing.assert_close(small(x), model(x))
    assert small[0].gate.out_features == small[0].up.out_features == 6


def test_one_adapter_is_removed_and_the_other_merged():
    model = transformer()
    names = [name for name, _ in model.named_parameters()]
    kept = expand(model, "blocks.*", rank=2)
    quarantine = expand(model, "blocks.*", rank=3)
    trained(model)
    rules = {0: Rule(["kept"], ablate=["quarantine"]), 1: Rule(["quarantine"]),
             2: Rule(["kept", "quarantine"])}  # fmt: skip
    router = Router(model, {"kept": kept, "quarantine": quarantine}, rules)
    ids = torch.tensor([0, 1, 2, 0, 1, 2])
    assert router.check(next_word, WORDS, ids) < 1e-5
    with router.labels(ids):
        next_word(model, WORDS).mean().backward()
    assert not model.head.weight.grad.any()
    small = merge(router.contract("quarantine"))
    router.ablate("quarantine")
    torch.testing.assert_close(small(WORDS), model(WORDS))
    assert [name for name, _ in small.named_parameters()] == names


def test_what_cannot_be_removed_is_refused():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    router = Router(model, {"part": Region(units={"0": [0]})}, FORGET)
    with pytest.raises(ValueError, match=r"contract: '0\.\w+' .* not removed"):
        router.contract("part")


def test_switched_off_until_restored():
    model = trained(transformer())
    before = copy.deepcopy(model.state_dict())
    router = Router(model, {"part": Region(heads={"blocks.0.attention": [2]})}, FORGET)
    ablation = router.ablate("part")
    weight = model.blocks[0].attention.out.weight
    assert not weight[:, 24:36].any()
    assert torch.equal(weight[:, 36:], before["blocks.0.attention.out.weight"][:, 36:])
    ablation.restore()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- left where they are

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True, foreach=True),
}


def momenta(optimizer, model):
    """What it holds for the added units of an MLP's first layer."""
    held = optimizer.state[model.blocks[1].mlp[0].weight].values()
    kept = [value[128:] for value in held if isinstance(value, torch.Tensor) and value.ndim]
    assert kept
    return torch.stack(kept)


@pytest.mark.parametrize(("name", "engine"), [*((name, "labels") for name in OPTIMIZERS),
                                              ("adamw", "backward")])  # fmt: skip
def test_masked_entries_do_not_move_and_others_move_as_ever(name, engine):
    """After both parts have gained momentum, by plain steps that a twin takes, too."""
    model = transformer()
    region = expand(model, "blocks.*.mlp", units=4)
    twin = copy.deepcopy(model)
    router = Router(model, {"part": region}, FORGET)
    optimizer = router.optimizer(OPTIMIZERS[name](model.parameters()))
    plain = OPTIMIZERS[name](twin.parameters())
    rest, part = torch.zeros(6).long(), torch.ones(6).long()

    def step(ids):
        optimizer.zero_grad()
        if engine == "backward":
            router.backward(next_word, WORDS, ids)
        else:
            with router.labels(ids):
                next_word(model, WORDS).mean().backward()
        optimizer.step()

    def added(state):
        mlp = "blocks.1.mlp."
        rows = [state[f"{mlp}0.weight"][128:], state[f"{mlp}0.bias"][128:]]
        return torch.cat([*(r.flatten() for r in rows), state[f"{mlp}2.weight"][:, 128:].flatten()])

    for _ in range(2):
        for one, step_of_one in ((model, optimizer), (twin, plain)):
            step_of_one.zero_grad()
            next_word(one, WORDS).mean().backward()
            step_of_one.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    before, momentum = copy.deepcopy(model.state_dict()), momenta(optimizer, model)
    for _ in range(100):
        step(rest)
    after = copy.deepcopy(model.state_dict())
    assert torch.equal(momenta(optimizer, model), momentum)
    assert torch.equal(added(after), added(before))
    assert not torch.equal(after["head.weight"], before["head.weight"])
    for _ in range(100):
        step(part)
    last = model.state_dict()
    assert not torch.equal(added(last), added(after))
    for name, value in last.items():
        same = value == after[name]
        if ".mlp." in name:
            same[(..., slice(128, None)) if name.endswith("2.weight") else slice(128, None)] = True
            same |= name.endswith("2.bias") and value == after[name]
        assert same.all(), name


def test_closing_takes_the_optimizers_hooks_away():
    model = transformer()
    router = Router(model, {"part": Region(units={"blocks.*.mlp": [0]})}, FORGET)
    optimizer = router.optimizer(torch.optim.SGD(model.parameters(), 0.1))
    assert optimizer._optimizer_step_pre_hooks
    router.close()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---- refused, in one line


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x))


REFUSED = {
    "a glob that fits nothing": (
        lambda: Router(transformer(), {"part": Region(units={"block.*.mlp": [0]})}, FORGET),
        r"no module fits 'block\.\*\.mlp'; did you mean 'blocks\.\*\.mlp'",
    ),
    "a parameter that is not there": (
        lambda: Router(transformer(), {"part": Region(params=["head.wait"])}, FORGET),
        r"no parameter fits 'head\.wait'; did you mean 'head\.weight'",
    ),
    "units past the end": (
        lambda: Router(
            transformer(), {"part": Region(units={"blocks.*.mlp": slice(120, 130)})}, FORGET
        ),
        r"units of 'blocks\.0\.mlp': slice\(120, 130, None\) goes past the end, there are 128",
    ),
    "heads past the end": (
        lambda: Router(transformer(), {"part": Region(heads={"blocks.*.attention": [4]})}, FORGET),
        "goes past the end, there are 4",
    ),
    "units of what has none": (
        lambda: Router(nn.GRU(2, 3), {"part": Region(units={"": [0]})}, FORGET),
        "a GRU has none",
    ),
    "heads of what has none": (
        lambda: Router(transformer(), {"part": Region(heads={"blocks.0.mlp": [0]})}, FORGET),
        "a Sequential is no attention",
    ),
    "overlap": (
        lambda: Router(
            transformer(),
            {"part": Region(units={"blocks.*.mlp": slice(0, 9)}),
             "b": Region(units={"blocks.1.mlp": [8]})},
            FORGET,
        ),
        r"regions 'part' and 'b' overlap in 'blocks\.1\.mlp\.0\.weight'",
    ),
    "a region called rest": (
        lambda: Router(transformer(), {"rest": Region(params=["head.*"])}, FORGET),
        "choose another name",
    ),
    "a rule without its region": (
        lambda: Router(transformer(), {"part": Region(params=["head.*"])}, {0: Rule(["parts"])}),
        "no region 'parts'; did you mean 'part'",
    ),
    "trained and switched off": (
        lambda: Router(
            transformer(), {"part": Region(params=["head.*"])}, {0: Rule(["part"], ["part"])}
        ),
        "cannot be both",
    ),
    "no rules": (
        lambda: Router(transformer(), {"part": Region(params=["head.*"])}, {}),
        "by labels that are ints",
    ),
    "labels in words": (
        lambda: Router(transformer(), {"part": Region(params=["head.*"])}, {"keep": Rule()}),
        r"rules must be given by labels that are ints, like \{0: ",
    ),
    "a weight that is no number": (
        lambda: Router(
            transformer(), {"part": Region(params=["head.*"])}, {0: Rule({"part": float("nan")})}
        ),
        "weight of 'part' must be finite, got nan",
    ),
    "tied": (
        lambda: Router(Tied(), {"part": Region(params=["head.weight"])}, FORGET),
        r"'head\.weight' is tied to 'embedding\.weight'.* other end",
    ),
    "parameters on edges": (
        lambda: Router(transformer(), {"part": Region(params=["head.*"])}, FORGET, on="edges"),
        "give it units or heads",
    ),
    "compiled": (
        lambda: Router(
            torch.compile(nn.Linear(2, 2)), {"part": Region(params=["*weight"])}, FORGET
        ),
        "compiled already",
    ),
    "compiled in place": (
        lambda: Router(in_place(), {"part": Region(params=["*weight"])}, FORGET),
        "'0' is compiled already",
    ),
    "expanded where there is no mlp": (
        lambda: expand(transformer(), "blocks.*.attention", units=2),
        r"'blocks\.0\.attention', a Attention, is no MLP",
    ),
    "expanded by nothing": (lambda: expand(transformer(), "blocks.*.mlp"), "must be positive"),
    "expanded where it is tied": (lambda: expand(Tied(), "head", rank=2), "is tied"),
}  # fmt: skip


def in_place():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].compile()
    return model


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_in_a_line(what):
    make, says = REFUSED[what]
    with pytest.raises(ValueError, match=says) as refused:
        make()
    assert "\n" not in str(refused.value)


LABELS = {
    "unknown": (torch.tensor([0, 1, 7, 0, 0, 0]), "no rule for label 7; there are 0, 1"),
    "another shape": (torch.zeros(5, dtype=torch.long), r"labels \(5,\) do not fit 'word'"),
    "too many axes": (torch.zeros(6, 9, 9, dtype=torch.long), r"labels \(6, 9, 9\) do not fit"),
    "chances of other labels": (torch.rand(6, 3), r"one for each of 2 labels"),
    "no tensor": ([0, 1, 0, 1, 0, 1], "must be a tensor"),
}


@pytest.mark.parametrize("what", LABELS)
def test_labels_are_refused(what):
    ids, says = LABELS[what]
    model = transformer()
    with Router(model, {"part": Region(units={"blocks.*.mlp": [0]})}, FORGET) as router:
        with pytest.raises(ValueError, match=says), router.labels(ids):
            model(WORDS)
        model(WORDS)  # nothing stays behind


def test_batch_norm_mixes_samples_unless_it_keeps_its_statistics():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    ids, batch = torch.tensor([0, 1, 0]), torch.randn(3, 4)

    def loss_fn(model, x):
        return (model(x) ** 2).mean(1)

    router = Router(model, {"part": Region(units={"0": [0]})}, {0: Rule(), 1: Rule({"rest": 1})})
    for use in (
        lambda: router.labels(ids).__enter__(),
        lambda: router.backward(loss_fn, batch, ids),
    ):
        with pytest.raises(ValueError, match="'1' is a BatchNorm1d, which mixes the samples"):
            use()
    model[1].eval()
    assert router.check(loss_fn, batch, ids) < 1e-6


@pytest.mark.parametrize(
    ("batch", "loss_fn", "says"),
    [
        (torch.randn(5, 4), lambda m, x: m(x).mean(1), r"expected tensors of 6 samples.*\(5, 4\)"),
        ((torch.randn(6, 4), "x"), lambda m, x: m(x[0]).mean(1), "got str"),
        (torch.randn(6, 4), lambda m, x: m(x).mean(), r"loss for each of 3 samples, got \(\)"),
    ],
)
def test_groups_need_samples(batch, loss_fn, says):
    model = nn.Linear(4, 2)
    router = Router(model, {"part": Region(params=["bias"])}, FORGET)
    with pytest.raises(ValueError, match=says):
        router.backward(loss_fn, batch, torch.tensor([0, 1] * 3))
