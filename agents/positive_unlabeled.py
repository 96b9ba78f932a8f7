"""Learning what unlabeled endings were where some behavior is never labeled.

A classifier that is taught by labels alone calls everything what was ever labeled. Unlabeled
endings are a mixture of the labeled behaviors, in shares that can be told, and of the others: so
what all endings cost as the others, less what the labeled behaviors' shares of them cost, is what
the others cost.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from oversight_rl.agents.memory import Memory

LEAST_TAIL = 0.5
"""Share of the labeled samples that an estimate of a share is based on at least."""
LEAST_SHARE = 0.05
"""Of all endings, from which on behaviors count alike; what is more seldom counts in proportion."""
BOUND = 2.0
"""What it costs at most to call an ending something that it is not."""


@dataclass(frozen=True)
class Judged:
    """Remembered endings, and what a classifier says of them."""

    log_chances: Tensor  # [R, M, B], of each behavior
    label: Tensor  # [R, M]
    weight: Tensor  # [R, M], 1, or 0 where nothing is remembered


def loss_of_endings(
    labeled: Judged,
    every: Judged,
    chances: Tensor,
    labels: Memory,
    endings: Memory,
    bounded: bool = False,
) -> Tensor:
    """Cross entropy on labeled endings, or the non-negative risk where a behavior has none. [R]

    Args:
        labeled: some labeled endings.
        every: some endings as they came, labeled or not.
        chances: that an ending of each behavior is labeled, nan where unknown, `[R, B]`.
        labels: that labeled endings are drawn from.
        endings: that all endings are drawn from; labels of those without are no behavior's.
        bounded: what a label costs that does not fit in, as some may be wrong.
    """
    never = never_labeled(chances, labels.counts())
    share = shares(chances, endings.counts(), endings.known)
    unknown = chances.isnan()
    if bool((unknown & never.any(-1, keepdim=True)).any()):
        share = torch.where(unknown, estimated_shares(labeled, every), share)
    share = share.nan_to_num(0.0)  # of runs in which nobody looks at it, whose gradient is 0 then
    plain = loss_of_labels(labeled, bounded)
    return torch.where(never.any(-1), non_negative_risk(labeled, every, share, never), plain)


def loss_of_labels(labeled: Judged, bounded: bool) -> Tensor:
    """Cross entropy on labeled endings, or a cost of wrong calls that has a bound. [R]"""
    own = labeled.log_chances.gather(-1, labeled.label[..., None]).squeeze(-1)
    return ((cost(own) if bounded else -own) * labeled.weight).mean(-1)


def as_often(weight: Tensor, label: Tensor, chances: Tensor) -> Tensor:
    """Weights of labeled endings under which their behaviors are as frequent as they are. [R, M]

    Endings that are labeled more often than others weigh less. All weigh 1 where they are labeled
    alike, or nobody knows how often.

    Args:
        weight: of labeled endings, `[R, M]`.
        label: of these, `[R, M]`.
        chances: that an ending of each behavior is labeled, nan where unknown, `[R, B]`.
    """
    rare = chances.where(chances > 0, torch.inf).amin(-1, keepdim=True)
    scale = torch.where(chances > 0, rare / chances, 1.0)
    return weight * scale.gather(-1, label)


def never_labeled(chances: Tensor, counts: Tensor) -> Tensor:
    """Which behaviors labels never teach: those with chance 0, or unknown and not met. [R, B] bool

    Args:
        chances: that an ending of each behavior is labeled, nan where unknown, `[R, B]`.
        counts: labeled endings of each behavior, `[R, B]`.

    Returns:
        False for all behaviors of a run in which none or all of them are taught.
    """
    never = (chances == 0) | (chances.isnan() & (counts == 0))
    taught = ~never & (counts > 0)
    return never & taught.any(-1, keepdim=True)


def shares(chances: Tensor, counts: Tensor, endings: Tensor) -> Tensor:
    """Share of each behavior among all endings, from those of them that are labeled. `[R, B]`

    Args:
        chances: as in `never_labeled`; the share is nan where they are unknown, and 0 where 0.
        counts: labeled ones of each behavior among the endings, `[R, B]`.
        endings: their number, `[R]`.
    """
    found = counts / (chances * endings.clamp(min=1)[:, None])
    return torch.where(chances == 0, 0.0, found.clamp(max=1.0))


@torch.no_grad()
def estimated_shares(labeled: Judged, every: Judged) -> Tensor:
    """Share of each labeled behavior among all endings, from a classifier's word alone. `[R, B]`

    The least ratio of two tails: of its chances above a bound among all endings, and among those
    labeled so. It is no less than the true share, but for noise, and near it where the classifier
    tells some endings of the behavior from all others (best bin estimation, arXiv 2111.00980).
    """
    behaviors = every.log_chances.shape[-1]
    own = F.one_hot(labeled.label, behaviors) * labeled.weight[..., None]  # [R, M, B]
    return torch.stack(
        [
            _least_ratio(
                labeled.log_chances[..., b], own[..., b], every.log_chances[..., b], every.weight
            )
            for b in range(behaviors)
        ],
        dim=-1,
    )


def _least_ratio(ours: Tensor, weight: Tensor, all_: Tensor, all_weight: Tensor) -> Tensor:
    """Least ratio of the shares of two samples `[R, M]`, `[R, N]` that are above a bound. [R]"""
    bounds = ours[:, :, None]  # [R, M, 1]

    def above(x: Tensor, weight: Tensor) -> Tensor:
        total = weight.sum(-1, keepdim=True).clamp(min=1)
        return ((x[:, None] >= bounds) * weight[:, None]).sum(-1) / total

    tail, among = above(ours, weight), above(all_, all_weight)  # [R, M]
    counts = (weight > 0) & (tail >= LEAST_TAIL)
    return torch.where(counts, among / tail, 1.0).amin(-1).clamp(max=1.0)


def non_negative_risk(labeled: Judged, every: Judged, share: Tensor, never: Tensor) -> Tensor:
    """Risk of a classifier where labels never name some behavior. `[R]`

    Source: arXiv 1703.00593, equation 6, for several labeled and several other behaviors. Each
    behavior counts alike, however seldom it is (Su et al. 2021, "Positive-Unlabeled Learning from
    Imbalanced Data"): where one expert comes to end in ghosts and another does not yet end in
    diamonds, a classifier of what is there would call all ghosts, and the second expert, told so,
    learns to end in nothing. And calling an ending wrongly has a bounded cost (arXiv 1805.07836):
    of few labels a network learns each by heart, and a logarithm of that, taken off, leaves no
    cost of calling all else the same.

    Args:
        labeled: some labeled endings.
        every: some endings as they came, labeled or not.
        share: of each behavior among all endings, where it is labeled, `[R, B]`.
        never: which behaviors are not, `[R, B]` bool; nobody looks at runs without any.
    """
    others = never | ~never.any(-1, keepdim=True)

    def as_other(log_chances: Tensor) -> Tensor:  # what calling endings one of the others costs
        return cost(log_chances.masked_fill(~others[:, None], -torch.inf).logsumexp(-1))

    own = F.one_hot(labeled.label, share.shape[-1]) * labeled.weight[..., None]
    mean = own / own.sum(1, keepdim=True).clamp(min=1)  # [R, M, B]
    share = share.masked_fill(never, 0.0)
    alike = share / share.clamp(min=LEAST_SHARE)
    known = (cost(labeled.log_chances) * mean * alike[:, None]).sum((1, 2))
    total = every.weight.sum(-1).clamp(min=1)
    among = (as_other(every.log_chances) * every.weight).sum(-1) / total
    taken = (as_other(labeled.log_chances) * (mean * share[:, None]).sum(-1)).sum(-1)
    rest = (among - taken).clamp(min=0) / (1 - share.sum(-1)).clamp(min=LEAST_SHARE)
    return (known + others.sum(-1) * rest) / share.shape[-1]


def cost(log_chance: Tensor) -> Tensor:
    """Of a call by its log-chance: 0 where that is sure, BOUND where it is out of the question.

    Slopes as the cross entropy, less so where the chance is small (arXiv 1805.07836, equation 6).
    """
    return -BOUND * torch.expm1(log_chance / BOUND)
