"""What a training loop knows of a learner, and how learners read what was saved of their runs."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from oversight_rl.envs.settings import UserError

Bounds: TypeAlias = dict[str, tuple[ArrayLike, ArrayLike]]
"""Least and greatest numbers that saved tensors can hold, by name; of rows, by column."""


class NotFinite(FloatingPointError):
    """A number of a run went bad in the midst of an update.

    Args:
        what: it is, in words that follow `the`.
        value: infinite or nan.
    """

    def __init__(self, what: str, value: float = math.nan) -> None:
        super().__init__(f"the {what} is not finite")
        self.what, self.value = what, value


class Learner(Protocol):
    """What trains R runs at once. The loop drives it and knows no more of it than this.

    The loop owns time, logs, checkpoints, evaluation, health and stopping. A learner that is a
    subclass says how it updates and what it learns; if that is all that its future hangs on, beside
    its seeds, the rest is as here.
    """

    runs: int
    """R."""
    updates: int
    """Done so far."""
    total: int
    """Updates of a whole training."""

    steps: int = 1
    """That each run takes in an update."""

    @property
    def env_steps(self) -> int:
        """Steps taken by each run so far, in looks between updates too; here, there are none."""
        return self.updates * self.steps

    def update(self) -> None:
        """One update of every run; numbers that go bad do not raise, see `numbers`."""

    def curves(self) -> list[dict[str, float]]:
        """Points of the training curves after an update, for each run; here, none."""
        return [{} for _ in range(self.runs)]

    def numbers(self) -> dict[str, Tensor]:
        """What the last update made, `[R]` each: finite if all is well; the same names each time.

        They are in the order in which they came to be. Here, the size of each tensor `learned`.
        """
        flat = [tensor.detach().reshape(self.runs, -1) for tensor in self.learned()]
        return {f"tensor {i} learned": tensor.norm(dim=-1) for i, tensor in enumerate(flat)}

    def learned(self) -> list[Tensor]:
        """All that learning changes in place (parameters, moments), `[R, ...]` each.

        The loop takes an update of a run back by copying into them.
        """

    def state(self, run: int) -> dict[str, Tensor]:
        """All that decides the future of a run, by name; of what learns no copies."""
        return {f"learned.{i}": tensor.detach()[run] for i, tensor in enumerate(self.learned())}

    def bounds(self) -> Bounds:
        """Least and greatest number in each tensor of whole numbers that `state` has by now."""
        return {}

    def load(self, states: Sequence[Mapping[str, Tensor]], update: int) -> None:
        """Go on from states, one for each run, taken after an update; here, all in place.

        Raises:
            UserError: a tensor is missing, has another shape or type, or holds what cannot be.
        """
        self.updates = update
        check_states(states, self)
        for run, saved in enumerate(states):
            for name, tensor in self.state(run).items():
                tensor.copy_(saved[name])


def fresh_moments(parameter: Tensor, counts_on: torch.device | str) -> dict[str, Tensor]:
    """What Adam keeps of a parameter, before its first step; its count may be elsewhere."""
    return {
        "step": torch.tensor(0.0, device=counts_on),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def check_states(
    states: Sequence[Mapping[str, Tensor]],
    learner: Learner,
    looked_at: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> None:
    """Refuse states, one for each run of a learner, from which it cannot go on; see `Learner.load`.

    Of the tensors, `looked_at` leaves out what is never read.
    """
    bounds = learner.bounds()
    for run, saved in enumerate(states):
        ours = learner.state(run)
        check_shapes(saved, ours)
        check_numbers(looked_at({name: saved[name] for name in ours}), bounds)


def check_shapes(saved: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    """Refuse saved tensors that are not those of a run as it is now, by name.

    Raises:
        UserError: a tensor is missing or has another shape or type.
    """
    for name, like in ours.items():
        found = saved.get(name)
        if found is None or (found.shape, found.dtype) != (like.shape, like.dtype):
            raise UserError(f"the checkpoint does not fit the configuration: {name}")


def check_numbers(saved: Mapping[str, Tensor], bounds: Bounds) -> None:
    """Refuse saved numbers that would lead astray; a checksum does not notice intent.

    Args:
        saved: by name, as far as they are ever looked at.
        bounds: of all whole numbers among them, and of floats that become an index. Bools count as
            0 and 1; a number may be nan where it may be infinite.

    Raises:
        UserError: a number is out of its bounds.
        KeyError: whole numbers have none.
    """
    for name, tensor in saved.items():
        if tensor.is_floating_point() and name not in bounds:
            continue
        low, high = bounds[name]
        given = tensor.detach().cpu().numpy()
        if given.dtype == bool:  # a file's bytes can be others than 0 and 1
            given = given.view(np.uint8)
        columns = given.reshape(-1, np.size(low))
        within = (columns >= low) & (columns <= high)
        if not (within | (np.isnan(columns) & np.isinf(high))).all():
            raise UserError(f"the checkpoint holds what cannot be: {name}")
