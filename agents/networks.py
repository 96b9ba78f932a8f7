"""Experts, gate, mixture and value net: one definition for every learner.

All parameters carry a leading run axis R, so that one module trains R independent runs. The
experts, the gate and the value net have the same hidden layers, so they are J parallel *trunks*
that take part in the same batched products.

The mixture is g_1 h_1 + ... + g_K h_K of the experts' activations under one shared linear head.
The head is linear, so the mixture is taken after it instead, over A logits and not H activations:
`head(sum_k g_k h_k) = sum_k g_k (W h_k) + b`. Every policy that steering can make (one expert, a
blend, an ablation, another gate) is then a set of mixing weights on the same expert logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, cast

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from agents.routing import route
from envs.settings import Settings, as_sequence
from envs.world import Record

Sizes = Annotated[
    tuple[Annotated[int, Field(ge=1, le=2**14)], ...],
    BeforeValidator(as_sequence),
    Field(min_length=1),
]


class AgentConfig(Settings):
    """The networks."""

    section: ClassVar[str] = "agent"

    experts: int = Field(2, ge=2, le=64)
    """Number of experts K of the methods that mix; the first is the diamond's, the second the
    ghost's, further ones learn from unlabeled episodes only."""
    hidden: Sizes = (128, 128)
    """Units of each hidden layer of the experts, the gate and the value net."""
    value_activation: Literal["relu", "none"] = "relu"
    """Activation of the value net; "none" makes it affine, as in the published code."""
    gate_conv: bool = False
    """Whether the gate starts with a 1x1 convolution over the planes, as in the published code."""


PER_OBSERVATION = ("expert_logits", "head_logits", "gate_logits", "value")


@dataclass(frozen=True)
class Output(Record):
    """What an agent computes for B observations in each of R runs."""

    expert_logits: Tensor  # [R, B, K, A], W h_k; a gradient into it reaches the expert only
    head_logits: Tensor  # [R, B, K, A], the same numbers; a gradient into it reaches W only
    bias: Tensor  # [R, 1, A], the shared head's bias
    gate_logits: Tensor  # [R, B, K], the last is 0 by definition
    value: Tensor  # [R, B]

    @classmethod
    def cat(cls, outputs: Sequence[Output]) -> Output:
        """Join batches of the same agents."""
        joined = {n: torch.cat([vars(o)[n] for o in outputs], dim=1) for n in PER_OBSERVATION}
        return cls(bias=outputs[0].bias, **joined)

    def rows(self, index: Tensor) -> Output:
        """The output for other batches: `index` `[R, ...]` into B, per run."""
        runs, batch = self.value.shape
        more = [1] * (index.ndim - 1)
        row = index + (torch.arange(runs, device=index.device) * batch).view(-1, *more)
        parts = [vars(self)[name] for name in PER_OBSERVATION]
        table = torch.cat([part.reshape(runs * batch, -1) for part in parts], dim=-1)
        # an embedding's gradient sums what belongs to the same row, fast and in a fixed order
        columns = F.embedding(row, table).split([part[0, 0].numel() for part in parts], dim=-1)
        taken = {
            name: column.reshape(*index.shape, *part.shape[2:])
            for name, column, part in zip(PER_OBSERVATION, columns, parts, strict=True)
        }
        return Output(bias=self.bias.view(runs, *more, -1), **taken)

    def routed(self, routes: Tensor) -> Output:
        """Weight each sample's gradient per module: routes `[R, B, K + 1]`, the last the gate's.

        The shared head always learns.
        """
        *experts, gate = routes.unbind(-1)
        return replace(
            self,
            expert_logits=route(self.expert_logits, torch.stack(experts, dim=-1)),
            gate_logits=route(self.gate_logits, gate),
        )

    def mix(self, weights: Tensor) -> Tensor:
        """Policy logits of a mixture: weights `[R, B, K]` (broadcastable) -> `[R, B, A]`."""
        logits = self.expert_logits + (self.head_logits - self.head_logits.detach())
        return (weights[..., None] * logits).sum(-2) + self.bias

    def alone(self, expert: int) -> Tensor:
        """Policy logits of one expert under the shared head. [R, B, A]"""
        weights = torch.zeros_like(self.gate_logits[:, :1])
        weights[..., expert] = 1.0
        return self.mix(weights)

    @property
    def gate(self) -> Tensor:
        """Mixing probabilities of the gate. [R, B, K]"""
        return self.gate_logits.softmax(-1)


