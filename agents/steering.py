"""Steering: what to do with a trained agent's experts at deployment.

A steering is a set of mixing weights on the experts, with a temperature: keep one expert, blend
several, ablate one, replace the gate by a constant, or leave the gate in charge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oversight_rl.agents.networks import Agent, Output, cumulative, sample
from oversight_rl.envs.settings import BEHAVIORS, UserError, nearest

KEPT = "deployed"
"""What a method keeps at deployment: the wanted behavior's expert, or its only policy."""
TEMPERATURES = 1e-3, 1e3
"""Least and greatest that a policy can be steered at."""
MOST_WEIGHT = 1e3
"""Of an expert in a blend, positive or negative."""


def expert_names(experts: int, behaviors: Sequence[str] = BEHAVIORS) -> tuple[str, ...]:
    """Names of the experts: the behaviors they are meant for, then `expert_2`, ..."""
    if experts == 1:
        return ("single",)
    return tuple(behaviors[k] if k < len(behaviors) else f"expert_{k}" for k in range(experts))


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

    def __post_init__(self) -> None:
        """Check the numbers, wherever they come from.

        Raises:
            UserError: the temperature or a weight is so extreme that probabilities may overflow.
        """
        low, high = TEMPERATURES
        if not low <= self.temperature <= high:
            raise UserError(
                f"temperature: must lie in [{low:g}, {high:g}], got {self.temperature:g} "
                "(or steer greedily)"
            )
        for weight in self.weights or ():
            if not abs(weight) <= MOST_WEIGHT:
                raise UserError(
                    f"steer: weights must lie in [-{MOST_WEIGHT:g}, {MOST_WEIGHT:g}], "
                    f"got {weight:g}"
                )

    @property
    def expert(self) -> int | None:
        """The expert that acts by itself, if one does."""
        weights = self.weights or ()
        alone = not self.ablated and sorted(weights) == [*[0.0] * (len(weights) - 1), 1.0]
        return weights.index(1.0) if alone else None

    def mix(self, output: Output) -> Tensor:
        """What the steered policy's head puts out, before the temperature: `[R, B, A]`."""
        weights = output.gate
        if self.weights is not None:
            weights = weights.new_tensor(self.weights).expand_as(weights)
        if self.ablated:
            kept = weights.new_ones(weights.shape[-1])
            kept[list(self.ablated)] = 0.0
            weights = weights * kept
        return output.mix(weights)

    def probabilities(self, output: Output) -> Tensor:
        """Action probabilities of the steered policy, with A actions: `[R, B, A]`.

        They are nan where the agent's numbers are not finite, greedily taken too.
        """
        logits = self.mix(output)
        chances = (logits / self.temperature).softmax(-1)
        if self.greedy:
            best = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1])
            return best + 0 * chances
        return chances

    def with_options(self, greedy: bool = False, temperature: float = 1.0) -> Steering:
        """The same steering, taken greedily or at another temperature.

        Raises:
            UserError: the temperature is out of range.
        """
        return replace(self, greedy=greedy, temperature=temperature)


MIXTURE = Steering("mixture")
"""The agent as trained: the gate mixes the experts."""


def keep(expert: str, experts: int, behaviors: Sequence[str] = BEHAVIORS) -> Steering:
    """One expert alone, under the shared head (the gate forced to 1)."""
    index = _index(expert, experts, behaviors)
    return Steering(expert, tuple(float(k == index) for k in range(experts)))


def blend(
    weights: Mapping[str, float], experts: int, behaviors: Sequence[str] = BEHAVIORS
) -> Steering:
    """Experts mixed with constant weights, whatever the gate says; experts not named get 0."""
    vector = [0.0] * experts
    for name, weight in weights.items():
        vector[_index(name, experts, behaviors)] = float(weight)
    return Steering(",".join(f"{n}={w:g}" for n, w in weights.items()), tuple(vector))


def ablate(expert: str, experts: int, behaviors: Sequence[str] = BEHAVIORS) -> Steering:
    """The mixture with one expert's output zero."""
    return Steering(f"without:{expert}", ablated=(_index(expert, experts, behaviors),))


def parse(text: str, experts: int, behaviors: Sequence[str] = BEHAVIORS) -> Steering:
    """Read a steering from the command line.

    Args:
        text: `mixture`, `deployed` (what the method keeps), an expert's name,
            `NAME=WEIGHT,NAME=WEIGHT` or `without:NAME`. A single policy is the wanted behavior's.
        experts: number of experts of the agent.
        behaviors: that its first experts are meant for.

    Raises:
        UserError: the text names no expert or no number, or one out of range.
    """
    if text == MIXTURE.name and experts > 1:
        return MIXTURE
    if text == KEPT or (experts == 1 and text == behaviors[0]):
        text = expert_names(experts, behaviors)[0]
    if text.startswith("without:"):
        return ablate(text.removeprefix("without:"), experts, behaviors)
    if "=" not in text:
        return keep(text, experts, behaviors)
    weights = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name.strip() in weights:
            raise UserError(f"steer: names {name.strip()} twice, got {text!r}")
        try:
            weights[name.strip()] = float(number)
        except ValueError:
            raise UserError(f"steer: expected NAME=WEIGHT, got {part!r}") from None
    return blend(weights, experts, behaviors)


def standard(experts: int, behaviors: Sequence[str] = BEHAVIORS) -> list[Steering]:
    """The policies of the result table: the mixture and each expert, or `single`."""
    names = expert_names(experts, behaviors)
    alone = [keep(name, experts, behaviors) for name in names]
    return alone if experts == 1 else [MIXTURE, *alone]


def steering_curve(experts: int, behaviors: Sequence[str] = BEHAVIORS) -> list[Steering]:
    """Blends between the first two experts, from mostly the second to mostly the first."""
    first, second = expert_names(experts, behaviors)[:2]
    shares = [w / 10 for w in range(1, 10)]
    return [blend({first: w, second: 1 - w}, experts, behaviors) for w in shares]


def _index(expert: str, experts: int, behaviors: Sequence[str]) -> int:
    names = expert_names(experts, behaviors)
    if expert not in names:
        more = behaviors[:1] if experts == 1 else (MIXTURE.name,)
        choices = (KEPT, *more, *names)
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

    def predict(
        self, observation: Tensor | NDArray[np.float32], deterministic: bool = False
    ) -> tuple[NDArray[np.int64], None]:
        """Actions as SB3's policies give them, with a state that there is not.

        Args:
            observation: `[..., 4, rows, cols]`.
            deterministic: whether to take the likeliest ones.
        """
        actions = self(observation).argmax(-1) if deterministic else self.act(observation)
        return actions.cpu().numpy(), None
