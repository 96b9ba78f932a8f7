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
LEAST = 1e-9  # what is divided by
ENOUGH = 50
"""Labels before an input counts as found for good."""


class Tally(nn.Module):
    """How often inputs were on in the endings of R runs, in labeled ones and in others.

    Args:
        chances: that an ending of each of B behaviors is labeled, nan where unknown, `[R, B]`.
        inputs: number of inputs F.
    """

    on_labeled: Tensor  # [R, B, F] int64, endings labeled so that an input was on in
    on_others: Tensor  # [R, F] int64, the same for endings without a label
    labeled: Tensor  # [R, B] int64, endings
    others: Tensor  # [R] int64
    telling: Tensor  # [R, F] bool, inputs that are on oftener in labeled endings, by far

    def __init__(self, chances: Tensor, inputs: int) -> None:
        super().__init__()
        self.chances = chances
        for name, shape in (("labeled", chances.shape), ("others", chances.shape[:1])):
            self.register_buffer(f"on_{name}", torch.zeros(*shape, inputs, dtype=torch.int64))
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("telling", torch.zeros_like(self.on_others, dtype=torch.bool))

    def add(self, on_labeled: Tensor, labeled: Tensor, on_others: Tensor, others: Tensor) -> None:
        """Count endings, in the shapes of what is kept; those in `others` that got labels, below 0.

        Where nobody knows how many get one, there may come none any more, while others drift away.
        So those are passed over that come without.

        Where behaviors are known to be labeled unequally often, or some never, an input that says
        which behavior it was is on oftener, too. But how often it was on in labeled endings of each
        says how often it was in those of them without a label, which are among others; an input
        that is on less often there tells. As others become many that are of no labeled behavior,
        that no longer shows, so that what was found once stays.
        """
        counts = self.chances.isfinite().all(-1) | (labeled > 0).any(-1)
        self.on_labeled += on_labeled
        self.labeled += labeled
        # labels may come of endings that were passed over
        self.on_others.add_(on_others * counts[:, None]).clamp_(min=0)
        self.others.add_(others * counts).clamp_(min=0)
        now, enough = self._oftener(), (self.labeled.sum(-1) >= ENOUGH)[:, None]
        self.telling.copy_(torch.where(self._apart, self.telling | (now & enough), now))

    @property
    def _apart(self) -> Tensor:
        """Where behaviors are known to be labeled unequally often. [R, 1] bool"""
        unequal = (self.chances != self.chances[:, :1]).any(-1)
        return (unequal & self.chances.isfinite().all(-1))[:, None]

    def _oftener(self) -> Tensor:
        """Inputs that are on oftener in labeled endings than they are to be in others. [R, F]"""
        chances = self.chances.double()[..., None]  # [R, B, 1]
        unlabeled = torch.where(chances > 0, (1 - chances) / chances, 0.0)  # for each labeled one
        weight = torch.where(self._apart[:, None], unlabeled, 1.0)
        labeled, others = self.labeled.double()[..., None], self.others.double()[:, None]
        n = (weight * labeled).sum(1)
        size = n**2 / (weight**2 * labeled).sum(1).clamp(min=LEAST)  # as many equal ones tell
        m = torch.where(self._apart, n, others)
        on = (weight * self.on_labeled).sum(1) / n.clamp(min=LEAST)
        on_others = self.on_others / m.clamp(min=LEAST)
        pooled = (on * size + on_others * m) / (size + m).clamp(min=LEAST)
        error = pooled * (1 - pooled).clamp(min=0)
        error = (error * (1 / size.clamp(min=LEAST) + 1 / m.clamp(min=LEAST))).sqrt()
        known = chances.isfinite().all(1)  # else some behavior may never be labeled
        heard = torch.where(known, (labeled > 0).any(1), (labeled > 0).all(1)) & (others > 0)
        return heard & (on > OFTENER * on_others) & (on - on_others > BEYOND_CHANCE * error)
