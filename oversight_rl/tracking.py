"""A run folder and everything written into it: TensorBoard, metrics, result.

Nothing else writes there, checkpoints apart.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image
from pydantic import TypeAdapter
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams, text

from oversight_rl import checkpoint
from oversight_rl.agents.methods import METHODS
from oversight_rl.config import Config, dump_yaml, flat, load_yaml, read_yaml
from oversight_rl.envs.settings import UserError
from oversight_rl.evaluation import Row
from oversight_rl.files import check_plain, check_there, read_json, write_atomically, writing

CONFIG, RESULT, CHECKPOINTS = "config.yaml", "result.json", "checkpoints"
LOCK = "lock.tmp"  # of a process at work there; no part of a run, like all that ends so
SEEDS = "seeds.yaml"  # settings of runs that train side by side, a folder each
METRICS, TRAINING, EVENTS = "metrics.csv", "training.csv", "events.out.tfevents.oversight_rl"
MOST_RESULT = 2**26  # bytes of a result.json that is read
LIBRARIES = ("oversight-rl", "torch", "numpy", "gymnasium")
PATIENCE = 10.0  # seconds to wait for a process that is about to let go of a folder
_ROW = TypeAdapter(Row)  # checks the types of what is read
MAY_BE_UNKNOWN = ("p_ghost_on_path", "return_se", "window_return", "optimal_return")  # nan then
_UNTRACKED = ("wall_seconds",)  # metrics.csv of a repeated run is the same to the byte


class RunFolder:
    """One run on disk.

    Args:
        path: the folder; see `create` and `open`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / CHECKPOINTS
        self.events = Events(path / EVENTS)

    @classmethod
    def create(cls, path: Path, config: Config, imported: str | None = None) -> RunFolder:
        """Begin a run in a new folder; `imported` says where its policy comes from, if not trained.

        Raises:
            UserError: the folder already holds something, or cannot be made.
        """
        check_free(path)
        facts = provenance() | ({"imported": imported} if imported else {})
        folder = cls(path)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            write_atomically(path / CONFIG, dump_yaml(config, facts).encode())
            folder.clear(config)
        return folder

    def clear(self, config: Config) -> None:
        """Make it the folder of a run at its very beginning."""
        checkpoint.drop_after(self.checkpoints, -1)
        for name in (METRICS, TRAINING):
            (self.path / name).write_bytes(b"")
        self.events.cut(0)
        self._describe(config)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """A run that is already there.

        Raises:
            UserError: the folder holds no run, or something in it leads elsewhere.
        """
        check_there(path)
        if not (path / CONFIG).is_file():
            raise UserError(f"{path}: not a run folder (no {CONFIG} in it)")
        for name in (CONFIG, METRICS, TRAINING, RESULT, EVENTS):
            check_plain(path / name)
        if (path / CHECKPOINTS).is_symlink():
            raise UserError(f"{path / CHECKPOINTS}: is not a plain folder")
        return cls(path)

    def config(self) -> Config:
        """The configuration of the run."""
        return load_yaml(self.path / CONFIG)

    @property
    def version(self) -> str:
        """Version of this program that began the run."""
        facts = read_yaml(self.path / CONFIG).get("provenance")
        versions = facts.get("versions") if isinstance(facts, dict) else None
        return str(versions.get("oversight-rl")) if isinstance(versions, dict) else "unknown"

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / RESULT).is_file()

    @property
    def has_evaluations(self) -> bool:
        """Whether metrics.csv has anything in it."""
        metrics = self.path / METRICS
        return metrics.is_file() and metrics.stat().st_size > 0

    def result(self) -> list[Row]:
        """The rows of a finished run.

        Raises:
            UserError: there are none yet, or they are damaged.
        """
        path = self.path / RESULT
        records = read_json(path, MOST_RESULT)
        try:
            rows = [
                _ROW.validate_python({k: math.nan if v is None else v for k, v in record.items()})
                for record in records
            ]
            deployed_row(rows)
            for row in rows:
                _check_ranges(row)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a readable result ({error})") from None
        return rows

    def load(self) -> checkpoint.Saved:
        """The agent of the newest checkpoint.

        Raises:
            UserError: there is none, or it is damaged or of another run.
        """
        config = self.config()
        prefix = checkpoint.deployed_prefix(config)
        like = checkpoint.agent_like(config, prefix)
        tried = -1
        while True:
            newest = max(checkpoint.updates(self.checkpoints), default=-1)
            if newest < 0:
                raise UserError(f"{self.path}: no checkpoint in it yet")
            try:
                tensors, facts = checkpoint.load(self.checkpoints, newest, like)
                break
            except UserError:
                if newest == tried:  # and not just removed by the run that is being trained
                    raise
                tried = newest
        agent = checkpoint.agent_from(tensors, config, self.checkpoints, prefix)
        return checkpoint.Saved(agent, config, facts["env_steps"], facts["wall_seconds"])

    def logged(self) -> dict[str, int]:
        """How long each log is, in bytes; what is said to be there is on disk."""
        lengths = {EVENTS: self.events.sync()}
        for name in (METRICS, TRAINING):
            with (self.path / name).open("rb") as file:
                os.fsync(file.fileno())
                lengths[name] = file.seek(0, os.SEEK_END)
        return lengths

    def rewind(self, logged: object) -> None:
        """Cut the logs back to what they were, as `logged` told, to go on from there.

        Raises:
            UserError: they are shorter than that, or `logged` tells nothing.
        """
        lengths = logged if isinstance(logged, dict) else {}
        for name in (METRICS, TRAINING, EVENTS):
            path, length = self.path / name, lengths.get(name)
            if not isinstance(length, int) or length < 0:
                raise UserError(f"{self.checkpoints}: says nothing of {name}; train anew")
            if name == EVENTS:
                self.events.cut(length)
                continue
            if not path.is_file() or path.stat().st_size < length:
                raise UserError(f"{path}: cannot be gone on with (it has lost lines)")
            with writing(path):
                os.truncate(path, length)

    def log_training(self, update: int, points: Mapping[str, float]) -> None:
        """Points of the training curves: to training.csv and TensorBoard."""
        _append(self.path / TRAINING, [{"update": update} | dict(points)])
        self.log(update, {f"training/{name}": value for name, value in points.items()})
        self.events.flush()

    def log(self, update: int, scalars: Mapping[str, float]) -> None:
        """Scalars to TensorBoard."""
        known = {tag: value for tag, value in scalars.items() if not math.isnan(value)}
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in known.items()]
        if values:
            self.events.add(Summary(value=values), update)

    def log_rows(self, update: int, rows: Sequence[Row]) -> None:
        """An evaluation: to metrics.csv, and the returns and endings to TensorBoard."""
        records = [{"update": update} | dataclasses.asdict(row) for row in rows]
        _append(
            self.path / METRICS,
            [{k: v for k, v in record.items() if k not in _UNTRACKED} for record in records],
        )
        for row in rows:
            self.log(
                update,
                {
                    f"evaluation/return/{row.policy}": row.ground_truth_return,
                    f"evaluation/p_diamond/{row.policy}": row.p_diamond,
                    f"evaluation/p_ghost/{row.policy}": row.p_ghost,
                    f"evaluation/p_timeout/{row.policy}": row.p_timeout,
                },
            )
        self.log(update, {"evaluation/return/optimum": rows[0].optimal_return})
        self.events.flush()

    def picture(self, tag: str, update: int, encoded: bytes) -> None:
        """A PNG or an animated GIF to TensorBoard, as it is."""
        width, height = Image.open(io.BytesIO(encoded)).size
        image = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=encoded
        )
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self.events.add(summary, update)

    def finish(self, config: Config, rows: Sequence[Row]) -> None:
        """Write the hyperparameter summary and result.json, which makes the run finished."""
        deployed = deployed_row(rows)
        settings = flat(
            config.model_dump(mode="json", exclude={"device", "pictures", "evaluation"})
        )
        hyperparameters = {
            k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in settings.items()
        }
        metrics = {
            "hparam/deployed_return": deployed.ground_truth_return,
            "hparam/p_ghost": deployed.p_ghost,
        }
        for summary in hparams(hyperparameters, metrics):
            self.events.add(summary)
        self.log(config.learner.updates, metrics)
        self.events.sync()
        write_json(self.path / RESULT, rows)

    def _describe(self, config: Config) -> None:
        """The text page and the chart of returns."""
        method = METHODS[config.method]
        settings = "\n".join(
            f"| `{k}` | {v} |" for k, v in flat(config.model_dump(mode="json")).items()
        )
        page = text(
            "run",
            f"## {config.method}, {config.oversight:.2%} oversight, seed {config.seeds[0]}\n\n"
            f"**{config.method}**: {method.summary}. It assumes: {method.assumes}. Deployed: "
            f"**{'the first expert' if method.experts == 'many' else 'the only expert'}**. "
            f"Environment: {config.env}.\n\n"
            "* `evaluation/return`: expected discounted ground-truth return per episode of the "
            "mixture and of each expert alone, at the training oversight level, next to the "
            "optimum where it is known (all in one chart under *Custom Scalars*)\n"
            "* `evaluation/p_diamond`, `p_ghost`, `p_timeout`: how episodes of each policy end: in "
            "the wanted behavior, another, or none\n"
            "* `pictures/policies` (grid world): arrows are action probabilities; the color is the "
            "gate, teal where it trusts the diamond expert and violet where the ghost expert\n"
            "* `pictures/rollouts`: each policy at work on the same starts, animated\n"
            "* `training/endings`: how training episodes ended, as the learner saw them\n"
            "* `training/gate`: mean gate weight on the first expert, by the episode's outcome\n"
            "* `training/loss`, `training/env_steps_per_second`\n\n"
            f"| setting | value |\n| --- | --- |\n{settings}\n",
        )
        charts = custom_scalars(
            {
                "Ground truth": {
                    "return of each policy and the optimum": [
                        "Multiline",
                        ["evaluation/return/.*"],
                    ],
                    "chance of the ghost": ["Multiline", ["evaluation/p_ghost/.*"]],
                },
                "Training": {
                    "endings as seen": ["Multiline", ["training/endings/.*"]],
                    "gate by outcome": ["Multiline", ["training/gate/.*"]],
                },
            }
        )
        for summary in (page, charts):
            self.events.add(summary)
        self.events.flush()


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


