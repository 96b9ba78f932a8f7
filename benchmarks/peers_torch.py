"""RoutedPPO and SB3's PPO, as subjects of `peers.py`: `python benchmarks/peers_torch.py NAME`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial

import torch
from minigrid_speed import WORLDS, dummy, vector
from stable_baselines3 import PPO
from turns import Work, serve

from oversight_rl.agents import RoutedPPO

WORLD = WORLDS["8x8"]
NETWORKS = {"net_arch": [64, 64]}
LARGE = {"n_steps": 512, "n_epochs": 2, "batch_size": 2048}  # on 8 worlds
SMALL = {"n_steps": 256, "n_epochs": 10, "batch_size": 64}  # SB3's defaults, but for n_steps


def routed_on_batch(method: str) -> Work:
    model = RoutedPPO(
        "MoEPolicy", WORLD, method=method, oversight=0.1, n_envs=128, n_steps=32, n_epochs=2,
        batch_size=2048, threads=None, policy_kwargs=NETWORKS,
    )  # fmt: skip
    return learning(model, 5)


def routed_on_dummy(settings: dict[str, int]) -> Work:
    model = RoutedPPO(
        "MoEPolicy", dummy(WORLD), method="naive", threads=None, policy_kwargs=NETWORKS, **settings
    )
    return learning(model)


def sb3(settings: dict[str, int]) -> Work:
    return learning(PPO("MlpPolicy", dummy(WORLD), device="cpu", **settings))


def learning(model: PPO, updates: int = 1) -> Work:
    """Training, so many updates a call."""

    def work() -> int:
        steps = updates * model.n_steps * model.n_envs
        model.learn(steps, reset_num_timesteps=False)
        return steps

    return work


SUBJECTS: dict[str, Callable[[], Work]] = {
    "naive": partial(routed_on_batch, "naive"),
    "routing": partial(routed_on_batch, "routing"),
    "imputed_routing": partial(routed_on_batch, "imputed_routing"),
    "sb3": partial(sb3, SMALL),
    "dummy_naive": partial(routed_on_dummy, SMALL),
    "sb3_large": partial(sb3, LARGE),
    "dummy_naive_large": partial(routed_on_dummy, LARGE),
    "dummy_worlds": lambda: vector(dummy(WORLD)),
}


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    serve(SUBJECTS[sys.argv[1]]())
