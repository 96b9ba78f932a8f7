"""How fast the MiniGrid worlds step: one real one, SB3's DummyVecEnv of them, our batch.

`python benchmarks/minigrid_speed.py [--quick] [--json FILE]`. All subjects take random actions in
turns, so that a busy machine slows them alike; every figure is the median of the turns.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from envs.minigrid import SymbolicObservation
from envs.vector import make_vec

WORLDS = {
    "8x8": "MiniGrid-DiamondGhost-8x8-v0",
    "four_rooms": "MiniGrid-DiamondGhost-FourRooms-v0",
}
DUMMIES = 8  # worlds in the DummyVecEnv, SB3's usual number
BATCHES = (64, 256, 1024)

Work = Callable[[], int]  # does a little and returns the number of steps that it took


@dataclass(frozen=True)
class Arguments:
    """Measure how fast the MiniGrid worlds step, in steps per second."""

    json: Path | None = None
    """File to write the figures to, as one flat object."""
    quick: bool = False
    """Fewer and shorter turns: under half a minute."""


def single(env_id: str) -> Work:
    env = gym.make(env_id)
    env.reset(seed=0)
    actions = np.random.default_rng(0).integers(3, size=100)

    def work() -> int:
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
        return len(actions)

    return work


def vector(env: VecEnv) -> Work:
    env.seed(0)
    env.reset()
    actions = np.random.default_rng(0).integers(3, size=(10, env.num_envs))

    def work() -> int:
        for action in actions:
            env.step(action)
        return actions.size

    return work


def subjects() -> dict[str, Work]:
    """What is measured, by name."""
    found: dict[str, Work] = {}
    for world, env_id in WORLDS.items():

        def one(env_id: str = env_id) -> gym.Env:
            return Monitor(SymbolicObservation(gym.make(env_id)))

        found[f"steps_per_second_single_{world}"] = single(env_id)
        found[f"steps_per_second_dummy_{world}"] = vector(DummyVecEnv([one] * DUMMIES))
        for count in BATCHES:
            batch = vector(make_vec(env_id, count))
            found[f"steps_per_second_batch_{count}_{world}"] = batch
    return found


def rate(work: Work, seconds: float) -> float:
    """Steps per second over at least so long."""
    steps, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        steps += work()
    return steps / elapsed


def main() -> None:
    arguments = tyro.cli(Arguments)
    turns, seconds = (5, 0.2) if arguments.quick else (15, 0.5)
    measured = subjects()
    rates: dict[str, list[float]] = {name: [] for name in measured}
    for turn in track(range(1 + turns), "measuring", transient=True):
        for name, work in measured.items():
            value = rate(work, seconds)
            if turn:  # the first warms up
                rates[name].append(value)
    for world in WORLDS:
        dummy = np.array(rates[f"steps_per_second_dummy_{world}"])
        for count in BATCHES:
            batch = np.array(rates[f"steps_per_second_batch_{count}_{world}"])
            rates[f"batch_{count}_over_dummy_{world}"] = (batch / dummy).tolist()

    table = Table(title="MiniGrid diamond/ghost, one process", box=box.SIMPLE_HEAD)
    for heading in ("figure", "median", "quartiles"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for name, values in rates.items():
        low, middle, high = np.percentile(values, [25, 50, 75])
        table.add_row(name, f"{middle:,.0f}", f"{low:,.0f} to {high:,.0f}")
    Console().print(table)
    if arguments.json is not None:
        figures = {name: float(np.median(values)) for name, values in rates.items()}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
