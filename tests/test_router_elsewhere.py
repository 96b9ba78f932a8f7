"""Gradient routing in other people's modules and circumstances; see tests/test_router.py."""

import copy

import pytest
import torch
from gymnasium import spaces
from routing import next_word, transformer
from stable_baselines3.common.policies import ActorCriticPolicy
from test_router import (
    ALL,
    CASES,
    RULES,
    WEIGHTS,
    B,
    assert_gradients,
    cnn,
    data,
    double,  # noqa: F401  (used by all)
    expected,
    mlp,
    rows,
    squares,
    weights_of,
)
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from oversight_rl.agents.routing import Region, Router, Rule, expand

# ---- other modules


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(6, 5, 2, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):  # [B, 6], seen three times
        hidden, _ = self.gru(x[:, None].expand(-1, 3, -1))
        return self.head(hidden[:, -1])


def sb3_loss(policy, batch):
    observation, action = batch
    value, log_prob, entropy = policy.evaluate_actions(observation, action)
    return value[:, 0] ** 2 - log_prob - 0.1 * entropy


def one_by_one(model, loss_fn, batch, weights, entries):
    """The same sum by a loop over samples."""
    samples = []
    for row in range(B):
        model.zero_grad()
        loss_fn(model, tuple(part[row : row + 1] for part in batch)).sum().backward()
        samples.append({name: p.grad.clone() for name, p in model.named_parameters()})
    model.zero_grad()
    stacked = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    return expected(model, loss_fn, batch, weights, entries, stacked)


def test_recurrent_networks_go_by_groups():
    model = Recurrent()
    _, batch, ids = data(model)
    entries = {name: ALL for name, _ in model.named_parameters() if name.startswith("gru")}
    wanted = one_by_one(model, squares, batch, weights_of(ids), entries)
    router = Router(model, {"part": Region(params=["gru.*"])}, RULES)
    with (
        pytest.raises(ValueError, match=r"'gru' is a GRU.*use router.backward"),
        router.labels(ids),
    ):
        pass
    router.backward(squares, batch, ids)
    assert_gradients(model, wanted)
    assert router.check(squares, batch, ids) < 1e-12
    assert_gradients(model, wanted)  # which checking leaves alone


@pytest.mark.parametrize("engine", ["labels", "backward"])
def test_a_policy_of_stable_baselines(engine):
    torch.set_default_dtype(torch.float32)  # which SB3 casts to
    box = spaces.Box(-1, 1, (6,))
    policy = ActorCriticPolicy(box, spaces.Discrete(3), lambda _: 1e-3, net_arch=[8, 8])
    batch = torch.randn(B, 6), torch.randint(0, 3, (B,))
    _, _, ids = data(policy)
    layers = [f"mlp_extractor.{net}_net.2" for net in ("policy", "value")]
    names = [f"{layer}.{p}" for layer in layers for p in ("weight", "bias")]
    entries = rows(*names, at=slice(5, 8))
    wanted = one_by_one(policy, sb3_loss, batch, weights_of(ids), entries)
    region = Region(units={"mlp_extractor.*.2": slice(5, 8)})
    with Router(policy, {"part": region}, RULES) as router:
        if engine == "backward":
            router.backward(sb3_loss, batch, ids)
        else:
            with router.labels(ids):
                sb3_loss(policy, batch).mean().backward()
        assert_gradients(policy, wanted, 1e-6)
        assert router.check(sb3_loss, batch, ids) < 1e-6


def gpt2():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=3,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double()


def gpt2_loss(model, ids):
    logits = model(ids[:, :-1]).logits
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


