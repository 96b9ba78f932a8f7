"""What each part of a code knows: certificates, probes and leakage, next to a constant."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional as F

from oversight_rl.agents.routing.evaluation import fresh_decoder, leakage
from oversight_rl.experiments.partition.data import Images
from oversight_rl.experiments.partition.model import SplitAutoencoder

PARTS, WHOLE, CONSTANT = "parts", "whole", "constant"
RIDGE = 1e-3  # of linear probes, on standardized features


@dataclass(frozen=True)
class Viewer:
    """Who restores images, from what."""

    restore: Callable[[Images], Tensor]
    """What it makes of images, `[N, pixels]`."""
    features: Callable[[Images], Tensor]
    """What it sees of them, `[N, features]`."""


def viewers(
    model: SplitAutoencoder, groups: Sequence[str], train: Images, steps: int
) -> dict[str, Viewer]:
    """Those who restore images: from a part by a fresh decoder, from all, and from nothing.

    Args:
        model: frozen.
        groups: names of its parts.
        train: images that fresh decoders learn from.
        steps: of their training.
    """

    def part(g: int) -> Viewer:
        def features(images: Images) -> Tensor:
            return codes(images)[:, g]

        restore = fresh_decoder((features(train), train.pixels), steps=steps)
        return Viewer(lambda images: restore(features(images)), features)

    @torch.no_grad()
    def codes(images: Images) -> Tensor:
        return model.encode(images.pixels)

    @torch.no_grad()
    def whole(images: Images) -> Tensor:
        restored = model.restore(codes(images))  # [decoders, N, pixels]
        rows = torch.arange(len(images), device=images.group.device)
        return restored[images.group if model.own_decoders else 0, rows]

    middle = train.pixels.median(0).values  # no constant has a smaller mean absolute error
    return {name: part(g) for g, name in enumerate(groups)} | {
        WHOLE: Viewer(whole, lambda images: codes(images).flatten(1)),
        CONSTANT: Viewer(lambda x: middle.expand_as(x.pixels), lambda x: x.pixels[:, :1] * 0),
    }


def judge(
    viewers: Mapping[str, Viewer], groups: Sequence[str], train: Images, test: Images
) -> dict[str, dict[str, float]]:
    """Figures of test images: of the parts on average, then of each viewer.

    What is a part's own group to the part, is each group in turn to the whole and to the constant.
    """
    errors = {
        who: (viewer.restore(test) - test.pixels).abs().mean(1) for who, viewer in viewers.items()
    }
    found = {}
    for who, viewer in viewers.items():
        seen = viewer.features(train), viewer.features(test)
        each = []
        for g in [groups.index(who)] if who in groups else range(len(groups)):
            own = test.group == g
            mine, others = (float(errors[who][rows].mean()) for rows in (own, ~own))
            best, worst = (float(errors[name][~own].mean()) for name in (WHOLE, CONSTANT))
            each.append(
                {
                    "gap": others - mine,
                    "own_error": mine,
                    "foreign_error": others,
                    "leakage": leakage(others, best, worst) if best < worst else math.nan,
                    "p_own_class": probe(seen, train, test, train.group == g, own),
                    "p_foreign_class": probe(seen, train, test, train.group != g, ~own),
                }
            )
        found[who] = {name: fmean(view[name] for view in each) for name in each[0]}
        for g, name in enumerate(groups):
            found[who][f"error_{name}"] = float(errors[who][test.group == g].mean())
    parts = [found[name] for name in groups]
    return {PARTS: {name: fmean(part[name] for part in parts) for name in parts[0]}} | found


def probe(
    seen: tuple[Tensor, Tensor], train: Images, test: Images, learned: Tensor, asked: Tensor
) -> float:
    """How often a linear probe is right about the class.

    Args:
        seen: features of all images to train and to test with.
        train: these.
        test: these.
        learned: which of `train` it learns from, bool.
        asked: which of `test` it is asked about, bool.
    """
    x, known = seen[0][learned].double(), train.label[learned]
    mean, deviation = x.mean(0), x.std(0).clamp_min(1e-6)

    def design(x: Tensor) -> Tensor:
        return F.pad((x.double() - mean) / deviation, (0, 1), value=1.0)

    x = design(x)
    size = RIDGE * len(x) * torch.eye(x.shape[1]).to(x)
    weights = torch.linalg.solve(x.T @ x + size, x.T @ F.one_hot(known).double())
    said = (design(seen[1][asked]) @ weights).argmax(1)
    return float((said == test.label[asked]).double().mean())
