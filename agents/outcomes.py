"""Methods and overseers of runs as tensors: what labels say of a step, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oversight_rl.agents.methods import (
    LABELED,
    METHODS,
    TIMEOUT,
    UNFINISHED,
    UNLABELED,
    Lesson,
    Method,
)
from oversight_rl.envs.overseers import Overseer, rate
from oversight_rl.envs.settings import BEHAVIORS, NO_LABEL
from oversight_rl.envs.world import Seen, Truth


@dataclass(frozen=True)
class MethodTables:
    """The methods of R runs as tensors; O outcomes, K experts."""

    reward: Tensor  # [R, O]
    sample_weight: Tensor  # [R, O], 1 if samples with that outcome count
    weighs_labels: Tensor  # [R], 1 if labeled samples weigh more
    routes: Tensor  # [R, O, K + 1], gradient weights into the experts and the gate
    overseen: Tensor  # [R] bool, labels from the overseer, and none of the method's own
    sees_truth: Tensor  # [R] bool, labels from true endings
    label_share: Tensor  # [R, B], share of flagged (or true) endings that are labeled
    label_error: Tensor  # [R, B], share of labels that name a wrong behavior
    labeled: Tensor  # [R, B], chance that an ending of a behavior is labeled; nan: unknown
    lessons: frozenset[Lesson]  # of all runs

    @property
    def reward_tells(self) -> Tensor:
        """Whether what an ending is worth depends on its behavior. [R] bool"""
        labeled = self.reward[:, LABELED:]
        return (labeled != labeled[:, :1]).any(-1)

    @property
    def needs_word(self) -> Tensor:
        """Whether an unlabeled ending is worth nothing by itself, but something as a behavior.

        Then it does not count as long as no label has said what any was. [R] bool
        """
        return self.reward_tells & (self.reward[:, UNLABELED] == 0)

    @property
    def asks_labels(self) -> bool:
        """Whether what is learned from a step depends on its episode's label, in any run.

        If not, rewards alone do, and those are paid when an episode ends.
        """
        differ = ((x != x[:, :1]).any() for x in (self.routes, self.sample_weight))
        return "contrast" in self.lessons or bool(self.weighs_labels.any() or any(differ))


def tables(
    names: Sequence[str],
    overseers: Sequence[Overseer],
    experts: int,
    device: torch.device | str = "cpu",
    behaviors: int = len(BEHAVIORS),
) -> MethodTables:
    """The tables of one method and overseer per run.

    The stack has K experts; of the behaviors that labels tell apart the first is wanted, all others
    are as ghosts.

    Raises:
        ValueError: a method's rewards depend on labels that its overseer does not give.
    """
    methods = [METHODS[name] for name in names]
    plain = [1.0] * (experts + 1)

    def tensor(rows: object) -> Tensor:
        return torch.tensor(rows, dtype=torch.float32, device=device)

    def reward(method: Method, overseer: Overseer) -> list[float]:
        unlabeled, diamond, ghost = method.rewards(overseer, behaviors)
        return [0.0, 0.0, unlabeled, diamond, *[ghost] * (behaviors - 1)]

    def labeled(overseer: Overseer) -> list[float]:
        known = [overseer.labeled(behavior) for behavior in range(behaviors)]
        return [math.nan if chance is None else chance for chance in known]

    pairs = list(zip(methods, overseers, strict=True))
    counts = [[1.0, 1.0, float(m.table.keep_unlabeled), *[1.0] * behaviors] for m in methods]
    return MethodTables(
        reward=tensor([reward(*pair) for pair in pairs]),
        sample_weight=tensor(counts),
        weighs_labels=tensor([float(m.table.weighs_labels) for m in methods]),
        routes=tensor([[plain] * 3 + m.table.routes(experts, behaviors) for m in methods]),
        overseen=torch.tensor([not m.table.sees_truth for m in methods], device=device),
        sees_truth=torch.tensor([_looks(*pair) for pair in pairs], device=device),
        label_share=tensor([_share(*pair, behaviors) for pair in pairs]),
        label_error=tensor([_error(*pair, behaviors) for pair in pairs]),
        labeled=tensor([labeled(overseer) for overseer in overseers]),
        lessons=frozenset.intersection(*(frozenset(m.lessons) for m in methods)),
    )


def _looks(method: Method, overseer: Overseer) -> bool:
    """Whether labels come from how episodes really ended, whatever was flagged."""
    return method.table.sees_truth or not overseer.made.tied


def _share(method: Method, overseer: Overseer, behaviors: int) -> list[float]:
    """Share of the flagged (or true) endings of each behavior that are labeled."""
    labels, every = overseer.made, range(behaviors)
    if method.table.sees_truth:  # a source of its own, which no overseer changes
        audits = method.table.labels == "audit"
        return [(overseer.oversight or 0.0) if audits else 1.0] * behaviors
    told = [rate(labels.recall, b) for b in every]
    if labels.asks != "nobody":  # of any ending, but of a kind that it never tells
        return [told[b] * (rate(labels.shares, b) > 0) for b in every]
    return told if labels.tied else [told[b] * overseer.flagged(b) for b in every]


def _error(method: Method, overseer: Overseer, behaviors: int) -> list[float]:
    """Share of the labels of each behavior that name a wrong one."""
    if method.table.labels == "shuffled":
        return [1 - 1 / behaviors] * behaviors
    own = (0.0,) if method.table.sees_truth else overseer.made.error
    return [rate(own, b) for b in range(behaviors)]


def expected(table: Tensor, chances: Tensor) -> Tensor:
    """What a table by outcome says of an ending that is each behavior with some chance.

    `[R, O, *columns]` and chances `[R, T, N, behaviors]` -> `[R, T, N, *columns]`.
    """
    return torch.einsum("rtnb,rb...->rtn...", chances, table[:, LABELED:])


def labels(
    seen: Seen, truth: Truth, uniform: Tensor, methods: MethodTables, hard: Tensor | None = None
) -> Tensor:
    """What an overseer says of each step's end, NO_LABEL where nothing. `[R, T, N]`

    All that a learner may know of how an episode ended. Only an overseer whose labels are not tied
    to flags looks at the truth, and so do the oracle methods, which have labels of their own.

    Args:
        seen: of the steps, with what is flagged as `label`.
        truth: of the steps.
        uniform: in [0, 1), decides which labels go missing or wrong.
        methods: of the runs.
        hard: bool, whether labels can be wrong there; None: everywhere.
    """
    behaviors = methods.label_share.shape[1]
    label = torch.where(methods.sees_truth[:, None, None], truth.ending, seen.label)
    own = label.clamp(min=0).flatten(1)  # of no ending, any
    share = methods.label_share.gather(1, own).view_as(uniform)
    error = share * methods.label_error.gather(1, own).view_as(uniform)
    if hard is not None:
        error = torch.where(hard, error, 0.0)
    wrong = uniform < error
    shift = torch.where(wrong, uniform / error, 0.0) * (behaviors - 1)  # uniform among the others
    other = (label + 1 + shift.long()) % behaviors
    given = torch.where(wrong, other, label)
    return torch.where((label == NO_LABEL) | (uniform >= share), NO_LABEL, given)


def outcomes(seen: Seen) -> tuple[Tensor, Tensor]:
    """The outcome of the episode that each sample belongs to, and the steps left until its end.

    A label is known at an episode's end only, and is written back to all of its steps. Steps are
    those to the episode's last, or to the window's end where it is unfinished. Both are
    `[R, T, N]`.
    """
    steps, label = seen.label.shape[1], seen.label
    reached = torch.where(label == NO_LABEL, UNLABELED, LABELED + label)
    ended_as = torch.where(seen.terminated, reached, TIMEOUT)
    time = torch.arange(steps, device=label.device)[:, None]  # [T, 1]
    done = seen.terminated | seen.truncated
    end = torch.where(done, time, steps).flip(1).cummin(1).values.flip(1)  # [R, T, N]
    outcome = ended_as.gather(1, end.clamp(max=steps - 1))
    return torch.where(end < steps, outcome, UNFINISHED), end - time
