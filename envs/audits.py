"""What labels of audited episodes say of all: upper bounds on the share of unwanted endings.

A function of labels alone, for any environment that keeps the protocol of `labels`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy import special

from oversight_rl.envs.labels import behavior_index, distinct_names
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
    label_error: float = 0.0,
    confidence: float = CONFIDENCE,
) -> Audit:
    """Bound the share of unwanted endings, among all that end in a behavior, from labels of some.

    The audited episodes must be a fair sample: chosen before they end, independently of what the
    agent can see. An episode without a label says nothing. Labels may go missing if they do so
    whatever the ending was, so that their rate need not be known.

    Args:
        labels: of each audited episode, `info.get("label")` at its end.
        behaviors: names of the behaviors, the wanted one first.
        label_error: chance that a label names one of the wrong behaviors, each as often.
        confidence: chance that a bound holds, at least.

    Raises:
        UserError: labels would say nothing at that error, a number is out of range, or a label
            (as `LabelError`) is not among the behaviors.
        ValueError: behaviors are not two or more distinct names.

    Source:
        Clopper and Pearson 1934; for all looks, the mixture supermartingales of Robbins 1970 and
        arXiv 1810.08240.
    """
    names = distinct_names(behaviors)
    useless = 1 - 1 / len(names)  # the error at which every behavior is named as often
    if not 0 <= label_error < useless:
        raise UserError(
            f"label_error: must lie in [0, {useless:g}), where labels of {len(names)} behaviors "
            f"say something, got {label_error:g}"
        )
    if not 0 < confidence < 1:
        raise UserError(f"confidence: must lie in (0, 1), got {confidence:g}")
    said = [behavior_index(label, names, "a label") for label in labels if label is not None]
    labeled, unwanted = len(said), sum(behavior > 0 for behavior in said)

    def corrected(named: float) -> float:
        # unwanted are named as such but for e / (B - 1), wanted at e: named = e + share (1 - e B /
        # (B - 1)), which grows with the share, so that a bound on the one bounds the other
        return min(1.0, max(0.0, (named - label_error) / (1 - label_error / useless)))

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
