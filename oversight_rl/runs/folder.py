"""A run folder and everything written into it: TensorBoard, metrics, result.

Nothing else writes there, checkpoints apart.
"""

from __future__ import annotations

import csv
import io
import math
import os
import platform
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard.summary import custom_scalars, hparams, text

from oversight_rl.envs.settings import UserError
from oversight_rl.files import check_plain, check_there, write_atomically, writing
from oversight_rl.kinds import load_config
from oversight_rl.runs import checkpoint, snapshots
from oversight_rl.runs.experiment import Experiment, experiment_of
from oversight_rl.runs.rows import Row, deployed_row, read_rows, write_rows
from oversight_rl.settings import RunConfig, dump_yaml, flat, read_yaml

CONFIG, RESULT = "config.yaml", "result.json"
CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"
PICTURES = "pictures"  # the last ones drawn
LOCK = "lock.tmp"  # of a process at work there; no part of a run, like all that ends so
SEEDS = "seeds.yaml"  # settings of runs that train side by side, a folder each
METRICS, TRAINING, EVENTS = "metrics.csv", "training.csv", "events.out.tfevents.oversight_rl"
CURVES = "curves"  # TensorBoard's, of each policy by itself
FOLDERS = CHECKPOINTS, SNAPSHOTS, PICTURES, CURVES
LIBRARIES = ("oversight-rl", "torch", "numpy", "gymnasium")
KEPT, MOST_FOLDER = " ,=+-_", 200  # in names of folders, beside letters and digits; bytes
MOST_NAMES = 2**16  # characters of the first line of a CSV file
PATIENCE = 10.0  # seconds to wait for a process that is about to let go of a folder
_UNTRACKED = "wall_seconds"  # metrics.csv of a repeated run is the same to the byte


class Events:
    """TensorBoard's files: one for the whole run, and one for each curve of a color of its own.

    The page colors by folder: a curve by name is in one of that name. All can be cut back and gone
    on with. Runs go on without them if one cannot be written, and say so once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # bytes that are whole records, by the file's place; the whole run's is first
        self.lengths = {EVENTS: 0}
        for pattern in (EVENTS, f"{CURVES}/*/{EVENTS}"):
            for file in path.glob(pattern):
                self.lengths[file.relative_to(path).as_posix()] = file.stat().st_size
        self.broken = False
        # whole records, so that a reader seldom meets half of one
        self._buffers: dict[str, io.BytesIO] = {}

    def cut(self, lengths: Mapping[str, int]) -> None:
        """Go on after these bytes of each file; from the start, where there are none, or fewer."""
        for name in self.lengths:
            with self._or_without(name):
                path, length = self.path / name, lengths.get(name, 0)
                path.touch()
                self.lengths[name] = length if length <= path.stat().st_size else 0
                os.truncate(path, self.lengths[name])

    def add(self, summary: Summary, step: int | None = None, curve: str | None = None) -> None:
        """Add a summary, to be written at the next `flush`."""
        name = EVENTS if curve is None else f"{CURVES}/{_folder_name(curve)}/{EVENTS}"
        buffer = self._buffers.setdefault(name, io.BytesIO())
        events = [Event(step=step, summary=summary)]
        if not self.lengths.get(name) and not buffer.tell():
            events.insert(0, Event(file_version="brain.Event:2"))
        for event in events:
            event.wall_time = time.time()
            RecordWriter(buffer).write(event.SerializeToString())

    def flush(self) -> None:
        for name, buffer in self._buffers.items():
            records = buffer.getvalue()
            if not self.broken:
                with self._or_without(name):
                    path = self.path / name
                    if name != EVENTS:  # a run folder that is gone is not made anew
                        path.parent.parent.mkdir(exist_ok=True)
                        path.parent.mkdir(exist_ok=True)
                    with path.open("ab") as file:
                        file.write(records)
                    self.lengths[name] = self.lengths.get(name, 0) + len(records)
        self._buffers.clear()

    def sync(self) -> dict[str, int]:
        """Bring everything to disk; returns the length of what is there as a whole, by file."""
        self.flush()
        for name in self.lengths:
            if not self.broken:
                with self._or_without(name), (self.path / name).open("rb") as file:
                    os.fsync(file.fileno())
        return dict(self.lengths)

    @contextmanager
    def _or_without(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.broken:
                what = f"{self.path / name}: {error.strerror}"
                print(f"warning: {what}; going on without TensorBoard", file=sys.stderr)
            self.broken = True


def _folder_name(curve: str) -> str:
    """What a curve's folder is called: no name of a policy leads elsewhere, or is too long."""
    plain = "".join(c if c.isalnum() or c in KEPT else f"%{ord(c):X}" for c in curve)
    encoded = plain.encode()
    if 0 < len(encoded) <= MOST_FOLDER:
        return plain
    return f"{encoded[:MOST_FOLDER].decode(errors='ignore')}%{zlib.crc32(encoded):08x}"


