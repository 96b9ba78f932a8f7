"""Deployment: one agent under a steering, callable on raw observations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oversight_rl.agents.networks import Agent
from oversight_rl.agents.reinforce import cumulative, sample
from oversight_rl.agents.steering import MIXTURE, Steering, parse


class SteeredPolicy:
    """One agent under a steering, callable on raw observations.

    Args:
        agent: a stack of one run.
        steering: may be replaced at any time (`policy.steering = ...`), between episodes say.
    """

    def __init__(self, agent: Agent, steering: Steering = MIXTURE) -> None:
        if agent.head.weight.shape[0] != 1:
            raise ValueError("a policy needs one run; take it out of the stack first")
        self.agent = agent
        self.steering = steering

    def steer(self, text: str) -> SteeredPolicy:
        """Change the steering to what `text` says (see `parse`); returns itself."""
        self.steering = replace(
            parse(text, self.agent.n_experts),
            greedy=self.steering.greedy,
            temperature=self.steering.temperature,
        )
        return self

    @torch.no_grad()
    def __call__(self, observation: Tensor | NDArray[np.float32]) -> Tensor:
        """Action probabilities: observations `[..., 4, rows, cols]` -> `[..., A]`."""
        device = self.agent.head.weight.device
        planes = torch.as_tensor(observation, dtype=torch.float32, device=device)
        flat = planes.flatten(-3)
        output = self.agent(flat.reshape(1, -1, flat.shape[-1]))
        probabilities = self.steering.probabilities(output)
        return probabilities.view(*flat.shape[:-1], probabilities.shape[-1])

    def act(
        self, observation: Tensor | NDArray[np.float32], generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw actions: observations `[..., 4, rows, cols]` -> `[...]` int64."""
        probabilities = self(observation)
        uniform = torch.rand(
            probabilities.shape[:-1], generator=generator, device=probabilities.device
        )
        return sample(cumulative(probabilities), uniform)
