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

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oversight_rl.agents.methods import METHODS
from oversight_rl.agents.routing.primitive import route
from oversight_rl.agents.settings import AgentConfig
from oversight_rl.envs.record import Record
from oversight_rl.envs.settings import ACTIONS

DEPLOYED = 0
"""The expert that is kept, the wanted behavior's."""
PER_OBSERVATION = ("expert_logits", "head_logits", "gate_logits", "value")


@dataclass(frozen=True)
class Output(Record):
    """What an agent computes for B observations in each of R runs."""

    expert_logits: Tensor  # [R, B, K, A], W h_k; a gradient into it reaches the expert only
    head_logits: Tensor  # [R, B, K, A], the same numbers; a gradient into it reaches W only
    bias: Tensor  # [R, 1, A], the shared head's bias
    gate_logits: Tensor  # [R, B, K], the last is 0 by definition
    value: Tensor  # [R, B]

    def rows(self, index: Tensor) -> Output:
        """The output for other batches: `index` `[R, ...]` into B, per run."""
        runs, batch = self.value.shape
        more = [1] * (index.ndim - 1)
        row = index + (torch.arange(runs, device=index.device) * batch).view(-1, *more)
        parts = [vars(self)[name] for name in PER_OBSERVATION]
        table = torch.cat([part.reshape(runs * batch, -1) for part in parts], dim=-1)
        columns = rows_of(table, row).split([part[0, 0].numel() for part in parts], dim=-1)
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
        return (weights[..., None] * self._logits).sum(-2) + self.bias

    def alone(self, expert: int) -> Tensor:
        """Policy logits of one expert under the shared head. [R, B, A]"""
        return self._logits[..., expert, :] + self.bias

    @property
    def mixture(self) -> Tensor:
        """Policy logits of the gate's mixture, or of the only expert. [R, B, A]"""
        return self.mix(self.gate) if self.gate_logits.shape[-1] > 1 else self.alone(DEPLOYED)

    @property
    def _logits(self) -> Tensor:
        """W h_k, with gradients into both. [R, B, K, A]"""
        if not _learns(self.head_logits):
            return self.expert_logits
        return self.expert_logits + (self.head_logits - self.head_logits.detach())

    @property
    def gate(self) -> Tensor:
        """Mixing probabilities of the gate. [R, B, K]"""
        return self.gate_logits.softmax(-1)


