"""Damage files of every kind in thousands of ways: each is read, or refused in one line.

`python benchmarks/soak.py fuzz [--files 20000]`; the runs whose files are damaged have every
optional part on. See docs/reliability.md for what is promised, and the figures of the last time.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import torch

from oversight_rl import cli
from oversight_rl.agents.learner import Learner
from oversight_rl.agents.steering import parse
from oversight_rl.envs.settings import UserError
from oversight_rl.experiments.oversight import policies, reference
from oversight_rl.kinds import load_config
from oversight_rl.playground import page as play
from oversight_rl.reports import page
from oversight_rl.runs import checkpoint
from oversight_rl.runs.experiment import experiment_of
from oversight_rl.runs.folder import CHECKPOINTS, CONFIG, METRICS, RESULT, TRAINING, RunFolder
from oversight_rl.sweeps.plan import load_sweep, plan

ROOT = Path(__file__).resolve().parent.parent
COMMON = ["--device", "cpu", "--no-pictures", "--evaluation.every", "1", "--oversight", "0.9"]
COMMON += ["--evaluation.oversight", "0.1", "--evaluation.episodes", "16", "--agent.hidden", "4"]
COMMON += ["--labels.recall", "0.9", "--labels.error", "0.1", "--agent.experts", "3"]
GRID = ["--world.rows", "2", "--world.cols", "3", "--world.spurious-oversight", "0.2"]
GRID += ["--labels.shares", "0.8", "0.9"]
GRID += ["--reinforce.worlds", "16", "--reinforce.steps", "4", "--reinforce.updates", "2"]
GRID += ["--reinforce.gate-replay", "8", "--agent.value-activation", "none", "--agent.gate-conv"]
GRID += ["--reinforce.reward-model-sees-flags", "--agent.biases", "zero"]
LATE = ["--labels.budget", "1000", "--labels.delay", "3"]
MINIGRID = ["--algo", "ppo", "--env", "MiniGrid-DiamondGhost-5x5-v0", "--ppo.updates", "2"]
MINIGRID += ["--env-settings", "lava", "1", "reward", "ground_truth", "max_steps", "12"]
MINIGRID += ["--ppo.worlds", "4", "--ppo.steps", "8", "--ppo.batch-size", "16"]
MINIGRID += ["--ppo.gate-replay", "8", "--ppo.label-reach", "12"]
RUNS = {  # between them they save all there is to save
    "imputed_routing": [*GRID, "--method", "imputed_routing", *LATE],
    "naive_early_stop": [*GRID, "--method", "naive_early_stop"],
    "ppo": MINIGRID,
}
SLOW = 10  # of a kind that takes long to read, one file is read where of another so many are

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


def trained(name: str, folder: Path) -> Path:
    """Train one of the runs; returns its folder."""
    path = folder / name
    with open(os.devnull, "w") as quiet, redirect_stdout(quiet):
        cli.train([*COMMON, *RUNS[name], "--run-dir", str(path)])
    return path


def learner_of(run: Path) -> Learner:
    """The learner of a run, as it was when the run ended."""
    config = RunFolder.open(run).config()
    learner = experiment_of(config)([config]).learner
    resume(learner, run / CHECKPOINTS, learner.total)
    return learner


def resume(learner: Learner, checkpoints: Path, update: int) -> None:
    """Go on from a checkpoint, as the loop does."""
    tensors, _ = checkpoint.load(checkpoints, update, learner.state(0))
    learner.load([tensors], update)


# ---- by kind: good files to damage, and what reads them

Target = tuple[list[Path], Callable[[], object]]


def settings(folder: Path) -> Target:
    path = trained("ppo", folder) / CONFIG
    return [path], partial(load_config, path)


def sweep(folder: Path) -> Target:
    path = folder / "sweep.yaml"
    path.write_text((ROOT / "configs/compare.yaml").read_text() + "stack: 7\n")
    return [path], lambda: plan(load_sweep(path), folder)


def evaluated(name: str, folder: Path) -> Target:
    run = trained(name, folder)
    return newest(run), lambda: policies.read(run)


def resumed(name: str, folder: Path) -> Target:
    run = trained(name, folder)
    learner = learner_of(run)
    return newest(run), lambda: resume(learner, run / CHECKPOINTS, learner.total)


def newest(run: Path) -> list[Path]:
    """The two files of a run's newest checkpoint."""
    return sorted((run / CHECKPOINTS).iterdir())[-2:]


