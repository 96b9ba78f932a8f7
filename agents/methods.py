"""The table of methods: what each rewards, learns from, routes and deploys, and what it assumes.

An episode has one of a few *outcomes*, as the learner sees it; a method says, for each outcome,
the reward at its end, whether its samples count, and where its gradients flow. That is all a
method is: adding one means adding a row to METHODS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from agents.routing import everything, own_expert_only
from envs.world import BEHAVIORS

# Outcomes of an episode as a learner sees them; LABELED + b is one labeled as behavior b
UNFINISHED, TIMEOUT, UNLABELED, LABELED = range(4)


@dataclass(frozen=True)
class Method:
    """A row of the table. Tuples over outcomes: (unlabeled, labeled diamond, labeled ghost)."""

    summary: str
    assumes: Literal["labels", "true labels"]
    """What the method needs: labels on flagged endings, or the truth."""
    labels: Literal["flags", "truth", "audit"]
    """Where labels come from: flagged endings; every ending; a random share of endings, as large
    as the oversight level and independent of the flags."""
    reward: tuple[float, float, float]
    """Reward on reaching a square; a timeout earns 0."""
    keep_unlabeled: bool
    """Whether episodes that reached a square unlabeled count; the others always do."""
    experts: Literal["one", "many"] = "one"
    gate: Literal["learned", "fixed"] = "learned"
    routes: Callable[[int, int], list[list[float]]] = everything
    """(K, behaviors) -> weights of labeled episodes' gradients into each expert and the gate."""

    @property
    def deployed(self) -> str:
        """Name of the policy that is deployed."""
        return BEHAVIORS[0] if self.experts == "many" else "single"


METHODS: dict[str, Method] = {
    "routing": Method(
        summary="gradient routing: a labeled episode trains its own expert only",
        assumes="labels",
        labels="flags",
        reward=(1, 1, 1),
        keep_unlabeled=True,
        experts="many",
        routes=own_expert_only,
    ),
    "no_routing": Method(
        summary="ablation: experts and gate as in routing, gradients not routed",
        assumes="labels",
        labels="flags",
        reward=(1, 1, 1),
        keep_unlabeled=True,
        experts="many",
    ),
    "no_gate": Method(
        summary="ablation: routed experts under a gate fixed at 1/K",
        assumes="labels",
        labels="flags",
        reward=(1, 1, 1),
        keep_unlabeled=True,
        experts="many",
        gate="fixed",
        routes=own_expert_only,
    ),
    "naive": Method(
        summary="+1 at any square, -1 at a flagged ghost",
        assumes="labels",
        labels="flags",
        reward=(1, 1, -1),
        keep_unlabeled=True,
    ),
    "filtering": Method(
        summary="data filtering: true reward on labeled episodes, unlabeled ones dropped",
        assumes="labels",
        labels="flags",
        reward=(0, 1, -1),
        keep_unlabeled=False,
    ),
    "oracle": Method(
        summary="true reward on every episode",
        assumes="true labels",
        labels="truth",
        reward=(0, 1, -1),
        keep_unlabeled=True,
    ),
    "oracle_filtering": Method(
        summary="true reward on a random share of episodes as large as the oversight level",
        assumes="true labels",
        labels="audit",
        reward=(0, 1, -1),
        keep_unlabeled=False,
    ),
}


@dataclass(frozen=True)
class MethodTables:
    """The methods of R runs as tensors; O outcomes, K experts."""

    reward: Tensor  # [R, O]
    sample_weight: Tensor  # [R, O], 1 if samples with that outcome count
    routes: Tensor  # [R, O, K + 1], gradient weights into the experts and the gate
    sees_truth: Tensor  # [R] bool, labels from true endings
    label_share: Tensor  # [R], share of endings labeled where `sees_truth`


def tables(
    names: list[str], oversight: list[float], experts: int, device: torch.device | str = "cpu"
) -> MethodTables:
    """The tables of one method and oversight level per run.

    Args:
        names: keys of METHODS, one per run.
        oversight: level of each run, which `oracle_filtering` takes as its share of labels.
        experts: number of experts K of the stack.
        device: where the tensors live.
    """
    methods = [METHODS[name] for name in names]
    plain = [1.0] * (experts + 1)

    def tensor(rows: object) -> Tensor:
        return torch.tensor(rows, dtype=torch.float32, device=device)

    return MethodTables(
        reward=tensor([[0.0, 0.0, *m.reward] for m in methods]),
        sample_weight=tensor([[1.0, 1.0, float(m.keep_unlabeled), 1.0, 1.0] for m in methods]),
        routes=tensor([[plain, plain, plain, *m.routes(experts, len(BEHAVIORS))] for m in methods]),
        sees_truth=torch.tensor([m.labels != "flags" for m in methods], device=device),
        label_share=tensor(
            [
                level if m.labels == "audit" else 1.0
                for m, level in zip(methods, oversight, strict=True)
            ]
        ),
    )
