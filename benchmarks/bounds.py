"""What bounds an update from below: its matrix products, and a call for each operation.

    python benchmarks/bounds.py [--only NAME...] [--json FILE]

All operations of one update are recorded as torch dispatches them, and played back with nothing in
between: first the matrix products alone, then all. Products are arithmetic, which nothing saves.
Each other operation takes as long as one on a single number does, at least; the sum of both is what
so many operations cannot get below, unless a kernel of one's own, or a compiler, makes fewer of
them. What all of them take lies above that by the memory that they move, and the update above them
by what Python, NumPy and autograd do in between. One thread; take an idle machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from minigrid_speed import show
from peers_torch import SUBJECTS
from speed import PAPER_GFLOP, config
from torch.utils._python_dispatch import TorchDispatchMode

from oversight_rl.agents.threads import on_threads
from oversight_rl.experiments.oversight.grid import GridRuns

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addmm_", "baddbmm_"}
REPEATS = 7  # of which the fastest counts
Update = Callable[[], object]


def reinforce(preset: str, method: str) -> Update:
    return GridRuns([config(preset, method, torch.device("cpu"))]).learner.update


def ppo(method: str) -> Update:
    return SUBJECTS[method]()  # five updates


UPDATES: dict[str, Callable[[], Update]] = {
    **{f"paper_{method}": lambda m=method: reinforce("paper", m) for method in PAPER_GFLOP},
    "default": lambda: reinforce("default", "routing"),
    "ppo_naive": lambda: ppo("naive"),
    "ppo_routing": lambda: ppo("routing"),
}


@dataclass(frozen=True)
class Arguments:
    """Measure what bounds an update from below."""

    only: tuple[Literal[tuple(UPDATES)], ...] = tuple(UPDATES)
    """What to measure."""
    json: Path | None = None
    """File to write the figures to."""


@dataclass(frozen=True)
class Bounds:
    """Of an update, in milliseconds; and of how many operations it is."""

    update: float
    operations: float  # all of them, and nothing between
    products: float
    least: float  # products, and for all others a call each
    count: int


class Recorder(TorchDispatchMode):
    """Keeps every operation, with what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def fastest(work: Callable[[], object]) -> float:
    """Seconds."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.no_grad()
def play(calls: list[tuple[Any, Any, Any]]) -> None:
    for func, args, kwargs in calls:
        func(*args, **kwargs)


def bounds(update: Update, each: int) -> Bounds:
    """Of work that is so many updates."""
    for _ in range(3):
        update()
    took = fastest(update)
    with Recorder() as recorder:
        update()
    # a generator's numbers are drawn anew, and a number that Python asked for is not asked for
    calls = [c for c in recorder.calls if c[0].overloadpacket.__name__ != "_local_scalar_dense"]
    products = [c for c in calls if c[0].overloadpacket.__name__ in PRODUCTS]
    one = torch.zeros(1)
    call = fastest(lambda: play([(torch.ops.aten.add_.Tensor, (one, one), {})] * 10_000)) / 10_000
    arithmetic = fastest(lambda: play(products))
    least = arithmetic + (len(calls) - len(products)) * call
    found = took, fastest(lambda: play(calls)), arithmetic, least
    return Bounds(*(1000 * seconds / each for seconds in found), count=len(calls) // each)


def main(arguments: Arguments) -> None:
    found = {}
    with on_threads(1):
        for name in arguments.only:
            measured = bounds(UPDATES[name](), 5 if name.startswith("ppo") else 1)
            found |= {f"{name}, {what}": [value] for what, value in vars(measured).items()}
    show("milliseconds of an update", found, arguments.json)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
