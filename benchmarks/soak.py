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
from fuzz import fuzz, memory
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from oversight_rl import cli
from oversight_rl.runs import checkpoint, loop
from oversight_rl.runs.folder import EVENTS, LOCK, find_runs
from oversight_rl.terminal import STOPPED

ROOT = Path(__file__).resolve().parent.parent
COMMON = ["--device", "cpu", "--no-pictures", "--evaluation.every", "3"]
COMMON += ["--evaluation.oversight", "0.1", "--evaluation.episodes", "16"]
SMALL = ["--config", str(ROOT / "configs/smoke.yaml"), "--reinforce.updates", "13", *COMMON]
SMALL_PPO = ["--config", str(ROOT / "configs/minigrid.yaml"), "--ppo.updates", "13", *COMMON]
SMALL_PPO += ["--agent.hidden", "8", "8", "--ppo.worlds", "8", "--ppo.steps", "8"]
SMALL_PPO += ["--ppo.batch-size", "32"]
VARIANTS = [  # what is killed: between them they keep all that is kept between updates
    [*SMALL, "--method", "routing"],
    [*SMALL_PPO, "--method", "imputed_routing"],
    [*SMALL, "--method", "naive_early_stop"],
    [*SMALL_PPO, "--env", "OversightGrid-v0", "--oversight", "0.5"],
    [*SMALL, "--method", "imputed_routing", "--seeds", "0", "1"],
    [*SMALL_PPO, "--method", "reward_model_plain", "--seeds", "0", "1"],
    [*SMALL, "--method", "naive_oracle_stop"],
    [*SMALL_PPO, "--method", "routing", "--env-settings", "reward", "ground_truth"],
    [*SMALL, "--method", "reward_model", "--world.spurious-oversight", "0.1"],
    [*SMALL_PPO, "--method", "oracle"],
    [*SMALL, "--method", "oracle_filtering", "--on-nan", "skip"],
    [*SMALL_PPO, "--method", "naive", "--on-nan", "skip", "--ppo.label-reach", "20"],
    [*SMALL, "--method", "reward_model_plain", "--overseer", "ghosts_only"],
    [*SMALL, "--method", "routing", "--overseer", "budget", "--labels.delay", "20"],
]
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
        if "SOAK_DEBUG" not in os.environ:
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
    files = {file.name for file in path.rglob("*")} - {LOCK}
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
        # a killed process leaves its lock, which holds nothing then
        found = (f for f in of.rglob("*") if f.is_file() and f.name != LOCK)
        return {str(f.relative_to(of)) for f in found}

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
    """All that TensorBoard shows of a run, as it reads it: points in the order of the files."""
    shown: dict[str, Any] = {}
    for file in run.rglob(EVENTS):
        sizes, name = {"scalars": 0, "images": 0, "tensors": 0}, file.parent.relative_to(run).name
        events = EventAccumulator(str(file), sizes, purge_orphaned_data=False).Reload()
        tags = events.Tags()
        for tag in tags["scalars"]:
            points = [(e.step, None if tag == SPEED else e.value) for e in events.Scalars(tag)]
            shown[f"{name}:{tag}"] = points
        shown |= {f"{name}:{tag}": [e.step for e in events.Images(tag)] for tag in tags["images"]}
        shown |= {f"{name}:{tag}": len(events.Tensors(tag)) for tag in tags["tensors"]}
    return shown


