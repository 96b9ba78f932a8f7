"""Commands in a terminal: exit codes, lines and warnings, standard streams that may fail."""

from __future__ import annotations

import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from rich.console import Console

from oversight_rl.envs.settings import UserError

UNSHOWN, BAD_INPUT, STOPPED = 1, 2, 130  # exit codes


def run(command: Callable[[list[str]], object], args: list[str]) -> None:
    """Run a command with what stands after its name; `SystemExit`, and a line, if it goes wrong."""
    with standard_streams():
        try:
            command(args)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(BAD_INPUT) from None
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            raise SystemExit(STOPPED) from None


def say(console: Console, line: str) -> None:
    """A line as it is, so that a command in it can be copied."""
    console.print(line, soft_wrap=True, markup=False, highlight=False)


def fixed(value: float, form: str) -> str:
    """A number in a form like `.2f`; what rounds to zero has no sign."""
    text = f"{value:{form}}"
    return text.lstrip("-+") if not text.strip("-+0.%") else text


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Stream:
    """A standard stream that may fail: on a full disk, or left by its reader.

    What a command was asked to do is done all the same, and what it cannot show is dropped.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failed: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self._or_nowhere():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._or_nowhere():
            self.stream.flush()

    @contextmanager
    def _or_nowhere(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failed = error
            # to where what is buffered can go, which would fail again at the interpreter's end
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


@contextmanager
def standard_streams() -> Iterator[None]:
    """For a command: streams that may be closed, full or ASCII, and warnings of one line each.

    `SystemExit` if what went well could not be shown, unless because nobody reads it.
    """
    before = sys.stdout, sys.stderr, warnings.formatwarning
    # descriptors that are closed: a file that is opened later shall not be taken for one of them
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    out, err = (Stream(stream or open(os.devnull, "w")) for stream in before[:2])  # noqa: SIM115
    for stream in (out, err):
        if hasattr(stream, "reconfigure"):  # whatever characters the terminal has not
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {UserError(plain(message))}\n"
    stop = None
    try:
        yield
    except SystemExit as asked:
        stop = asked
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr, warnings.formatwarning = before
    if out.failed is not None and not isinstance(out.failed, BrokenPipeError):
        print(f"error: standard output: {out.failed.strerror}", file=sys.stderr)
        stop = stop if stop is not None and stop.code else SystemExit(UNSHOWN)
    if stop is not None:
        raise stop


def plain(warning: Warning | str) -> str:
    """A warning without Gymnasium's colors and its own word for it."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(warning)).removeprefix("WARN: ")
