"""Regions, which are parts of a network, and rules, which say what a label may do to them."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

Index = slice | Sequence[int] | Tensor
EXAMPLE = "{0: Rule(['rest']), 1: Rule(['added'])}"
REST = "rest"
"""What is in no region."""


@dataclass(frozen=True)
class Region:
    """A part of a network, by globs (`fnmatch`: `*` crosses dots) of names of modules.

    Args:
        units: output units of linear layers and convolutions: rows of the weight, entries of the
            bias. Where the glob names an MLP, its hidden units: into and out of them.
        heads: heads of attention: rows of queries, keys and values, columns of the output layer.
        params: globs of names of parameters, as a whole.
    """

    units: Mapping[str, Index] = field(default_factory=dict)
    heads: Mapping[str, Index] = field(default_factory=dict)
    params: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, given in (("units", self.units), ("heads", self.heads)):
            if not isinstance(given, Mapping):
                known = "must be indices by globs of modules, like {'blocks.*.mlp': range(8)}"
                raise ValueError(f"Region: {name} {known}, got {given!r}")
        if isinstance(self.params, str | Mapping):
            raise ValueError(f"Region: params must be a list of globs, got {self.params!r}")


@dataclass(frozen=True)
class Rule:
    """What samples of one label do.

    Args:
        train: regions (and "rest") that they update, or the weight of their gradient for each,
            any real number; those left out have 0. None updates everything.
        ablate: regions that are switched off for them, as if their parameters were zero.
    """

    train: Sequence[str] | Mapping[str, float] | None = None
    ablate: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.ablate, str):
            object.__setattr__(self, "ablate", (self.ablate,))

    def weights(self, names: Sequence[str]) -> list[float]:
        """The weight of each part, which is 0 where it is switched off."""
        train = self.train
        if train is None:
            train = [name for name in names if name not in self.ablate]
        if not isinstance(train, Mapping):
            train = dict.fromkeys([train] if isinstance(train, str) else train, 1.0)
        for name in (*train, *self.ablate):
            if name not in names:
                raise ValueError(f"Rule: no region {name!r}{nearest(name, names)}")
        for name, weight in train.items():
            if not math.isfinite(weight):
                raise ValueError(f"Rule: the weight of {name!r} must be finite, got {weight}")
        for name in self.ablate:
            if name == REST or train.get(name):
                raise ValueError(f"Rule: {name!r} cannot be both trained and switched off")
        return [float(train.get(name, 0.0)) for name in names]


def check_given(regions: Any, rules: Any) -> None:
    """Refuse regions without names, and rules without labels."""
    if not isinstance(regions, Mapping) or not _all(regions, str, Region):
        raise ValueError("regions must be given by name, like {'added': Region(...)}")
    if not isinstance(rules, Mapping) or not rules or not _all(rules, int, Rule):
        raise ValueError(f"rules must be given by labels that are ints, like {EXAMPLE}")


def _all(given: Mapping[Any, Any], key: type, value: type) -> bool:
    return all(isinstance(k, key) and isinstance(v, value) for k, v in given.items())


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the names most like one that is unknown."""
    known = list(known)
    general = {re.sub(r"\b\d+\b", "*", other) for other in known}
    close = get_close_matches(name, [*general, *known] if "*" in name else known, 3, 0.4)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def matches(pattern: str, names: Sequence[str], what: str) -> list[str]:
    """The names that a glob fits; none is an error. The model itself is "", which no `*` fits."""
    found = [name for name in names if fnmatchcase(name, pattern) and (name or not pattern)]
    if not found:
        raise ValueError(f"no {what} fits {pattern!r}{nearest(pattern, names)}")
    return found


def positions(index: Index, count: int, what: str) -> Tensor:
    """An index of some of `count` things, as int64 `[n]`."""
    if isinstance(index, slice):
        ends = [end for end in (index.start, index.stop) if end is not None]
        if any(not -count <= end <= count for end in ends):
            raise ValueError(f"{what}: {index} goes past the end, there are {count}")
        found = torch.arange(count)[index]
    else:
        given = torch.as_tensor(index).cpu()
        found = given.nonzero()[:, 0] if given.dtype == torch.bool else given.long()
        past = found[(found < -count) | (found >= count)]
        if past.numel():
            raise ValueError(f"{what}: {int(past[0])} goes past the end, there are {count}")
    if not found.numel():
        raise ValueError(f"{what}: {index} is empty, of {count}")
    return found % count
