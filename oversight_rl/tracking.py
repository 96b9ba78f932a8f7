"""A run folder and everything written into it: TensorBoard, metrics, result.

Nothing else writes there, checkpoints apart.
"""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import io
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import TypeAdapter
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from agents.methods import METHODS
from envs.settings import UserError
from oversight_rl import checkpoint
from oversight_rl.checkpoint import write_atomically
from oversight_rl.config import Config, dump_yaml, flat, load_yaml
from oversight_rl.evaluation import Row

CONFIG, RESULT, CHECKPOINTS = "config.yaml", "result.json", "checkpoints"
METRICS, TRAINING = "metrics.csv", "training.csv"
LIBRARIES = ("oversight-rl", "torch", "numpy", "gymnasium")
PATIENCE = 10.0  # seconds to wait for a process that is about to let go of a folder
_ROW = TypeAdapter(Row)  # checks the types of what is read
_UNTRACKED = ("wall_seconds",)  # metrics.csv of a repeated run is the same to the byte


class RunFolder:
    """One run on disk.

    Args:
        path: the folder; see `create` and `open`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / CHECKPOINTS
        self._writer: SummaryWriter | None = None

    @classmethod
    def create(cls, path: Path, config: Config, imported: str | None = None) -> RunFolder:
        """Begin a run in a new folder; `imported` says where its policy comes from, if not trained.

        Raises:
            UserError: the folder already holds something, or cannot be made.
        """
        check_free(path)
        facts = provenance() | ({"imported": imported} if imported else {})
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_atomically(path / CONFIG, dump_yaml(config, facts).encode())
            for name in (METRICS, TRAINING):
                (path / name).touch()
        except OSError as error:
            raise UserError(f"{path}: cannot write there ({error.strerror})") from None
        folder = cls(path)
        folder._describe(config)
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """A run that is already there.

        Raises:
            UserError: the folder holds no run.
        """
        if not (path / CONFIG).is_file():
            raise UserError(f"{path}: not a run folder (no {CONFIG} in it)")
        return cls(path)

    def config(self) -> Config:
        """The configuration of the run."""
        return load_yaml(self.path / CONFIG)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / RESULT).is_file()

    def result(self) -> list[Row]:
        """The rows of a finished run.

        Raises:
            UserError: there are none yet, or they are damaged.
        """
        path = self.path / RESULT
        try:
            records = list(json.loads(path.read_text(encoding="utf-8")))
            rows = [
                _ROW.validate_python({k: math.nan if v is None else v for k, v in record.items()})
                for record in records
            ]
            deployed_row(rows)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: not a readable result ({reason})") from None
        return rows

    def load(self) -> checkpoint.Saved:
        """The agent of the newest checkpoint.

        Raises:
            UserError: there is none, or it is damaged or of another run.
        """
        updates = checkpoint.updates(self.checkpoints)
        if not updates:
            raise UserError(f"{self.path}: no checkpoint in it yet")
        config = self.config()
        tensors, facts = checkpoint.load(self.checkpoints, updates[-1])
        agent = checkpoint.agent_from(tensors, config, self.checkpoints)
        return checkpoint.Saved(agent, config, facts["env_steps"], facts["wall_seconds"])

    @property
    def writer(self) -> SummaryWriter:
        """TensorBoard, opened when first needed."""
        if self._writer is None:
            self._writer = SummaryWriter(str(self.path))
        return self._writer

    def rewind(self, update: int) -> None:
        """Forget what was logged after `update`, to go on from its checkpoint."""
        for name in (METRICS, TRAINING):
            try:
                _rewind(self.path / name, update)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self.path / name}: cannot be gone on with ({error})") from None
        self._writer = SummaryWriter(str(self.path), purge_step=update + 1)

    def log_training(self, update: int, points: Mapping[str, float]) -> None:
        """Points of the training curves: to training.csv and TensorBoard."""
        _append(self.path / TRAINING, [{"update": update} | dict(points)])
        self.log(update, {f"training/{name}": value for name, value in points.items()})

    def log(self, update: int, scalars: Mapping[str, float]) -> None:
        """Scalars to TensorBoard."""
        for tag, value in scalars.items():
            if not math.isnan(value):
                self.writer.add_scalar(tag, value, update)

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
        self.writer.flush()

    def picture(self, tag: str, update: int, encoded: bytes) -> None:
        """A PNG or an animated GIF to TensorBoard, as it is."""
        width, height = Image.open(io.BytesIO(encoded)).size
        image = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=encoded
        )
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self.writer._get_file_writer().add_summary(summary, update)

    def finish(self, config: Config, rows: Sequence[Row]) -> None:
        """Write result.json and the hyperparameter summary, and close."""
        write_json(self.path / RESULT, rows)
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
        # add_hparams of the writer itself would open a second event file
        for summary in hparams(hyperparameters, metrics):
            self.writer._get_file_writer().add_summary(summary)
        self.log(config.learner.updates, metrics)
        self.close()

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _describe(self, config: Config) -> None:
        """The text page and the chart of returns."""
        method = METHODS[config.method]
        settings = "\n".join(
            f"| `{k}` | {v} |" for k, v in flat(config.model_dump(mode="json")).items()
        )
        self.writer.add_text(
            "run",
            f"## {config.method}, {config.oversight:.2%} oversight, seed {config.seeds[0]}\n\n"
            f"**{config.method}**: {method.summary}. It assumes: {method.assumes}. "
            f"Deployed policy: **{method.deployed}**.\n\n"
            "* `evaluation/return`: expected discounted ground-truth return per episode of the "
            "mixture and of each expert alone, at the training oversight level, next to the "
            "optimum (all in one chart under *Custom Scalars*)\n"
            "* `evaluation/p_diamond`, `p_ghost`, `p_timeout`: how episodes of each policy end\n"
            "* `pictures/policies`: arrows are action probabilities; the color is the gate, teal "
            "where it trusts the diamond expert and violet where it trusts the ghost expert\n"
            "* `pictures/rollouts`: each policy at work on the same starts, animated\n"
            "* `training/endings`: how training episodes ended, as the learner saw them\n"
            "* `training/gate`: mean gate weight on the diamond expert, by the episode's outcome\n"
            "* `training/loss`, `training/env_steps_per_second`\n\n"
            f"| setting | value |\n| --- | --- |\n{settings}\n",
        )
        self.writer.add_custom_scalars(
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


def _append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add lines to a CSV file, which begins with their names."""
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(records)