def exported(name: str, folder: Path) -> Target:
    (saved,) = policies.read(trained(name, folder))
    steering = parse("without:ghost", *saved.kind.names(saved.agent)).with_options(True, 0.5)
    path = folder / "policy.safetensors"
    policies.write_policy(path, steering, saved)
    return [path], lambda: policies.read_policy(path)


def state_dict(folder: Path) -> Target:
    path, imported = folder / "state.pt", folder / "imported"
    torch.save(published(inputs=16, width=4, actions=4), path)

    def bring_in() -> None:
        shutil.rmtree(imported, ignore_errors=True)
        reference.import_state_dict(path, imported, 0.1)

    bring_in()
    return [path], bring_in


def published(inputs: int, width: int, actions: int) -> dict[str, torch.Tensor]:
    """A state dict as the published code saves it."""
    sizes = {f"{name}.layers.0": (width, inputs) for name in reference.EXPERTS}
    sizes |= {f"{name}.layers.1": (width, width) for name in reference.EXPERTS}
    sizes |= {reference.HEAD: (actions, width)}
    state = {f"{name}.weight": torch.ones(size) for name, size in sizes.items()}
    state |= {f"{name}.bias": torch.ones(size[0]) for name, size in sizes.items()}
    return state | {reference.FIXED_GATE: torch.zeros(1)}


def report(folder: Path) -> Target:
    run = trained("imputed_routing", folder)
    return [run / name for name in (RESULT, METRICS, TRAINING, CONFIG)], lambda: page.write(run)


def playground(folder: Path) -> Target:
    path = folder / "watched"
    with open(os.devnull, "w") as quiet, redirect_stdout(quiet):
        few = ["--world.spurious-oversight", "0", "--pictures"]
        cli.train([*COMMON, *GRID, *few, "--run-dir", str(path)])
    run = RunFolder.open(path)
    files = [*sorted(run.snapshots.iterdir()), path / METRICS]
    return files, lambda: play.write([path], path / play.PAGE)


KINDS: dict[str, Callable[[Path], Target]] = {
    "settings": settings,
    "sweep": sweep,
    **{f"checkpoint of {name}, evaluated": partial(evaluated, name) for name in RUNS},
    **{f"checkpoint of {name}, resumed": partial(resumed, name) for name in RUNS},
    **{f"exported {name}": partial(exported, name) for name in ("imputed_routing", "ppo")},
    "state dict": state_dict,
    "report": report,
    "playground": playground,
}


# ---- damage


def fuzz_kind(kind: str, files: int, seed: int, folder: Path) -> tuple[Counter[str], float, float]:
    """Read damaged files of one kind; all must be read, or refused in one line.

    Returns:
        How many of each, the slowest in seconds, and MB that memory grew.
    """
    targets, read = KINDS[kind](folder)
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


def forge(draw: random.Random, good: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of which some numbers were changed."""
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
    return forged


def fuzz_forged(files: int, seed: int, folder: Path, name: str) -> Counter[str]:
    """Go on from checkpoints whose numbers were changed and whose checksums were set right."""
    learner = learner_of(trained(name, folder))
    good = {name: tensor.clone() for name, tensor in learner.state(0).items()}
    draw, counts, update = random.Random(seed), Counter[str](), learner.total
    facts, target = {"env_steps": 0, "wall_seconds": 0.0}, folder / "forged"
    for _ in range(files):
        shutil.rmtree(target, ignore_errors=True)
        checkpoint.save(target, update, forge(draw, good), facts)
        try:
            resume(learner, target, update)
            with np.errstate(all="ignore"):  # of infinite numbers
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
        files: How many of each kind (a tenth of it of what takes longer to read).
        seed: Of the damage.
    """
    torch.set_num_threads(1)
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            share = files // SLOW if kind in ("report", "playground") or "ppo" in kind else files
            counts, slowest, grown = fuzz_kind(kind, share, seed, Path(folder))
        print(
            f"{kind}: {dict(counts)}, slowest {slowest:.2f} s, memory {grown:+.0f} MB", flush=True
        )
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            counts = fuzz_forged(files // SLOW, seed, Path(folder), name)
        print(f"forged checkpoints of {name}: {dict(counts)}", flush=True)