def _append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add lines to a CSV file, which begins with their names."""
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(records)


def check_free(path: Path) -> None:
    """Refuse a folder that already holds something.

    Raises:
        UserError: it does.
    """
    if (path.exists() or path.is_symlink()) and not path.is_dir():
        raise UserError(f"{path}: is not a folder")
    # a run that was killed before it wrote its settings leaves empty folders, and half a file
    found = (p for p in path.rglob("*") if p.is_symlink() or not p.is_dir())
    if any(p.suffix != ".tmp" for p in found):
        hint = f"go on with --resume {path}, or " if find_runs(path) else ""
        raise UserError(f"{path}: is not empty; {hint}choose another --run-dir")


def begin_seeds(path: Path, config: Config) -> dict[Path, Config]:
    """Plan a run folder for each seed below `path`, so that a run killed at its start has all.

    Raises:
        UserError: the folder is taken, or cannot be written.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        with locked(path):
            check_free(path)
            write_atomically(path / SEEDS, dump_yaml(config, provenance()).encode())
    return planned_seeds(path)


def planned_seeds(path: Path) -> dict[Path, Config]:
    """The runs that `begin_seeds` planned there, if it did."""
    check_plain(path / SEEDS)
    if not (path / SEEDS).is_file():
        return {}
    config = load_yaml(path / SEEDS)
    return {path / f"seed_{seed}": config.single(seed) for seed in config.seeds}


