"""Checkpoints: atomic, resumable, pickle-free.

A checkpoint is a pair of files, `update_N.safetensors` and `update_N.json`. Each is written under
another name, flushed to disk and renamed; the JSON comes last, so a pair with both is complete. It
is never written again. The JSON holds checksums of the tensors and of itself.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from oversight_rl.envs.settings import UserError
from oversight_rl.files import as_text, check_plain, read_json, write_atomically

KEEP = 2  # newest checkpoints left in a folder: runs of one stack may be one apart
MOST_TEXT = 2**20  # bytes of a checkpoint's JSON, and of a safetensors file's header
_FILE = re.compile(r"update_([0-9]{8,12})\.(?:json|safetensors)(?:\.tmp)?")


def save(
    folder: Path, update: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Save a checkpoint, unless it is there, and drop all but the newest few.

    The folder is made if need be; the run folder around it must be there.
    """
    folder.mkdir(exist_ok=True)
    if update not in updates(folder):
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        content = {"update": update} | dict(facts) | {"checksums": checksums(ready)}
        content["checksum"] = zlib.crc32(json.dumps(content).encode())
        path = folder / f"update_{update:08d}.safetensors"
        write_atomically(path, safetensors.torch.save(ready))
        write_atomically(path.with_suffix(".json"), json.dumps(content, indent=1).encode())
    _keep(folder, updates(folder)[-KEEP:])


def drop_after(folder: Path, update: int) -> None:
    """Drop the checkpoints that are newer than `update`, and what a kill left of others."""
    _keep(folder, [old for old in updates(folder) if old <= update][-KEEP:])


def _keep(folder: Path, kept: Sequence[int]) -> None:
    """Remove other checkpoints, and what a kill left of them; JSON files first."""
    for path in sorted(folder.glob("update_*"), key=lambda path: path.suffix != ".json"):
        match = _FILE.fullmatch(path.name)
        if match and (int(match[1]) not in kept or path.suffix == ".tmp"):
            path.unlink()


def updates(folder: Path) -> list[int]:
    """Updates with a complete checkpoint, oldest first."""
    names = {path.name for path in folder.glob("update_*")}
    found = [
        int(match[1])
        for name in names
        if name.endswith(".json")
        and (match := _FILE.fullmatch(name))
        and name.removesuffix("json") + "safetensors" in names
    ]
    return sorted(found)


def load(
    folder: Path, update: int, like: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint; `UserError` if it is missing, damaged, or none such.

    Tensors `like` those to read have the shapes and types that these must have, on any device.
    """
    path = folder / f"update_{update:08d}.json"
    check_plain(path)
    facts = read_json(path, MOST_TEXT)
    known = {"update": int, "env_steps": int, "wall_seconds": float, "checksums": dict}
    if not isinstance(facts, dict) or any(
        not isinstance(facts.get(name), kind) for name, kind in known.items()
    ):
        raise UserError(f"{path}: not of a checkpoint of this program")
    checksum, seconds = facts.pop("checksum", None), facts["wall_seconds"]
    if checksum != zlib.crc32(json.dumps(facts).encode()) or facts["update"] != update:
        raise UserError(f"{path}: is damaged")
    if facts["env_steps"] < 0 or not (seconds >= 0 and math.isfinite(seconds)):
        raise UserError(f"{path}: not of a checkpoint of this program")
    wanted = facts.pop("checksums")
    return read_tensors(path.with_suffix(".safetensors"), like, wanted)[0], facts


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """CRC-32 of each tensor's bytes, to notice damage."""
    plain = {name: tensor.flatten().view(torch.uint8).numpy() for name, tensor in tensors.items()}
    return {name: zlib.crc32(content.data) for name, content in plain.items()}


def read_tensors(
    path: Path, like: Mapping[str, Tensor], wanted: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, within the memory that `like` would take.

    Args:
        path: the file.
        like: tensors to read, with the shapes and types that they must have.
        wanted: their checksums; None: there are none.
    """
    check_plain(path)
    tensors = {}
    try:
        with path.open("rb") as raw:
            header = int.from_bytes(raw.read(8), "little")
            if header > MOST_TEXT:
                raise UserError(f"{path}: its header claims {header:,} bytes")
            # safetensors takes no name that is not UTF-8
            source = str(path) if as_text(path) == str(path) else f"/dev/fd/{raw.fileno()}"
            with safetensors.safe_open(source, framework="pt") as file:
                names = set(file.keys())
                for name, ours in like.items():
                    shape = tuple(file.get_slice(name).get_shape()) if name in names else None
                    check_shape(name, shape, ours.shape, path)
                    tensors[name] = file.get_tensor(name)
                    kind = tensors[name].dtype
                    if kind != ours.dtype:
                        raise UserError(f"{path}: {name} is {kind}, not {ours.dtype}")
                metadata = file.metadata() or {}
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    for name, found in checksums(tensors).items():
        if wanted is not None and wanted.get(name) != found:
            raise UserError(f"{path}: is damaged: {name} is not as it was saved")
    return tensors, metadata


def check_shape(
    name: str, found: Sequence[int] | None, wanted: Sequence[int], source: Path
) -> None:
    """Refuse a tensor of another shape than is wanted, or none."""
    if found is None or tuple(found) != tuple(wanted):
        was = "is missing" if found is None else f"has shape {tuple(found)}"
        what = f"{name} {was}, expected {tuple(wanted)}"
        raise UserError(f"{source}: does not fit its configuration: {what}")
