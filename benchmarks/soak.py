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
from typing import Any, cast

import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from oversight_rl.agents.networks import Agent
from oversight_rl.agents.steering import MIXTURE
from oversight_rl.cli import main, train
from oversight_rl.envs.settings import UserError
from oversight_rl.experiments.oversight import reference
from oversight_rl.experiments.oversight.config import Config
from oversight_rl.experiments.oversight.grid import GridRuns
from oversight_rl.experiments.oversight.policies import read_policy, read_run, write_policy
from oversight_rl.kinds import load_config
from oversight_rl.reports import page
from oversight_rl.runs import checkpoint, loop
from oversight_rl.runs.folder import EVENTS, RunFolder, find_runs
from oversight_rl.sweeps.plan import load_sweep, plan
from oversight_rl.terminal import STOPPED

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--config", str(ROOT / "configs/smoke.yaml"), "--device", "cpu", "--no-pictures"]
SMALL += ["--evaluation.every", "3", "--reinforce.updates", "13", "--evaluation.oversight", "0.1"]
SMALL_PPO = ["--config", str(ROOT / "configs/minigrid.yaml"), "--device", "cpu", "--no-pictures"]
SMALL_PPO += ["--agent.hidden", "8", "8", "--ppo.worlds", "8", "--ppo.steps", "8"]
SMALL_PPO += ["--ppo.batch-size", "32", "--ppo.updates", "13", "--evaluation.every", "3"]
SMALL_PPO += ["--evaluation.episodes", "16", "--evaluation.oversight", "0.1"]
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
        code = ended(in_child(lambda: train([*args, "--run-dir", str(path)]), watch))
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
        [*SMALL_PPO, "--method", "imputed_routing"],
        [*SMALL_PPO, "--env", "OversightGrid-v0"],
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
                child = in_child(lambda a=args: train(a), kill_at_file_event(path, at))
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
                code = ended(in_child(lambda a=args: train(a)))
                assert code == 0, f"run {runs} (seed {seed}) could not be gone on with: {code}"
            wrong = differences(path, whole)
            assert not wrong, f"run {runs} (seed {seed}) did not end as if nothing was: {wrong}"
            shutil.rmtree(path)
            runs += 1
    seconds = time.perf_counter() - begun
    print(f"{done} kills of {runs} runs, all the same in the end ({seconds:.0f} s)")
    for where, count in moments.most_common():
        print(f"{count:5d}  {where}")


# ---- damaged files

POISON = [  # what has made readers of YAML, JSON and numbers stumble
    b"!!python/object/apply:os.system [ls]", b"&a [*a, *a]", b"*a", b"<<: ", b"!!int x",
    b"!!float y", b"!!timestamp z", b"!!binary '*'", b"!!set {a}", b"!!omap [1]", b"!!pairs [1]",
    b"!!bool q", b"0x_", b"0b", b"1e999", b".nan", b"-.inf", b"NaN", b"-Infinity", b"{", b"[",
    b"? ", b"~", b"2001-13-45", b"1:99:99", b"9" * 5000, b"[" * 3000, b"{a: " * 50, b"\x00",
    b"\xff\xfe", b"'", b'"', b"|\n", b"---\n", b"%YAML 1.1", b"\xe2\x80\xae", b"\x1b[31m", b"../x",
    b"<script>alert(1)</script>", b"$\\frac{", b"null", b"true", b"-1", b"0", b"1e308", b'{"a":',
    (2**60).to_bytes(8, "little"), (2**64 - 1).to_bytes(8, "little"), bytes(8), b"\x80\x02c",
]  # fmt: skip
NUMBERS = [float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 2**62, -(2**62), 200, -3, 0]


FORGED = ("imputed_routing", "naive_early_stop")  # between them they save all there is to save


