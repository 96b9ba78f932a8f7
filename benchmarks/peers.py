"""How fast PPO trains in an 8x8 room: ours next to SB3's, and to rejax's on navix (JAX).

    make peers                               # installs the peers into .venv-peers, and runs it
    python benchmarks/peers.py [--quick] [--only NAME...] [--cores 1 2] [--json FILE]
    python benchmarks/peers.py --shell       # a million steps as commands, besides
    python benchmarks/peers.py --time-to 0.8 # until the deployed policy's return is that, besides

Every subject is a process of its own, on one core and on two; they take turns, so that a busy
machine slows them alike, and ratios are of the same turn. Compiling and warming up are not part of
a turn. Settings are equal: 128 worlds x 32 steps, two passes in minibatches of 2,048, hidden layers
of 64 and 64. On a DummyVecEnv of 8 worlds, SB3's PPO (`sb3`) and ours (`dummy_naive`) have SB3's
ten passes in minibatches of 64, or, where the name ends with `large`, the settings above. What only
steps these worlds is `dummy_worlds`: nothing that learns in them can be faster.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from minigrid_speed import WORLDS, show
from peers_torch import SUBJECTS
from rich.progress import track
from speed import config, seconds_until
from turns import Subject, cores_at_hand

from oversight_rl.agents.threads import on_threads
from oversight_rl.experiments.oversight.environments import PPORuns

HERE = Path(__file__).resolve().parent
PEERS = ("rejax", "rejax_full_view")
NAMES = (*PEERS, *SUBJECTS)
RATIOS = (
    *product(("naive", "routing", "imputed_routing"), (*PEERS, "sb3")),
    *product(("dummy_naive", "dummy_worlds"), ("sb3",)),
    *product(("dummy_naive_large", "dummy_worlds"), ("sb3_large",)),
)
MILLION = 245  # updates of 128 worlds x 32 steps

Values = dict[str, list[float]]


@dataclass(frozen=True)
class Arguments:
    """Measure how fast PPO trains, next to its peers."""

    only: tuple[Literal[NAMES], ...] = NAMES
    """What to measure."""
    cores: tuple[Literal[1, 2], ...] = (1, 2)
    """Cores, and threads, of each."""
    shell: bool = False
    """Time a million steps as commands, too: starting, compiling and evaluating included."""
    time_to: float | None = None
    """Time imputed_routing until the return of its deployed policy passes this, too."""
    quick: bool = False
    """Fewer and shorter turns."""
    json: Path | None = None
    """File to write the figures to, as one flat object."""
    python: Path = HERE.parent / ".venv-peers/bin/python"
    """An interpreter that has jax, rejax and navix."""


def why_no_peers(python: Path) -> str | None:
    """Why the peers cannot be run, in a few words."""
    if not python.exists():
        return f"there is no {python}"
    found = subprocess.run(
        [python, "-c", "import rejax, navix"], capture_output=True, text=True, check=False
    )
    return found.stderr.strip().rpartition("\n")[2] or "it fails" if found.returncode else None


def command(name: str, python: Path) -> list[str]:
    """What runs a subject."""
    if name in PEERS:
        return [str(python), str(HERE / "peers_rejax.py"), name]
    return [sys.executable, str(HERE / "peers_torch.py"), name]


def in_turns(names: Sequence[str], cores: int, arguments: Arguments) -> Values:
    """Rates of training, what was known before it, and ratios; names end with the cores."""
    turns, seconds = (3, 0.3) if arguments.quick else (15, 1.0)
    values: Values = {}
    rates: Values = {name: [] for name in names}
    with ExitStack() as stack:
        subjects = {}
        for name in track(names, f"starting, {cores} core", transient=True):
            subjects[name] = stack.enter_context(
                closing(Subject(command(name, arguments.python), cores))
            )
            for fact, value in subjects[name].facts.items():
                values[f"{fact}_{name}"] = [value]
        for turn in track(range(1 + turns), f"measuring, {cores} core", transient=True):
            for name, subject in subjects.items():
                rate = subject.rate(seconds)
                if turn:  # the first warms up
                    rates[name].append(rate)
    values |= {f"steps_per_second_{name}": found for name, found in rates.items()}
    for one, other in RATIOS:
        if one in rates and other in rates:
            ratio = np.array(rates[one]) / np.array(rates[other])
            values[f"{one}_over_{other}"] = ratio.tolist()
    return {f"{name}_{cores}core": found for name, found in values.items()}


def from_the_shell(arguments: Arguments, peers: Sequence[str]) -> Values:
    """Wall seconds of commands that train for a million steps."""
    values: Values = {f"shell_seconds_{name}": [] for name in (*peers, "routing")}
    for _ in track(range(1 if arguments.quick else 3), "a million steps", transient=True):
        for name in (*peers, "routing"):
            with tempfile.TemporaryDirectory() as folder:
                run = [*command(name, arguments.python), str(MILLION * 128 * 32)]
                if name == "routing":
                    train = f"--env {WORLDS['8x8']} --algo ppo --method routing".split()
                    run = [sys.executable, str(HERE.parent / "train.py"), *train]
                    run += ["--ppo.updates", str(MILLION), "--run-dir", f"{folder}/run"]
                start = time.perf_counter()
                subprocess.run(run, stdout=subprocess.DEVNULL, check=True)
                values[f"shell_seconds_{name}"].append(time.perf_counter() - start)
    return values


def time_to(goal: float, seeds: int) -> Values:
    """Seconds that imputed_routing trains until its deployed policy is that good, by configs/."""
    found = []
    for seed in track(range(seeds), f"until {goal:g}", transient=True):
        chosen = config("minigrid", "imputed_routing", torch.device("cpu")).single(seed)
        with on_threads(chosen.threads), closing(PPORuns([chosen])) as runs:
            found.append(seconds_until(runs, goal))
    trained, whole = zip(*found, strict=True)
    return {f"seconds_to_{goal:g}": trained, f"seconds_to_{goal:g}_with_evaluation": whole}


def main() -> None:
    arguments = tyro.cli(Arguments)
    names = arguments.only
    if set(names) & set(PEERS) and (why := why_no_peers(arguments.python)):
        print(f"rejax is left out: {why}; `make peers` installs it")
        names = tuple(name for name in names if name not in PEERS)
    values: Values = {}
    for cores in arguments.cores:
        if cores > len(cores_at_hand()):
            print(f"{cores} cores are left out: there is one")
        else:
            values |= in_turns(names, cores, arguments)
    if arguments.shell:
        values |= from_the_shell(arguments, [name for name in PEERS if name in names])
    if arguments.time_to is not None:
        values |= time_to(arguments.time_to, 2 if arguments.quick else 5)
    show("PPO in an 8x8 room", values, arguments.json)


if __name__ == "__main__":
    main()