@pytest.mark.parametrize("engine", ["labels", "backward"])
def test_gpt2_whose_embeddings_are_tied(engine):
    model = gpt2()
    batch = torch.randint(0, 50, (B, 9))
    ids = data(mlp())[2]
    region = expand(model, "transformer.h.*.mlp", units=8)
    with torch.no_grad():
        for block in model.transformer.h:  # as if trained
            block.mlp.c_proj.weight.normal_(0, 0.1)
    added = slice(96, 104)
    entries = {"transformer.h.1.attn.c_proj.weight": (slice(0, 8),)}
    entries["transformer.h.1.attn.c_attn.bias"] = ([*range(8), *range(24, 32), *range(48, 56)],)
    entries["transformer.h.1.attn.c_attn.weight"] = (
        slice(None), entries["transformer.h.1.attn.c_attn.bias"][0])  # fmt: skip
    for i in (0, 1):
        entries[f"transformer.h.{i}.mlp.c_fc.weight"] = (slice(None), added)
        entries[f"transformer.h.{i}.mlp.c_fc.bias"] = (added,)
        entries[f"transformer.h.{i}.mlp.c_proj.weight"] = (added,)
    region = Region(units=region.units, heads={"transformer.h.1.attn": [0]})
    wanted = one_by_one(model, lambda m, x: gpt2_loss(m, x[0]), (batch,), weights_of(ids), entries)
    with Router(model, {"part": region}, RULES) as router:
        if engine == "backward":
            router.backward(gpt2_loss, batch, ids)
        else:
            with router.labels(ids):
                gpt2_loss(model, batch).mean().backward()
        assert_gradients(model, wanted)
        assert router.check(gpt2_loss, batch, ids) < 1e-12


# ---- other circumstances


def test_labels_of_positions():
    """Against a layer whose weight is a tensor for each position."""
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    x, y = torch.randn(4, 5, 6), torch.randn(4, 5, 3)
    ids = torch.randint(0, 4, (4, 5))
    copies = [
        p.detach().expand(4, 5, *p.shape).clone().requires_grad_() for p in model.parameters()
    ]
    inner = torch.einsum("btoi,bti->bto", copies[0], x) + copies[1]
    outer = torch.einsum("btoi,bti->bto", copies[2], F.gelu(inner)) + copies[3]
    ((outer - y) ** 2).mean().backward()
    part = torch.tensor([WEIGHTS[i] for i in ids.flatten().tolist()]).view(4, 5)
    with Router(model, {"part": Region(units={"": slice(0, 5)})}, RULES) as router:
        with router.labels(ids):
            ((model(x) - y) ** 2).mean().backward()
        for index, parameter in enumerate(model.parameters()):
            inside = torch.zeros(parameter.shape, dtype=torch.bool)
            inside[[slice(5), slice(5), (slice(None), slice(5)), slice(0)][index]] = True
            weight = torch.where(inside, part[..., None, None], 1 - part[..., None, None] / 3)
            weight = weight[..., 0, :] if parameter.ndim == 1 else weight
            wanted = (weight * copies[index].grad).sum((0, 1))
            torch.testing.assert_close(parameter.grad, wanted, rtol=0, atol=1e-15)


def test_chances_of_labels_weight_what_the_rules_say():
    model = mlp()
    loss_fn, batch, ids = data(model)
    region, entries = CASES["mlp"][1:]
    chances = torch.rand(B, 4)
    chances /= chances.sum(1, keepdim=True)
    mean = chances @ weights_of(torch.arange(4))
    wanted = expected(model, loss_fn, batch, mean, entries)
    with Router(model, {"part": region}, RULES) as router:
        with router.labels(chances):
            loss_fn(model, batch).mean().backward()
        assert_gradients(model, wanted)
        model.zero_grad()
        router.backward(loss_fn, batch, chances)
        assert_gradients(model, wanted)
        model.zero_grad()
        with router.labels(F.one_hot(ids, 4).double()):
            loss_fn(model, batch).mean().backward()
        assert_gradients(model, expected(model, loss_fn, batch, weights_of(ids), entries))


