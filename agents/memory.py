"""What runs remember of labeled episodes, for what can be learned from them again and again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CAPACITY = 16_384
"""Samples that each run remembers, the newest."""


class Memory(nn.Module):
    """Labeled samples of R runs, the newest of each.

    Args:
        runs: number of runs R.
        active: active inputs of an observation that are kept (D), the first ones.
        draws: samples that `draw` gives at most (M); never more than there are steps in a window.
    """

    active: Tensor  # [R, CAPACITY + 1, D] int16, active inputs; the last row is scratch
    label: Tensor  # [R, CAPACITY + 1] int8, index into BEHAVIORS
    count: Tensor  # [R] int64, samples met so far

    def __init__(self, runs: int, active: int, draws: int) -> None:
        super().__init__()
        self.draws = draws
        self.register_buffer("active", torch.zeros(runs, CAPACITY + 1, active, dtype=torch.int16))
        self.register_buffer("label", torch.zeros(runs, CAPACITY + 1, dtype=torch.int8))
        self.register_buffer("count", torch.zeros(runs, dtype=torch.int64))

    @torch.no_grad()
    def add(self, active: Tensor, label: Tensor, labeled: Tensor) -> None:
        """Keep the labeled ones among B samples, in the place of the oldest.

        Args:
            active: `[R, B, D or more]` active inputs.
            label: `[R, B]`.
            labeled: `[R, B]` bool.
        """
        rank = labeled.cumsum(-1) - 1
        fits = labeled & (rank >= rank[:, -1:] + 1 - CAPACITY)
        place = torch.where(fits, (self.count[:, None] + rank) % CAPACITY, CAPACITY)
        run = torch.arange(len(place), device=place.device)[:, None]
        self.active[run, place] = active[..., : self.active.shape[-1]].short()
        self.label[run, place] = label.to(torch.int8)
        self.count += labeled.sum(-1)

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw M samples, with replacement, by uniform numbers `[R, B]` in [0, 1); M <= B.

        Returns:
            active inputs `[R, M, D]`, labels `[R, M]`, and weights `[R, M]`: 1, but 0 in runs that
            remember nothing.
        """
        uniform = uniform[:, : self.draws]
        known = self.count.clamp(max=CAPACITY)[:, None]
        index = (uniform * known).long()
        run = torch.arange(len(index), device=index.device)[:, None]
        weight = (known > 0).to(uniform.dtype).expand_as(uniform)
        return self.active[run, index].long(), self.label[run, index].long(), weight
