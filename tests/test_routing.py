"""The routing primitive and its rules."""

import pytest
import torch

from oversight_rl.agents.methods import everything, own_expert_only
from oversight_rl.agents.routing import lookup, route

WEIGHTS = [0.0, 1.0, 0.3, -0.75]


@pytest.mark.parametrize("features", [(), (3,), (2, 4), (2, 3, 2)])
def test_identity_forward_weighted_backward(features):
    x = torch.randn(4, *features, requires_grad=True)
    upstream = torch.randn(4, *features)
    y = route(x, torch.tensor(WEIGHTS))
    assert torch.equal(y, x)
    y.backward(upstream)
    for i, weight in enumerate(WEIGHTS):
        assert torch.equal(x.grad[i], upstream[i] * weight)


def test_batches_of_any_rank():
    x = torch.randn(2, 5, 3, requires_grad=True)
    weight = torch.randn(2, 5)
    route(x, weight).sum().backward()
    assert torch.equal(x.grad, weight[..., None].expand(2, 5, 3))


def test_an_independent_stop_gradient_formula_agrees():
    x = torch.randn(6, 3, requires_grad=True)
    weight = torch.randn(6)
    w = weight[:, None]
    (g,) = torch.autograd.grad((route(x, weight) ** 3).sum(), x)
    (expected,) = torch.autograd.grad(((w * x + ((1 - w) * x).detach()) ** 3).sum(), x)
    torch.testing.assert_close(g, expected)


def test_under_torch_func_transforms():
    x, weight = torch.randn(4, 3), torch.tensor(WEIGHTS)

    def f(x, weight):
        return (route(x, weight) ** 2).sum()

    expected = 2 * x * weight[:, None]
    torch.testing.assert_close(torch.func.grad(f)(x, weight), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(f))(x, weight), expected)
    per_sample = torch.func.vmap(torch.func.grad(f), in_dims=(None, 0))(x[0], weight)
    torch.testing.assert_close(per_sample, 2 * x[0] * weight[:, None])
    tangent = torch.randn(4, 3)
    _, derivative = torch.func.jvp(lambda x: route(x, weight), (x,), (tangent,))
    torch.testing.assert_close(derivative, tangent * weight[:, None])


def test_under_torch_compile():
    compiled = torch.compile(
        lambda x, w: (route(x.tanh(), w) ** 2).sum(), backend="aot_eager", fullgraph=True
    )
    weight = torch.tensor(WEIGHTS)
    x = torch.randn(4, 3, requires_grad=True)
    compiled(x, weight).backward()
    expected = 2 * x.tanh() * (1 - x.tanh() ** 2) * weight[:, None]
    torch.testing.assert_close(x.grad, expected.detach())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    x = torch.randn(4, 3, device="cuda", requires_grad=True)
    route(x, torch.tensor(WEIGHTS, device="cuda")).sum().backward()
    assert torch.equal(x.grad.cpu(), torch.tensor(WEIGHTS)[:, None].expand(4, 3))


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="leading axes"):
        route(torch.randn(4, 3), torch.ones(3))


def test_rules():
    assert own_expert_only(2, 2) == [[1, 0, 0], [0, 1, 0]]
    assert own_expert_only(3, 2, other=-0.75) == [[1, -0.75, -0.75, 0], [-0.75, 1, -0.75, 0]]
    assert everything(2, 2) == [[1, 1, 1], [1, 1, 1]]


def test_each_run_looks_up_its_own_table():
    table = torch.arange(12.0).view(2, 3, 2)
    outcome = torch.tensor([[[0, 2]], [[1, 1]]])  # [R, T, N]
    expected = torch.tensor([[[[0, 1], [4, 5]]], [[[8, 9], [8, 9]]]], dtype=torch.float32)
    assert torch.equal(lookup(table, outcome), expected)
