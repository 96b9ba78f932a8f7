"""Features of observations, where none are asked for."""

import math
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

SMALLEST_IMAGE = 36  # pixels along a side that SB3's NatureCNN takes
SYMBOLS = 64
"""Integer observations with fewer values than this are symbols, and not pixels."""

COMBINATIONS = 2**16
"""Combinations of a cell's symbols at most, which `SymbolicCNN` has a table of."""


class SymbolicCNN(BaseFeaturesExtractor):
    """A small CNN over a grid of symbols: `[B, rows, cols, channels]` integers.

    Each channel is a one-hot code. A 1x1 convolution of the codes is a sum of a few rows of a
    table, so it is looked up; a 3x3 convolution of stride 2 follows.

    Args:
        observation_space: `Box` of integers from 0, with three axes.
        width: channels after the first convolution.
        channels: channels after the second.
    """

    sizes: Tensor
    """Number of symbols in each channel."""

    def __init__(self, observation_space: spaces.Box, width: int = 8, channels: int = 16) -> None:
        kernel = cast(Any, tuple(min(3, side) for side in observation_space.shape[:2]))
        steps = [(side - 3) // 2 + 1 if side > 3 else 1 for side in observation_space.shape[:2]]
        super().__init__(observation_space, channels * math.prod(steps))
        sizes = observation_space.high.max(axis=(0, 1)).astype(np.int64) + 1
        self.register_buffer("sizes", torch.as_tensor(sizes), persistent=False)
        self.codes = nn.ParameterList(nn.Parameter(torch.randn(n, width)) for n in sizes)
        self.convolution = nn.Conv2d(width, channels, kernel, stride=2)

    def forward(self, observation: Tensor) -> Tensor:
        """Features `[B, features_dim]`."""
        # one row for each combination of symbols, so that a cell is one look-up
        table = self.codes[0]
        for code in list(self.codes)[1:]:
            table = (table[:, None] + code).flatten(0, 1)
        combination: Tensor = observation[..., 0].long()
        for channel, size in enumerate(self.sizes[1:].unbind(), start=1):
            combination = combination * size + observation[..., channel].long()
        x = F.embedding(combination, table).relu()
        return self.convolution(x.permute(0, 3, 1, 2)).relu().flatten(1)  # type: ignore[no-any-return]


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