class RunFolder:
    """One run on disk; see `create` and `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints, self.snapshots = path / CHECKPOINTS, path / SNAPSHOTS
        self.events = Events(path)

    @classmethod
    def create(cls, path: Path, config: RunConfig, imported: str | None = None) -> RunFolder:
        """Begin a run in a new folder; `imported` says where its policy is from, if not trained."""
        check_free(path)
        facts = provenance() | ({"imported": imported} if imported else {})
        folder = cls(path)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            write_atomically(path / CONFIG, dump_yaml(config, provenance=facts).encode())
            folder.clear(config)
        return folder

    def clear(self, config: RunConfig) -> None:
        """Make it the folder of a run at its very beginning."""
        checkpoint.drop_after(self.checkpoints, -1)
        snapshots.drop_after(self.snapshots, -1)
        for name in (METRICS, TRAINING):
            (self.path / name).write_bytes(b"")
        self.events.cut({})
        self._describe(config)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """A run that is already there; `UserError` if it is none, or leads elsewhere."""
        check_there(path)
        if not (path / CONFIG).is_file():
            raise UserError(f"{path}: not a run folder (no {CONFIG} in it)")
        for name in (CONFIG, METRICS, TRAINING, RESULT, EVENTS):
            check_plain(path / name)
        for folder in (*map(path.joinpath, FOLDERS), *path.glob(f"{CURVES}/*")):
            if folder.is_symlink():
                raise UserError(f"{folder}: is not a plain folder")
            check_plain(folder / EVENTS)
        return cls(path)

    def config(self) -> RunConfig:
        return load_config(self.path / CONFIG)

    @property
    def provenance(self) -> dict[str, Any]:
        """Commit and versions that began the run, by their dotted names; empty if not known."""
        facts = read_yaml(self.path / CONFIG).get("provenance")
        return flat(facts) if isinstance(facts, dict) else {}

    @property
    def finished(self) -> bool:
        return (self.path / RESULT).is_file()

    @property
    def has_evaluations(self) -> bool:
        metrics = self.path / METRICS
        return metrics.is_file() and metrics.stat().st_size > 0

    def result(self) -> list[Row]:
        """The rows of a finished run; `UserError` if there are none yet, or they are damaged."""
        return read_rows(self.path / RESULT, experiment_of(self.config()).check)

    def load(self, like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and facts of the newest checkpoint, see `checkpoint.load`."""
        tried = -1
        while True:
            newest = max(checkpoint.updates(self.checkpoints), default=-1)
            if newest < 0:
                raise UserError(f"{self.path}: no checkpoint in it yet")
            try:
                return checkpoint.load(self.checkpoints, newest, like)
            except UserError:
                if newest == tried:  # and not just removed by the run that is being trained
                    raise
                tried = newest

    def logged(self) -> dict[str, int]:
        """How long each log is, in bytes; what is said to be there is on disk."""
        lengths = self.events.sync()
        for name in (METRICS, TRAINING):
            with (self.path / name).open("rb") as file:
                os.fsync(file.fileno())
                lengths[name] = file.seek(0, os.SEEK_END)
        return lengths

    def rewind(self, logged: object) -> None:
        """Cut the logs back to what they were, as `logged` told, to go on from there."""
        lengths = logged if isinstance(logged, dict) else {}
        for name in (METRICS, TRAINING, EVENTS, *lengths):
            length = lengths.get(name)
            if not isinstance(length, int) or length < 0:
                raise UserError(f"{self.checkpoints}: says nothing of {name}; train anew")
        self.events.cut(lengths)
        for name in (METRICS, TRAINING):
            path, length = self.path / name, lengths[name]
            if not path.is_file() or path.stat().st_size < length:
                raise UserError(f"{path}: cannot be gone on with (it has lost lines)")
            with writing(path):
                os.truncate(path, length)

    def log_training(self, update: int, points: Mapping[str, float]) -> None:
        """Points of the training curves: to training.csv and TensorBoard."""
        _append(self.path / TRAINING, [{"update": update} | dict(points)])
        self.log(update, {f"training/{name}": value for name, value in points.items()})
        self.events.flush()

    def log(self, update: int, scalars: Mapping[str, float], curve: str | None = None) -> None:
        """Scalars to TensorBoard."""
        known = {tag: value for tag, value in scalars.items() if not math.isnan(value)}
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in known.items()]
        if values:
            self.events.add(Summary(value=values), update, curve)

    def log_rows(self, update: int, rows: Sequence[Row], kind: type[Experiment]) -> None:
        """An evaluation: to metrics.csv, and the figures that are shown to TensorBoard."""
        records = [{"update": update} | row.record for row in rows]
        for record in records:
            del record[_UNTRACKED]
        _append(self.path / METRICS, records)
        for row in rows:
            shown = kind.shown_of(row).items()
            self.log(update, {f"evaluation/{short}": x for short, x in shown}, row.policy)
        (short,) = (s for s, name in kind.shown([kind.score]).items() if name == kind.score)
        first = f"deployed/{short}"  # on the page, by its name
        self.log(update, {first: deployed_row(rows).figures[kind.score]})
        if kind.optimum is not None:
            best = rows[0].figures[kind.optimum]
            self.log(update, {first: best, f"evaluation/{short}": best}, "optimum")
        self.events.flush()

    def picture(self, tag: str, update: int, encoded: bytes) -> None:
        """A PNG or an animated GIF to TensorBoard, as it is, and to a file that holds the last."""
        file = self.path / f"{tag}.{'gif' if encoded.startswith(b'GIF') else 'png'}"
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, encoded)
        width, height = Image.open(io.BytesIO(encoded)).size
        size = {"height": height, "width": width, "colorspace": 3}
        image = Summary.Image(encoded_image_string=encoded, **size)
        self.events.add(Summary(value=[Summary.Value(tag=tag, image=image)]), update)

    def text(self, tag: str, update: int, markdown: str) -> None:
        """A text to TensorBoard."""
        self.events.add(text(tag, markdown), update)

    def finish(self, config: RunConfig, rows: Sequence[Row], kind: type[Experiment]) -> None:
        """Write the hyperparameter summary and result.json, which makes the run finished."""
        settings = config.model_dump(mode="json", exclude={"device", "pictures", "evaluation"})
        first = {"Method": config.method, "Oversight": config.oversight, "Seed": config.seeds[0]}
        hyperparameters = first | {  # the page sorts them, capitals first, and opens on five
            k: v if isinstance(v, int | float | str | bool) else str(v)
            for k, v in flat(settings).items()
            if k not in ("method", "oversight", "seeds")
        }
        shown = kind.shown_of(deployed_row(rows)).items()
        metrics = {f"hparam/deployed_{short}": value for short, value in shown}
        for summary in hparams(hyperparameters, metrics):
            self.events.add(summary)
        self.log(config.learner.updates, metrics)
        self.events.sync()
        write_rows(self.path / RESULT, rows)

    def _describe(self, config: RunConfig) -> None:
        """The text page and the charts of several curves."""
        kind, settings = experiment_of(config), flat(config.model_dump(mode="json"))
        table = "\n".join(f"| `{name}` | {value} |" for name, value in settings.items())
        page = (
            f"## {config.method}, {config.oversight:.2%} oversight, seed {config.seeds[0]}\n\n"
            f"{kind.describe(config)}\n\n| setting | value |\n| --- | --- |\n{table}\n"
        )
        charts = {
            title: {name: ["Multiline", [tags]] for name, tags in group.items()}
            for title, group in kind.charts.items()
        }
        self.events.add(text("run", page))
        self.events.add(custom_scalars(charts))
        self.events.flush()