def damaged(draw: random.Random, content: bytes) -> bytes:
    """A file with bits flipped, parts lost, repeated, or put in."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        what = draw.randrange(6)
        if what == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif what == 1:
            del data[at : at + draw.randrange(1, 40)]
        elif what == 2:
            data[at:at] = draw.choice(POISON)
        elif what == 3:
            places = [i + 2 for i in range(len(data)) if data[i : i + 2] in (b": ", b'":')]
            start = draw.choice(places or [0])
            end = data.find(b"\n", start)
            data[start : end if end > 0 else start + 8] = draw.choice(POISON)
        elif what == 4:
            del data[at:]
        else:
            data[at:at] = data[draw.randrange(len(data) + 1) :][:200]
    return bytes(data)


def readers(folder: Path) -> dict[str, tuple[list[Path], Callable[[], object]]]:
    """By kind of file: good files to damage, and what reads them."""
    tiny = ["--world.rows", "2", "--world.cols", "2", "--agent.hidden", "4", "--reinforce.worlds"]
    tiny += ["4", "--reinforce.updates", "2", "--reinforce.gate-replay", "0"]
    run = folder / "run"
    child = in_child(lambda: train([*SMALL, *tiny, "--run-dir", str(run)]))
    assert ended(child) == 0
    config = cast(Config, RunFolder.open(run).config())
    learner = GridRuns([config]).learner
    newest = run / f"checkpoints/update_{learner.total:08d}.json"

    def resume() -> None:
        tensors, _ = checkpoint.load(newest.parent, 2, learner.state(0))
        learner.load([tensors], 2)

    policy = folder / "policy/policy.safetensors"
    policy.parent.mkdir()
    saved = read_run(RunFolder.open(run))
    write_policy(policy, MIXTURE, saved)
    state = folder / "state/state.pt"
    state.parent.mkdir()
    torch.save(published(saved.agent), state)
    imported = folder / "imported"

    def bring_in() -> None:
        shutil.rmtree(imported, ignore_errors=True)
        reference.import_state_dict(state, imported, 0.1)

    bring_in()
    sweep = folder / "sweep/sweep.yaml"
    sweep.parent.mkdir()
    shutil.copy(ROOT / "configs/compare.yaml", sweep)
    settings = folder / "settings/config.yaml"
    settings.parent.mkdir()
    shutil.copy(run / "config.yaml", settings)
    pair = [newest, newest.with_suffix(".safetensors")]
    logs = [run / name for name in ("result.json", "metrics.csv", "training.csv", "config.yaml")]
    return {
        "settings": ([settings], lambda: load_config(settings)),
        "sweep": ([sweep], lambda: plan(load_sweep(sweep), folder)),
        "checkpoint, evaluated": (pair, lambda: read_run(RunFolder.open(run))),
        "checkpoint, resumed": (pair, resume),
        "exported policy": ([policy], lambda: read_policy(policy)),
        "state dict": ([state], bring_in),
        "report": (logs, lambda: page.write(run)),
    }


def published(agent: Agent) -> dict[str, torch.Tensor]:
    """A state dict as the published code saves it, with this agent's sizes."""
    width, inputs = agent.trunks[0].weight.shape[-2:]
    sizes = {f"{name}.layers.0": (width, inputs) for name in reference.EXPERTS}
    sizes |= {f"{name}.layers.1": (width, width) for name in reference.EXPERTS}
    sizes |= {reference.HEAD: (agent.n_actions, width)}
    state = {f"{name}.weight": torch.ones(size) for name, size in sizes.items()}
    state |= {f"{name}.bias": torch.ones(size[0]) for name, size in sizes.items()}
    return state | {reference.FIXED_GATE: torch.zeros(1)}


def fuzz_kind(kind: str, files: int, seed: int, folder: Path) -> tuple[Counter[str], float, float]:
    """Read damaged files of one kind; all must be read, or refused in one line.

    Returns:
        How many of each, the slowest in seconds, and MB that memory grew.
    """
    targets, read = readers(folder)[kind]
    good = {target: target.read_bytes() for target in targets}
    draw, counts, slowest, before = random.Random(seed), Counter[str](), 0.0, 0.0
    for number in range(files):
        target = draw.choice(targets)
        bad = damaged(draw, good[target])
        target.write_bytes(bad)
        begun = time.perf_counter()
        try:
            read()
            counts["read"] += 1
        except UserError as error:
            counts["refused" if "\n" not in str(error) else "refused at length"] += 1
        except BaseException as error:
            keep = Path(tempfile.mkdtemp()) / target.name
            keep.write_bytes(bad)
            raise AssertionError(f"{kind}: {keep} is not refused in one line") from error
        slowest = max(slowest, time.perf_counter() - begun)
        target.write_bytes(good[target])
        if number == files // 4:
            before = memory()
    assert "refused at length" not in counts, f"{kind}: some are refused in more than a line"
    return counts, slowest, memory() - before