class Linear(nn.Module):
    """Parameters of independent affine maps with leading axes `[*stack]`; see `affine`."""

    def __init__(self, stack: Sequence[int], inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*stack, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(*stack, outputs))


def _linears(stack: Sequence[int], sizes: Sequence[int]) -> Sequence[Linear]:
    """Layers of the given sizes, as a registered sequence."""
    layers = nn.ModuleList(Linear(stack, *pair) for pair in pairwise(sizes))
    return cast(Sequence[Linear], layers)


@torch.no_grad()
def initialize(module: nn.Module, generators: Sequence[torch.Generator]) -> None:
    """Draw weights and biases from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's default."""
    for part in module.modules():
        if isinstance(part, Linear):
            bound = part.weight.shape[-1] ** -0.5
            for run, generator in enumerate(generators):
                for parameter in part.parameters(recurse=False):
                    parameter[run].uniform_(-bound, bound, generator=generator)


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Independent affine maps: `[*stack, B, in]`, `[*stack, out, in]` -> `[*stack, B, out]`."""
    product = torch.baddbmm(
        bias.flatten(0, -2)[:, None], x.flatten(0, -3), weight.flatten(0, -3).mT
    )
    return product.view(*weight.shape[:-2], *product.shape[1:])


class Agent(nn.Module):
    """A stack of R agents: K experts under one shared linear head, a gate, and a value net.

    Observations are the world's planes, flattened: F = planes * rows * cols inputs, either dense
    (float) or as the indices of those that are 1 (int64), padded with F. See `World.active`.

    Args:
        config: sizes; `config.experts` is used where `experts` is "many".
        shape: of an observation, `(planes, rows, cols)`.
        actions: number of actions A.
        runs: number of runs R.
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
        self.planes, self.inputs = shape[0], math.prod(shape)
        self.n_actions = actions
        self.n_experts = config.experts if experts == "many" else 1
        self.has_gate = self.n_experts > 1 and gate == "learned"
        self.affine_value = config.value_activation == "none"
        trunks = self.n_experts + self.has_gate + (not self.affine_value)
        # trunk j: the experts in order, then the gate, then the value net
        sizes = [self.inputs, *config.hidden]
        self.trunks: Sequence[Linear] = _linears([runs, trunks], sizes)
        width = config.hidden[-1]
        self.head = Linear([runs], width, actions)
        self.gate_out = Linear([runs], width, self.n_experts - 1) if self.has_gate else None
        self.gate_conv = (
            Linear([runs], self.planes, self.planes) if self.has_gate and config.gate_conv else None
        )
        value_sizes = [*sizes, 1] if self.affine_value else [width, 1]
        self.value_layers: Sequence[Linear] = _linears([runs], value_sizes)
        if generators is not None:
            initialize(self, generators)

    def prepare(self) -> Prepared:
        """Compose what can be composed, once for all forwards until the parameters change."""
        return Prepared(self)

    def forward(self, observation: Tensor) -> Output:
        """Everything that the agent computes: `[R or 1, B, F]` or active inputs -> Output."""
        return self.prepare()(observation)


