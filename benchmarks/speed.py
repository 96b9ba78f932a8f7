"""How fast the program is, as ratios measured in one run.

`python benchmarks/speed.py [--quick] [--device cuda] [--json FILE]`; `make bench` runs it whole.
Every figure is the median of several measurements, with the spread between the quartiles.

The *dense floor* of an update is the time that its floating-point operations would take as one
large matrix product: those of the plain dense computation at paper size (512 worlds x 32 steps;
rollout forward of the policy, training forward and backward of policy and value net as published,
without gradients of the input).
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from oversight_rl.agents.reinforce.collect import collect
from oversight_rl.agents.reinforce.losses import label, loss
from oversight_rl.agents.steering import KEPT, parse, standard
from oversight_rl.envs.settings import ACTIONS, WorldConfig
from oversight_rl.envs.world import World
from oversight_rl.experiments.oversight.config import Config
from oversight_rl.experiments.oversight.grid import GridRuns
from oversight_rl.experiments.oversight.runs import OversightRuns
from oversight_rl.kinds import load_config
from oversight_rl.runs.rows import Facts

CONFIGS = Path(__file__).parent.parent / "configs"
PAPER_GFLOP = {"routing": 44.6, "naive": 22.2}  # of one dense update at paper size
QUALITY = 0.56  # exact return steered to diamond at 10% oversight, where the published agent ends


@dataclass(frozen=True)
class Arguments:
    """Measure how fast the program is."""

    json: Path | None = None
    """File to write the figures to, as one flat object."""
    quick: bool = False
    """Fewer and smaller measurements: under a minute."""
    device: str = "cpu"
    """Where to measure: cpu or cuda."""
    stacks: tuple[int, ...] = (1, 4, 16)
    """Sizes of stacks to measure, in runs."""


class Bench:
    """Measurements on one device, collected as a flat object."""

    def __init__(self, arguments: Arguments) -> None:
        self.quick = arguments.quick
        self.device = torch.device(arguments.device)
        self.figures: dict[str, float] = {}
        self.spreads: dict[str, tuple[float, float]] = {}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, f: Callable[[], object], repeats: int, warm: int = 1) -> np.ndarray:
        """Durations of `f`, after warming up."""
        times = []
        for i in range(warm + repeats):
            start = time.perf_counter()
            f()
            self.wait()
            if i >= warm:
                times.append(time.perf_counter() - start)
        return np.array(times)

    def record(self, name: str, values: np.ndarray) -> float:
        """Keep the median of `values`, and the quartiles for the table."""
        low, middle, high = np.percentile(values, [25, 50, 75])
        self.figures[name], self.spreads[name] = float(middle), (float(low), float(high))
        return float(middle)


def config(preset: str, method: str, device: torch.device, **changes: int) -> Config:
    base = load_config(CONFIGS / f"{preset}.yaml")
    changed = base.reinforce.model_copy(update=changes)
    return base.model_copy(
        update={"method": method, "device": device.type, "reinforce": changed, "pictures": False}
    )


def facts(chosen: Config) -> Facts:
    return Facts(chosen.method, chosen.seeds[0], chosen.oversight)


def gemm(bench: Bench) -> None:
    """The machine's f32 rate on 16384x256 by 256x256, GFLOP/s."""
    x = torch.randn(16384, 256, device=bench.device)
    w = torch.randn(256, 256, device=bench.device)
    times = bench.seconds(lambda: x @ w, 10 if bench.quick else 40, warm=5)
    bench.record("gemm_gflops", 2 * x.shape[0] * 256 * 256 / times / 1e9)


def updates(bench: Bench) -> None:
    """Whole updates at paper size, next to the dense floor; and where the time goes."""
    for method, gflop in PAPER_GFLOP.items():
        trainer = GridRuns([config("paper", method, bench.device)]).learner
        times = bench.seconds(trainer.update, 5 if bench.quick else 15, warm=2)
        bench.record(f"update_seconds_{method}", times)
        floor = gflop / bench.figures["gemm_gflops"]
        bench.record(f"update_over_floor_{method}", times / floor)
    shares(bench, config("paper", "routing", bench.device), "paper")
    shares(bench, config("default", "routing", bench.device), "default")


def shares(bench: Bench, chosen: Config, name: str) -> None:
    """Seconds per update of its parts."""
    runs = GridRuns([chosen])
    trainer, learner = runs.learner, chosen.reinforce
    world = trainer.world
    clock = {"collect": 0.0, "loss": 0.0, "backward": 0.0, "optimizer": 0.0}
    for _ in range(50 if name == "default" else 0):
        trainer.update()  # past the long first episodes
    repeats = 3 if bench.quick else 10

    def timed(part: str, f: Callable[..., Any], *arguments: object) -> Any:
        start = time.perf_counter()
        result = f(*arguments)
        bench.wait()
        clock[part] += (time.perf_counter() - start) / repeats
        return result

    agent, methods = trainer.agent, trainer.methods
    for _ in range(repeats):
        draw = trainer._draw(learner.steps)
        rollout, trainer.worlds = timed("collect", collect, agent, world, trainer.worlds, draw)
        targets = timed("loss", label, rollout, methods, learner, 0.0, None, trainer.gate_memory)
        losses = timed("loss", loss, agent, rollout, targets, None, trainer.gate_memory)
        trainer.optimizer.zero_grad()
        timed("backward", losses.total(learner, 0.5).sum().backward)
        timed("optimizer", trainer.optimizer.step, learner.learning_rate[0])
    stepping = world_seconds(bench, learner.worlds, learner.steps)
    clock = {"world": stepping, "rollout_policy": clock.pop("collect") - stepping, **clock}
    whole = sum(clock.values())
    for part, seconds in clock.items():
        bench.record(f"share_{part}_{name}", np.array([seconds / whole]))
    policies, levels = standard(trainer.agent.n_experts), [[chosen.oversight]]
    times = bench.seconds(
        lambda: runs.judge.tables(trainer.agent, [facts(chosen)], policies, levels),
        3 if bench.quick else 10,
    )
    bench.record("evaluation_seconds" + ("_paper" if name == "paper" else ""), times)
    trainer.update()
    logging = bench.seconds(trainer.curves, 5)
    bench.record(f"curves_over_update_{name}", logging / whole)


