"""How fast the MiniGrid worlds step, and PPO trains on them: SB3's ways next to ours.

`python benchmarks/minigrid_speed.py [--quick] [--json FILE]`. The worlds take random actions: one
real one, SB3's DummyVecEnv of them, our batch. PPO trains: SB3's own with its defaults, and with
the settings of ours, on a DummyVecEnv of 8; and RoutedPPO (two experts, gate, value net) on the
batch. All take turns, so that a busy machine slows them alike; every figure is the median of the
turns.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from stable_baselines3 import PPO
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from oversight_rl.agents import RoutedPPO
from oversight_rl.envs.minigrid import SymbolicObservation
from oversight_rl.envs.vector import make_vec

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


def learning() -> dict[str, Work]:
    """PPO, one update a turn."""

    def one() -> gym.Env:
        return Monitor(SymbolicObservation(gym.make(WORLDS["8x8"])))

    def dummy() -> VecEnv:
        return DummyVecEnv([one] * DUMMIES)

    routed = RoutedPPO("MoEPolicy", WORLDS["8x8"], oversight=0.1)
    ours = {"batch_size": routed.batch_size, "n_epochs": routed.n_epochs}
    models = {
        "sb3_ppo": PPO("MlpPolicy", dummy(), n_steps=256, device="cpu"),
        "sb3_ppo_our_settings": PPO("MlpPolicy", dummy(), n_steps=512, device="cpu", **ours),
        "routed_ppo": routed,
    }

    def work(model: PPO) -> int:
        steps = model.n_steps * model.n_envs
        model.learn(steps, reset_num_timesteps=False)
        return steps

    return {f"steps_per_second_{k}_8x8": partial(work, model) for k, model in models.items()}


def rate(work: Work, seconds: float) -> float:
    """Steps per second over at least so long."""
    steps, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        steps += work()
    return steps / elapsed


def main() -> None:
    arguments = tyro.cli(Arguments)
    turns, seconds = (5, 0.2) if arguments.quick else (15, 0.5)
    measured = subjects() | learning()
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

    routed = np.array(rates["steps_per_second_routed_ppo_8x8"])
    for name in ("sb3_ppo", "sb3_ppo_our_settings"):
        theirs = np.array(rates[f"steps_per_second_{name}_8x8"])
        rates[f"routed_ppo_over_{name}"] = (routed / theirs).tolist()

    table = Table(title="MiniGrid diamond/ghost, one process", box=box.SIMPLE_HEAD)
    for heading in ("figure", "median", "quartiles"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for name, values in rates.items():
        low, middle, high = np.percentile(values, [25, 50, 75])
        table.add_row(name, f"{middle:,.4g}", f"{low:,.4g} to {high:,.4g}")
    Console().print(table)
    if arguments.json is not None:
        figures = {name: float(np.median(values)) for name, values in rates.items()}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