class Prepared:
    """An agent's forward pass, with all that can be composed beforehand composed.

    Layers with no activation between them compose: the gate's convolution with its first layer,
    and all of an affine value net.
    """

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        weight: Tensor = agent.trunks[0].weight  # [R, J, H, F]
        bias: Tensor = agent.trunks[0].bias  # [R, J, H]
        if agent.gate_conv is not None:
            j = agent.n_experts
            planes = weight[:, j].unflatten(-1, (agent.planes, -1))  # [R, H, planes out, S]
            mixed = torch.einsum("rhos,roi->rhis", planes, agent.gate_conv.weight).flatten(2)
            shift = torch.einsum("rhos,ro->rh", planes, agent.gate_conv.bias)
            weight = torch.cat([weight[:, :j], mixed[:, None], weight[:, j + 1 :]], dim=1)
            bias = torch.cat([bias[:, :j], (bias[:, j] + shift)[:, None], bias[:, j + 1 :]], dim=1)
        self.first = FirstLayer(weight, bias)
        if agent.affine_value:
            *before, last = agent.value_layers
            row: Tensor = last.weight  # [R, 1, H]
            constant: Tensor = last.bias  # [R, 1]
            for layer in reversed(before):
                constant = constant + (row @ layer.bias[:, :, None]).squeeze(-1)
                row = row @ layer.weight
            self.affine_value = FirstLayer(row[:, None], constant[:, None])

    def __call__(self, observation: Tensor) -> Output:
        """Everything that the agent computes: see `Agent` for what an observation is."""
        agent, k = self.agent, self.agent.n_experts
        hidden = self._hidden(observation)  # [R, J, B, H]
        runs, _, batch, _ = hidden.shape
        experts = hidden[:, :k].reshape(runs, k * batch, -1)
        weight = agent.head.weight.mT
        expert_logits = experts @ weight.detach()
        head_logits = experts.detach() @ weight
        gate_logits = self.gate_logits(hidden[:, k]) if agent.has_gate else None
        return Output(
            expert_logits=expert_logits.unflatten(1, (k, batch)).transpose(1, 2),
            head_logits=head_logits.unflatten(1, (k, batch)).transpose(1, 2),
            bias=agent.head.bias[:, None],
            gate_logits=hidden.new_zeros(runs, batch, k) if gate_logits is None else gate_logits,
            value=self.value(observation, hidden),
        )

    def value(self, observation: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Value estimates `[R, B]`, from the trunks' activations if they are known."""
        if self.agent.affine_value:
            return self.affine_value(observation)[:, 0, :, 0]
        if hidden is None:
            hidden = self._hidden(observation, start=-1)
        layer = self.agent.value_layers[0]
        return affine(hidden[:, -1], layer.weight, layer.bias).squeeze(-1)

    def gate(self, observation: Tensor) -> Tensor:
        """The gate's logits alone, see `Output.gate_logits`. [R, B, K]"""
        k = self.agent.n_experts
        return self.gate_logits(self._hidden(observation, k, k + 1)[:, 0])

    def gate_logits(self, hidden: Tensor) -> Tensor:
        """The gate's logits from its trunk's activations `[R, B, H]`. [R, B, K]"""
        layer = self.agent.gate_out
        assert layer is not None
        return F.pad(affine(hidden, layer.weight, layer.bias), (0, 1))

    def _hidden(self, observation: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Activations of the trunks from `start` to `stop`. [R, J, B, H]"""
        x = self.first(observation, start, stop).relu()
        _, *later = self.agent.trunks
        for layer in later:
            x = affine(x, layer.weight[:, start:stop], layer.bias[:, start:stop]).relu()
        return x


class FirstLayer:
    """First layers of J nets in R runs, laid out as a table of rows.

    An observation has a few ones among many zeros, so the product with it is a sum of few rows.

    Args:
        weight: `[R, J, H, F]`.
        bias: `[R, J, H]`.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias
        runs, nets, _, inputs = weight.shape
        nets_first = torch.arange(runs * nets, device=weight.device) * inputs
        self.offset = nets_first.view(runs, nets, 1, 1)

    @cached_property
    def table(self) -> Tensor:
        """A row for each input of each net, and one of zeros."""
        return F.pad(self.weight.mT.flatten(0, 2), (0, 0, 0, 1))

    def __call__(self, observation: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Before the activation, nets `start` to `stop`: `[R or 1, B, ...]` -> `[R, J, B, H]`."""
        bias = self.bias[:, start:stop, None]
        if observation.is_floating_point():
            weight = self.weight[:, start:stop]
            dense = observation @ weight.flatten(1, 2).mT  # one product for all nets
            product: Tensor = dense.unflatten(-1, weight.shape[1:3]).transpose(1, 2)
            return product + bias
        nowhere = observation[:, None] == self.weight.shape[-1]
        row = (observation[:, None] + self.offset[:, start:stop]).masked_fill(
            nowhere, len(self.table) - 1
        )  # [R, J, B, active]
        summed = F.embedding_bag(row.flatten(0, 2), self.table, mode="sum")
        return summed.view(*row.shape[:3], -1) + bias
