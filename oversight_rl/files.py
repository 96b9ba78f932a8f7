"""Files as data: written as a whole or not at all, read within bounds, never followed elsewhere."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from oversight_rl.envs.settings import UserError, nearest


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is either there as a whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a write broken off, or a link that leads elsewhere
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def writing(path: Path, more: str = "") -> Iterator[None]:
    """Say by a `UserError` that something cannot be written; `more` is added to it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot write there ({error.strerror or error}){more}") from None


def as_text(path: str | Path) -> str:
    """A path as text that can be written anywhere; what is no UTF-8 in it is escaped."""
    return os.fsencode(path).decode(errors="backslashreplace")


def check_there(path: Path, what: str = "run folder") -> None:
    """Refuse a path at which there is nothing; what is called like it beside it is suggested."""
    if os.path.exists(path):
        return
    try:
        beside = os.listdir(path.parent)
    except OSError:
        beside = []
    likely = nearest(path.name, [name for name in beside if name != path.name])
    raise UserError(f"no such {what}: {path}{likely}")


def check_plain(path: Path) -> None:
    """Refuse what is there and is no file of its own: a link, a pipe, a device, a folder."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return  # whoever needs it says that it is missing
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: is not a plain file")


def read_text(path: Path, most: int) -> str:
    """The text of a file; `UserError` if it has more than `most` bytes, or cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot read the file ({error.strerror})") from None
    if len(content) > most:
        raise UserError(f"{path}: is longer than {most:,} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason})") from None


def read_json(path: Path, most: int) -> Any:
    """What a JSON file holds; `UserError` if it has more than `most` bytes, or cannot be read."""
    text = read_text(path, most)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
