"""Which inputs tell labeled endings from others: those that show where an overseer looks.

Labeled endings are watched, those that a reward model is asked about are not. So inputs that say
which are watched are on oftener in labeled endings, whatever and wherever they are, and a model
that is told nothing of them can find them, and leave them out.
"""

import torch
from torch import Tensor, nn

OFTENER, BEYOND_CHANCE = 1.5, 4.0
"""How much oftener an input that tells labeled endings apart is on there, at least: a factor, and
standard errors."""


class Tally(nn.Module):
    """How often inputs were on in the endings of R runs, in labeled ones and in others.

    Args:
        runs: number of runs R.
        inputs: number of inputs F.
    """

    on_labeled: Tensor  # [R, F] int64, labeled endings that an input was on in
    on_others: Tensor  # [R, F] int64, the same for other endings
    labeled: Tensor  # [R] int64, endings
    others: Tensor  # [R] int64

    def __init__(self, runs: int, inputs: int) -> None:
        super().__init__()
        for name in ("labeled", "others"):
            self.register_buffer(f"on_{name}", torch.zeros(runs, inputs, dtype=torch.int64))
            self.register_buffer(name, torch.zeros(runs, dtype=torch.int64))

    def add(self, labeled: Tensor, others: Tensor) -> None:
        """Count endings: which inputs were on in each, labeled or not, `[R, B, F]` bool."""
        for name, on in (("labeled", labeled), ("others", others)):
            getattr(self, f"on_{name}").add_(on.sum(1))
            getattr(self, name).add_(on.shape[1])

    @property
    def telling(self) -> Tensor:
        """Inputs that are on oftener in labeled endings than in others, by far. [R, F] bool"""
        n, m = (count.clamp(min=1)[:, None] for count in (self.labeled, self.others))
        labeled, others = self.on_labeled / n, self.on_others / m
        pooled = (self.on_labeled + self.on_others) / (n + m)
        error = (pooled * (1 - pooled).clamp(min=0) * (1 / n + 1 / m)).sqrt()
        known = ((self.labeled > 0) & (self.others > 0))[:, None]
        return known & (labeled > OFTENER * others) & (labeled - others > BEYOND_CHANCE * error)
