"""Certificates, leakage, relearning, and precision and recall of routes, with known answers."""

import math

import pytest
import torch
from torch import nn

from oversight_rl.agents.routing import certify, leakage, precision_recall, relearn


def test_a_certificate_tells_what_is_in_a_part():
    torch.manual_seed(0)
    hidden = torch.randn(600, 3)
    targets = torch.stack([hidden[:, 0], hidden[:, 1]], 1)
    seen = hidden[:, :1] * 100 + 7  # the first alone, on a scale of its own

    def errors(**how):
        return certify((seen[:500], targets[:500]), (seen[500:], targets[500:]), **how)

    error = errors(steps=300)
    assert error.shape == (100,)
    unknown = targets[500:, 1].abs()
    torch.testing.assert_close(error, unknown / 2, rtol=0, atol=0.25)  # the median restores it
    assert abs(error.mean() - unknown.mean() / 2) < 0.05
    assert torch.equal(error, errors(steps=300))  # of its seed alone
    assert not torch.equal(error, errors(steps=300, seed=1))
    linear = errors(steps=300, decoder=nn.Linear(1, 2), learning_rate=0.1)
    assert abs(linear.mean() - error.mean()) < 0.05


def test_leakage_is_a_share_of_what_the_network_knows():
    assert leakage(0.36, 0.12, 0.36) == 0
    assert leakage(0.12, 0.12, 0.36) == 1
    assert leakage(0.24, 0.12, 0.36) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="must be below the constant's"):
        leakage(0.2, 0.4, 0.3)


def test_relearning_is_of_a_copy():
    """Gradient descent on w^2 / 2 goes w <- (1 - lr) w."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(2.0)
    curve = relearn(
        model,
        lambda m, batch: m(batch) ** 2 / 2,
        [torch.ones(1, 1), -torch.ones(1, 1)],
        lambda m: m.weight.item(),
        steps=3,
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.5),
    )
    assert curve == [2.0, 1.0, 0.5, 0.25]
    assert model.weight.item() == 2.0


def test_precision_and_recall_of_routes():
    taken, truth = torch.tensor([1, 1, 1, 0, 0]), torch.tensor([1, 0, 1, 1, 0])
    assert precision_recall(taken, truth, 1) == (2 / 3, 2 / 3)
    assert precision_recall(taken, truth, 0) == (1 / 2, 1 / 2)
    assert all(map(math.isnan, precision_recall(taken, truth, 7)))
