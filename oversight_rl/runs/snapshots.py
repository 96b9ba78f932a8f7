"""Snapshots: what an agent was at each evaluation, to be looked at later.

`update_N.safetensors` holds parameters as 16-bit floats. Nothing goes on from them, so that they
may be deleted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from oversight_rl.envs.settings import UserError
from oversight_rl.files import write_atomically
from oversight_rl.runs import checkpoint

_FILE = re.compile(r"update_([0-9]{8,12})\.safetensors(?:\.tmp)?")
_LARGEST = torch.finfo(torch.float16).max


def save(folder: Path, update: int, tensors: Mapping[str, Tensor]) -> None:
    """Write a snapshot, in place of an earlier one of the same update."""
    folder.mkdir(exist_ok=True)
    small = {
        name: tensor.detach().clamp(-_LARGEST, _LARGEST).half().cpu().contiguous()
        for name, tensor in tensors.items()
    }
    write_atomically(folder / f"update_{update:08d}.safetensors", safetensors.torch.save(small))


def drop_after(folder: Path, update: int) -> None:
    """Drop the snapshots that are newer than `update`, and what a kill left of others."""
    for path in folder.glob("update_*"):
        match = _FILE.fullmatch(path.name)
        if match and (int(match[1]) > update or path.suffix == ".tmp"):
            path.unlink()


def updates(folder: Path) -> list[int]:
    """Updates with a snapshot, oldest first."""
    found = (_FILE.fullmatch(path.name) for path in folder.glob("update_*.safetensors"))
    return sorted(int(match[1]) for match in found if match)


def load(folder: Path, update: int, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a snapshot, as floats; `UserError` if it is damaged, or none such.

    Tensors `like` those to read have the shapes that these must have, on any device.
    """
    path = folder / f"update_{update:08d}.safetensors"
    small = {name: tensor.to("meta", torch.float16) for name, tensor in like.items()}
    tensors, _ = checkpoint.read_tensors(path, small)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds what is no finite number")
    return {name: tensor.float() for name, tensor in tensors.items()}
