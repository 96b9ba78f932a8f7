"""Wear runs out, and see that nothing is lost: kills, damaged files, long runs, many runs.

    python benchmarks/soak.py kill [--kills 50]     kill at random moments, resume, compare
    python benchmarks/soak.py fuzz [--files 20000]  damaged checkpoints and settings, refused
    python benchmarks/soak.py long [--minutes 60]   memory, open files and logs of one long run
    python benchmarks/soak.py sweep [--runs 1000]   memory and open files of a sweep's driver

See docs/reliability.md for what is promised, and the figures of the last time.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from oversight_rl import cli
from oversight_rl.tracking import EVENTS, find_runs

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--config", str(ROOT / "configs/smoke.yaml"), "--device", "cpu", "--no-pictures"]
SMALL += ["--evaluation.every", "3", "--training.updates", "13", "--evaluation.oversight", "0.1"]
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.truncate"}
SPEED = "training/env_steps_per_second"  # a time, so never the same twice


# ---- kills


def in_child(command: Callable[[], object], prepare: Callable[[], None] = lambda: None) -> int:
    """Run a command in a process of its own, quietly; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        if not os.environ.get("SOAK_DEBUG"):
            os.dup2(quiet, 2)
        prepare()
        command()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """Wait for a child; its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at_file_event(folder: Path, number: int, tell: int | None = None) -> Callable[[], None]:
    """Have the present process kill itself just before its n-th step on the folder's files.

    Steps are what Python's audit events tell of: files opened, renamed, removed, cut, folders made.
    Their count goes to the file descriptor `tell`.
    """
    count = 0

    def look(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in FILE_EVENTS and str(args[0]).startswith(str(folder)):
            count += 1
            if tell is not None:
                os.pwrite(tell, str(count).encode(), 0)
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.addaudithook(look)


def whole_run(args: Sequence[str], path: Path) -> tuple[float, int]:
    """Train without a kill; returns the seconds that it took, and its steps on files."""
    with tempfile.TemporaryFile() as told:
        begun = time.perf_counter()
        watch = kill_at_file_event(path, 0, told.fileno())
        code = ended(in_child(lambda: cli.train([*args, "--run-dir", str(path)]), watch))
        assert code == 0, f"the uninterrupted run ended with {code}"
        return time.perf_counter() - begun, int(os.pread(told.fileno(), 20, 0))


def begin_or_resume(args: Sequence[str], path: Path) -> list[str]:
    """What a user types: the same command as long as nothing was begun, else --resume."""
    begun = find_runs(path) or (path / "seeds.yaml").is_file()
    return ["--resume", str(path)] if begun else [*args, "--run-dir", str(path)]


def moment(path: Path) -> str:
    """Where a kill came, by what it left behind."""
    if not find_runs(path):
        return "before the settings were there"
    files = {file.name for file in path.rglob("*")}
    if any(name.endswith(".tmp") for name in files):
        return "while a file was being written"
    if any(f.endswith(".safetensors") and f"{f[:-11]}json" not in files for f in files):
        return "between the two files of a checkpoint"
    if not any(name.startswith("update_") for name in files):
        return "before the first checkpoint"
    return "while training, evaluating or logging"


def differences(path: Path, whole: Path) -> list[str]:
    """What is not the same in two folders of runs."""
    found = []

    def files(of: Path) -> set[str]:
        return {str(f.relative_to(of)) for f in of.rglob("*") if f.is_file()}

    if files(path) != files(whole):
        found.append(f"files {files(path) ^ files(whole)}")
        return found
    for run in find_runs(whole):
        ours, theirs = path / run.relative_to(whole), run
        names = ["metrics.csv", "training.csv"]
        names += [f"checkpoints/{f.name}" for f in theirs.glob("checkpoints/*.safetensors")]
        found += [n for n in names if (ours / n).read_bytes() != (theirs / n).read_bytes()]
        if timeless(ours / "result.json") != timeless(theirs / "result.json"):
            found.append("result.json")
        if curves(ours) != curves(theirs):
            found.append("TensorBoard")
    return found


def timeless(result: Path) -> list[dict[str, Any]]:
    """The rows of a result.json without the time that training took."""
    rows = json.loads(result.read_text())
    return [{k: v for k, v in row.items() if k != "wall_seconds"} for row in rows]


def curves(run: Path) -> dict[str, Any]:
    """All that TensorBoard shows of a run, as it reads it: points in the order of the file."""
    sizes = {"scalars": 0, "images": 0, "tensors": 0}
    events = EventAccumulator(str(run / EVENTS), sizes, purge_orphaned_data=False).Reload()
    tags = events.Tags()
    shown: dict[str, Any] = {
        tag: [(e.step, None if tag == SPEED else e.value) for e in events.Scalars(tag)]
        for tag in tags["scalars"]
    }
    shown |= {tag: [e.step for e in events.Images(tag)] for tag in tags["images"]}
    return shown | {tag: len(events.Tensors(tag)) for tag in tags["tensors"]}


def kill(kills: int = 50, seed: int = 0, each: int = 3) -> None:
    """Kill small runs at random moments, resume them, and compare with uninterrupted ones.

    Args:
        kills: How many.
        seed: Of the moments.
        each: Most kills of one run.
    """
    torch.set_num_threads(1)  # a forked child has no pool of threads
    draw = random.Random(seed)
    variants = [
        [*SMALL, "--method", "routing"],
        [*SMALL, "--method", "routing", "--seeds", "0", "1"],
        [*SMALL, "--method", "naive_oracle_stop"],
        [*SMALL, "--method", "reward_model"],
    ]
    moments: Counter[str] = Counter()
    begun, runs, done = time.perf_counter(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        wholes: dict[int, tuple[Path, float, int]] = {}
        while done < kills:
            which = runs % len(variants)
            if which not in wholes:
                whole = Path(folder) / f"whole_{which}"
                wholes[which] = (whole, *whole_run(variants[which], whole))
            whole, seconds, steps = wholes[which]
            path = Path(folder) / f"run_{runs}"
            for _ in range(min(each, kills - done)):
                args = begin_or_resume(variants[which], path)
                by_file = draw.random() < 0.5
                at = draw.randint(1, steps) if by_file else 0
                child = in_child(lambda a=args: cli.train(a), kill_at_file_event(path, at))
                if not by_file:
                    time.sleep(draw.uniform(0, seconds))
                    os.kill(child, signal.SIGKILL)
                if ended(child) != -signal.SIGKILL:
                    break  # it was done before
                done += 1
                moments[moment(path)] += 1
            if not all((run / "result.json").is_file() for run in find_runs(path) or [path]) or (
                len(find_runs(path)) < len(find_runs(whole))
            ):
                args = begin_or_resume(variants[which], path)
                code = ended(in_child(lambda a=args: cli.train(a)))
                assert code == 0, f"run {runs} (seed {seed}) could not be gone on with: {code}"
            wrong = differences(path, whole)
            assert not wrong, f"run {runs} (seed {seed}) did not end as if nothing was: {wrong}"
            shutil.rmtree(path)
            runs += 1
    seconds = time.perf_counter() - begun
    print(f"{done} kills of {runs} runs, all the same in the end ({seconds:.0f} s)")
    for where, count in moments.most_common():
        print(f"{count:5d}  {where}")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"kill": kill}, description=__doc__)
