"""Whether two checkouts train and evaluate alike, to the bit: for refactors.

    python benchmarks/same.py OLD NEW [--only NAME...] [--out DIR]

The same runs are trained in both, each with the checkout's own `train.py` and presets, and every
tensor of their checkpoints and every value of `metrics.csv`, `training.csv` and `result.json` is
compared, times aside. Prints a line for each run; exits with 1 if anything differs. What was given
another name or was added on purpose is in the tables below.

With --out, the runs stay there, and those of a commit without changes are not trained again.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from safetensors.torch import load_file

# ---- what has another name in a newer version, and what is new

SECTIONS = {"training": "reinforce"}  # of settings, in flags
TENSORS: dict[str, str] = {}  # a pattern for the old name, and what stands for it
FIGURES = {  # likewise, where the new table has no column of the old name
    "p_diamond(.*)": r"p_left\1",  # the stranger's own behaviors
    "p_ghost(.*)": r"p_right\1",
}
ADDED = {"deployed"}  # columns that the old table need not have
TIMES = {"wall_seconds"}  # never the same twice
SHOWN = 8  # differences of one run

# ---- the runs

SMALL = ["--config", "configs/smoke.yaml", "--training.updates", "12", "--evaluation.every", "6"]
SMALL_PPO = ["--algo", "ppo", "--ppo.updates", "12", "--ppo.worlds", "16", "--ppo.steps", "8"]
SMALL_PPO += ["--ppo.batch-size", "64", "--ppo.label-reach", "40", "--agent.hidden", "16"]
SMALL_PPO += ["--evaluation.every", "6", "--evaluation.episodes", "20", "--oversight", "0.3"]
STRANGER = """
import gymnasium
from oversight_rl.envs.labels import OversightLabels

def side(env, observation, *others):
    return "left" if observation[0] < 0 else "right"

def make(oversight):
    return OversightLabels(
        gymnasium.make("CartPole-v1"), side, oversight, ("left", "right"), flags_visible=True
    )

def register():
    gymnasium.register("Stranger-v0", make, max_episode_steps=50)
