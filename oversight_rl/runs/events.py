"""TensorBoard's file of a run."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class Events:
    """TensorBoard's file: one for the whole run, which can be cut back and gone on with.

    Runs go on without it if it cannot be written, and say so once.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.length = path.stat().st_size if path.is_file() else 0  # bytes that are whole records
        self.broken = False
        self._buffer = io.BytesIO()  # whole records, so that a reader seldom meets half of one
        self._records = RecordWriter(self._buffer)

    def cut(self, length: int) -> None:
        """Go on after the first `length` bytes; from the start, if there are fewer."""
        with self._or_without():
            self.path.touch()
            self.length = length if length <= self.path.stat().st_size else 0
            os.truncate(self.path, self.length)

    def add(self, summary: Summary, step: int | None = None) -> None:
        """Add a summary, to be written at the next `flush`."""
        if not self.length and not self._buffer.tell():
            self._record(Event(file_version="brain.Event:2"))
        self._record(Event(step=step, summary=summary))

    def _record(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def flush(self) -> None:
        """Write what was added."""
        records = self._buffer.getvalue()
        self._buffer.seek(0)
        self._buffer.truncate()
        if records and not self.broken:
            with self._or_without():
                with self.path.open("ab") as file:
                    file.write(records)
                self.length += len(records)

    def sync(self) -> int:
        """Bring everything to disk; returns the length of what is there as a whole."""
        self.flush()
        if not self.broken:
            with self._or_without(), self.path.open("rb") as file:
                os.fsync(file.fileno())
        return self.length

    @contextmanager
    def _or_without(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.broken = True
            print(
                f"warning: {self.path}: {error.strerror}; going on without TensorBoard",
                file=sys.stderr,
            )
