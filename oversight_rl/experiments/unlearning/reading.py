"""A language model in training: which stories an update reads, and what these may teach."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from oversight_rl.agents.routing import Router, expand
from oversight_rl.agents.supervised import SupervisedLearner
from oversight_rl.envs.settings import UserError
from oversight_rl.experiments.unlearning.config import Config
from oversight_rl.experiments.unlearning.corpus import RETAIN, UNLABELED, Corpus
from oversight_rl.experiments.unlearning.methods import ADDED, METHODS, QUIET
from oversight_rl.experiments.unlearning.model import LanguageModel, story_losses
from oversight_rl.experiments.unlearning.stories import OPENING

Batch = tuple[Tensor, Tensor]
"""Stories `[B, T]`, and what they are routed by, `[B]`."""


class Reader:
    """One run: a model, its router if it has one, and the learner that the loop drives."""

    def __init__(self, config: Config, corpus: Corpus, device: torch.device) -> None:
        self.config, self.settings, self.corpus = config, config.stories, corpus
        self.method, self.seed = METHODS[config.method], config.seeds[0]
        share = 1.0 if self.method.assumes == "truth" else config.oversight
        self.labels = corpus.labels(share, self.seed)
        read = torch.isin(self.labels, torch.tensor(self.method.reads, device=device))
        self.all = read.nonzero()[:, 0]
        if not len(self.all):
            raise UserError(
                f"oversight: at {config.oversight:.2%} labels {config.method} has no story to read"
            )
        self.labeled = (read & (self.labels != UNLABELED)).nonzero()[:, 0]
        first = self.settings.labeled_first if self.method.labeled_first else 0.0
        self.labeled_until = math.ceil(first * self.settings.updates) if len(self.labeled) else 0
        self.model, self.router = self._new_model(device)
        optimizer = torch.optim.AdamW(self.model.parameters())
        self.learner = SupervisedLearner(
            self.model,
            self.router.optimizer(optimizer) if self.router else optimizer,
            self._draw,
            self._backward,
            updates=self.settings.updates,
            learning_rate=self.settings.learning_rate,
            seed=self.seed,
            samples=self.settings.batch,
        )

    def _new_model(self, device: torch.device) -> tuple[LanguageModel, Router | None]:
        of, method, added = self.settings, self.method, None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = LanguageModel(
                len(self.corpus.words),
                self.corpus.length,
                width=of.width,
                hidden=of.hidden,
                heads=of.heads,
                layers=of.layers,
            )
            if method.adds == "units":
                added = expand(model, "blocks.*.mlp", units=of.units)
            elif method.adds == "adapters":
                added = expand(model, "blocks.*", rank=of.rank)
        model.to(device)
        if added is None or not method.rules:
            return model, None
        return model, Router(model, {ADDED: added}, method.rules, on=method.on)

    def _draw(self, update: int) -> Batch:
        rows = self.labeled if update < self.labeled_until else self.all
        rows = rows[torch.randint(len(rows), (self.settings.batch,)).to(rows.device)]
        stories, labels = self.corpus.train[rows], self.labels[rows]
        if self.method.quiet:
            quiet = torch.rand(len(rows)).to(rows.device) < self.method.quiet
            labels = torch.where(quiet & (labels == RETAIN), QUIET, labels)
        return stories, labels

    def _backward(self, batch: Batch, progress: float) -> Mapping[str, Tensor]:
        stories, labels = batch
        with nullcontext() if self.router is None else self.router.labels(labels):
            loss = story_losses(self.model, stories, OPENING).mean()
            loss.backward()
        return {"story": loss}
