"""Steering: what to do with a trained agent's experts at deployment.

A steering is a set of mixing weights on the experts, with a temperature: keep one expert, blend
several, ablate one, replace the gate by a constant, or leave the gate in charge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.networks import Agent, Output
from agents.reinforce import cumulative, sample
from envs.settings import UserError, nearest
from envs.world import BEHAVIORS


def expert_names(experts: int) -> tuple[str, ...]:
    """Names of the experts: the behaviors they are meant for, then `expert_2`, ..."""
    if experts == 1:
        return ("single",)
    return tuple(BEHAVIORS[k] if k < len(BEHAVIORS) else f"expert_{k}" for k in range(experts))


@dataclass(frozen=True)
class Steering:
    """How experts become one policy. Build one with `mixture`, `keep`, `blend` or `parse`."""

    name: str
    weights: tuple[float, ...] | None = None
    """Mixing weight of each expert in place of the gate's; None: the gate's own."""
    ablated: tuple[int, ...] = ()
    """Experts whose output is zero."""
    temperature: float = 1.0
    greedy: bool = False
    """Whether the likeliest action is taken always."""

    def probabilities(self, output: Output) -> Tensor:
        """Action probabilities of the steered policy: `[R, B, A]`."""
        weights = output.gate
        if self.weights is not None:
            weights = weights.new_tensor(self.weights).expand_as(weights)
        if self.ablated:
            kept = weights.new_ones(weights.shape[-1])
            kept[list(self.ablated)] = 0.0
            weights = weights * kept
        logits = output.mix(weights)
        if self.greedy:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        return (logits / self.temperature).softmax(-1)

    def with_options(self, greedy: bool = False, temperature: float = 1.0) -> Steering:
        """The same steering, taken greedily or at another temperature.

        Raises:
            UserError: the temperature is not above 0.
        """
        if not temperature > 0:
            raise UserError(f"temperature: must be above 0, got {temperature} (or steer greedily)")
        return replace(self, greedy=greedy, temperature=temperature)


MIXTURE = Steering("mixture")
"""The agent as trained: the gate mixes the experts."""


def keep(expert: str, experts: int) -> Steering:
    """One expert alone, under the shared head (the gate forced to 1)."""
    index = _index(expert, experts)
    return Steering(expert, tuple(float(k == index) for k in range(experts)))


def blend(weights: Mapping[str, float], experts: int) -> Steering:
    """Experts mixed with constant weights, whatever the gate says; experts not named get 0."""
    vector = [0.0] * experts
    for name, weight in weights.items():
        vector[_index(name, experts)] = float(weight)
    if not np.isfinite(vector).all():
        raise UserError(f"steer: weights must be finite, got {dict(weights)}")
    return Steering(",".join(f"{n}={w:g}" for n, w in weights.items()), tuple(vector))


def ablate(expert: str, experts: int) -> Steering:
    """The mixture with one expert's output zero."""
    return Steering(f"without:{expert}", ablated=(_index(expert, experts),))


def parse(text: str, experts: int) -> Steering:
    """Read a steering from the command line.

    Args:
        text: `mixture`, an expert's name, `NAME=WEIGHT,NAME=WEIGHT` or `without:NAME`.
        experts: number of experts of the agent.

    Raises:
        UserError: the text names no expert or no number.
    """
    if text == MIXTURE.name and experts > 1:
        return MIXTURE
    if text.startswith("without:"):
        return ablate(text.removeprefix("without:"), experts)
    if "=" not in text:
        return keep(text, experts)
    weights = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        try:
            weights[name.strip()] = float(number)
        except ValueError:
            raise UserError(f"steer: expected NAME=WEIGHT, got {part!r}") from None
    return blend(weights, experts)


def standard(experts: int) -> list[Steering]:
    """The policies of the result table: the mixture and each expert, or `single`."""
    alone = [keep(name, experts) for name in expert_names(experts)]
    return alone if experts == 1 else [MIXTURE, *alone]


def steering_curve(experts: int) -> list[Steering]:
    """Blends between the first two experts, from mostly the second to mostly the first."""
    first, second = expert_names(experts)[:2]
    return [blend({first: w / 10, second: 1 - w / 10}, experts) for w in range(1, 10)]


def _index(expert: str, experts: int) -> int:
    names = expert_names(experts)
    if expert not in names:
        choices = names if experts == 1 else (MIXTURE.name, *names)
        raise UserError(
            f"steer: must be one of {', '.join(choices)}, got {expert!r}{nearest(expert, choices)}"
        )
    return names.index(expert)


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
