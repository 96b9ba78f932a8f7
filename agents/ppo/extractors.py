"""Features of observations, where none are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
)
from torch import Tensor, nn
from torch.nn import functional as F

from oversight_rl.agents.networks import rows_of

SMALLEST_IMAGE = 36  # pixels along a side that SB3's NatureCNN takes
SYMBOLS = 64
"""Integer observations with fewer values than this are symbols, and not pixels."""

COMBINATIONS = 2**16
"""Combinations of a cell's symbols at most, which `SymbolicCNN` has a table of."""
MOST_CODES = 2**62
"""Kinds of patches that a number can tell apart."""
MOST_MARKS = 2**16
"""Numbers up to which those that occur are counted in a table, and not sorted."""


@dataclass(frozen=True)
class Patches:
    """Grids of symbols as the patches that a convolution sees, equal ones once."""

    cells: Tensor  # [P, rows, cols] of whole numbers, combinations of symbols
    index: Tensor  # [B, places] into P

    def __getitem__(self, observations: Tensor) -> Patches:
        return Patches(self.cells, self.index.index_select(0, observations))

    @classmethod
    def of(cls, cells: Tensor) -> Patches:
        """Of the cells of each patch of B observations: see `SymbolicCNN.cells`."""
        shape, cells = cells.shape[:2], cells.flatten(0, 1)
        index = torch.arange(len(cells), device=cells.device)
        number, kinds = renumbered(cells, int(cells.max()) + 1)
        for _ in cells.shape[1:]:  # of a row, of a patch
            if kinds ** number.shape[-1] > MOST_CODES:
                return cls(cells, index.view(shape))
            first, *others = number.unbind(-1)
            for other in others:
                first = first * kinds + other
            number, kinds = renumbered(first, kinds ** number.shape[-1])
        which = index.new_empty(kinds).index_copy_(0, number, index)
        return cls(cells[which], number.view(shape))


def renumbered(x: Tensor, kinds: int) -> tuple[Tensor, int]:
    """Numbers in `range(kinds)` without those that do not occur, and how many do."""
    if kinds > MOST_MARKS:
        distinct, number = x.unique(return_inverse=True)
        return number, len(distinct)
    number = torch.bincount(x.flatten()).bool().cumsum(0) - 1
    return number.index_select(0, x.flatten()).view(x.shape), int(number[-1]) + 1


