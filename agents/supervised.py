"""Learning of any network from batches: draw -> weight -> loss -> step, one run."""

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from oversight_rl.agents.learner import Bounds, Learner, fresh_moments
from oversight_rl.agents.settings import Schedule, at

Batch = TypeVar("Batch")


class SupervisedLearner(Learner, Generic[Batch]):
    """One run of a network in training.

    Whatever is drawn in an update (its batch, dropout) comes from torch's own generator, which is
    seeded anew from the run's seed and the update's number: all else that decides the future is in
    the model and the optimizer.

    Args:
        model: trained in place. Of its tensors, parameters and persistent buffers are saved.
        optimizer: Adam or AdamW of the model, before its first step; if its gradients are routed,
            `router.optimizer(...)`.
        draw: the batch of an update, by its number, from 0.
        backward: leaves the gradient of a batch in the model's parameters, routed or not, at a
            progress in [0, 1]; returns losses by name, always the same ones.
        updates: of a whole training.
        learning_rate: of the optimizer.
        seed: of the run.
        samples: of a batch, to tell how many were seen.
    """

    runs = 1

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Adam | torch.optim.AdamW,
        draw: Callable[[int], Batch],
        backward: Callable[[Batch, float], Mapping[str, Tensor]],
        *,
        updates: int,
        learning_rate: Schedule,
        seed: int,
        samples: int = 1,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.draw, self.backward = draw, backward
        self.updates, self.total, self.steps = 0, updates, samples
        self.learning_rate, self.seed = learning_rate, seed
        saved, named = model.state_dict(), dict(model.named_buffers())
        self.kept = {f"model.{name}": x for name, x in named.items() if name in saved}
        self.moving: dict[str, Tensor] = {}  # parameters and moments, by their names in checkpoints
        trained = {p for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            if parameter not in trained:
                self.kept[f"model.{name}"] = parameter.detach()
                continue
            self.moving[f"model.{name}"] = parameter.detach()
            moments = optimizer.state[parameter]
            moments.update(fresh_moments(parameter, "cpu"))
            self.moving |= {f"adam.{moment}.{name}": x for moment, x in moments.items()}
        self.losses: dict[str, Tensor] = {}

    def update(self) -> None:
        progress = self.updates / max(1, self.total - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = at(self.learning_rate, progress)
        with torch.random.fork_rng(devices=[]):
            _seed(self.seed, self.updates)
            batch = self.draw(self.updates)
            self.optimizer.zero_grad()
            self.losses = {k: x.detach() for k, x in self.backward(batch, progress).items()}
        self.optimizer.step()
        self.updates += 1

    def curves(self) -> list[dict[str, float]]:
        return [{f"loss/{name}": float(value) for name, value in self.losses.items()}]

    def numbers(self) -> dict[str, Tensor]:
        found = {f"{name} loss": value for name, value in self.losses.items()}
        moving = {name: x for name, x in self.moving.items() if not _is_count(name)}
        found |= zip(moving, torch._foreach_norm(list(moving.values())), strict=True)
        return {name: value.reshape(1) for name, value in found.items()}

    def learned(self) -> list[Tensor]:
        return [x[None] for x in self.moving.values()]

    def state(self, run: int) -> dict[str, Tensor]:
        return self.kept | self.moving

    def bounds(self) -> Bounds:
        return dict.fromkeys(filter(_is_count, self.moving), (0, self.updates))


def _is_count(name: str) -> bool:
    """Whether it is Adam's count of steps: a float, which an exponent comes of."""
    return name.startswith("adam.step.")


def _seed(*numbers: int) -> None:
    """Seed torch's generators; `torch.manual_seed` takes 0.4 ms, for a trace of its caller."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
