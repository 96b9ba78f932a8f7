"""The base of records of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Self

import torch
from torch import Tensor


class Record:
    """Base of frozen dataclasses whose fields are tensors (or records) with common leading axes."""

    def map(self, f: Callable[[Tensor], Tensor]) -> Self:
        """The same record with `f` applied to every tensor."""
        values = {
            field.name: value.map(f) if isinstance(value, Record) else f(value)
            for field in fields(self)  # type: ignore[arg-type]
            for value in [getattr(self, field.name)]
        }
        return type(self)(**values)

    def __getitem__(self, index: object) -> Self:
        return self.map(lambda x: x[index])  # type: ignore[index]

    @classmethod
    def stack(cls, records: list[Self], dim: int = 0) -> Self:
        """Join records along a new axis `dim`."""
        values: dict[str, object] = {}
        for field in fields(cls):  # type: ignore[arg-type]
            column = [getattr(record, field.name) for record in records]
            first = column[0]
            values[field.name] = (
                type(first).stack(column, dim)
                if isinstance(first, Record)
                else torch.stack(column, dim)
            )
        return cls(**values)