"""
PLUGIN = "[gymnasium.envs]\n__root__ = stranger:register\n"


@dataclass(frozen=True)
class Run:
    """What is trained in both checkouts."""

    flags: list[str]
    stopped: bool = False  # and gone on with
    begun_by_old: bool = False  # the new one goes on with what the old one began
    results: bool = True  # whether evaluations are compared too


def all_runs(methods: Sequence[str]) -> dict[str, Run]:
    """All runs by name, with these methods."""
    ppo = [name for name in methods if not name.endswith("_stop")]  # it deploys the last agent
    grid, minigrid, stranger = (
        ["--env", name]
        for name in ("OversightGrid-v0", "MiniGrid-DiamondGhost-5x5-v0", "Stranger-v0")
    )
    runs = {f"reinforce/{name}": Run([*SMALL, "--method", name]) for name in methods}
    runs["reinforce/seeds"] = Run([*SMALL, "--seeds", "3", "1", "2"])
    options = ["--label-recall", "0.8", "--label-error", "0.1", "--training.no-bootstrap"]
    options += ["--world.spurious-oversight", "0.1", "--agent.experts", "3", "--on-nan", "skip"]
    options += ["--evaluation.episodes", "200"]
    runs["reinforce/options"] = Run([*SMALL, *options])
    for name in ppo:
        runs[f"minigrid/{name}"] = Run([*SMALL_PPO, *minigrid, "--method", name])
    for name in ppo:  # were evaluated by rollouts once, and are evaluated exactly
        flags = [*SMALL_PPO, *grid, "--method", name]
        runs[f"ppo_grid/{name}"] = Run(flags, results=False)
    runs["stranger"] = Run([*SMALL_PPO, *stranger])
    longer = ["--training.updates", "300", "--evaluation.every", "20"]
    longer_ppo = ["--ppo.updates", "100", "--evaluation.every", "10"]
    for how in ("stopped", "begun_by_old"):
        options = {"stopped": True, "begun_by_old": how == "begun_by_old"}
        for name in ("routing", "imputed_routing", "naive_early_stop"):
            flags = [*SMALL, *longer, "--method", name]
            runs[f"{how}/{name}"] = Run(flags, **options)
        runs[f"{how}/seeds"] = Run([*SMALL, *longer, "--seeds", "1", "2"], **options)
        runs[f"{how}/minigrid"] = Run([*SMALL_PPO, *minigrid, *longer_ppo], **options)
    presets = {name: Run(["--config", f"configs/{name}.yaml"]) for name in ("smoke", "default")}
    return runs | presets


class Checkout:
    """A checkout of the project, and the folder where its runs lie.

    Args:
        path: of the checkout.
        out: of the runs.
        plugins: folder with the stranger's package.
    """

    def __init__(self, path: Path, out: Path, plugins: Path) -> None:
        self.path, self.out = path.resolve(), out
        paths = os.pathsep.join(map(str, (self.path, plugins)))
        self.environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        code = "import oversight_rl; print(oversight_rl.__file__)"
        found = self._call("-c", code).strip()
        assert Path(found).is_relative_to(self.path), f"{self.path}: imports {found}"
        describe = ["git", "-C", str(self.path), "describe", "--always", "--dirty", "--abbrev=40"]
        self.version = subprocess.run(describe, capture_output=True, text=True).stdout.strip()

    def _call(self, *words: str) -> str:
        command = [sys.executable, *words]
        done = subprocess.run(
            command, cwd=self.path, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{self.path}: {' '.join(command)}:\n{done.stderr[-2000:]}"
        return done.stdout

    @cached_property
    def methods(self) -> list[str]:
        """What it can train with."""
        code = "from oversight_rl.agents.methods import METHODS; print(*METHODS)"
        return self._call("-c", code).split()

    @cached_property
    def sections(self) -> set[str]:
        """Of settings, as its flags name them."""
        return set(re.findall(r"--(\w+)\.", self._call("train.py", "--help")))

    def flags(self, run: Run) -> list[str]:
        """The run's flags as this version spells them."""
        common = ["--no-pictures", "--device", "cpu"]
        return [*common, *(spelled(word, self.sections) for word in run.flags)]

    def train(self, run: Run, name: str, by: Checkout | None = None) -> Path:
        """Train a run, unless this commit has; returns its folder.

        Args:
            run: what to train.
            name: of its folder.
            by: who began it and stopped, if not this checkout.
        """
        folder, mark = self.out / name, (self.out / name).with_suffix(".done")
        flags = self.flags(run)
        versions = " and ".join(checkout.version for checkout in (self, by) if checkout)
        version = f"{versions}: {' '.join(flags)}"
        if mark.is_file() and mark.read_text() == version and "-dirty" not in versions:
            return folder
        mark.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if by is not None:
            shutil.copytree(stopped(by.out / name), folder)
            self._call("train.py", "--resume", str(folder))
        elif run.stopped:
            self._stop(folder, flags)
            shutil.copytree(folder, stopped(folder))
            self._call("train.py", "--resume", str(folder))
        else:
            self._call("train.py", *flags, "--run-dir", str(folder))
        mark.write_text(version)
        return folder

    def _stop(self, folder: Path, flags: list[str]) -> None:
        """Begin a run and stop it, as a user does, once it has been evaluated a few times."""
        shutil.rmtree(stopped(folder), ignore_errors=True)
        command = [sys.executable, "train.py", *flags, "--run-dir", str(folder)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, cwd=self.path, env=self.environment, **quiet)
        while len(set(column(folder, "update"))) < 3 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        code = process.wait()
        assert code == 130, f"{self.path}: {' '.join(command)} ended with {code}, not stopped"


LABELS = {"--label-recall": "--labels.recall", "--label-error": "--labels.error"}


def spelled(word: str, sections: Container[str]) -> str:
    """A flag as a version with these sections of settings has it; other words stay."""
    if word in LABELS and "labels" in sections:
        return LABELS[word]
    match = re.fullmatch(r"--(\w+)(\..*)", word)
    if match and match[1] not in sections:
        return f"--{SECTIONS.get(match[1], match[1])}{match[2]}"
    return word


def stopped(folder: Path) -> Path:
    """Where a copy lies of a run as it was when it was stopped."""
    return folder.with_name(f"{folder.name}.stopped")


def column(folder: Path, name: str) -> list[str]:
    """A column of the first metrics.csv in a folder; none as long as there is none."""
    tables = sorted(folder.rglob("metrics.csv"))
    return [row[name] for row in read(tables[0]) if row[name]] if tables else []