def fuzz_forged(files: int, seed: int, folder: Path, method: str) -> Counter[str]:
    """Go on from checkpoints whose numbers were changed and whose checksums were set right."""
    own = {"updates": 2, "worlds": 16, "steps": 4, "gate_replay": 8}
    settings = {"agent": {"hidden": 4}, "world": {"rows": 2, "cols": 2}, "reinforce": own}
    settings |= {"method": method, "oversight": 1.0, "device": "cpu"}
    learner = GridRuns([Config.model_validate(settings)]).learner
    learner.update()
    good = {name: tensor.clone() for name, tensor in learner.state(0).items()}
    draw, counts = random.Random(seed), Counter[str]()
    facts = {"env_steps": 0, "wall_seconds": 0.0}
    for _ in range(files):
        forged = {name: tensor.clone() for name, tensor in good.items()}
        integers = [name for name, tensor in good.items() if not tensor.is_floating_point()]
        for name in draw.sample(draw.choice([integers, list(good)]), draw.randint(1, 3)):
            flat = forged[name].view(-1)
            if len(flat):
                value = draw.choice(NUMBERS)
                if not flat.is_floating_point():
                    value = int(value) if abs(value) < 2**63 else 0
                    info = torch.iinfo(flat.dtype) if flat.dtype != torch.bool else None
                    value = max(info.min, min(info.max, value)) if info else value % 2
                flat[draw.randrange(len(flat))] = value
        target = folder / "forged"
        shutil.rmtree(target, ignore_errors=True)
        checkpoint.save(target, 1, forged, facts)
        try:
            learner.load([checkpoint.load(target, 1, good)[0]], 1)
            learner.update()
            counts["gone on with"] += 1
        except UserError:
            counts["refused"] += 1
    return counts


def memory(process: int | str = "self") -> float:
    """Resident memory of a process in MB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def fuzz(files: int = 20_000, seed: int = 0) -> None:
    """Damage files of every kind in thousands of ways; none may do more than be refused.

    Args:
        files: How many of each kind (a tenth of it of reports, which take longer).
        seed: Of the damage.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        kinds = list(readers(Path(folder)))
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            share = files // 10 if kind == "report" else files
            counts, slowest, grown = fuzz_kind(kind, share, seed, Path(folder))
        print(
            f"{kind}: {dict(counts)}, slowest {slowest:.2f} s, memory {grown:+.0f} MB", flush=True
        )
    for method in FORGED:
        with tempfile.TemporaryDirectory() as folder:
            counts = fuzz_forged(files // 10, seed, Path(folder), method)
        print(f"forged checkpoints of {method}: {dict(counts)}", flush=True)


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


def long(minutes: float = 60.0, pictures: bool = False) -> None:
    """Train small networks for a while; memory and open files must not grow.

    Args:
        minutes: How long.
        pictures: Whether pictures are drawn, and at every evaluation at that.
    """
    torch.set_num_threads(1)
    small = ["--agent.hidden", "16", "--reinforce.worlds", "32", "--reinforce.steps", "8"]
    small += ["--reinforce.updates", str(2**31), "--evaluation.every", "50", "--device", "cpu"]
    small += [] if pictures else ["--no-pictures"]
    loop.PICTURES = 2**31  # evaluations with pictures
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        child = in_child(lambda: train([*small, "--run-dir", str(run)]))
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
        child = in_child(lambda: main(args))
        looks = observe(child, 24 * 3600, 1.0)
        done = len(list(out.rglob("result.json")))
        assert done == runs, f"{done} of {runs} runs are finished; see them with SOAK_DEBUG=1"
        print(f"a sweep of {runs} runs, its driver: {told(looks)}")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {"kill": kill, "fuzz": fuzz, "long": long, "sweep": many}, description=__doc__
    )