def kill(kills: int = 50, seed: int = 0, each: int = 3) -> None:
    """Kill small runs at random moments, resume them, and compare with uninterrupted ones.

    Args:
        kills: How many.
        seed: Of the moments.
        each: Most kills of one run.
    """
    torch.set_num_threads(1)  # a forked child has no pool of threads
    draw = random.Random(seed)
    moments: Counter[str] = Counter()
    begun, runs, done = time.perf_counter(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        wholes: dict[int, tuple[Path, float, int]] = {}
        while done < kills:
            which = runs % len(VARIANTS)
            if which not in wholes:
                whole = Path(folder) / f"whole_{which}"
                wholes[which] = (whole, *whole_run(VARIANTS[which], whole))
            whole, seconds, steps = wholes[which]
            path = Path(folder) / f"run_{runs}"
            for _ in range(min(each, kills - done)):
                args = begin_or_resume(VARIANTS[which], path)
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
                args = begin_or_resume(VARIANTS[which], path)
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


# ---- long runs, and many


def open_files(process: int | str = "self") -> int:
    """Number of files that a process has open."""
    return len(os.listdir(f"/proc/{process}/fd"))


def observe(child: int, seconds: float, every: float) -> list[tuple[float, float, int]]:
    """Look at a process now and then: seconds, MB of memory, open files."""
    begun, looks = time.monotonic(), []
    while (now := time.monotonic() - begun) < seconds:
        time.sleep(min(every, seconds - now))
        if os.waitpid(child, os.WNOHANG)[0]:
            return looks
        looks.append((time.monotonic() - begun, memory(child), open_files(child)))
    return looks


def told(looks: Sequence[tuple[float, float, int]]) -> str:
    """How memory and open files went, from a fifth of the time on, when all has been used once."""
    settled = looks[len(looks) // 5 :]
    third = max(1, len(settled) // 3)
    early = sum(mb for _, mb, _ in settled[:third]) / third
    late = sum(mb for _, mb, _ in settled[-third:]) / third
    files = sorted({n for _, _, n in settled})
    return (
        f"{looks[-1][0] / 60:.1f} minutes, memory {early:.1f} MB early and {late:.1f} MB late "
        f"({max(mb for _, mb, _ in settled):.1f} at most), open files {files[0]} to {files[-1]}"
    )


def long(minutes: float = 60.0, pictures: bool = False, algo: str = "reinforce") -> None:
    """Train small networks for a while; memory and open files must not grow.

    Args:
        minutes: How long.
        pictures: Whether pictures are drawn, and at every evaluation at that.
        algo: The learner.
    """
    torch.set_num_threads(1)
    small = ["--algo", algo, "--agent.hidden", "16", "--evaluation.every", "50"]
    small += ["--device", "cpu", "--evaluation.episodes", "100"]
    sizes = {"worlds": 32, "steps": 8, "updates": 2**31}
    small += [word for name, n in sizes.items() for word in (f"--{algo}.{name}", str(n))]
    small += [] if pictures else ["--no-pictures"]
    loop.PICTURES = 2**31  # evaluations with pictures
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        child = in_child(lambda: cli.train([*small, "--run-dir", str(run)]))
        looks = observe(child, 60 * minutes, max(1.0, minutes / 4))
        os.kill(child, signal.SIGTERM)
        assert ended(child) == STOPPED, "it did not stop when asked"
        update = max(checkpoint.updates(run / "checkpoints"))
        print(f"one run, {update:,} updates, {update // 50:,} evaluations: {told(looks)}")
        for file in sorted(run.rglob("*")):
            if file.is_file():
                print(f"{file.stat().st_size / 1e6:9.2f} MB  {file.relative_to(run)}")


def many(runs: int = 1000, workers: int = 1) -> None:
    """Sweep over tiny runs; the driver's memory and open files must not grow.

    Args:
        runs: How many.
        workers: Processes.
    """
    torch.set_num_threads(1)
    settings = {
        "reinforce": {"updates": 1, "worlds": 4, "steps": 2, "gate_replay": 0},
        "agent": {"hidden": 4},
        "world": {"rows": 2, "cols": 2},
        "evaluation": {"oversight": [0.1]},
        "pictures": False,
        "device": "cpu",
    }
    with tempfile.TemporaryDirectory() as folder:
        config, out = Path(folder) / "many.yaml", Path(folder) / "out"
        content = {"settings": settings, "grid": {"seeds": list(range(runs))}, "stack": 20}
        config.write_text(json.dumps(content))
        args = ["sweep", str(config), "--out", str(out), "--workers", str(workers)]
        child = in_child(lambda: cli.main(args))
        looks = observe(child, 24 * 3600, 1.0)
        done = len(list(out.rglob("result.json")))
        assert done == runs, f"{done} of {runs} runs are finished; see them with SOAK_DEBUG=1"
        print(f"a sweep of {runs} runs, its driver: {told(looks)}")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {"kill": kill, "fuzz": fuzz, "long": long, "sweep": many}, description=__doc__
    )
