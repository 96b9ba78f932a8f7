"""Where endings on the grid get their labels: the one place in training that looks at the truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from oversight_rl.agents.learner import Bounds
from oversight_rl.agents.outcomes import MethodTables, labels
from oversight_rl.agents.reinforce.collect import Rollout
from oversight_rl.agents.reinforce.late import Waiting
from oversight_rl.envs.overseers import Overseer
from oversight_rl.envs.settings import ACTIONS, BEHAVIORS, NO_LABEL
from oversight_rl.envs.world import World

Doubt = Callable[[Rollout], Tensor]
"""How little a classifier knows of each step's end, should the episode end there. `[R, T, N]`"""
ASKING = 0.5  # of the updates, over which the labels that a learner asks for are spread
COARSE = 2**12  # uniform numbers times this have fractions that are as good as others


class Overseeing(nn.Module):
    """The overseers of R runs, who differ in their level of oversight alone.

    Args:
        overseers: one per run.
        world: that they watch.
        updates: of training.
        window: steps T and worlds N.

    Raises:
        ValueError: they differ in more than their levels.
    """

    spent: Tensor  # [R] int64, labels given so far

    def __init__(
        self, overseers: Sequence[Overseer], world: World, updates: int, window: tuple[int, int]
    ) -> None:
        super().__init__()
        self.labels, *others = (overseer.labels for overseer in overseers)
        if any(other != self.labels for other in others):
            raise ValueError("overseers of one stack may differ in their levels only")
        self.world, self.updates = world, updates
        self.register_buffer("spent", torch.zeros(len(overseers), dtype=torch.int64))
        self.waiting = None
        if self.labels.delay:
            shape = len(overseers), *window, world.n_active
            self.waiting = Waiting(self.labels.delay, world.config.max_steps, shape)

    @property
    def remembers(self) -> bool:
        """Whether what was labeled before decides what will be."""
        return self.labels.budget is not None or self.waiting is not None

    def bounds(self) -> Bounds:
        """What its whole numbers can be, by name."""
        found: Bounds = {"spent": (0, self.labels.budget or 0)}
        if self.waiting is not None:
            most = self.updates * self.waiting.label[0, 0].numel()  # steps of a run
            found |= {f"waiting.{name}": (0, most) for name in ("count", "episodes")}
            found |= {f"waiting.{name}": (0, self.updates) for name in ("served", "windows")}
            found |= {"waiting.active": (0, self.world.inputs), "waiting.ended": (0, 1)}
            found["waiting.action"] = 0, len(ACTIONS) - 1
            found["waiting.label"] = NO_LABEL, len(BEHAVIORS) - 1
        return found

    @torch.no_grad()
    def forward(
        self, rollout: Rollout, methods: MethodTables, update: int, doubt: Doubt | None = None
    ) -> Rollout:
        """The window with the labels that the overseers give, in place of those that flags give.

        Args:
            rollout: a window.
            methods: of the runs.
            update: how many there were before.
            doubt: where overseers label what is asked for: what the learner knows least of; it
                asks by chance times that.
        """
        hard = None if self.labels.near is None else self.close(rollout)
        label = labels(rollout.seen, rollout.truth, rollout.uniform, methods, hard)
        if self.labels.budget is not None:
            wanted = (label != NO_LABEL) & methods.overseen[:, None, None]
            given = self._afforded(rollout, wanted, update, doubt)
            self.spent += given.sum((1, 2))
            label = torch.where(wanted & ~given, NO_LABEL, label)
        return replace(rollout, seen=replace(rollout.seen, label=label))

    def close(self, rollout: Rollout) -> Tensor:
        """Whether diamond and ghost lie so near each other that labels can be wrong. `[R, T, N]`"""
        assert self.labels.near is not None
        _, ghost, diamond = (rollout.observation[..., :3] % self.world.config.cells).unbind(-1)
        return self.world.distance(diamond, ghost) <= self.labels.near

    def _afforded(
        self, rollout: Rollout, wanted: Tensor, update: int, doubt: Doubt | None
    ) -> Tensor:
        """Which of the labels that could be given `[R, T, N]` the budget is spent on."""
        assert self.labels.budget is not None
        budget = self.labels.budget
        order = -torch.arange(wanted[0].numel(), device=wanted.device).expand(len(wanted), -1)
        if self.labels.asks != "nobody":
            budget = math.ceil(budget * min(1.0, (update + 1) / (ASKING * self.updates)))
            chance = rollout.uniform * COARSE % 1
            order = (chance if doubt is None else chance * doubt(rollout)).flatten(1)
        order = torch.where(wanted.flatten(1), order.double(), -torch.inf)
        rank = order.argsort(dim=1, descending=True, stable=True).argsort(dim=1).view_as(wanted)
        return wanted & (rank < (budget - self.spent)[:, None, None])