# ---- comparing


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a table, CSV or JSON."""
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))


def unknown(value: Any) -> bool:
    """Whether a cell says that nothing is known."""
    return value in (None, "", "nan", "NaN") or (isinstance(value, float) and math.isnan(value))


def alike(old: Any, new: Any) -> bool:
    """Whether two cells hold the same number to the bit, or the same word."""
    if unknown(old) or unknown(new):
        return unknown(old) and unknown(new)
    try:
        return repr(float(old)) == repr(float(new))
    except ValueError:
        return str(old) == str(new)


def renamed(name: str, patterns: Mapping[str, str]) -> str:
    """What a name of the old version is in the new one."""
    for pattern, name_now in patterns.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(name_now)
    return name


def compare_tables(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> Iterator[str]:
    """What differs between two tables, by column; columns of the old one may be unknown."""
    if len(old) != len(new):
        yield f"{len(old)} rows, {len(new)} now"
        return
    left = dict.fromkeys(name for row in new for name in row)  # in order
    for name in dict.fromkeys(name for row in old for name in row):
        column = [row.get(name) for row in old]
        now = name if name in left else renamed(name, FIGURES)
        if now not in left:
            if not all(map(unknown, column)):
                yield f"{name} is gone"
            continue
        left.pop(now)
        pairs = [(a, row.get(now)) for a, row in zip(column, new, strict=True)]
        wrong = [i for i, pair in enumerate(pairs) if not alike(*pair)]
        if wrong and name not in TIMES:
            was, now_is = pairs[wrong[0]]
            yield f"{now} in {len(wrong)} of {len(old)} rows, first {was} and {now_is} now"
    yield from (f"{name} is new" for name in left if name not in ADDED)


def compare_tensors(
    old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]
) -> Iterator[str]:
    """What differs between two checkpoints, by the name of the tensor."""
    ours = {name if name in new else renamed(name, TENSORS): x for name, x in old.items()}
    for name in sorted({*ours, *new}):
        if name not in new or name not in ours:
            yield f"{name} is {'new' if name in new else 'gone'}"
            continue
        a, b = ours[name], new[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            yield f"{name}: {a.dtype}{list(a.shape)}, {b.dtype}{list(b.shape)} now"
        elif a.numel() and not torch.equal(
            a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)
        ):
            yield f"{name} differs by up to {(a.double() - b.double()).abs().max():.3g}"


def compare(old: Path, new: Path, results: bool = True) -> Iterator[str]:
    """What differs between two folders of runs.

    Args:
        old: the one.
        new: the other.
        results: whether to compare what evaluations found, too.
    """
    kinds = ("checkpoints/*.safetensors", "training.csv", "metrics.csv", "result.json")
    for kind in kinds[: None if results else 2]:
        files, others = (
            {file.relative_to(side) for file in side.rglob(kind)} for side in (old, new)
        )
        yield from (f"{file} is in one only" for file in sorted(files ^ others))
        if not files:
            yield f"no {kind}"
        for file in sorted(files & others):
            reader, comparing = (
                (load_file, compare_tensors)
                if file.suffix == ".safetensors"
                else (read, compare_tables)
            )
            yield from (
                f"{file}: {what}" for what in comparing(reader(old / file), reader(new / file))
            )


def main(
    old: Annotated[Path, tyro.conf.Positional],
    new: Annotated[Path, tyro.conf.Positional],
    only: tuple[str, ...] = (),
    out: Path | None = None,
) -> None:
    """Train the same runs in two checkouts and say what differs.

    Args:
        old: A checkout.
        new: Another.
        only: Runs whose names begin with one of these. Default: all.
        out: Folder for the runs. Default: one that is removed in the end.
    """
    with tempfile.TemporaryDirectory() as temporary:
        base = (out or Path(temporary)).resolve()
        package = base / "plugins"
        (package / "stranger-1.dist-info").mkdir(parents=True, exist_ok=True)
        (package / "stranger.py").write_text(STRANGER)
        (package / "stranger-1.dist-info/METADATA").write_text("Name: stranger\nVersion: 1\n")
        (package / "stranger-1.dist-info/entry_points.txt").write_text(PLUGIN)
        before, after = (
            Checkout(path, base / side, package) for path, side in ((old, "old"), (new, "new"))
        )
        runs = all_runs([name for name in before.methods if name in after.methods])
        chosen = {name: run for name, run in runs.items() if name.startswith(only or ("",))}
        assert chosen, f"no such run; there are {', '.join(runs)}"
        failed = 0
        for name, run in chosen.items():
            begun = time.perf_counter()
            was = before.train(run, name)
            now = after.train(run, name, before if run.begun_by_old else None)
            wrong = list(compare(was, now, run.results))
            failed += bool(wrong)
            verdict = "DIFFERS" if wrong else "the same"
            print(f"{name}: {verdict} ({time.perf_counter() - begun:.0f} s)", flush=True)
            more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
            for what in wrong[:SHOWN] + more:
                print(f"    {what}", flush=True)
    print(f"{failed} of {len(chosen)} differ" if failed else f"all {len(chosen)} are the same")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