def _append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add lines to a CSV file, under the names that it begins with."""
    with path.open("r+", newline="", encoding="utf-8", errors="surrogateescape") as file:
        names = next(csv.reader([file.readline(MOST_NAMES)]))
        file.seek(0, os.SEEK_END)
        writer = csv.DictWriter(file, names or list(records[0]), extrasaction="ignore")
        if not names:
            writer.writeheader()
        writer.writerows(records)


def check_free(path: Path) -> None:
    """Refuse a folder that already holds something."""
    if (path.exists() or path.is_symlink()) and not path.is_dir():
        raise UserError(f"{path}: is not a folder")
    # a run that was killed before it wrote its settings leaves empty folders, and half a file
    found = (p for p in path.rglob("*") if p.is_symlink() or not p.is_dir())
    if any(p.suffix != ".tmp" or p.is_symlink() for p in found):
        hint = f"go on with --resume {path}, or " if find_runs(path) else ""
        raise UserError(f"{path}: is not empty; {hint}choose another --run-dir")


def begin_seeds(path: Path, config: RunConfig) -> dict[Path, RunConfig]:
    """Plan a run folder for each seed below `path`, so that a run killed at its start has all."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        with locked(path):
            check_free(path)
            write_atomically(path / SEEDS, dump_yaml(config, provenance=provenance()).encode())
    return planned_seeds(path)


