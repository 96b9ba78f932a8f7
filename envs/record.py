"""The base of records of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor


class Record:
    """Base of frozen dataclasses whose fields are tensors (or records) with common leading axes."""

    def map(self, f: Callable[[Tensor], Tensor]) -> Self:
        """The same record with `f` applied to every tensor."""
        values = vars(self).items()
        return type(self)(**{k: x.map(f) if isinstance(x, Record) else f(x) for k, x in values})

    def __getitem__(self, index: object) -> Self:
        return self.map(lambda x: x[index])  # type: ignore[index]

    @classmethod
    def stack(cls, records: list[Self], dim: int = 0) -> Self:
        """Join records of tensors along a new axis `dim`."""
        columns = {name: [vars(record)[name] for record in records] for name in vars(records[0])}
        return cls(**{name: torch.stack(column, dim) for name, column in columns.items()})
