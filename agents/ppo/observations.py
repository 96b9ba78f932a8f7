"""Observations as SB3 has them: arrays, or dictionaries of arrays by the name of an entry.

What is remembered of them are rows of numbers, all entries side by side.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.preprocessing import get_obs_shape
from torch import Tensor

from oversight_rl.envs.settings import nearest

KINDS = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
FLATTEN_IT = "let it have one axis, and reshape it in a wrapper"
SMALL = 256  # choices that fit into a byte


def check_spaces(observed: spaces.Space[Any], acted: spaces.Space[Any]) -> None:
    """Refuse spaces that SB3's PPO cannot work with, or would, sending wrong actions.

    Raises:
        ValueError: with what can be done about it.
    """
    if not parts_of(observed):
        raise ValueError("the observation is a Dict with nothing in it that can be read")
    for name, part in parts_of(observed).items():
        where = f"entry {name!r} of the observation" if observed is not part else "the observation"
        if not isinstance(part, KINDS):
            raise ValueError(
                f"{where} is a {type(part).__name__}; it must be a Box, Discrete, MultiDiscrete or "
                "MultiBinary space, or the whole a Dict of these: wrap the environment, in "
                "gymnasium's FlattenObservation say"
            )
        _check_numbers(part, where)
        if isinstance(part, spaces.Box) and not part.shape:
            raise ValueError(
                f"{where} is a Box of shape (), a number alone: give it the shape (1,) in a wrapper"
            )
        if isinstance(part, spaces.MultiDiscrete) and part.nvec.ndim > 1:
            raise ValueError(f"{where} is a MultiDiscrete of shape {part.shape}: {FLATTEN_IT}")
    where, kind = "the action", type(acted).__name__
    if not isinstance(acted, KINDS):
        raise ValueError(
            f"{where} is a {kind}; it must be a Box, Discrete, MultiDiscrete or MultiBinary space"
        )
    _check_numbers(acted, where)
    if isinstance(acted, spaces.MultiDiscrete | spaces.MultiBinary) and len(acted.shape) > 1:
        raise ValueError(f"{where} is a {kind} of shape {acted.shape}: {FLATTEN_IT}")
    if isinstance(acted, spaces.Box):
        if not np.issubdtype(acted.dtype, np.floating):
            raise ValueError(
                f"{where} is a Box of whole numbers ({acted.dtype}), and a Gaussian draws "
                "fractions: make it MultiDiscrete, or a Box of floats that the environment rounds"
            )
        if not (np.isfinite(acted.low).all() and np.isfinite(acted.high).all()):
            raise ValueError(
                f"{where} is a Box without finite bounds, {acted}: give it some in a "
                "wrapper (gymnasium's TransformAction)"
            )


def _check_numbers(space: spaces.Space[Any], where: str) -> None:
    """Refuse what does not begin at 0, and what is empty or of no numbers."""
    if np.any(getattr(space, "start", 0)):
        raise ValueError(
            f"{where} is {space}, which does not begin at 0, where SB3 begins to count: shift the "
            "numbers in a wrapper (gymnasium's TransformAction or TransformObservation)"
        )
    if not np.prod(space.shape or (1,)):
        raise ValueError(f"{where} is empty, of shape {space.shape}")
    if np.dtype(space.dtype).kind not in "biuf":
        raise ValueError(f"{where} is of type {space.dtype}, and not of numbers")


def flags_in_axes_of(space: spaces.Space[Any], flags: Any, turned: bool, stacked: int) -> Any:
    """An environment's flags in the axes that a policy sees, for each entry of a dictionary.

    Args:
        space: of what the policy sees.
        flags: booleans in the shape of the environment's own observation; of a dictionary, for
            those entries that show any.
        turned: whether images were transposed on the way, channels first.
        stacked: observations in a row that the policy sees, each with its flags.

    Raises:
        ValueError: they are no such thing.
    """
    if isinstance(space, spaces.Dict):
        if not isinstance(flags, Mapping):
            raise ValueError(
                "the environment's flags must be a dictionary of boolean arrays by the name of an "
                f"entry, as its observations are, got {type(flags).__name__}"
            )
        unknown = [name for name in flags if name not in space.spaces]
        if unknown:
            raise ValueError(
                f"the environment's flags name {unknown[0]!r}; entries of its observations are "
                f"{', '.join(space.spaces)}{nearest(str(unknown[0]), space.spaces)}"
            )
        return {
            name: flags_in_axes_of(part, flags[name], turned, stacked)
            if name in flags
            else np.zeros(part.shape or (), bool)
            for name, part in space.items()
        }
    flags, shape = np.asarray(flags), space.shape
    if flags.dtype != bool:
        raise ValueError(f"the environment's flags must be booleans, got {flags.dtype}")
    tiled = [np.concatenate([flags] * stacked, axis) for axis in (-1, 0) if flags.ndim]
    for seen in (flags, *tiled):
        if seen.shape == shape:
            return seen
        if turned and seen.ndim == 3 and np.moveaxis(seen, -1, 0).shape == shape:
            return np.moveaxis(seen, -1, 0)
    raise ValueError(
        f"the environment's flags have shape {flags.shape}, its observations {shape}: "
        "a wrapper that reshapes observations must set an attribute flags of its own"
    )


def each(function: Callable[..., Any], first: Any, *others: Any) -> Any:
    """What a function makes of observations, entry by entry where they are dictionaries.

    Then a new dictionary is returned, with the entries of the first.
    """
    if isinstance(first, Mapping):
        return {k: function(entry, *(other[k] for other in others)) for k, entry in first.items()}
    return function(first, *others)


def how_many(observations: Any) -> int:
    """Size B of the first axis of observations `[B, ...]`."""
    one = next(iter(observations.values())) if isinstance(observations, Mapping) else observations
    return len(one)


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
    named_parts = dict(zip(shapes, parts, strict=True))
    return each(lambda part, shape: part.reshape(-1, *shape), named_parts, shapes)


def flags_found(telling: Tensor, space: spaces.Space[Any]) -> Any:
    """Flags among the numbers in a row `[1, D]`, in the shapes of a space `[1, ...]`.

    A number that names a category is none: 0 is not off there.
    """
    kinds = [
        torch.full((row_width(part),), not isinstance(part, spaces.Discrete | spaces.MultiDiscrete))
        for part in parts_of(space).values()
    ]
    return from_rows(telling & torch.cat(kinds), space)


def row_width(space: spaces.Space[Any]) -> int:
    """Numbers D in a row of an element of a space."""
    return sum(int(np.prod(part.shape or (1,))) for part in parts_of(space).values())


def parts_of(space: spaces.Space[Any]) -> dict[str, spaces.Space[Any]]:
    """The spaces of a dictionary's entries; any other space has one, of no name."""
    return space.spaces if isinstance(space, spaces.Dict) else {"": space}


def row_type(*of: spaces.Space[Any]) -> torch.dtype:
    """The smallest type that holds the numbers of elements of these spaces side by side.

    torch computes with no unsigned integers but bytes; what is wider is kept in a larger type.
    """
    types = []
    for space in of:
        for part in parts_of(space).values():
            kind = np.dtype(part.dtype)
            if isinstance(part, spaces.Discrete):
                kind = np.dtype(np.uint8 if part.n <= SMALL else np.int32)
            types.append(kind)
    together = np.result_type(*types)
    if together.kind == "u" and together.itemsize > 1:
        together = np.promote_types(together, np.int8)
    return torch.as_tensor(np.zeros(1, together)).dtype


def named(name: str, observations: Any) -> dict[str, Any]:
    """Observations as a flat dictionary, for files: entries as `name.ENTRY`."""
    if isinstance(observations, Mapping):
        return {f"{name}.{entry}": part for entry, part in observations.items()}
    return {name: observations}


def unnamed(name: str, saved: Mapping[str, Any]) -> Any:
    """The observations that `named` gave these names, among others."""
    if name in saved:
        return saved[name]
    start = f"{name}."
    return {k.removeprefix(start): part for k, part in saved.items() if k.startswith(start)}