def _rewind(path: Path, update: int) -> None:
    """Drop the lines of a CSV file that came after `update`."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        kept = [record for record in reader if int(record["update"]) <= update]
    text = io.StringIO(newline="")
    if kept:
        writer = csv.DictWriter(text, list(kept[0]))
        writer.writeheader()
        writer.writerows(kept)
    write_atomically(path, text.getvalue().encode())


def check_free(path: Path) -> None:
    """Refuse a folder that already holds something.

    Raises:
        UserError: it does.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is not a folder")
    if path.is_dir() and any(path.iterdir()):
        hint = f"go on with --resume {path}, or " if find_runs(path) else ""
        raise UserError(f"{path}: is not empty; {hint}choose another --run-dir")


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


def deployed_row(rows: Sequence[Row]) -> Row:
    """The row of the deployed policy, sampled, at the training oversight level."""
    (match,) = (
        row
        for row in rows
        if row.method in METHODS
        and row.policy == METHODS[row.method].deployed
        and not row.greedy
        and row.deploy_oversight == row.train_oversight
    )
    return match


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from a folder; a dead one holds nothing.

    Raises:
        UserError: another process is at work in it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise UserError(f"{path}: another process is at work in it") from None
                time.sleep(0.2)
        yield
    finally:
        os.close(descriptor)


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
