"""Texts of the user's own, by topic: read within bounds, cut into pieces of equal length."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from oversight_rl.envs.settings import UserError
from oversight_rl.files import check_plain, check_there, read_text

MOST_TEXT = 2**26  # bytes of a file
MOST_TOPICS = 64
VOCABULARY = 2000  # words that are known; all others are one word
OTHER = "<other>"
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")


def read_topics(
    folder: Path, length: int, least: int
) -> tuple[list[str], dict[str, NDArray[np.int64]]]:
    """The texts of a folder, a file `TOPIC.txt` for each topic.

    Args:
        folder: where they are.
        length: words of a piece.
        least: pieces that each topic must have.

    Returns:
        The words that are known; the pieces of each topic, ids of words `[N, length]`, in the order
        of the text.

    Raises:
        UserError: there are fewer than two files, or one is not text, too long or too short.
    """
    check_there(folder, "folder of texts")
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder")
    files = sorted(folder.glob("*.txt"))
    if not 2 <= len(files) <= MOST_TOPICS:
        raise UserError(
            f"{folder}: must hold 2 to {MOST_TOPICS} files TOPIC.txt, one for each topic, "
            f"got {len(files)}"
        )
    for file in files:
        if not file.stem.isprintable():
            raise UserError(f"{file}: a topic must have a printable name")
    texts = {file.stem: _words(file) for file in files}
    for file, words in zip(files, texts.values(), strict=True):
        if len(words) < least * length:
            raise UserError(
                f"{file}: must have at least {least * length:,} words ({least} pieces of "
                f"{length}), got {len(words):,}"
            )
    counts = Counter(word for words in texts.values() for word in words)
    known = [OTHER, *(word for word, _ in counts.most_common(VOCABULARY - 1))]
    index = {word: i for i, word in enumerate(known)}
    pieces = {}
    for topic, words in texts.items():
        ids = np.array([index.get(word, 0) for word in words], np.int64)
        pieces[topic] = ids[: len(ids) // length * length].reshape(-1, length)
    return known, pieces


def _words(file: Path) -> list[str]:
    check_plain(file)
    text = read_text(file, MOST_TEXT)
    if odd := _CONTROL.search(text):
        raise UserError(f"{file}: is not text (it holds the character {ord(odd[0]):#04x})")
    return _WORD.findall(text.lower())
