"""Value nets of experts that act by themselves: what each is to get by its own behavior."""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from oversight_rl.agents.networks import FirstLayer, Linear, affine, initialize


class OwnValues(nn.Module):
    """A stack of R value nets, each with an output for each expert.

    Args:
        runs: number of runs R.
        inputs: of an observation.
        hidden: units of the hidden layers.
        experts: number of experts K.
        generators: streams to draw the initial parameters from, one per run.
    """

    def __init__(
        self,
        runs: int,
        inputs: int,
        hidden: Sequence[int],
        experts: int,
        generators: Sequence[torch.Generator],
    ) -> None:
        super().__init__()
        self.layers = hidden_layers(runs, [inputs, *hidden])
        self.out = Linear([runs], hidden[-1], experts)
        initialize(self, generators)

    def forward(self, observation: Tensor) -> Tensor:
        """Values `[R, B, K]` of observations, see `networks.Agent`."""
        return stacked(self.layers, self.out, observation)


def hidden_layers(runs: int, sizes: Sequence[int]) -> Sequence[Linear]:
    """Layers of R nets, of the given sizes, as a registered sequence."""
    layers = nn.ModuleList(Linear([runs], *pair) for pair in pairwise(sizes))
    return cast(Sequence[Linear], layers)


def stacked(hidden: Sequence[Linear], out: Linear, observation: Tensor) -> Tensor:
    """R nets of layers with ReLU between them: observations `[R or 1, B, ...]` -> `[R, B, O]`."""
    first, *later = hidden
    x = FirstLayer(first.weight[:, None], first.bias[:, None])(observation)[:, 0].relu()
    for layer in later:
        x = affine(x, layer.weight, layer.bias).relu()
    return affine(x, out.weight, out.bias)
