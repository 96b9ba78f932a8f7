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
    """States that a group of G runs met in a step."""

    runs: slice
    states: slice  # among the window's U
    layers: list[Tensor]  # [G * J, B, H], activations of each hidden layer


class Window:
    """The states of a window and what R agents compute for them.

    Args:
        forward: of the agents. If gradients are on, then they will be, when all is learned from.
    """

    def __init__(self, forward: Prepared) -> None:
        self.forward, self.learns = forward, torch.is_grad_enabled()
        layers = forward.agent.trunks[1:]
        self.table = forward.first.table  # [R, J, F + 2, H]
        self.weights = [*(layer.weight for layer in layers), forward.out_weight]  # [R, J, out, in]
        self.biases = [*(layer.bias for layer in layers), forward.out_bias]  # [R, J, out]
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
        last = self.biases[-1]
        logits = last.new_zeros(*last.shape[:2], active.shape[1], last.shape[2])
        for runs in self.groups:
            count = max(counts[runs])
            x = row_sums(active[runs, :count], self.table[runs]).flatten(0, 1)
            layers = []
            states = slice(self.count, self.count + count)
            for weight, bias in zip(self.weights, self.biases, strict=True):
                layers.append(x.relu_())
                shift = bias[runs].flatten(0, 1)[:, None]
                x = torch.baddbmm(shift, x, weight[runs].flatten(0, 1).mT)
            logits[runs, :, :count] = x.unflatten(0, (-1, last.shape[1]))
            self.pieces.append(Piece(runs, states, layers if self.learns else []))
        self.active.append(active)
        self.logits.append(logits)
        self.count += active.shape[1]
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
        ctx.pieces, ctx.rows, ctx.depth = pieces, table.shape[2], len(weights)
        ctx.save_for_backward(active, *weights, *(x for piece in pieces for x in piece.layers))
        return logits, logits.clone()

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> tuple[Tensor | None, ...]:
        active, *saved = ctx.saved_tensors
        weights, layers = saved[: ctx.depth], saved[ctx.depth :]
        to_weights = [torch.zeros_like(weight) for weight in weights]
        to_biases = [weight.new_zeros(weight.shape[:-1]) for weight in weights]
        shift = weights[0].new_zeros(*weights[0].shape[:2], weights[0].shape[-1])  # the first bias
        first = shift.new_empty(*grad[0].shape[:3], shift.shape[-1])  # before the first activation
        for n, piece in enumerate(ctx.pieces):
            runs = piece.runs
            # into the activations, into the parameters: alike from the last hidden layer on
            down, up = (g[runs, :, piece.states].flatten(0, 1) for g in grad)
            for i in reversed(range(ctx.depth)):
                x = layers[n * ctx.depth + i]  # what weight i was multiplied with
                to_weights[i][runs].flatten(0, 1).baddbmm_(up.mT, x)
                to_biases[i][runs].flatten(0, 1).add_(up.sum(1))
                room = first[runs, :, piece.states].flatten(0, 1) if i == 0 else torch.empty_like(x)
                down = torch.bmm(down, weights[i][runs].flatten(0, 1), out=room)
                up = _threshold_backward(down, x, 0.0, grad_input=down)
            shift[runs].flatten(0, 1).add_(up.sum(1))
        table = row_gradients(active, first, shift, ctx.rows)
        return None, None, None, table, *to_weights, *to_biases


# typed, as autograd functions and out variants are not
_by_hand = cast(Callable[..., tuple[Tensor, ...]], _ByHand.apply)
_threshold_backward = cast(Callable[..., Tensor], torch.ops.aten.threshold_backward.grad_input)
