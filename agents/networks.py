"""Experts, gate, mixture and value net: one definition for every learner.

All parameters carry a leading run axis R, so that one module trains R independent runs.

The mixture is g_1 h_1 + ... + g_K h_K of the experts' activations under one shared linear head.
The head is linear, so the mixture is taken after it instead, over A logits and not H activations:
`head(sum_k g_k h_k) = sum_k g_k (W h_k) + b`. Every policy that steering can make (one expert, a
blend, an ablation, another gate) is then a set of mixing weights on the same expert logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from agents.routing import route
from envs.settings import Settings

Sizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]


class AgentConfig(Settings):
    """The networks."""

    section: ClassVar[str] = "agent"

    experts: int = Field(2, ge=2, le=64)
    """Number of experts K of the methods that mix; the first is the diamond's, the second the
    ghost's, further ones learn from unlabeled episodes only."""
    hidden: Sizes = (128, 128)
    """Units of each hidden layer of an expert and of the gate."""
    value_hidden: Sizes = (128, 128)
    """Units of each hidden layer of the value net."""
    value_activation: Literal["relu", "none"] = "relu"
    """Activation of the value net; "none" makes it affine, as in the published code."""
    gate_conv: bool = False
    """Whether the gate starts with a 1x1 convolution over the planes, as in the published code."""


@dataclass(frozen=True)
class PolicyOutput:
    """What the policy network computes for a batch of B observations in R runs."""

    expert_logits: Tensor  # [R, K, B, A], each expert under the shared head's weight
    bias: Tensor  # [R, A], the shared head's bias
    gate_logits: Tensor  # [R, B, K], not routed; the last is 0 by definition

    def mix(self, weights: Tensor) -> Tensor:
        """Policy logits of a mixture: weights `[R, B, K]` (broadcastable) -> `[R, B, A]`."""
        return torch.einsum("rbk,rkba->rba", weights, self.expert_logits) + self.bias[:, None]

    @property
    def gate(self) -> Tensor:
        """Mixing probabilities of the gate. [R, B, K]"""
        return self.gate_logits.softmax(-1)


class StackedLinear(nn.Module):
    """R independent affine maps: `[R, B, in]` (or `[1, B, in]`, shared) -> `[R, B, out]`."""

    def __init__(self, runs: int, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(runs, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(runs, outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        runs = self.weight.shape[0]
        if runs == 1:  # one large product beats a batched product of one on a CPU
            bias = None if self.bias is None else self.bias[0]
            return F.linear(x[0], self.weight[0], bias)[None]
        x = x.expand(runs, -1, -1)
        if self.bias is None:
            return torch.bmm(x, self.weight.mT)
        return torch.baddbmm(self.bias[:, None], x, self.weight.mT)


class StackedMLP(nn.Module):
    """R independent multilayer perceptrons; the activation follows every layer but the last."""

    def __init__(
        self, runs: int, sizes: Sequence[int], activation: Literal["relu", "none"] = "relu"
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            StackedLinear(runs, inputs, outputs) for inputs, outputs in pairwise(sizes)
        )
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if i and self.activation == "relu":
                x = F.relu(x)
            x = layer(x)
        return x


class Gate(nn.Module):
    """The gate: planes -> optional 1x1 convolution -> MLP -> K logits, the last fixed at 0.

    With K = 2 the first logit goes through a sigmoid, as in the paper.
    """

    def __init__(self, runs: int, planes: int, cells: int, config: AgentConfig) -> None:
        super().__init__()
        self.planes = planes
        self.conv = StackedLinear(runs, planes, planes) if config.gate_conv else None
        self.mlp = StackedMLP(runs, [planes * cells, *config.hidden, config.experts - 1])

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            pixels = x.unflatten(-1, (self.planes, -1)).mT.flatten(1, 2)  # [R, B * S, planes]
            mixed = self.conv(pixels).unflatten(1, (x.shape[1], -1))  # [R, B, S, planes]
            x = mixed.mT.flatten(2)
        return F.pad(self.mlp(x), (0, 1))


class Agent(nn.Module):
    """A stack of R agents: K experts under one shared linear head, a gate, and a value net.

    Args:
        config: sizes; `config.experts` is used where `experts` is "many".
        shape: of an observation, `(planes, rows, cols)`.
        actions: number of actions A.
        seeds: one per run; a run's parameters depend on its own seed only.
        experts: "many" for a mixture, "one" for a single-expert policy (K = 1, no gate).
        gate: "learned", or "fixed" for the constant gate 1/K.
        generators: streams to draw the initial parameters from, one per run; with none the
            parameters are left unset, to be loaded.
    """

    def __init__(
        self,
        config: AgentConfig,
        shape: Sequence[int],
        actions: int,
        runs: int,
        experts: Literal["one", "many"] = "many",
        gate: Literal["learned", "fixed"] = "learned",
        generators: Sequence[torch.Generator] | None = None,
    ) -> None:
        super().__init__()
        planes, rows, cols = shape
        inputs = planes * rows * cols
        self.n_experts = config.experts if experts == "many" else 1
        self.n_actions = actions
        self.experts = nn.ModuleList(
            StackedMLP(runs, [inputs, *config.hidden]) for _ in range(self.n_experts)
        )
        self.head = StackedLinear(runs, config.hidden[-1], actions)
        learned = self.n_experts > 1 and gate == "learned"
        self.gate = Gate(runs, planes, rows * cols, config) if learned else None
        self.value_net = StackedMLP(
            runs, [inputs, *config.value_hidden, 1], config.value_activation
        )
        if generators is not None:
            self._initialize(generators)

    @torch.no_grad()
    def _initialize(self, generators: Sequence[torch.Generator]) -> None:
        """Draw weights and biases from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's default."""
        for module in self.modules():
            if isinstance(module, StackedLinear):
                bound = module.weight.shape[-1] ** -0.5
                for run, generator in enumerate(generators):
                    for parameter in module.parameters(recurse=False):
                        parameter[run].uniform_(-bound, bound, generator=generator)

    def forward(self, observation: Tensor, routes: Tensor | None = None) -> PolicyOutput:
        """Expert and gate logits.

        Args:
            observation: `[R, B, planes * rows * cols]`, or `[1, B, ...]` shared by all runs.
            routes: `[R, B, K]` weight of each sample's gradient into each expert; None: all 1.
        """
        logits = []
        for k, expert in enumerate(self.experts):
            hidden = F.relu(expert(observation))  # [R, B, H]
            if routes is not None:
                hidden = route(hidden, routes[..., k])
            logits.append(hidden @ self.head.weight.mT)
        expert_logits = torch.stack(logits, dim=1)
        if self.gate is None:
            gate_logits = expert_logits.new_zeros(1, 1, 1).expand(
                *expert_logits.shape[:1], observation.shape[1], self.n_experts
            )
        else:
            gate_logits = self.gate(observation)
        assert self.head.bias is not None
        return PolicyOutput(expert_logits, self.head.bias, gate_logits)

    def value(self, observation: Tensor) -> Tensor:
        """Value estimates: `[R, B, F]` -> `[R, B]`."""
        estimate: Tensor = self.value_net(observation).squeeze(-1)
        return estimate


def flatten(observation: Tensor) -> Tensor:
    """Planes to features: `[..., planes, rows, cols]` -> `[..., planes * rows * cols]`."""
    return observation.flatten(-3)