def planned_seeds(path: Path) -> dict[Path, RunConfig]:
    """The runs that `begin_seeds` planned there, if it did."""
    check_plain(path / SEEDS)
    if not (path / SEEDS).is_file():
        return {}
    config = load_config(path / SEEDS)
    return {path / f"seed_{seed}": config.single(seed) for seed in config.seeds}


def find_runs(path: Path) -> list[Path]:
    """Run folders at `path`: itself, or one per seed below it."""
    if (path / CONFIG).is_file():
        return [path]
    seeds = [p for p in path.glob("seed_*") if (p / CONFIG).is_file()]
    return sorted(seeds, key=lambda p: (len(p.name), p.name))


def open_runs(path: Path) -> list[RunFolder]:
    """The runs at `path`, see `find_runs`; `UserError` if there is none."""
    return [RunFolder.open(run) for run in find_runs(path) or [path]]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from a folder, or be refused; a dead process holds nothing."""
    check_plain(path / LOCK)
    lock = FileLock(path / LOCK, timeout=PATIENCE)
    with writing(path):
        try:
            lock.acquire()
        except Timeout:
            raise UserError(f"{path}: another process is at work in it") from None
    try:
        yield
    finally:
        with suppress(OSError):  # whoever got hold of it meanwhile sees that, and makes another
            (path / LOCK).unlink()
        lock.release()


def provenance() -> dict[str, Any]:
    """Versions and commit that produce a run."""
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    versions = {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()}
    return {"commit": commit, "versions": versions}
