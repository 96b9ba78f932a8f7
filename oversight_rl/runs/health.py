"""Numbers that went bad: seen at the update that made them, without making a GPU wait."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Watch:
    """Notes the first number of each of R runs that is not finite."""

    def __init__(self, runs: int, device: torch.device) -> None:
        self.names: list[str] = []
        self.update = torch.zeros(runs, dtype=torch.int64, device=device)  # of the first, or 0
        self.which = torch.zeros_like(self.update)  # index into names
        self.value = torch.zeros(runs, device=device)
        self.count = torch.zeros_like(self.update)  # updates with any

    @torch.no_grad()
    def look(self, update: int, numbers: Mapping[str, Tensor]) -> Tensor:
        """Look at what an update (counted from 1) made; returns whether all is finite, [R] bool.

        The numbers are `[R]` each, see `Learner.numbers`.
        """
        self.names = list(numbers)
        values = torch.stack(list(numbers.values())).to(self.value)  # [numbers, R]
        bad = ~values.isfinite()
        any_bad = bad.any(0)
        first = any_bad & (self.count == 0)
        which = bad.int().argmax(0)  # the first of several
        self.update = torch.where(first, update, self.update)
        self.which = torch.where(first, which, self.which)
        self.value = torch.where(first, values.gather(0, which[None])[0], self.value)
        self.count = self.count + any_bad
        return ~any_bad

    def seen(self) -> dict[int, str]:
        """What was seen first, in words, by run; waits for the device."""
        if not bool(self.count.any()):
            return {}
        return {
            run: f"update {self.update[run]}: the {self.names[which]} is {float(self.value[run])}"
            for run, which in enumerate(self.which.tolist())
            if self.count[run]
        }