def world_seconds(bench: Bench, worlds: int, steps: int) -> float:
    """Median seconds of `steps` steps of `worlds` worlds, resets and random numbers included."""
    world = World(WorldConfig(), 0.1, bench.device)
    action = torch.randint(len(ACTIONS), (steps, worlds), device=bench.device)
    state = world.reset(torch.rand(worlds, world.noise_channels, device=bench.device))

    def run() -> None:
        nonlocal state
        fresh = world.reset(torch.rand(steps, worlds, world.noise_channels, device=bench.device))
        for t in range(steps):
            state, _ = world.step(state, action[t], fresh[t])

    return float(np.median(bench.seconds(run, 5 if bench.quick else 15, warm=2)))


def worlds(bench: Bench) -> None:
    for count in (512, 4096, 65536):
        rate = 32 * count / world_seconds(bench, count, 32)
        bench.record(f"world_steps_per_second_{count}", np.array([rate]))


def stacks(bench: Bench, sizes: tuple[int, ...]) -> None:
    """Cost of a stack of R runs over R times the cost of one."""
    shapes = {"": {"worlds": 128, "steps": 32}, "_paper": {"worlds": 512, "steps": 32}}
    for suffix, shape in shapes.items():
        if bench.quick and suffix and bench.device.type == "cpu":
            continue
        preset = "paper" if suffix else "default"
        alone = None
        for runs in sizes:
            base = config(preset, "routing", bench.device, **shape)
            trainer = GridRuns([base.single(seed) for seed in range(runs)]).learner
            few = 2 if suffix and runs > 4 else 4 if bench.quick else 8
            times = bench.seconds(trainer.update, few, warm=1)
            alone = float(np.median(times)) if alone is None else alone
            bench.record(f"stack_cost_ratio_{runs}{suffix}", times / (runs * alone))
            steps = runs * shape["worlds"] * shape["steps"]
            bench.record(f"stack_steps_per_second_{runs}{suffix}", steps / times)


def seconds_until(
    runs: OversightRuns, goal: float, wait: Callable[[], object] = lambda: None
) -> tuple[float, float]:
    """Seconds of training until the deployed policy's return passes a goal; and of all, if it does.

    The return is looked at every five updates. Training that never gets there takes forever.
    """
    (chosen,), learner = runs.configs, runs.learner
    experts, behaviors = runs.names(runs.agent)
    policy = [parse(KEPT, experts, behaviors)]
    start, training = time.perf_counter(), 0.0
    while learner.updates < learner.total:
        before = time.perf_counter()
        for _ in range(5):
            learner.update()
        wait()
        training += time.perf_counter() - before
        table = runs.judge.tables(runs.agent, [facts(chosen)], policy, [[chosen.oversight]])[0]
        if table[0].figures[runs.score] > goal:
            return training, time.perf_counter() - start
    return math.inf, math.inf


def time_to_quality(bench: Bench) -> None:
    """Training seconds of the default until the steered return passes QUALITY."""
    default = config("default", "routing", bench.device)
    seeds = range(2 if bench.quick else 5)
    found = [seconds_until(GridRuns([default.single(s)]), QUALITY, bench.wait) for s in seeds]
    trained, whole = map(np.array, zip(*found, strict=True))
    bench.record("time_to_quality_seconds", trained)
    bench.record("time_to_quality_seconds_with_evaluation", whole)


def main() -> None:
    arguments = tyro.cli(Arguments)
    bench = Bench(arguments)
    parts: list[Callable[[], object]] = [
        lambda: gemm(bench),
        lambda: updates(bench),
        lambda: worlds(bench),
        lambda: stacks(bench, arguments.stacks),
        lambda: time_to_quality(bench),
    ]
    for part in track(parts, "measuring", transient=True):
        part()
    if bench.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    bench.record("peak_memory_mib", np.array([peak]))

    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    table = Table(title=f"{name}, {torch.get_num_threads()} threads", box=box.SIMPLE_HEAD)
    for heading in ("figure", "median", "quartiles"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for figure, value in bench.figures.items():
        low, high = bench.spreads[figure]
        spread = f"{low:,.4g} to {high:,.4g}" if low != high else ""
        table.add_row(figure, f"{value:,.4g}", spread)
    Console().print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(bench.figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
