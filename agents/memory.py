"""What runs remember of labeled episodes, for what can be learned from them again and again."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from oversight_rl.envs.settings import BEHAVIORS

CAPACITY = 16_384
"""Samples that each run remembers, the newest; fewer where they would not fit into MOST_BYTES."""
MOST_BYTES = 2**28
"""Of the observations that a run remembers."""


class Memory(nn.Module):
    """Labeled samples of R runs, the newest of each.

    Args:
        runs: number of runs R.
        width: numbers of an observation that are kept (D), the first ones: its active inputs, or
            all of it.
        draws: samples that `draw` gives at most (M); never more than uniform numbers given to it.
        dtype: of these numbers.
        kinds: labels B; where samples without one are kept, that is their number.
    """

    observation: Tensor  # [R, capacity + 1, D]; the last row is scratch
    label: Tensor  # [R, capacity + 1] int8, index of a behavior
    count: Tensor  # [R] int64, samples met so far

    def __init__(
        self,
        runs: int,
        width: int,
        draws: int,
        dtype: torch.dtype = torch.int16,
        kinds: int = len(BEHAVIORS),
    ) -> None:
        super().__init__()
        self.draws, self.kinds = draws, kinds
        self.capacity = min(CAPACITY, max(1, MOST_BYTES // (width * dtype.itemsize)))
        rows = self.capacity + 1
        self.register_buffer("observation", torch.zeros(runs, rows, width, dtype=dtype))
        self.register_buffer("label", torch.zeros(runs, rows, dtype=torch.int8))
        self.register_buffer("count", torch.zeros(runs, dtype=torch.int64))

    @torch.no_grad()
    def add(self, observation: Tensor, label: Tensor, labeled: Tensor) -> None:
        """Keep the labeled ones among B samples, in the place of the oldest. `[R, B, ...]`"""
        rank = labeled.cumsum(-1) - 1
        fits = labeled & (rank >= rank[:, -1:] + 1 - self.capacity)
        place = torch.where(fits, (self.count[:, None] + rank) % self.capacity, self.capacity)
        run = torch.arange(len(place), device=place.device)[:, None]
        kept = observation[..., : self.observation.shape[-1]]
        self.observation[run, place] = kept.to(self.observation.dtype)
        self.label[run, place] = label.to(torch.int8)
        self.count += labeled.sum(-1)

    def keep(self, rows: NDArray[Any], labels: NDArray[np.int64]) -> None:
        """Keep B samples of the one run: rows `[B, ...]`, labels `[B]`."""
        if len(rows):
            known = torch.ones(1, len(rows), dtype=torch.bool)
            flat = torch.as_tensor(rows).flatten(1)
            self.add(flat[None], torch.as_tensor(labels)[None], known)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # as a module has it, without the rows that nothing was put into
        super()._save_to_state_dict(destination, prefix, keep_vars)
        known = min(int(self.count.max()), self.capacity)
        for name in ("observation", "label"):
            # a copy, since a view is saved with all that it is a view of
            destination[prefix + name] = destination[prefix + name][:, :known].clone()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in ("observation", "label"):
            saved, ours = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and saved.shape[1] < ours.shape[1]:
                whole = torch.zeros_like(ours, dtype=saved.dtype, device=saved.device)
                whole[:, : saved.shape[1]] = saved
                state_dict[prefix + name] = whole
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def known(self) -> Tensor:
        """Samples that each run remembers. [R]"""
        return self.count.clamp(max=self.capacity)

    def counts(self) -> Tensor:
        """How many of them have each label. [R, B]"""
        there = torch.arange(self.capacity, device=self.label.device) < self.known[:, None]
        kinds = torch.arange(self.kinds, device=self.label.device)
        same = self.label[:, :-1, None] == kinds
        return (same & there[..., None]).sum(1)

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw M samples by the first ones of uniform numbers `[R, B]`; M <= B. See `at`.

        Whole numbers of observations are int64.
        """
        drawn, label, weight = self.at(uniform[:, : self.draws])
        return drawn if drawn.is_floating_point() else drawn.long(), label, weight

    def at(self, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Samples by uniform numbers `[R, M]` in [0, 1), with replacement.

        Returns:
            observations `[R, M, D]`, labels `[R, M]`, and weights `[R, M]`: 1, but 0 in runs that
            remember nothing.
        """
        known = self.known[:, None]
        index = (uniform * known).long()
        run = torch.arange(len(index), device=index.device)[:, None]
        weight = (known > 0).to(uniform.dtype).expand_as(uniform)
        return self.observation[run, index], self.label[run, index].long(), weight
