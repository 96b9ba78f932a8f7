"""A reward model: a classifier of endings, learned from labeled ones, that rewards the others.

Semi-supervised RL: the learner has the true reward of a few episodes and imputes it for the rest
(Christiano 2016). The model sees how an episode ended, as the policy would see it, and tells the
chance that it ended on the diamond. By default it does not look at the flags: a labeled ending is
always flagged and an unlabeled one hardly ever is, so that a model which reads flags is asked about
endings unlike all that it was taught.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agents.networks import Linear, affine, initialize

MEMORY = 16_384
"""Labeled endings that each run remembers, the newest."""
LESSON = 1024
"""Remembered endings that an update learns from."""
HIDDEN = 64
FLAGS_FROM = 3  # active inputs of an observation from here on are flags, see `World.active`


class RewardModel(nn.Module):
    """A stack of R classifiers and the labeled endings that they remember.

    A classifier is a 1x1 convolution over the planes, summed over the cells, and a linear layer:
    what squares coincide matters, and not where.

    Args:
        runs: number of runs R.
        shape: of an observation, `(planes, rows, cols)`.
        active: active inputs of an observation that the model looks at (D).
        generators: streams to draw the initial parameters from, one per run.
    """

    final: Tensor  # [R, MEMORY + 1, D] active inputs of the endings; the last row is scratch
    label: Tensor  # [R, MEMORY + 1] int64, index into BEHAVIORS
    count: Tensor  # [R] int64, labeled endings met so far

    def __init__(
        self,
        runs: int,
        shape: Sequence[int],
        active: int,
        generators: Sequence[torch.Generator],
    ) -> None:
        super().__init__()
        self.planes, self.inputs, self.active = shape[0], math.prod(shape), active
        self.convolution = Linear([runs], self.planes, HIDDEN)
        self.out = Linear([runs], HIDDEN, 1)
        initialize(self, generators)
        self.register_buffer("final", torch.zeros(runs, MEMORY + 1, active, dtype=torch.int64))
        self.register_buffer("label", torch.zeros(runs, MEMORY + 1, dtype=torch.int64))
        self.register_buffer("count", torch.zeros(runs, dtype=torch.int64))

    def forward(self, final: Tensor) -> Tensor:
        """Logits that endings are on the diamond: `[R, B, D or more]` -> `[R, B]`."""
        runs, batch, _ = final.shape
        dense = torch.zeros(runs, batch, self.inputs + 1, device=final.device)
        dense = dense.scatter(-1, final[..., : self.active], 1.0)[..., :-1]
        cells = dense.unflatten(-1, (self.planes, -1)).mT.flatten(1, 2)  # [R, B * S, planes]
        hidden = affine(cells, self.convolution.weight, self.convolution.bias).relu()
        pooled = hidden.unflatten(1, (batch, -1)).sum(2)
        return affine(pooled, self.out.weight, self.out.bias).squeeze(-1)

    @torch.no_grad()
    def remember(self, final: Tensor, label: Tensor, labeled: Tensor) -> None:
        """Add the labeled endings among B steps, in the place of the oldest.

        Args:
            final: `[R, B, D or more]` active inputs of the observation after each step.
            label: `[R, B]`.
            labeled: `[R, B]` bool, which steps are labeled endings.
        """
        rank = labeled.cumsum(-1) - 1
        fits = labeled & (rank >= rank[:, -1:] + 1 - MEMORY)
        place = torch.where(fits, (self.count[:, None] + rank) % MEMORY, MEMORY)
        run = torch.arange(len(place), device=place.device)[:, None]
        self.final[run, place] = final[..., : self.active]
        self.label[run, place] = label
        self.count += labeled.sum(-1)

    def loss(self, uniform: Tensor) -> Tensor:
        """Cross entropy on remembered endings drawn by `uniform` `[R, B]` in [0, 1). [R]

        Exactly 0 where there is none to remember.
        """
        known = self.count.clamp(max=MEMORY)[:, None]
        index = (uniform[:, :LESSON] * known).long()
        run = torch.arange(len(index), device=index.device)[:, None]
        is_diamond = (self.label[run, index] == 0).to(uniform.dtype)
        logit = self(self.final[run, index])
        error = F.binary_cross_entropy_with_logits(logit, is_diamond, reduction="none")
        return torch.where(known > 0, error, 0.0).mean(-1)
