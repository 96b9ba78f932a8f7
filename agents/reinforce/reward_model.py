"""A reward model: it tells what an unlabeled ending was, and learns that from the labeled ones.

Semi-supervised RL: the learner has the true reward of a few episodes and imputes it for the rest
(Christiano 2016). The model sees how an episode ended, as the policy would see it, and tells the
chance that it ended on the diamond. By default it does not look at the flags: a labeled ending is
always flagged and an unlabeled one hardly ever is, so that a model which reads flags is asked about
endings unlike all that it was taught.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oversight_rl.agents.memory import Memory
from oversight_rl.agents.networks import Linear, affine, initialize
from oversight_rl.agents.positive_unlabeled import Judged, as_often, cost, loss_of_endings
from oversight_rl.agents.reinforce.own_values import hidden_layers, stacked
from oversight_rl.agents.telling import Tally
from oversight_rl.envs.settings import PLANES
from oversight_rl.envs.world import World

LESSON = 1024
"""Remembered endings that an update learns from."""
HIDDEN = 64
FLAGS_FROM = 3  # active inputs of an observation from here on are flags, see `World.active`


class RewardModel(nn.Module):
    """A stack of R reward models and the labeled endings that they remember.

    Each is a 1x1 convolution over the planes, summed over the cells, and a linear layer:
    what squares coincide matters, and not where.

    Args:
        runs: number of runs R.
        world: that the endings are of.
        sees_flags: whether the model looks at the flags.
        chances: that an ending of each behavior is labeled, nan where unknown, `[R, B]`. Where one
            of them may be 0, the model remembers unlabeled endings too, and learns from them.
        generators: streams to draw the initial parameters from, one per run.
    """

    believed: ClassVar[int] = 50
    """Labeled endings after which its word counts in full."""
    doubts: ClassVar[bool] = True
    """Whether a label that does not fit in costs less, where labels can be wrong."""
    asks: ClassVar[bool] = True
    """Whether its doubt says which labels to ask for, where an overseer can be asked."""

    def __init__(
        self,
        runs: int,
        world: World,
        sees_flags: bool,
        chances: Tensor,
        generators: Sequence[torch.Generator],
    ) -> None:
        super().__init__()
        self.world, self.chances = world, chances
        self.build(runs)
        initialize(self, generators)
        width = world.n_active if sees_flags else FLAGS_FROM
        self.memory = Memory(runs, width, LESSON)
        one_sided = bool((~(chances > 0)).any())
        self.every_memory = Memory(runs, width, LESSON) if one_sided else None

    def build(self, runs: int) -> None:
        """Make the networks."""
        self.convolution = Linear([runs], len(PLANES), HIDDEN)
        self.out = Linear([runs], HIDDEN, 1)

    @property
    def trust(self) -> Tensor:
        """How much its word counts next to nobody's, by what it was taught: in [0, 1], `[R]`."""
        return (self.memory.count / self.believed).clamp(max=1.0)

    def remember(self, final: Tensor, label: Tensor, ended: Tensor) -> None:
        """Keep the endings among B samples; a label below 0 is none. `[R, B]` each."""
        self.memory.add(final, label, ended & (label >= 0))
        if self.every_memory is not None:
            none = self.every_memory.kinds
            self.every_memory.add(final, torch.where(label >= 0, label, none), ended)

    def forward(self, final: Tensor) -> Tensor:
        """Logits that endings are on the diamond: `[R, B, D or more]` -> `[R, B]`.

        Cells where nothing is have the same features, so that only the others are worked out.
        """
        active = final[..., : self.memory.observation.shape[-1]]  # [R, B, D]
        cells, bias = self.world.config.cells, self.convolution.bias[:, None, None]  # [R, 1, 1, H]
        there = active < self.world.inputs  # a flag that is off is nowhere
        together = active[..., :, None] % cells == active[..., None, :] % cells
        together = (together & there[..., None] & there[..., None, :]).float()  # [R, B, D, D]
        rows = F.pad(self.convolution.weight.mT, (0, 0, 0, 1))  # [R, planes + 1, H], the last is 0
        run = torch.arange(len(rows), device=rows.device)[:, None, None]
        # an embedding's gradient is summed in a fixed order, that of indexing is not
        each = F.embedding(active // cells + run * rows.shape[1], rows.flatten(0, 1))
        features = (together @ each + bias).relu() - bias.relu()
        share = there / together.sum(-1).clamp(min=1)  # inputs of one cell stand for it together
        pooled = (features * share[..., None]).sum(2) + cells * bias[:, 0].relu()
        return affine(pooled, self.out.weight, self.out.bias).squeeze(-1)

    def knows(self, final: Tensor) -> Tensor:
        """Of which endings it was taught anything like: `[R, B, D or more]` -> `[R, B]` bool."""
        return torch.ones(final.shape[:2], dtype=torch.bool, device=final.device)

    def loss(self, uniform: Tensor) -> Tensor:
        """Cross entropy on remembered endings drawn by `uniform` `[R, B]` in [0, 1). [R]

        Exactly 0 where there is none to remember. Where labels never name some behavior, all
        endings are looked at, too; see `positive_unlabeled.loss_of_endings`. Where labels are known
        to be wrong at times, one that does not fit in has a bounded cost.
        """
        final, label, weight = self.memory.draw(uniform)
        weight = as_often(weight, label, self.chances)
        logits, errs = self(final), self.doubts and any(self.world.labels.error)
        if self.every_memory is not None:
            every, *about = self.every_memory.draw(uniform.flip(-1))
            judged = Judged(_both(logits), label, weight), Judged(_both(self(every)), *about)
            memories = self.memory, self.every_memory
            return loss_of_endings(*judged, self.chances, *memories, bounded=errs)
        # as `loss_of_labels`, from one logit: torch's own function rounds otherwise
        is_diamond = (label == 0).to(uniform.dtype)
        paid = F.binary_cross_entropy_with_logits(logits, is_diamond, reduction="none")
        if errs:
            paid = cost(-paid)
        return (paid * weight).mean(-1)


class PlainRewardModel(RewardModel):
    """A reward model that is told labels alone: layers as the policy's, on all that it sees.

    Flags are inputs like any other to it. But labeled endings are flagged and those that it is
    asked about are not, so it leaves out the inputs that tell the two apart, whatever they are. It
    needs labels on all cells before it is right. Where the overseer looks at a part of the world
    alone, all that lies there tells them apart; so nothing is left out, and its word does not count
    for an ending with an input that was on in no labeled one.

    Args:
        hidden: units of its layers.
        args: as `RewardModel`, without `sees_flags`.
    """

    believed = 500
    doubts = False  # 0.756 with a bound, 0.761 without, three labels in ten wrong at 10%
    asks = False  # it doubts what is odd: 500 labels by chance teach more (0.82, 0.50 by its doubt)

    def __init__(
        self,
        hidden: Sequence[int],
        runs: int,
        world: World,
        chances: Tensor,
        generators: Sequence[torch.Generator],
    ) -> None:
        self.sizes = [world.inputs, *hidden]
        super().__init__(runs, world, True, chances, generators)
        self.tally = Tally(chances, world.inputs + 1)  # the last is that of inputs that are off

    def build(self, runs: int) -> None:
        self.layers = hidden_layers(runs, self.sizes)
        self.out = Linear([runs], self.sizes[-1], 1)

    @torch.no_grad()
    def remember(self, final: Tensor, label: Tensor, ended: Tensor) -> None:
        super().remember(final, label, ended)
        tally, kinds = self.tally, self.chances.shape[1]
        kind = torch.where(label >= 0, label, kinds)  # the last of one more: no label
        at = final.long() + (kind * tally.on_others.shape[1])[..., None]
        on = tally.on_others.new_zeros(len(final), (kinds + 1) * tally.on_others.shape[1])
        on.scatter_add_(1, at.flatten(1), ended[..., None].expand_as(at).flatten(1).long())
        on = on.unflatten(1, (kinds + 1, -1))
        count = F.one_hot(kind, kinds + 1).mul(ended[..., None]).sum(1)
        on_others, others = on[:, -1], count[:, -1]
        if self.world.labels.delay:  # then they were among others before
            on_others, others = on_others - on[:, :-1].sum(1), others - count[:, :-1].sum(1)
        tally.add(on[:, :-1], count[:, :-1], on_others, others)

    def forward(self, final: Tensor) -> Tensor:
        if self.world.labels.region == "all":
            final = torch.where(self._of(final, self.tally.telling), self.world.inputs, final)
        return stacked(self.layers, self.out, final).squeeze(-1)

    def knows(self, final: Tensor) -> Tensor:
        if self.world.labels.region == "all":
            return super().knows(final)
        never_on = self._of(final, self.tally.on_labeled.sum(1) == 0)
        return ~(never_on & (final < self.world.inputs)).any(-1)

    @staticmethod
    def _of(final: Tensor, inputs: Tensor) -> Tensor:
        """What is said of inputs `[R, F + 1]`, for those that are on in endings. [R, B, D]"""
        run = torch.arange(len(final), device=final.device)[:, None, None]
        return inputs[run, final.long()]


def _both(logits: Tensor) -> Tensor:
    """Log-chances of diamond and ghost from the diamond's logits: `[..., 2]`."""
    return torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], dim=-1)
