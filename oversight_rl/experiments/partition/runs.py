"""Runs of split autoencoders: how they are trained, judged and shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from oversight_rl.agents.supervised import SupervisedLearner
from oversight_rl.envs import render
from oversight_rl.experiments.partition.config import PartitionConfig
from oversight_rl.experiments.partition.data import Images, load
from oversight_rl.experiments.partition.evaluation import (
    CONSTANT,
    PARTS,
    WHOLE,
    Viewer,
    judge,
    viewers,
)
from oversight_rl.experiments.partition.model import METHODS, SplitAutoencoder
from oversight_rl.runs.experiment import Experiment, View
from oversight_rl.runs.rows import Facts, Row

SIDE = 40  # pixels of a drawn image, at least
EARLIER = 4  # times fewer steps of fresh decoders, before training has ended
SHOWN = 10  # images in a picture, of as many classes


class Partition(Experiment):
    """One run."""

    score: ClassVar[str] = "gap"
    methods: ClassVar[Mapping[str, Any]] = METHODS
    report: ClassVar[str] = "oversight_rl.experiments.partition.figures:REPORT"
    page: ClassVar[tuple[str, str, str]] = (
        "What each part of a code knows",
        "Held-out images, above what is made of them",
        "Parts switched on",
    )
    charts: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "Certificates": {
            "error on a part's own group": "evaluation/own$",
            "error on the other groups": "evaluation/foreign$",
            "leakage": "evaluation/leakage$",
        },
        "Training": {"losses": "training/loss/.*"},
    }

    def __init__(self, configs: Sequence[PartitionConfig]) -> None:
        (self.config,) = self.configs = configs
        config, settings, device = self.config, self.config.partition, self.config.torch_device()
        self.train, self.test = (x.to(device) for x in load(config.data, config.groups))
        seeds = np.random.SeedSequence(config.seeds[0]).generate_state(2)
        groups, pixels = len(config.groups), self.train.pixels.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seeds[0]))
            model = SplitAutoencoder(settings, pixels, groups, METHODS[config.method])
        self.model = model.to(device)
        told = np.random.default_rng(seeds[1]).random(len(self.train)) < config.oversight
        group = torch.where(torch.as_tensor(told).to(device), self.train.group, groups)

        def draw(update: int) -> tuple[Tensor, Tensor]:
            rows = torch.randint(len(group), (settings.batch_size,)).to(device)
            return self.train.pixels[rows], group[rows]

        self.learner = SupervisedLearner(
            self.model,
            torch.optim.Adam(self.model.parameters()),
            draw,
            self.model.backward,
            updates=settings.updates,
            learning_rate=settings.learning_rate,
            seed=config.seeds[0],
            samples=settings.batch_size,
        )
        self.judged = -1  # at which update
        self.viewers: dict[str, Viewer] = {}
        self.found: dict[str, dict[str, float]] = {}

    def evaluate(self, facts: Sequence[Facts]) -> list[list[Row]]:
        if self.judged != self.learner.updates:  # seconds of training of fresh decoders
            self.judged = self.learner.updates
            groups, steps = self.config.groups, self.config.partition.certificate_steps
            if self.learner.updates < self.learner.total:
                steps = -(-steps // EARLIER)
            self.viewers = viewers(self.model, groups, self.train, steps)
            self.found = judge(self.viewers, groups, self.train, self.test)
        rows = [
            Row.of(facts[0], who, figures, deployed=who == PARTS, evaluator="held-out")
            for who, figures in self.found.items()
        ]
        return [rows]

    def pictures(self, run: int) -> dict[str, bytes]:
        """Images of each class beside what everyone makes of them, as last evaluated."""
        shown = self.examples()
        columns = {"input": shown.pixels}
        for who, viewer in self.viewers.items():
            if who != CONSTANT:
                name = f"{who} alone" if who in self.config.groups else who
                columns[name] = viewer.restore(shown)
        panels = [_strip(pixels, shown.shape) for pixels in columns.values()]
        return {"restored": render.png(render.panels(panels, list(columns)))}

    def views(self, run: int) -> dict[str, View]:
        """Images of each class above what parts make of them that are switched on."""
        shown, found = self.examples(), dict[str, View]()
        names = {WHOLE: "all parts", CONSTANT: "none: the best constant"}
        for who in (WHOLE, *self.config.groups, CONSTANT):
            restored = self.viewers[who].restore(shown)
            both = [
                _strip(torch.stack(pair), shown.shape)
                for pair in zip(shown.pixels, restored, strict=True)
            ]
            name = names.get(who, f"{who} alone")
            found[name] = render.png(np.concatenate(both, axis=1))
        return found

    def examples(self) -> Images:
        """The first held-out image of each class."""
        first = [int((self.test.label == c).nonzero()[0]) for c in self.test.label.unique()]
        return self.test[first[:SHOWN]]

    @classmethod
    def try_out(cls, config: PartitionConfig) -> None:
        super().try_out(config)
        load(config.data, config.groups)

    @classmethod
    def shown(cls, figures: Sequence[str], details: bool = False) -> dict[str, str]:
        known = {name: name for name in figures if not name.startswith("error_")}
        return {name.removesuffix("_error"): figure for name, figure in known.items()}

    @classmethod
    def notes(cls, rows: Sequence[Row]) -> list[str]:
        return [
            "own, foreign: mean absolute error in [-1, 1] of what a fresh decoder restores from a "
            "part, for held-out images of its own group and of the others; gap: foreign - own",
            "leakage: 0 if a part tells no more of other groups than a constant, 1 if as much as "
            "the whole; own_class, foreign_class: how often a linear probe names the class",
        ]

    @classmethod
    def describe(cls, config: PartitionConfig) -> str:
        return (
            f"**{config.method}**: {METHODS[config.method].summary}. Data: {config.data}, in parts "
            f"for {', '.join(config.groups)}.\n\n"
            "* `evaluation/own`, `evaluation/foreign`: mean absolute error of what a fresh decoder "
            "restores from a part, of its own group and of others; of the whole code by its own "
            "decoder, and of the best constant\n"
            "* `evaluation/leakage`: 0 as the constant, 1 as the whole\n"
            "* `pictures/restored`: held-out images, and what each part alone restores\n"
            "* `training/loss`: error, size of the code, correlation between parts"
        )


def _strip(pixels: Tensor, shape: tuple[int, int]) -> render.Picture:
    """Images `[N, pixels]` one below the other, large enough to see."""
    zoom = -(-SIDE // max(shape))
    gray = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy().reshape(-1, *shape)
    large = gray.repeat(zoom, 1).repeat(zoom, 2)
    framed = np.pad(large, ((0, 0), (2, 2), (2, 2)), constant_values=128)
    return np.repeat(framed.reshape(-1, framed.shape[2], 1), 3, 2)
