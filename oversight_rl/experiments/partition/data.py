"""Images and their classes: scikit-learn's digits, or idx files, which may be a stranger's."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oversight_rl.envs.settings import UserError
from oversight_rl.experiments.partition.config import DIGITS, MOST_CLASS, classes
from oversight_rl.files import check_plain, check_there

UNSIGNED = 8  # an idx file's code for bytes
MOST_BYTES = 2**28  # of the content of an idx file
MOST_PIXELS = 2**14  # of an image
HELD_OUT = 0.2  # share of the images that are for tests, where no files say which


@dataclass(frozen=True)
class Images:
    """Images of some classes, in groups."""

    pixels: Tensor  # [N, pixels], in [-1, 1]
    label: Tensor  # [N], int64
    group: Tensor  # [N], int64
    shape: tuple[int, int]

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, rows: Sequence[int]) -> Images:
        return Images(self.pixels[rows], self.label[rows], self.group[rows], self.shape)

    def to(self, device: torch.device) -> Images:
        """The same, on a device."""
        pixels, label, group = (x.to(device) for x in (self.pixels, self.label, self.group))
        return Images(pixels, label, group, self.shape)


def load(data: str, groups: Sequence[str]) -> tuple[Images, Images]:
    """Images to train with, and others to test with.

    Raises:
        UserError: they cannot be read, are not what they should be, or lack a group.
    """
    pixels, label, test = _digits() if data == DIGITS else _idx(Path(data))
    if test is None:
        order = np.random.default_rng(0).permutation(len(label))
        held = round(HELD_OUT * len(label))
        pixels, label = pixels[order], label[order]
        test = pixels[:held], label[:held]
        pixels, label = pixels[held:], label[held:]
    if pixels.shape[1:] != test[0].shape[1:]:
        shapes = f"{pixels.shape[1:]} to train and of {test[0].shape[1:]} to test"
        raise UserError(f"{data}: holds images of {shapes}")
    return _grouped(pixels, label, groups, data), _grouped(*test, groups, data)


Pair = tuple[NDArray[np.number], NDArray[np.number]]


def _digits() -> tuple[NDArray[np.number], NDArray[np.number], Pair | None]:
    try:
        # an extra, and a second to load
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "data: digits come with scikit-learn, which is not installed: "
            "pip install 'oversight-rl[digits]', or name a folder of idx files"
        ) from None
    digits = load_digits()
    return digits.images / 16 * 255, digits.target, None


def _idx(folder: Path) -> tuple[NDArray[np.number], NDArray[np.number], Pair | None]:
    check_there(folder, "folder of idx files")
    train = _pair(folder, "train")
    if train is None:
        raise UserError(f"{folder}: must hold train-images... and train-labels..., as idx files")
    return *train, _pair(folder, "t10k")


def _pair(folder: Path, prefix: str) -> Pair | None:
    """Images and their classes; None if there are no such files."""
    found = {}
    for what in ("images", "labels"):
        paths = sorted(path for path in folder.glob(f"{prefix}-{what}*"))
        if len(paths) > 1:
            raise UserError(f"{folder}: holds {len(paths)} files {prefix}-{what}..., not one")
        found[what] = paths
    if not found["images"] and not found["labels"]:
        return None
    if not all(found.values()):
        raise UserError(f"{folder}: {prefix}-images... and {prefix}-labels... belong together")
    images, labels = read_idx(found["images"][0], 3), read_idx(found["labels"][0], 1)
    if len(images) != len(labels):
        raise UserError(f"{folder}: {len(images):,} {prefix} images have {len(labels):,} labels")
    if math.prod(images.shape[1:]) > MOST_PIXELS:
        raise UserError(f"{folder}: images of {images.shape[1:]} have more than {MOST_PIXELS:,}")
    return images, labels


def read_idx(path: Path, axes: int) -> NDArray[np.uint8]:
    """The bytes of an idx file, gzipped or not, in as many axes as it must have.

    No more is read than the header says, which says no more than `MOST_BYTES`.

    Raises:
        UserError: it cannot be read, holds something else, or not what its header says.
    """
    check_plain(path)
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as file:
            head = file.read(4 + 4 * axes)
            if len(head) < 4 + 4 * axes or head[:2] != b"\0\0":
                raise UserError(f"{path}: is not an idx file")
            if head[2] != UNSIGNED or head[3] != axes:
                has = f"type {head[2]} in {head[3]} axes"
                raise UserError(f"{path}: must hold bytes (type 8) in {axes} axes, has {has}")
            shape = np.frombuffer(head, ">u4", offset=4).tolist()
            size = math.prod(shape)
            if not 0 < size <= MOST_BYTES:
                raise UserError(f"{path}: claims {size:,} bytes, not 1 to {MOST_BYTES:,}")
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot read the file ({error})") from None
    if len(content) != size:
        more = "more" if len(content) > size else f"{len(content):,}"
        raise UserError(f"{path}: claims {size:,} bytes and has {more}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _grouped(
    pixels: NDArray[np.number], label: NDArray[np.number], groups: Sequence[str], data: str
) -> Images:
    group = np.full(MOST_CLASS + 1, -1)
    for i, name in enumerate(groups):
        group[list(classes(name))] = i
    own = group[label.astype(int)]
    kept = own >= 0
    for i, name in enumerate(groups):
        if (own == i).sum() < 2:
            raise UserError(f"groups: {data} has too few images of {name} to train and to test")
    flat = torch.as_tensor(pixels[kept].reshape(kept.sum(), -1), dtype=torch.float32)
    labels, owners = (torch.as_tensor(x[kept].astype(np.int64)) for x in (label, own))
    return Images(flat / 127.5 - 1, labels, owners, tuple(pixels.shape[1:]))
