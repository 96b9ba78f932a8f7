"""The table of methods: what each reads, which parts of the network it may teach, how it forgets.

Adding a method means adding a row to METHODS. What a row says is all that a method is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from oversight_rl.agents.routing import Rule
from oversight_rl.experiments.unlearning.corpus import FORGET, RETAIN, UNLABELED

ADDED = "added"
"""The region that is added to the network."""
QUIET = 3
"""Stands for the label of some retain stories, with which the added region learns not to disturb.
"""
ALL = (RETAIN, FORGET, UNLABELED)

PARAMETERS = {
    RETAIN: Rule(["rest"], ablate=[ADDED]),
    FORGET: Rule([ADDED]),
    UNLABELED: Rule(),
    QUIET: Rule([ADDED]),
}
"""arXiv 2512.05648, with QUIET beside it."""
PUBLISHED = {FORGET: Rule({ADDED: 1.0, "rest": -0.75}), RETAIN: Rule(), UNLABELED: Rule()}
"""arXiv 2410.04332, section 4.2: weights of the gradient of activations."""


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    summary: str
    reads: tuple[int, ...] = ALL
    """Labels of the stories that it trains on."""
    adds: Literal["", "units", "adapters"] = ""
    """What the network is expanded by."""
    rules: Mapping[int, Rule] = field(default_factory=dict)
    """What stories of a label may teach; none: everything teaches everything."""
    on: Literal["params", "edges"] = "params"
    labeled_first: bool = False
    """Whether it begins with labeled stories alone."""
    quiet: float = 0.0
    """Share of the retain stories that count as QUIET."""
    forgets: Literal["", "ablation", "random", "gradient_difference", "rmu"] = ""
    """How, when all is learned: not at all; the added region goes; as many hidden units go, drawn
    at random; or by unlearning after the fact, on labeled stories."""
    assumes: Literal["labels", "truth"] = "labels"
    """Whether labels are those of the share, or of all stories."""


ROUTING = Method(
    "labeled forget stories teach added units alone, labeled retain stories the rest without these "
    "units, unlabeled ones everything; labeled ones come first; the units are removed",
    adds="units",
    rules=PARAMETERS,
    labeled_first=True,
    quiet=0.1,
    forgets="ablation",
)
METHODS: dict[str, Method] = {
    "routing": ROUTING,
    "routing_mixed": replace(
        ROUTING,
        summary="routing, with labeled and unlabeled stories mixed from the start",
        labeled_first=False,
    ),
    "adapter_routing": replace(
        ROUTING,
        summary="routing into low-rank adapters beside all linear layers of the blocks",
        adds="adapters",
    ),
    "published_routing": Method(
        "the paper's form: on labeled forget stories, the gradient of the activations of all units "
        "but the added ones has the weight -0.75; the added units are removed",
        adds="units",
        rules=PUBLISHED,
        on="edges",
        forgets="ablation",
    ),
    "random_ablation": Method(
        "control: no routing; as many hidden units, drawn at random, are removed",
        adds="units",
        forgets="random",
    ),
    "base": Method("learns from all stories, and forgets nothing"),
    "filter": Method("drops labeled forget stories", reads=(RETAIN, UNLABELED)),
    "strict_filter": Method("keeps labeled retain stories alone", reads=(RETAIN,)),
    "gradient_difference": Method(
        "base; then steps that raise the loss on labeled forget stories and lower it on retain "
        "ones",
        forgets="gradient_difference",
    ),
    "rmu": Method(
        "base; then steps that make activations useless on labeled forget stories and keep them on "
        "retain ones",
        forgets="rmu",
    ),
    "perfect_filter": Method("never sees a story to forget", reads=(RETAIN,), assumes="truth"),
}
