"""What labels of audited episodes say of all: upper bounds on the share of unwanted endings.

A function of labels alone, for any environment that keeps the protocol of `labels`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy import special

from oversight_rl.envs.labels import behavior_index, distinct_names
from oversight_rl.envs.overseers import as_labels, rate
from oversight_rl.envs.settings import UserError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Audit:
    """Labels of audited endings, and what they say of all that these are a fair sample of."""

    labeled: int
    """Endings with a label."""
    unwanted: int
    """Of these, labeled as another behavior than the first."""
    bound: float
    """Upper bound on the share of unwanted endings, for one look at a number of labels that was
    decided on before; 1 where there are none."""
    anytime_bound: float
    """Upper bound that holds at all looks at once, however often and whenever they are taken."""


def audit(
    labels: Iterable[str | None],
    behaviors: Sequence[str] = ("wanted", "unwanted"),
    label_error: float | Sequence[float] = 0.0,
    confidence: float = CONFIDENCE,
    label_recall: float | Sequence[float] = 1.0,
) -> Audit:
    """Bound the share of unwanted endings, among all that end in a behavior, from labels of some.

    The audited episodes must be a fair sample: chosen before they end, independently of what the
    agent can see. An episode without a label says nothing.

    Args:
        labels: of each audited episode, `info.get("label")` at its end.
        behaviors: names of the behaviors, the wanted one first.
        label_error: chance that a label names one of the wrong behaviors, each as often; one for
            all, or for each behavior, as in `Labels`.
        confidence: chance that a bound holds, at least.
        label_recall: chance that an audited ending gets its label, for all (then it need not be
            known) or for each behavior.

    Raises:
        UserError: labels would say nothing at that error, the confidence is out of range, or a
            label (as `LabelError`) is not among the behaviors.
        ValueError: behaviors are not two or more distinct names, or a rate is out of range.

    Source:
        Clopper and Pearson 1934; for all looks, the mixture supermartingales of Robbins 1970 and
        arXiv 1810.08240.
    """
    names = distinct_names(behaviors)
    said_of = as_labels({"error": label_error, "recall": label_recall}, len(names))
    unwanted_ones = range(1, len(names))
    e, recall = rate(said_of.error, 0), rate(said_of.recall, 0)
    # the worst of the unwanted: named as the wanted one most often, labeled most seldom
    missed = max(rate(said_of.error, b) for b in unwanted_ones) / (len(names) - 1)
    least = min(rate(said_of.recall, b) for b in unwanted_ones)
    if e + missed >= 1:
        raise UserError(
            f"label_error: must lie in [0, {1 - 1 / len(names):g}), where labels of {len(names)} "
            f"behaviors say something, got {label_error}"
        )
    if not 0 < confidence < 1:
        raise UserError(f"confidence: must lie in (0, 1), got {confidence:g}")
    said = [behavior_index(label, names, "a label") for label in labels if label is not None]
    labeled, unwanted = len(said), sum(behavior > 0 for behavior in said)

    def corrected(named: float) -> float:
        # of labels, the share s of unwanted endings are named as such but for `missed`, others at
        # e: named = e + s (1 - e - missed); of endings, there are s / least to (1 - s) / recall
        share = min(1.0, max(0.0, (named - e) / (1 - e - missed)))
        ended = share * recall + (1 - share) * least
        return share * recall / ended if ended > 0 else 1.0

    bounds = (bound(unwanted, labeled, 1 - confidence) for bound in (_once, _anytime))
    return Audit(labeled, unwanted, *map(corrected, bounds))


def _once(hits: int, trials: int, risk: float) -> float:
    """The share at which so few hits have a chance of `risk` (Clopper-Pearson, one-sided)."""
    return float(special.betaincinv(hits + 1, trials - hits, 1 - risk)) if hits < trials else 1.0


def _anytime(hits: int, trials: int, risk: float) -> float:
    """The lowest share that is refused at some look with a chance of at most `risk`.

    Bets against a share p, that hits come at the rate x < p, multiply a stake by x / p at a hit and
    by (1 - x) / (1 - p) else, which wins nothing on average where the share is p or more. So does
    the mean over x uniform in (0, p), which ever reaches 1 / risk with a chance of at most `risk`
    (Ville).
    """
    misses = trials - hits

    def excess(p: float) -> float:  # of the log stake; grows with p
        mixed = special.betaln(hits + 1, misses + 1)  # the integral over x in (0, 1) ...
        mixed += math.log(special.betainc(hits + 1, misses + 1, p))  # ... and in (0, p)
        start = (hits + 1) * math.log(p) + misses * math.log1p(-p)
        return float(mixed - start + math.log(risk))

    highest = math.nextafter(1, 0)
    if excess(highest) <= 0:
        return 1.0
    low, high = max(hits / trials, 1e-12), highest  # at the share seen, no bet has won
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if excess(middle) > 0 else (middle, high)
    return high
