"""What there is to read: stories to train on, labels of some, and others to judge by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oversight_rl.envs.settings import UserError, nearest
from oversight_rl.experiments.unlearning.config import StoriesConfig
from oversight_rl.experiments.unlearning.stories import Storyteller
from oversight_rl.experiments.unlearning.texts import read_topics

RETAIN, FORGET, UNLABELED = range(3)  # labels of stories
SPARE = 64  # stories of each kind to relearn from, to tune on, and to choose by
JUDGED = 100  # stories of each topic to judge by, at most
HELD_OUT = 99  # seed of all these: the same for all runs


@dataclass(frozen=True)
class Corpus:
    """Stories, ids of words `[N, T]`; those held out are in none of the others."""

    words: Sequence[str]
    topics: Sequence[str]
    forget: int
    """The topic to forget."""
    train: Tensor
    topic: Tensor
    """Of the stories to train on, `[N]`."""
    judged: Tensor
    judged_topic: Tensor
    relearn: tuple[Tensor, Tensor]
    """Stories to relearn from: of the topic to forget, and as many of the others."""
    tune: tuple[Tensor, Tensor]
    """Retain stories to tune on, and to choose by."""
    floors: Sequence[float]
    """Of the loss on each topic, exact; nan where it is not known."""

    @property
    def length(self) -> int:
        """Words of a story."""
        return self.train.shape[1]

    @property
    def retained(self) -> list[int]:
        """The other topics."""
        return [topic for topic in range(len(self.topics)) if topic != self.forget]

    def labels(self, share: float, seed: int) -> Tensor:
        """Labels of the stories to train on `[N]`, known of a share of them, drawn by a seed."""
        known = np.random.default_rng((seed, 1)).random(len(self.topic)) < share
        truth = torch.where(self.topic == self.forget, FORGET, RETAIN)
        return torch.where(torch.tensor(known).to(truth.device), truth, UNLABELED)

    def to(self, device: torch.device) -> Corpus:
        """The same on a device."""
        moved: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device)
        for name in ("relearn", "tune"):
            moved[name] = tuple(part.to(device) for part in getattr(self, name))
        return replace(self, **moved)

    def text(self, story: Tensor) -> str:
        """A story in words."""
        return " ".join(self.words[i] for i in story.tolist())


def corpus_of(config: StoriesConfig, seed: int) -> Corpus:
    """The corpus of a run; `UserError` if texts cannot be read or do not have the topic."""
    return _told(config, seed) if config.texts is None else _read(config, config.texts)


def _told(config: StoriesConfig, seed: int) -> Corpus:
    teller = Storyteller()
    forget = _forget(config, teller.topics)
    count = len(teller.topics)
    draws = np.random.default_rng(HELD_OUT)
    held = [teller.tell(topic, JUDGED + 3 * SPARE, draws) for topic in range(count)]
    draws = np.random.default_rng((seed, 0))
    shares = np.full(count, (1 - config.forget_share) / (count - 1))
    shares[forget] = config.forget_share
    counts = draws.multinomial(config.stories, shares)
    train = [teller.tell(topic, int(n), draws) for topic, n in enumerate(counts)]
    floors = [teller.entropy(topic) for topic in range(count)]
    return _corpus(teller.words, teller.topics, forget, train, held, JUDGED, floors)


def _read(config: StoriesConfig, folder: Path) -> Corpus:
    # the last half of the pieces may be held out
    words, pieces = read_topics(folder, config.words, least=2 * 4 * SPARE)
    topics = list(pieces)
    forget = _forget(config, topics)
    judged = min(JUDGED, min(map(len, pieces.values())) // 2 - 3 * SPARE)
    ends = [len(own) - judged - 3 * SPARE for own in pieces.values()]
    train = [own[:end] for own, end in zip(pieces.values(), ends, strict=True)]
    held = [own[end:] for own, end in zip(pieces.values(), ends, strict=True)]
    return _corpus(words, topics, forget, train, held, judged, [math.nan] * len(topics))


def _forget(config: StoriesConfig, topics: Sequence[str]) -> int:
    if config.forget not in topics:
        known = f"must be one of {', '.join(topics)}, got {config.forget!r}"
        raise UserError(f"stories.forget: {known}{nearest(config.forget, topics)}")
    return topics.index(config.forget)


def _corpus(
    words: Sequence[str],
    topics: Sequence[str],
    forget: int,
    train: Sequence[NDArray[np.int64]],
    held: Sequence[NDArray[np.int64]],
    judged: int,
    floors: Sequence[float],
) -> Corpus:
    """Deal out what is held out: of each topic, the first to judge by, others as they are needed.

    Retain stories are of all retain topics in turns.
    """
    spare = [torch.tensor(own[judged:]) for own in held]
    others = torch.stack([own[: 3 * SPARE] for i, own in enumerate(spare) if i != forget], 1)
    relearn, tune, choose = others.flatten(0, 1)[: 3 * SPARE].split(SPARE)
    return Corpus(
        words,
        topics,
        forget,
        torch.tensor(np.concatenate(train)),
        torch.arange(len(topics)).repeat_interleave(torch.tensor([len(own) for own in train])),
        torch.tensor(np.concatenate([own[:judged] for own in held])),
        torch.arange(len(topics)).repeat_interleave(judged),
        (spare[forget][:SPARE], relearn),
        (tune, choose),
        floors,
    )
