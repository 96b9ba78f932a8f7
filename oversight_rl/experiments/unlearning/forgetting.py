"""How a trained model forgets, and what comes after: ablation, unlearning after the fact, tuning.

All of it is a function of the trained model and the corpus: nothing is drawn but from fixed seeds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oversight_rl.agents.routing import Region, Router, Rule, relearn
from oversight_rl.experiments.unlearning.config import StoriesConfig
from oversight_rl.experiments.unlearning.corpus import FORGET, RETAIN, SPARE, Corpus
from oversight_rl.experiments.unlearning.methods import ADDED, Method
from oversight_rl.experiments.unlearning.model import LanguageModel, story_losses
from oversight_rl.experiments.unlearning.stories import OPENING

STEPS = 60  # of unlearning after the fact
MOST_LOSS = 5.0  # of forget stories, nats a word: gradient difference goes no further
STEER = 40.0  # length of the activations that RMU steers forget stories to
SHOWN_STEPS = 5  # of relearning, between points of the curves
CHOSEN_EVERY = 5  # tuning steps between looks at which is the best


def forget(
    model: nn.Module,
    router: Router | None,
    method: Method,
    corpus: Corpus,
    labels: Tensor,
    config: StoriesConfig,
) -> nn.Module:
    """A copy of a trained model that has forgotten, or was to.

    Args:
        model: as trained; it stays as it is.
        router: of the model, if it is expanded.
        method: says how.
        corpus: unlearning after the fact reads it, as far as it is labeled.
        labels: of its stories to train on.
        config: has the step size.
    """
    if method.forgets == "ablation" and router is not None:
        return router.contract(ADDED)
    if method.forgets == "random":
        return _without_random_units(model, config.units)
    copied = copy.deepcopy(model)
    if method.forgets == "gradient_difference":
        _descend(copied, _difference, corpus, labels, config.relearn_rate)
    if method.forgets == "rmu":
        _descend(copied, _misdirection(model), corpus, labels, config.relearn_rate)
    return copied


def tuned(model: nn.Module, corpus: Corpus, config: StoriesConfig) -> nn.Module:
    """A copy after a few steps on retain stories, as it was when others of them went best.

    Source: arXiv 2410.04332, section 4.2, where it mends what ablation broke.
    """
    learner = copy.deepcopy(model)
    best, lowest = model, loss_on(model, corpus.tune[1])
    optimizer = torch.optim.AdamW(learner.parameters(), config.relearn_rate)
    for step in range(1, config.tune_steps + 1):
        optimizer.zero_grad()
        story_losses(learner, corpus.tune[0], OPENING).mean().backward()
        optimizer.step()
        if step % CHOSEN_EVERY == 0 and (loss := loss_on(learner, corpus.tune[1])) < lowest:
            best, lowest = copy.deepcopy(learner), loss
    return best


def relearned(
    model: nn.Module, corpus: Corpus, count: int, config: StoriesConfig
) -> list[tuple[float, float]]:
    """Forget losses before and while a model learns from `count` forget stories, by steps.

    Retain losses, on those that tuning chooses by, stand beside them at the steps that are shown.

    As many retain stories are learned from, so that what comes back is no mere change of topic.
    """
    batch = torch.cat([stories[:count] for stories in corpus.relearn])
    judged = corpus.judged[corpus.judged_topic == corpus.forget]
    kept: list[float] = []

    def evaluate(model: nn.Module) -> float:
        shown = len(kept) % SHOWN_STEPS == 0
        kept.append(loss_on(model, corpus.tune[1]) if shown else math.nan)
        return loss_on(model, judged)

    curve = relearn(
        model,
        lambda model, ids: story_losses(model, ids, OPENING),
        [batch],
        evaluate,
        steps=config.relearn_steps,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, config.relearn_rate),
    )
    return list(zip(curve, kept, strict=True))


@torch.no_grad()
def loss_on(model: nn.Module, stories: Tensor) -> float:
    """Mean loss, nats for each word."""
    return float(story_losses(model, stories, OPENING).mean())


def _without_random_units(model: nn.Module, units: int) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    blocks = {name: mlp for name, mlp in model.named_modules() if name.endswith(".mlp")}
    drawn = {
        name: torch.randperm(mlp[0].out_features, generator=generator)[:units].tolist()
        for name, mlp in blocks.items()
    }
    with Router(model, {ADDED: Region(units=drawn)}, {RETAIN: Rule()}) as router:
        return router.contract(ADDED)


Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""From a model, retain stories and forget stories."""


def _descend(
    model: nn.Module, objective: Objective, corpus: Corpus, labels: Tensor, rate: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    of_label = [(labels == label).nonzero()[:, 0] for label in (RETAIN, FORGET)]
    if not all(map(len, of_label)):
        return  # nothing is known of what to forget
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    for _ in range(STEPS):
        retain, forget = (
            corpus.train[rows[torch.randint(len(rows), (SPARE // 4,), generator=generator)]]
            for rows in of_label
        )
        optimizer.zero_grad()
        objective(model, retain, forget).backward()
        optimizer.step()


def _difference(model: nn.Module, retain: Tensor, forget: Tensor) -> Tensor:
    """Down on retain stories, up on forget stories."""
    up = story_losses(model, forget, OPENING).clamp(max=MOST_LOSS).mean()
    return story_losses(model, retain, OPENING).mean() - up


def _misdirection(trained: nn.Module) -> Objective:
    """RMU: activations after the first block go one random way on forget stories (2403.03218)."""
    assert isinstance(trained, LanguageModel)
    width = trained.word.embedding_dim
    way = torch.rand(width, generator=torch.Generator().manual_seed(0))
    way = (way * STEER / way.norm()).to(trained.word.weight.device)

    def objective(model: nn.Module, retain: Tensor, forget: Tensor) -> Tensor:
        with torch.no_grad():
            kept = _after_first_block(trained, retain)
        steered = F.mse_loss(_after_first_block(model, forget), way.expand(*forget.shape, width))
        return steered + F.mse_loss(_after_first_block(model, retain), kept)

    return objective


def _after_first_block(model: nn.Module, ids: Tensor) -> Tensor:  # [B, T] -> [B, T, width]
    assert isinstance(model, LanguageModel)
    return model.blocks[0](model.embed(ids))  # type: ignore[no-any-return]
