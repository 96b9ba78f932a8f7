"""Language models that learn and forget: how they are judged and shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from oversight_rl.experiments.unlearning.config import Config
from oversight_rl.experiments.unlearning.corpus import corpus_of
from oversight_rl.experiments.unlearning.forgetting import SHOWN_STEPS, forget, relearned, tuned
from oversight_rl.experiments.unlearning.methods import METHODS
from oversight_rl.experiments.unlearning.model import story_losses, tell
from oversight_rl.experiments.unlearning.reading import Reader
from oversight_rl.experiments.unlearning.stories import OPENING
from oversight_rl.runs.experiment import Experiment, View
from oversight_rl.runs.rows import Facts, Row

RELEARN_FROM = (4, 16, 64)  # stories of the topic to forget
SAMPLES = 3  # stories of each kind that are told
WHEN, AS_IT_WAS = ("before", "after"), "as it was"


class UnlearningRuns(Experiment):
    """One run."""

    score: ClassVar[str] = "forgetting"
    forgets: ClassVar[bool] = True
    looks: ClassVar[str] = "--ablate"
    methods: ClassVar[Mapping[str, Any]] = METHODS
    report: ClassVar[str] = "oversight_rl.experiments.unlearning.figures:REPORT"
    page: ClassVar[tuple[str, str, str]] = (
        "What a model knows before and after it forgets",
        "How stories go on that it never read",
        "Told",
    )
    charts: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "Stories": {
            "loss on what is to be forgotten": "evaluation/forget$",
            "loss on the rest": "evaluation/retain$",
        }
    }

    def __init__(self, configs: Sequence[Config]) -> None:
        self.configs = configs
        (self.config,) = configs
        device, settings = self.config.torch_device(), self.config.stories
        self.corpus = corpus_of(settings, self.config.seeds[0]).to(device)
        self.reader = Reader(self.config, self.corpus, device)
        self.learner = self.reader.learner

    def forgetful(self) -> nn.Module:
        """A copy of the model as it is now that has forgotten, or was to."""
        reader = self.reader
        return forget(
            reader.model,
            reader.router,
            reader.method,
            self.corpus,
            reader.labels,
            self.config.stories,
        )

    def evaluate(self, facts: Sequence[Facts]) -> list[list[Row]]:
        trained, ablated = self.figures(self.reader.model), self.figures(self.forgetful())
        return [
            [
                Row.of(facts[0], "trained", trained, deployed=False, evaluator="rollout"),
                Row.of(facts[0], "ablated", ablated, evaluator="rollout"),
            ]
        ]

    def final(self, facts: Sequence[Facts]) -> list[list[Row]]:
        settings = self.config.stories
        forgetful = self.forgetful()
        deployed = tuned(forgetful, self.corpus, settings)
        found = {
            "trained": self.figures(self.reader.model),
            "ablated": self.figures(forgetful),
            "tuned": self.figures(deployed),
        }
        unknown = dict.fromkeys(found["tuned"], math.nan)
        for count in RELEARN_FROM:
            curve = relearned(deployed, self.corpus, count, settings)
            found["tuned"][f"relearned_{count}"] = min(forget for forget, _ in curve)
            for step in range(0, len(curve), SHOWN_STEPS):
                lost, kept = curve[step]
                losses = {"forgetting": lost - kept, "forget_loss": lost, "retain_loss": kept}
                found[f"relearned={count},step={step}"] = unknown | losses
        return [
            [
                Row.of(facts[0], policy, figures, deployed=policy == "tuned", evaluator="rollout")
                for policy, figures in found.items()
            ]
        ]

    @torch.no_grad()
    def figures(self, model: nn.Module) -> dict[str, float]:
        """What a model knows of each topic, in nats for each word."""
        corpus = self.corpus
        losses = story_losses(model, corpus.judged, OPENING)
        topics = [losses[corpus.judged_topic == i].mean().item() for i in range(len(corpus.topics))]
        forget, retain = topics[corpus.forget], [topics[i] for i in corpus.retained]
        floors = [corpus.floors[i] for i in corpus.retained]
        kept = sum(retain) / len(retain)
        return {
            "forgetting": forget - kept,
            "forget_loss": forget,
            "retain_loss": kept,
            **{f"relearned_{count}": math.nan for count in RELEARN_FROM},
            **{f"loss_{name}": loss for name, loss in zip(corpus.topics, topics, strict=True)},
            "forget_floor": corpus.floors[corpus.forget],
            "retain_floor": sum(floors) / len(floors),
        }

    def texts(self, run: int) -> dict[str, str]:
        """Openings that were never read, and how the model goes on, before and after."""
        told = {}
        for topic, stories in self.told().items():
            lines = []
            for opening, ways in stories:
                lines.append(f"* **{opening}**")
                lines += [f"  * {when}: {went}" for when, went in ways.items()]
            told[topic] = "\n".join(lines)
        return told

    def views(self, run: int) -> dict[str, View]:
        """The same, all before and all after."""
        told = self.told()
        return {
            f"by the model {when} it forgot" if when in WHEN else when: {
                topic: [(opening, ways[when]) for opening, ways in stories]
                for topic, stories in told.items()
            }
            for when in (*WHEN, AS_IT_WAS)
        }

    def told(self) -> dict[str, list[tuple[str, dict[str, str]]]]:
        """By topic, openings of stories, and how each goes on by when it is told."""
        corpus, models = self.corpus, (self.reader.model, self.forgetful())
        found = {}
        for topic in (corpus.forget, corpus.retained[0]):
            stories = []
            for story in corpus.judged[corpus.judged_topic == topic][:SAMPLES]:
                ways = {
                    when: corpus.text(
                        tell(model, story[None, :OPENING], corpus.length)[0][OPENING:]
                    )
                    for when, model in zip(WHEN, models, strict=True)
                }
                ways[AS_IT_WAS] = corpus.text(story[OPENING:])
                stories.append((corpus.text(story[:OPENING]), ways))
            found[corpus.topics[topic]] = stories
        return found

    @classmethod
    def shown(cls, figures: Sequence[str], details: bool = False) -> dict[str, str]:
        wanted = {"forgetting": cls.score, "forget": "forget_loss", "retain": "retain_loss"}
        wanted |= {f"relearned {count}": f"relearned_{count}" for count in RELEARN_FROM}
        return {short: name for short, name in wanted.items() if name in figures}

    @classmethod
    def notes(cls, rows: Sequence[Row]) -> list[str]:
        floors = [rows[0].figures[f"{kind}_floor"] for kind in ("forget", "retain")]
        known = f"; their floors are {floors[0]:.3f} and {floors[1]:.3f}, exact"
        return [
            f"losses in nats for each word{known * (not math.isnan(sum(floors)))}",
            "forgetting: how far the loss on the topic to forget lies above that on the others",
            "relearned: its lowest while so many stories on the topic are learned from",
        ]

    @classmethod
    def describe(cls, config: Any) -> str:
        method = METHODS[config.method]
        return (
            f"**{config.method}**: {method.summary}. It assumes: {method.assumes}. To forget: "
            f"**{config.stories.forget}**.\n\n"
            "* `evaluation/forget`, `evaluation/retain`: losses on the topic to forget and on the "
            "others, as trained and once it has forgotten, in nats for each word; "
            "`evaluation/forgetting`: how far the first lies above the second\n"
            "* `texts`: openings that were never read, and how the model goes on, before and after"
        )
