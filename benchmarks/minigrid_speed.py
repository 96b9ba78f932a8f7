"""How fast the MiniGrid worlds step: `python benchmarks/minigrid_speed.py [--quick] [--json FILE]`.

They take random actions: one real one, SB3's DummyVecEnv of them, our batch. All take turns, so
that a busy machine slows them alike; every figure is the median of the turns. How fast PPO trains
on them is measured by `peers.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from turns import Work, rate

from oversight_rl.envs.minigrid import SymbolicObservation
from oversight_rl.envs.vector import make_vec

WORLDS = {
    "8x8": "MiniGrid-DiamondGhost-8x8-v0",
    "four_rooms": "MiniGrid-DiamondGhost-FourRooms-v0",
}
DUMMIES = 8  # worlds in the DummyVecEnv, SB3's usual number
BATCHES = (64, 256, 1024)


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


def dummy(env_id: str) -> VecEnv:
    """Someone's own environments: real ones, one after another."""
    return DummyVecEnv([lambda: Monitor(SymbolicObservation(gym.make(env_id)))] * DUMMIES)


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
        found[f"steps_per_second_single_{world}"] = single(env_id)
        found[f"steps_per_second_dummy_{world}"] = vector(dummy(env_id))
        for count in BATCHES:
            batch = vector(make_vec(env_id, count))
            found[f"steps_per_second_batch_{count}_{world}"] = batch
    return found


def show(title: str, values: Mapping[str, Sequence[float]], file: Path | None) -> None:
    """Print medians and quartiles, and write them to a file as one flat object."""
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("figure", overflow="fold")
    for heading in ("median", "quartiles"):
        table.add_column(heading, justify="right")
    figures = {}
    for name, found in values.items():
        # between a number and forever there is none
        method: Any = "linear" if np.isfinite(found).all() else "inverted_cdf"
        low, middle, high = np.percentile(found, [25, 50, 75], method=method).tolist()
        table.add_row(name, f"{middle:,.4g}", f"{low:,.4g} to {high:,.4g}" if low != high else "")
        figures |= {name: middle, f"{name}_q25": low, f"{name}_q75": high}
    Console().print(table)
    if file is not None:
        file.write_text(json.dumps(figures, indent=1) + "\n")


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
        plain = np.array(rates[f"steps_per_second_dummy_{world}"])
        for count in BATCHES:
            batch = np.array(rates[f"steps_per_second_batch_{count}_{world}"])
            rates[f"batch_{count}_over_dummy_{world}"] = (batch / plain).tolist()
    show("MiniGrid diamond/ghost, one process", rates, arguments.json)


if __name__ == "__main__":
    main()