class SymbolicCNN(BaseFeaturesExtractor):
    """A small CNN over a grid of symbols: `[B, rows, cols, channels]` integers.

    Each channel is a one-hot code. A 1x1 convolution of the codes is a sum of a few rows of a
    table, so it is looked up; a 3x3 convolution of stride 2 follows. It is one product over
    patches, of which there are few kinds: 400 in a rollout that shows 1,500 views of 9 patches.

    Args:
        observation_space: `Box` of integers from 0, with three axes.
        width: channels after the first convolution.
        channels: channels after the second.
    """

    window: Tensor
    """Which of the grid's cells, counted row by row, a patch has: `[places, rows, cols]`."""

    def __init__(self, observation_space: spaces.Box, width: int = 8, channels: int = 16) -> None:
        sides = observation_space.shape[:2]
        kernel = cast(Any, tuple(min(3, side) for side in sides))
        starts = [range(0, side - k + 1, 2) for side, k in zip(sides, kernel, strict=True)]
        super().__init__(observation_space, channels * math.prod(map(len, starts)))
        sizes = observation_space.high.max(axis=(0, 1)).astype(np.int64) + 1
        self.sizes = sizes.tolist()
        self.codes = nn.ParameterList(nn.Parameter(torch.randn(n, width)) for n in sizes)
        self.convolution = nn.Conv2d(width, channels, kernel, stride=2)
        cells = torch.arange(math.prod(sides)).view(*sides)
        rows, cols = kernel
        window = [cells[i : i + rows, j : j + cols] for i in starts[0] for j in starts[1]]
        self.register_buffer("window", torch.stack(window), persistent=False)

    def cells(self, observation: Tensor) -> Tensor:
        """The combinations of symbols in patches of observations `[B, rows, cols, channels]`.

        Returns `[B, places, rows of a patch, cols]`.
        """
        combination, *others = observation.int().unbind(-1)
        for channel, size in zip(others, self.sizes[1:], strict=True):
            combination = combination * size + channel
        cells = combination.flatten(1).t().index_select(0, self.window.flatten())
        return cells.t().reshape(-1, *self.window.shape)

    def forward(self, observation: Tensor | Patches) -> Tensor:
        """Features `[B, features_dim]` of observations, or of their patches."""
        if isinstance(observation, Tensor):
            observation = self.cells(observation)
        return self.composed()(observation)

    def composed(self) -> Callable[[Tensor | Patches], Tensor]:
        """A function of `cells` or `Patches`, composed beforehand; it holds while parameters do."""
        # one row for each combination of symbols, so that a cell is one look-up
        table = self.codes[0]
        for code in list(self.codes)[1:]:
            table = (table[:, None] + code).flatten(0, 1)
        table, bias = table.relu(), cast(Tensor, self.convolution.bias)
        weight = self.convolution.weight.permute(0, 2, 3, 1).flatten(1)

        def features(patches: Tensor | Patches) -> Tensor:
            merged = None if isinstance(patches, Tensor) else patches
            cells = patches if isinstance(patches, Tensor) else patches.cells
            x = rows_of(table, cells).flatten(-3)  # [..., cells * width]
            x = F.linear(x, weight, bias).relu()  # [..., channels]
            x = rows_of(x, merged.index) if merged else x
            return x.transpose(1, 2).flatten(1)  # as a convolution lays them out

        return features


def prepared(extractor: nn.Module, observations: Any) -> Any:
    """Observations (tensors) as an extractor takes them soonest: `Patches`, where it takes them."""
    if type(extractor) is not SymbolicCNN:
        return observations
    return Patches.of(extractor.cells(observations))


class EntryExtractor(CombinedExtractor):
    """SB3's CombinedExtractor; an entry that its CNN does not fit has the extractor that it would
    have alone.

    Args:
        observation_space: `Dict`.
        kwargs: as CombinedExtractor's, for the other entries.
    """

    def __init__(self, observation_space: spaces.Dict, **kwargs: Any) -> None:
        own = {name: default_extractor(part) for name, part in observation_space.items()}
        plain = {
            name: part
            for name, part in observation_space.items()
            if own[name] is NatureCNN or not (is_image_space(part) or own[name] is SymbolicCNN)
        }
        super().__init__(spaces.Dict(plain), **kwargs)
        self._observation_space = observation_space
        for name in own.keys() - plain.keys():
            extractor = own[name](observation_space[name])
            self.extractors[name] = extractor
            self._features_dim += extractor.features_dim


def default_extractor(space: spaces.Space[Any]) -> type[BaseFeaturesExtractor]:
    """The features extractor of an observation space, where none is asked for."""
    if isinstance(space, spaces.Dict):
        return EntryExtractor
    if is_image_space(space) and min(cast(spaces.Box, space).shape[-2:]) >= SMALLEST_IMAGE:
        return NatureCNN
    if is_symbolic(space):
        return SymbolicCNN
    return FlattenExtractor


def is_symbolic(space: spaces.Space[Any]) -> bool:
    """Whether observations are grids of a few integer symbols, as MiniGrid's are."""
    return (
        isinstance(space, spaces.Box)
        and len(space.shape) == 3
        and np.issubdtype(space.dtype, np.integer)
        and bool((space.low == 0).all() and space.high.max() < SYMBOLS)
        and math.prod(int(n) + 1 for n in space.high.max(axis=(0, 1))) <= COMBINATIONS
    )
