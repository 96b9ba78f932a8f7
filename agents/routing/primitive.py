"""Gradient routing: weight the gradient, per sample and per module.

`route` is the whole primitive: the identity forward, a weight per sample backward (arXiv
2410.04332, section 3). Everything else about a routing scheme is a rule that computes weights: a
table with a row per label and a column per part of the network, looked up per sample.
"""

from typing import Any

import torch
from torch import Tensor


class _Weighted(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(activation: Tensor, weight: Tensor) -> Tensor:
        return activation.view_as(activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad[0] * weight, None


class _WeightedForwardToo(_Weighted):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (weight,) = ctx.saved_tensors
        return tangents[0] * weight  # type: ignore[no-any-return]


def in_transform() -> bool:
    """Whether code runs for a transform of `torch.func`, or to be compiled."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """What its `apply` does, which in eager mode looks at signatures for longer than all else."""
    if in_transform():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def route(activation: Tensor, weight: Tensor) -> Tensor:
    """Identity forward; backward multiplies each sample's gradient by its weight.

    Args:
        activation: `[*batch, *features]`, any shape.
        weight: `[*batch]`, any real numbers: 1 is ordinary backpropagation, 0 a stop-gradient.

    Returns:
        `activation`, with its gradient weighted.

    Raises:
        ValueError: the weight's shape is not a leading part of the activation's.

    Source: arXiv 2410.04332, section 3.
    """
    if activation.shape[: weight.ndim] != weight.shape:
        raise ValueError(
            f"route: weight {tuple(weight.shape)} must match the leading axes of activation "
            f"{tuple(activation.shape)}"
        )
    weight = weight.reshape(weight.shape + (1,) * (activation.ndim - weight.ndim))
    # Dynamo traces no Function with a jvp of its own
    function = _Weighted if torch.compiler.is_compiling() else _WeightedForwardToo
    return apply(function, activation, weight)  # type: ignore[no-any-return]


def lookup(table: Tensor, outcome: Tensor) -> Tensor:
    """Each sample's row in its run's table, which has one per outcome.

    `[R, O, *columns]` and `[R, ...]` int64 in `range(O)` -> `[R, ..., *columns]`.
    """
    runs, outcomes = table.shape[:2]
    offset = torch.arange(runs, device=table.device) * outcomes
    row = outcome + offset.view(-1, *[1] * (outcome.ndim - 1))
    return table.flatten(0, 1)[row]