def _learns(x: Tensor | None = None) -> bool:
    """Whether gradients go into `x`, or anywhere; a tracer, which looks twice, is told the same."""
    learning = torch.is_grad_enabled() if x is None else x.requires_grad
    return learning or bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def rows_of(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table `[U, D]`, by an index of any shape: `[..., D]`.

    The gradient sums what belongs to the same row in a fixed order, by what is fastest of that.
    """
    if table.is_cuda:  # where adding by index has no order
        return F.embedding(index, table)
    return table.index_select(0, index.flatten()).view(*index.shape, table.shape[-1])


def _picked(x: Tensor, index: Tensor) -> Tensor:
    """Of a batch `[R, J, U, O]` those with an index `[B]`: `[R, J, B, O]`."""
    rows = x.permute(2, 0, 1, 3)
    return rows_of(rows.flatten(1), index).view(-1, *rows.shape[1:]).permute(1, 2, 0, 3)


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
        bias.flatten(0, -2)[:, None], x.flatten(0, -3), weight.flatten(0, -3).transpose(-2, -1)
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
            if config.biases == "zero":
                for part in self.modules():
                    if isinstance(part, Linear):
                        nn.init.zeros_(part.bias)

    def prepare(self) -> Prepared:
        """Compose what can be composed, once for all forwards until the parameters change."""
        return Prepared(self)

    def forward(self, observation: Tensor) -> Output:
        """Everything that the agent computes: `[R or 1, B, F]` or active inputs -> Output."""
        return self.prepare()(observation)


def new_agent(
    config: AgentConfig,
    shape: Sequence[int],
    method: str,
    runs: int,
    generators: Sequence[torch.Generator] | None = None,
) -> Agent:
    """A stack of agents as a method wants them, see `Agent`."""
    policy = METHODS[method].policy
    return Agent(config, shape, len(ACTIONS), runs, policy.experts, policy.gate, generators)


def take_run(stack: Agent, run: int) -> Agent:
    """A copy of one run of a stack, on the CPU."""
    single = {
        id(parameter): nn.Parameter(parameter.detach()[run : run + 1].to("cpu", copy=True))
        for parameter in stack.parameters()
    }
    return copy.deepcopy(stack, single)  # which takes these for copies of the stack's


def cumulative(probabilities: Tensor) -> Tensor:
    """The inner edges of the actions' shares of [0, 1]: `[..., A]` -> `[..., A - 1]`."""
    return probabilities.cumsum(-1)[..., :-1]


def sample(edges: Tensor, uniform: Tensor) -> Tensor:
    """Draw actions by inverse transform: `cumulative` `[..., A - 1]`, uniform `[...]` -> int64."""
    return (uniform[..., None] >= edges).sum(-1)


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
        # the layers after the trunks, padded to O outputs each, so that they are one product
        unbiased = (agent.head.weight, torch.zeros_like(agent.head.bias))  # see `Output.bias`
        others = [agent.gate_out, None if agent.affine_value else agent.value_layers[0]]
        outs = [unbiased] * agent.n_experts
        outs += [(layer.weight, layer.bias) for layer in others if layer is not None]
        width = max(agent.n_actions, agent.n_experts)  # the padding is the gate's last logit, too
        weights = [F.pad(weight, (0, 0, 0, width - weight.shape[1])) for weight, _ in outs]
        self.out_weight = torch.stack(weights, dim=1)  # [R, J, O, H]
        biases = [F.pad(bias, (0, width - bias.shape[1])) for _, bias in outs]
        self.out_bias = torch.stack(biases, dim=1)  # [R, J, O]
        if agent.affine_value:
            *before, last = agent.value_layers
            row: Tensor = last.weight  # [R, 1, H]
            constant: Tensor = last.bias  # [R, 1]
            for layer in reversed(before):
                constant = constant + (row @ layer.bias[:, :, None]).squeeze(-1)
                row = row @ layer.weight
            self.affine_value = FirstLayer(row[:, None], constant[:, None])

    def __call__(self, observation: Tensor, index: Tensor | None = None) -> Output:
        """Everything that the agent computes: see `Agent` for what an observation is.

        With an index `[B]` it is that of B observations, which these are in all runs.
        """
        parts = self.products(observation)
        if index is not None:
            parts = [x if x is None else _picked(x, index) for x in parts]
        return self.output(*parts)

    def products(self, observation: Tensor) -> Sequence[Any]:
        """All that takes time: what `output` needs, `[R, J, B, ...]` each."""
        parts = self._hidden(observation), self.out_weight, self.out_bias
        apart = _learns() and self.agent.n_experts > 1  # one expert and W learn from the same
        two = _two_ways(*parts) if apart else (affine(*parts), None)
        return (*two, self.affine_value(observation)) if self.agent.affine_value else two

    def output(
        self, own: Tensor, shared: Tensor | None = None, value: Tensor | None = None
    ) -> Output:
        """The output made of `products`, or of those of several batches joined."""
        agent, k = self.agent, self.agent.n_experts
        both = own[:, k:]
        if shared is None:
            shared = own.detach()
        elif _learns(shared):
            both = both + (shared[:, k:] - shared[:, k:].detach())
        return Output(
            expert_logits=own[:, :k, :, : agent.n_actions].transpose(1, 2),
            head_logits=shared[:, :k, :, : agent.n_actions].transpose(1, 2),
            bias=agent.head.bias[:, None],
            gate_logits=both[:, 0, :, :k] if agent.has_gate else torch.zeros_like(own[:, 0, :, :k]),
            value=both[:, -1, :, 0] if value is None else value[:, 0, :, 0],
        )

    def value(self, observation: Tensor) -> Tensor:
        """Value estimates alone. [R, B]"""
        if self.agent.affine_value:
            return self.affine_value(observation)[:, 0, :, 0]
        hidden = self._hidden(observation, -1)
        return affine(hidden, self.out_weight[:, -1:], self.out_bias[:, -1:])[:, 0, :, 0]

    def gate(self, observation: Tensor) -> Tensor:
        """The gate's logits alone, see `Output.gate_logits`. [R, B, K]"""
        k = self.agent.n_experts
        hidden = self._hidden(observation, k, k + 1)
        outputs = affine(hidden, self.out_weight[:, k : k + 1], self.out_bias[:, k : k + 1])
        return outputs[:, 0, :, :k]

    def _hidden(self, observation: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Activations of the trunks from `start` to `stop`. [R, J, B, H]"""
        alone = not _learns()  # without gradients nothing else looks at the sums
        x = F.relu(self.first(observation, start, stop), inplace=alone)
        _, *later = self.agent.trunks
        for layer in later:
            x = affine(x, layer.weight[:, start:stop], layer.bias[:, start:stop])
            x = F.relu(x, inplace=alone)
        return x


class FirstLayer:
    """First layers of J nets in R runs, laid out as a table of rows.

    An observation has a few ones among many zeros, so the product with it is a sum of few rows.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias  # [R, J, H, F], [R, J, H]

    @cached_property
    def table(self) -> Tensor:
        """A row for each input of each net, one of zeros, and the bias: `[R, J, F + 2, H]`."""
        nothing = torch.zeros_like(self.bias)[..., None, :]
        return torch.cat([self.weight.mT, nothing, self.bias[..., None, :]], dim=2)

    def __call__(self, observation: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Before the activation, nets `start` to `stop`: `[R or 1, B, ...]` -> `[R, J, B, H]`."""
        if observation.is_floating_point():
            weight, bias = self.weight[:, start:stop], self.bias[:, start:stop]
            # one product for all nets
            rows = observation.expand(len(weight), -1, -1)
            dense = affine(rows, weight.flatten(1, 2), bias.flatten(1, 2))
            product: Tensor = dense.unflatten(-1, weight.shape[1:3]).transpose(1, 2)
            return product.contiguous()
        table = self.table[:, start:stop]
        return _row_sums(observation.expand(len(table), -1, -1), table)


class _RowSums(torch.autograd.Function):
    """`row_sums` with gradients into the table."""

    @staticmethod
    def forward(ctx: Any, index: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = table.shape[2]
        return row_sums(index, table)

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> tuple[None, Tensor]:
        (index,) = ctx.saved_tensors
        return None, row_gradients(index, grad[0], grad[0].sum(2), ctx.rows)


def row_sums(index: Tensor, table: Tensor) -> Tensor:
    """Sums of rows of tables and of the last one, a bias.

    `[R, B, D]` indices into `[R, J, rows, H]` -> `[R, J, B, H]`.
    """
    rows = F.pad(index, (0, 1), value=table.shape[2] - 1)
    bags = rows[:, None] + _firsts(table, table.shape[2])
    sums = F.embedding_bag(bags.flatten(0, 2), table.flatten(0, 2), mode="sum")
    return sums.view(*table.shape[:2], index.shape[1], -1)


def row_gradients(index: Tensor, grad: Tensor, bias: Tensor, rows: int) -> Tensor:
    """Gradient of tables from that of their `row_sums`.

    The gradient of a row is a sum of rows as well, over the samples that took it. They are sorted
    by row once for all J tables of a run. The last row but one, of zeros, is never learned.

    Args:
        index: `[R, B, D]`.
        grad: `[R, J, B, H]`.
        bias: `[R, J, H]`, the sum of `grad` over all samples.
        rows: of a table.

    Returns:
        `[R, J, rows, H]`.
    """
    runs, batch, active = index.shape
    row, order = index.flatten(1).sort(dim=1, stable=True)  # [R, B * D]
    begins = torch.searchsorted(row, torch.arange(rows - 1, device=index.device).repeat(runs, 1))
    samples = (order // active)[:, None, :, None] + _firsts(grad, batch)
    begins = begins[:, None, :, None] + _firsts(grad, batch * active)
    sums = F.embedding_bag(samples.flatten(), grad.flatten(0, 2), begins.flatten(), mode="sum")
    sums = sums.view(*grad.shape[:2], rows - 1, -1)
    return torch.cat([sums, bias[:, :, None]], dim=2)


def _firsts(x: Tensor, each: int) -> Tensor:
    """Where the parts of a flat tensor begin, `each` long: `[R, J, 1, 1]` for `x` `[R, J, ...]`."""
    return torch.arange(x.shape[0] * x.shape[1], device=x.device).view(*x.shape[:2], 1, 1) * each


class _TwoWays(torch.autograd.Function):
    """The same affine map twice, see `affine`.

    A gradient into the first reaches the activations only, into the second the parameters only.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        product = affine(x, weight, bias)
        return product, product.clone()

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad[0] @ weight, grad[1].mT @ x, grad[1].sum(-2)


# typed, as autograd functions are not
_row_sums = cast(Callable[[Tensor, Tensor], Tensor], _RowSums.apply)
_two_ways = cast(Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], _TwoWays.apply)