def find_runs(path: Path) -> list[Path]:
    """Run folders at `path`: itself, or one per seed below it."""
    if (path / CONFIG).is_file():
        return [path]
    seeds = [p for p in path.glob("seed_*") if (p / CONFIG).is_file()]
    return sorted(seeds, key=lambda p: (len(p.name), p.name))


def open_runs(path: Path) -> list[RunFolder]:
    """The runs at `path`, see `find_runs`.

    Raises:
        UserError: there is none.
    """
    return [RunFolder.open(run) for run in find_runs(path) or [path]]


def deployed_policy(method: str, policies: Iterable[str]) -> str | None:
    """Name of the deployed one among the policies of a run's table; None if it is not there.

    A mixture comes first, then its experts, whose names are those of the run's behaviors.
    """
    names = list(dict.fromkeys(policies))
    place = int(method in METHODS and METHODS[method].experts == "many")
    return names[place] if place < len(names) else None


def deployed_row(rows: Sequence[Row]) -> Row:
    """The row of the deployed policy, sampled, at the training oversight level."""
    name = deployed_policy(rows[0].method, [row.policy for row in rows]) if rows else None
    (match,) = (
        row
        for row in rows
        if row.policy == name and not row.greedy and row.deploy_oversight == row.train_oversight
    )
    return match


def _check_ranges(row: Row) -> None:
    """Refuse a row that no run can have."""
    for name, value in vars(row).items():
        if name == "method":
            fine = value in METHODS
        elif isinstance(value, float) and math.isnan(value):
            fine = name in MAY_BE_UNKNOWN
        elif name.startswith("p_") or name.endswith("oversight"):
            fine = -1e-6 <= value <= 1 + 1e-6  # sums of chances round
        else:
            fine = not isinstance(value, int | float) or not abs(value) > 1e15
        if not fine:
            raise ValueError(f"{name} cannot be {value!r}")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from a folder; a dead one holds nothing.

    Raises:
        UserError: another process is at work in it, or it cannot be written.
    """
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


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Rows as a JSON list; nan is written as null."""
    records = [
        {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()}
        for record in map(dataclasses.asdict, rows)
    ]
    write_atomically(path, (json.dumps(records, indent=1) + "\n").encode())


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
