"""Observations as SB3 has them: arrays, or dictionaries of arrays by the name of an entry.

What is remembered of them are rows of numbers, all entries side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.preprocessing import get_obs_shape
from torch import Tensor

SMALL = 256  # choices that fit into a byte


def each(function: Callable[..., Any], first: Any, *others: Any) -> Any:
    """What a function makes of observations, entry by entry where they are dictionaries.

    Args:
        function: of one array or tensor of `first` and of each of `others`.
        first: an array, a tensor, or a dictionary of them; always a new dictionary is returned.
        others: of the same kind; entries that `first` has not got are left out.
    """
    if isinstance(first, Mapping):
        return {
            name: function(entry, *(other[name] for other in others))
            for name, entry in first.items()
        }
    return function(first, *others)


def how_many(observations: Any) -> int:
    """Size B of the first axis of observations `[B, ...]`."""
    if isinstance(observations, Mapping):
        return how_many(next(iter(observations.values())))
    return len(observations)


def as_rows(observations: Any) -> NDArray[Any]:
    """Observations `[B, ...]` as rows of numbers `[B, D]`."""
    flat = each(lambda x: x.reshape(len(x), int(np.prod(x.shape[1:]))), observations)
    return np.concatenate([*flat.values()], axis=-1) if isinstance(flat, dict) else flat


def from_rows(rows: Tensor, space: spaces.Space[Any]) -> Any:
    """The observations (tensors) `[B, ...]` of a space that rows `[B, D]` were made of."""
    shapes: Any = get_obs_shape(space)
    if not isinstance(shapes, dict):
        return rows.reshape(-1, *shapes)
    parts = rows.split([int(np.prod(shape)) for shape in shapes.values()], dim=-1)
    return {
        name: part.reshape(-1, *shape)
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def row_width(space: spaces.Space[Any]) -> int:
    """Numbers D in a row of an element of a space."""
    parts = space.spaces.values() if isinstance(space, spaces.Dict) else [space]
    return sum(int(np.prod(part.shape or (1,))) for part in parts)


def row_type(*of: spaces.Space[Any]) -> torch.dtype:
    """The smallest type that holds the numbers of elements of these spaces side by side.

    torch computes with no unsigned integers but bytes; what is wider is kept in a larger type.
    """
    types = []
    for space in of:
        for part in space.spaces.values() if isinstance(space, spaces.Dict) else [space]:
            kind = np.dtype(part.dtype)
            if isinstance(part, spaces.Discrete):
                kind = np.dtype(np.uint8 if part.n <= SMALL else np.int32)
            types.append(kind)
    together = np.result_type(*types)
    if together.kind == "u" and together.itemsize > 1:
        together = np.promote_types(together, np.int8)
    return torch.as_tensor(np.zeros(1, together)).dtype
