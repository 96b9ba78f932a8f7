"""A window's trunks: forward in pieces, as states are met, and one backward, by hand.

The parameters do not change within a window, so the forward by which agents act is the one that
they learn from. Autograd would keep a graph of every piece, sum the pieces' gradients of each
parameter and look up rows anew in each; by hand, a piece adds to the gradients in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from oversight_rl.agents.networks import Output, Prepared, row_gradients, row_sums


@dataclass(frozen=True)
class Piece:
    """States that some runs met in a step, and what their trunks made of them."""

    trunks: slice  # of all R * J
    states: slice  # of the window's U
    layers: list[Tensor]  # [trunks, B, H], activations of each hidden layer


class Window:
    """The states of a window and what R agents compute for them.

    Args:
        forward: of the agents. If gradients are on, what is computed is kept to learn from it.
    """

    def __init__(self, forward: Prepared) -> None:
        self.forward, self.learns = forward, torch.is_grad_enabled()
        layers = forward.agent.trunks[1:]
        self.table = forward.first.table  # [R, J, F + 2, H]
        self.weights = [*(layer.weight for layer in layers), forward.out_weight]  # [R, J, out, in]
        self.biases = [*(layer.bias for layer in layers), forward.out_bias]  # [R, J, out]
        self.factors = [weight.detach().flatten(0, 1).mT for weight in self.weights]
        self.shifts = [bias.detach().flatten(0, 1)[:, None] for bias in self.biases]
        runs = len(self.table)
        # what one run has met in a step fits into a processor's cache; a GPU wants much at once
        alone = [slice(run, run + 1) for run in range(runs)]
        self.groups = [slice(0, runs)] if self.table.is_cuda else alone
        self.active: list[Tensor] = []  # [R, B, D], step by step
        self.logits: list[Tensor] = []  # [R, J, B, O]
        self.pieces: list[Piece] = []
        self.count = 0  # U

    @torch.no_grad()
    def act(self, active: Tensor, counts: Sequence[int]) -> Output:
        """What agents compute for further states, without a graph or a value. [R, B]

        Args:
            active: `[R, B, D]`, active inputs.
            counts: states of each run, the first ones; what follows is padding.
        """
        batch, (each, outputs) = active.shape[1], self.biases[-1].shape[1:]
        logits = self.table.new_zeros(len(active), each, batch, outputs)
        for runs in self.groups:
            trunks = slice(runs.start * each, runs.stop * each)
            count, layers = max(counts[runs]), []
            if not count:
                continue
            x = row_sums(active[runs, :count], self.table[runs]).flatten(0, 1)
            for factor, shift in zip(self.factors, self.shifts, strict=True):
                layers.append(x.relu_())
                x = torch.baddbmm(shift[trunks], x, factor[trunks])
            logits.flatten(0, 1)[trunks, :count] = x
            if self.learns:
                states = slice(self.count, self.count + count)
                self.pieces.append(Piece(trunks, states, layers))
        self.active.append(active)
        self.logits.append(logits)
        self.count += batch
        return self.forward.output(logits, logits, logits)  # no value is asked for

    def learning(self) -> tuple[Tensor, Output]:
        """Active inputs of all states `[R, U, D]`, and the output for them; it learns."""
        active, logits = torch.cat(self.active, dim=1), torch.cat(self.logits, dim=2)
        parameters = [self.table, *self.weights, *self.biases]
        two = _by_hand(self.pieces, active, logits, *parameters) if self.learns else (logits,) * 2
        if self.forward.agent.affine_value:
            two = *two, self.forward.affine_value(active)
        return active, self.forward.output(*two)


class _ByHand(torch.autograd.Function):
    """The logits of a window twice, as worked out before, as a function of the parameters.

    A gradient into the first reaches the activations only, into the second the last layers'
    parameters only.
    """

    @staticmethod
    def forward(
        ctx: Any, pieces: list[Piece], active: Tensor, logits: Tensor, table: Tensor, *rest: Tensor
    ) -> tuple[Tensor, Tensor]:
        weights = rest[: len(rest) // 2]
        # activations are freed with the graph, pieces later
        ctx.pieces = [(piece.trunks, piece.states) for piece in pieces]
        ctx.rows, ctx.depth = table.shape[2], len(weights)
        ctx.save_for_backward(active, *weights, *(x for piece in pieces for x in piece.layers))
        return logits, logits.clone()

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> tuple[Tensor | None, ...]:
        active, *saved = ctx.saved_tensors
        weights, layers = [x.flatten(0, 1) for x in saved[: ctx.depth]], saved[ctx.depth :]
        into_activations, into_parameters = (g.flatten(0, 1) for g in grad)  # [R * J, U, O]
        to_weights = [torch.zeros_like(weight) for weight in weights]
        to_biases = [weight.new_zeros(weight.shape[:2]) for weight in weights]
        width = weights[0].shape[-1]
        first = weights[0].new_empty(*into_activations.shape[:2], width)  # before its activation
        first_bias = first.new_zeros(len(first), width)
        for n, (trunks, states) in enumerate(ctx.pieces):
            down, up = into_activations[trunks, states], into_parameters[trunks, states]
            for i in reversed(range(ctx.depth)):
                x = layers[n * ctx.depth + i]  # what weight i was multiplied by
                to_weights[i][trunks].baddbmm_(up.mT, x)
                to_biases[i][trunks] += up.sum(1)
                room = torch.empty_like(x) if i else first[trunks, states]
                torch.bmm(down, weights[i][trunks], out=room)
                # from here on the same gradient goes both ways
                down = up = _threshold_backward(room, x, 0.0, grad_input=room)
            first_bias[trunks] += up.sum(1)
        shape = grad[0].shape[:2]  # [R, J]
        first, first_bias = first.unflatten(0, shape), first_bias.unflatten(0, shape)
        table = row_gradients(active, first, first_bias, ctx.rows)
        rest = (x.unflatten(0, shape) for x in (*to_weights, *to_biases))
        return None, None, None, table, *rest


# typed, as autograd functions and out variants are not
_by_hand = cast(Callable[..., tuple[Tensor, ...]], _ByHand.apply)
_threshold_backward = cast(Callable[..., Tensor], torch.ops.aten.threshold_backward.grad_input)