def test_what_a_label_switches_off_is_as_if_it_were_zero():
    model = transformer()
    ids = torch.arange(B) % 3
    batch = torch.randint(0, 268, (B, 9))
    region = Region(units={"blocks.*.mlp": slice(0, 99)}, heads={"blocks.0.attention": [1]},
                    params=["blocks.1.norm_1.*"])  # fmt: skip
    rules = {0: Rule(["rest"], ablate=["part"]), 1: Rule(["part"]), 2: Rule()}
    with Router(model, {"part": region}, rules) as router:
        with router.labels(ids):
            losses = next_word(model, batch)
        with router.ablate("part"):
            off = next_word(model, batch)
        assert torch.allclose(losses, torch.where(ids == 0, off, next_word(model, batch)))
        assert not torch.allclose(losses[0], next_word(model, batch)[0])
        assert router.check(next_word, batch, ids) < 1e-12
        with router.labels(ids):
            next_word(model, batch).mean().backward()
        one_pass = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        router.backward(next_word, batch, ids)
        assert_gradients(model, one_pass)


def test_on_edges_gradients_of_activations_are_weighted():
    """Against activations that are routed by hand."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    loss_fn, (x, y), ids = data(model)
    weights = weights_of(ids)
    by_unit = torch.cat([weights[:, 1:].expand(-1, 5), weights[:, :1].expand(-1, 3)], 1)
    hidden = torch.tanh(model[0](x))
    routed = hidden * by_unit + (hidden * (1 - by_unit)).detach()
    ((model[2](routed) - y) ** 2).mean().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    for name in ("", "0"):  # the MLP, or its layer
        model.zero_grad()
        region = Region(units={name: slice(0, 5)})
        with Router(model, {"part": region}, RULES, on="edges") as router:
            with router.labels(ids):
                losses = loss_fn(model, (x, y))
                losses.mean().backward()
            assert torch.equal(losses, loss_fn(model, (x, y)))
            assert_gradients(model, wanted)
            assert router.check(loss_fn, (x, y), ids) < 1e-12
            model.zero_grad()
            router.backward(loss_fn, (x, y), ids)
            assert_gradients(model, wanted)


def test_compiled_code_knows_labels_that_come_and_go():
    model = mlp()
    loss_fn, batch, ids = data(model)
    region, entries = CASES["mlp"][1:]
    ones = torch.ones(B, 2)
    with Router(model, {"part": region}, RULES) as router:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for labels in (None, ids, None, ids.flip(0), ids):
            model.zero_grad()
            if labels is None:
                loss_fn(compiled, batch).mean().backward()
            else:
                with router.labels(labels):
                    loss_fn(compiled, batch).mean().backward()
            weights = ones if labels is None else weights_of(labels)
            assert_gradients(model, expected(model, loss_fn, batch, weights, entries))


def test_a_model_that_was_compiled_and_called_before_is_noticed():
    model = mlp()
    compiled = torch.compile(model, backend="eager")
    loss_fn, batch, ids = data(model)
    compiled(batch[0])
    router = Router(model, {"part": CASES["mlp"][1]}, RULES)
    with pytest.raises(ValueError, match=r"no routed layer .* was called"), router.labels(ids):
        loss_fn(compiled, batch).mean().backward()


def test_under_torch_func():
    model = mlp()
    loss_fn, batch, ids = data(model)
    region, entries = CASES["mlp"][1:]
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    wanted = expected(model, loss_fn, batch, weights_of(ids), entries)
    with Router(model, {"part": region}, RULES) as router:

        def loss(parameters, x, y, ids):
            with router.labels(ids):
                return ((functional_call(model, parameters, x) - y) ** 2).mean()

        whole = grad(loss)(parameters, *batch, ids)
        single = vmap(grad(loss), (None, 0, 0, 0))(parameters, *batch, ids)
    for name in parameters:
        torch.testing.assert_close(whole[name], wanted[name], rtol=0, atol=1e-15)
        torch.testing.assert_close(single[name].mean(0), wanted[name], rtol=0, atol=1e-15)


@pytest.mark.parametrize("make", [mlp, cnn, transformer])
def test_autocast_is_as_exact_as_without_routing(make):
    torch.set_default_dtype(torch.float32)
    model = make()
    loss_fn, batch, _ = data(model)
    batch = tuple(part.float() for part in batch) if isinstance(batch, tuple) else batch
    gradients = []
    with Router(model, {"part": Region(params=["*"])}, {0: Rule({"part": 0.5})}) as router:
        for scale in (0.5, 1.0):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                if scale == 1:
                    with router.labels(torch.zeros(B, dtype=torch.long)):
                        loss_fn(model, batch).mean().backward()
                else:
                    (loss_fn(model, batch).mean() * scale).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    plain, routed = gradients
    assert (plain - routed).norm() <= 0.01 * plain.norm()


def test_gradients_accumulate():
    model = mlp()
    loss_fn, (x, y), ids = data(model)
    region, entries = CASES["mlp"][1:]
    with Router(model, {"part": region}, RULES) as router:
        for at in (slice(0, 3), slice(3, None)):
            with router.labels(ids[at]):
                (loss_fn(model, (x[at], y[at])).sum() / B).backward()
    assert_gradients(model, expected(model, loss_fn, (x, y), weights_of(ids), entries))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints(reentrant):
    model = mlp()
    _, (x, y), ids = data(model)
    region, entries = CASES["mlp"][1:]
    wanted = expected(model, squares, (x, y), weights_of(ids), entries)

    def forward(x):
        hidden = model[:2](x)
        return model[4](checkpoint(model[2:4], hidden, use_reentrant=reentrant))

    with Router(model, {"part": region}, RULES) as router, router.labels(ids):
        ((forward(x) - y) ** 2).mean().backward()
    assert_gradients(model, wanted)


def test_gradients_of_gradients():
    model = mlp()
    loss_fn, batch, _ = data(model)
    with Router(model, {"part": CASES["mlp"][1]}, {**RULES, 9: Rule()}) as router:
        seconds = []
        for labels in (None, torch.full((B,), 9)):
            model.zero_grad()
            if labels is None:
                loss = loss_fn(model, batch).mean()
            else:
                with router.labels(labels):
                    loss = loss_fn(model, batch).mean()
            first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
            sum((gradient**2).sum() for gradient in first).backward()
            seconds.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, second in seconds[0].items():
        torch.testing.assert_close(seconds[1][name], second)


# ---- others' hooks


def test_hooks_of_the_user_work_as_ever():
    def forward(hooked):
        seen = []
        if hooked:
            model[2].register_forward_hook(lambda m, args, output: output * 2)
            model[2].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
            model[2].register_full_backward_hook(lambda m, ins, outs: seen.append(ins[0].clone()))
            model[2].weight.register_hook(lambda g: seen.append(g.clone()))
        return seen

    model = mlp()
    loss_fn, batch, ids = data(model)
    everything = {**RULES, 9: Rule()}
    seen = forward(True)
    before = copy.copy(model[2]._forward_hooks)
    loss_fn(model, batch).mean().backward()
    plain, gradient = seen[:], model[2].weight.grad.clone()
    seen.clear()
    model.zero_grad()
    with Router(model, {"part": CASES["mlp"][1]}, everything) as router:
        with router.labels(torch.full((B,), 9)):
            loss_fn(model, batch).mean().backward()
        for a, b in zip(seen, plain, strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(model[2].weight.grad, gradient)
        assert router.check(loss_fn, batch, ids) < 1e-12
    assert model[2]._forward_hooks == before
    assert not any(m._forward_hooks for m in model if m is not model[2])


def test_a_model_has_one_router_at_a_time():
    model = mlp()
    router = Router(model, {"part": CASES["mlp"][1]}, RULES)
    with pytest.raises(ValueError, match="has a router already"):
        Router(model, {"part": CASES["mlp"][1]}, RULES)
    router.close()
    Router(model, {"part": CASES["mlp"][1]}, RULES)


def test_checking_drops_nothing():
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    loss_fn, batch, ids = data(model)
    with Router(model, {"part": Region(units={"0": slice(0, 3)})}, RULES) as router:
        assert router.check(loss_fn, batch, ids) < 1e-12
    assert model[1].p == 0.5
    assert all(parameter.grad is None for parameter in model.parameters())
