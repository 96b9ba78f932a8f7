"""What a part of a network knows, how much leaks into it, and how fast what is gone comes back."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


def certify(
    train: Pair,
    test: Pair,
    *,
    decoder: nn.Module | None = None,
    steps: int = 1000,
    batch: int = 256,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Tensor:
    """How well a fresh decoder restores targets from a frozen part of a network.

    What is in the part can be restored; what cannot is a certificate that it is not there, as far
    as such a decoder can tell. The features are standardized by those of `train`.

    Args:
        train: features `[N, d]` of a part, and targets `[N, n]`, to learn from.
        test: others, to judge by.
        decoder: trained in place; the default is an MLP with two hidden layers.
        steps: of Adam, on the mean absolute error.
        batch: samples of a step.
        learning_rate: falls to zero along a half cosine.
        seed: of the decoder's parameters and of what it sees.

    Returns:
        The mean absolute error of each test sample, `[M]`.

    Source: arXiv 2410.04332, section 4.1.
    """
    restore = fresh_decoder(
        train, decoder=decoder, steps=steps, batch=batch, learning_rate=learning_rate, seed=seed
    )
    return (restore(test[0]) - test[1]).abs().flatten(1).mean(1)


def fresh_decoder(
    train: Pair,
    *,
    decoder: nn.Module | None = None,
    steps: int = 1000,
    batch: int = 256,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Callable[[Tensor], Tensor]:
    """The decoder that `certify` trains: what it restores from features `[M, d]`, `[M, n]`."""
    features, targets = (part.detach() for part in train)
    mean, deviation = features.mean(0), features.std(0).clamp_min(1e-6)
    generator = torch.Generator().manual_seed(seed)
    if decoder is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            decoder = _mlp(features.shape[1], targets.shape[1]).to(features)
    trained = decoder
    optimizer = torch.optim.Adam(trained.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    features = (features - mean) / deviation
    for _ in range(steps):
        rows = torch.randint(len(features), (batch,), generator=generator).to(features.device)
        optimizer.zero_grad()
        error = (trained(features[rows]) - targets[rows]).abs().mean()
        error.backward()
        optimizer.step()
        schedule.step()

    @torch.no_grad()
    def restore(features: Tensor) -> Tensor:
        return trained((features - mean) / deviation)  # type: ignore[no-any-return]

    return restore


def _mlp(inputs: int, outputs: int, width: int = 256) -> nn.Module:
    layers = nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def leakage(certificate: float, decoder: float, constant: float) -> float:
    """How much of what is to be learned about a group is known to the part that is not for it.

    Args:
        certificate: error on the group of what is restored from the foreign part.
        decoder: error of the network itself, which has all parts.
        constant: error of the best constant, which knows nothing.

    Returns:
        0 if the foreign part tells no more than a constant, 1 if as much as the network.
    """
    if not decoder < constant:
        raise ValueError(
            f"leakage: the network's error {decoder} must be below the constant's {constant}"
        )
    return (constant - certificate) / (constant - decoder)


def relearn(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Sequence[Any],
    evaluate: Callable[[nn.Module], float],
    *,
    steps: int = 30,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = torch.optim.AdamW,
) -> list[float]:
    """How fast a model learns again what it was to forget: shallow unlearning returns at once.

    Args:
        model: a copy of it is trained.
        loss_fn: losses of a model and a batch, of any shape; their mean is minimized.
        batches: of data to relearn from, taken in turns.
        evaluate: what is asked of the model before and after each step, such as its loss on
            others of the kind.
        steps: how many.
        optimizer: makes one from parameters; its settings decide what "fast" is.

    Returns:
        What `evaluate` said, `steps + 1` numbers.
    """
    learner = copy.deepcopy(model)
    step = optimizer([p for p in learner.parameters() if p.requires_grad])
    curve = [evaluate(learner)]
    for count in range(steps):
        step.zero_grad()
        loss_fn(learner, batches[count % len(batches)]).mean().backward()
        step.step()
        curve.append(evaluate(learner))
    return curve


def precision_recall(taken: Tensor, truth: Tensor, label: int) -> tuple[float, float]:
    """How many samples on a label's route belong there, and how many that belong there are on it.

    A wrong route costs more than a missing one: what is routed to the wrong part stays there.

    Args:
        taken: labels that samples were routed by, `[N]`.
        truth: labels that they should have had, `[N]`.
        label: the one to ask about.

    Returns:
        Precision and recall; nan if nothing was on the route, or nothing belonged there.
    """
    on, meant = taken == label, truth == label
    right = float((on & meant).sum())
    return (
        right / float(on.sum()) if on.any() else float("nan"),
        right / float(meant.sum()) if meant.any() else float("nan"),
    )
