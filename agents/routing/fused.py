"""Layers whose parameters' gradient is weighted per sample in the one ordinary pass.

The forward pass is the layer's own. Backward, the gradient of the layer's input is what it always
is, and that of its parameters is summed over samples with their weights: `dW = (g * w)^T x`. Each
function below takes the layer's output, detached, and gives it a new derivative.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oversight_rl.agents.routing.layers import CONVOLUTIONS, NORMS, is_transposed
from oversight_rl.agents.routing.primitive import apply, route

Weigh = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""From a layer, its input and output, and weights `[*ids, parts]`, to its output."""


def spread(
    values: Tensor, like: Tensor, name: str, features: int = 1, channel_first: bool = False
) -> Tensor:
    """Values per label and unit, `[*ids, units]`, with axes added to go with activations.

    Args:
        values: what to spread.
        like: activations, `[*ids, ..., units]`, or `[B, units, ...]` with the channel first.
        name: of their module, for the error.
        features: how many of their last axes belong to one label.
        channel_first: whether axes follow that of the units.

    Raises:
        ValueError: the activations do not begin with the axes of the labels.
    """
    ids, units = values.shape[:-1], values.shape[-1:]
    if like.shape[: len(ids)] != ids or len(ids) > like.ndim - features:
        raise ValueError(
            f"labels {tuple(ids)} do not fit {name!r}, whose activations are {tuple(like.shape)}: "
            "they must begin with the labels' axes; else use router.backward"
        )
    between = (1,) * (like.ndim - len(ids) - 1)
    return values.view(ids + units + between if channel_first else ids + between + units)


class _Linear(torch.autograd.Function):
    """Output of `x @ weight.T + bias`; weights of samples for outputs, inputs and bias."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        output: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        by_output: Tensor | None,  # [..., out] or [..., 1]
        by_input: Tensor | None,  # [..., in] or [..., 1]
        for_bias: Tensor | None,  # [..., out] or [..., 1]; None is by_output's
    ) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, by_output, by_input, for_bias = ctx.saved_tensors
        grad = grads[0].contiguous()
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[1]:
            of_x = (grad.flatten(0, -2) @ weight.to(grad.dtype)).view(x.shape).to(x.dtype)
        weighted = grad if by_output is None else grad * by_output
        if ctx.needs_input_grad[2]:
            x = x.to(grad.dtype)
            rows = (x if by_input is None else x * by_input).flatten(0, -2)
            of_weight = (weighted.flatten(0, -2).mT @ rows).to(weight.dtype)
        if bias is not None and ctx.needs_input_grad[3]:
            weighted = weighted if for_bias is None else grad * for_bias
            of_bias = weighted.flatten(0, -2).sum(0).to(bias.dtype)
        return None, of_x, of_weight, of_bias, None, None, None


class _Convolution(torch.autograd.Function):
    """Output of a convolution; weights of samples for output channels of weight and bias."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        output: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        by_output: Tensor,  # [B, out or 1, 1...]
        for_bias: Tensor,
        how: tuple[Any, ...],  # stride, padding, dilation, transposed, output padding, groups
    ) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.how = inputs
        ctx.save_for_backward(*tensors[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, by_output, for_bias = ctx.saved_tensors
        (grad,) = grads
        of_x = of_weight = of_bias = None
        differentiate = torch.ops.aten.convolution_backward
        layer = (x.to(grad.dtype), weight.to(grad.dtype), None, *ctx.how)
        if ctx.needs_input_grad[1]:
            of_x = differentiate(grad, *layer, (True, False, False))[0].to(x.dtype)
        if ctx.needs_input_grad[2]:
            of_weight = differentiate(grad * by_output, *layer, (False, True, False))[1]
            of_weight = of_weight.to(weight.dtype)
        if bias is not None and ctx.needs_input_grad[3]:
            of_bias = (grad * for_bias).transpose(0, 1).flatten(1).sum(1).to(bias.dtype)
        return None, of_x, of_weight, of_bias, None, None, None


class _LayerNorm(torch.autograd.Function):
    """Output of a layer norm; weights of samples for its weight and bias."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        output: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        for_weight: Tensor,
        for_bias: Tensor,
        eps: float,
    ) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, for_weight, for_bias = ctx.saved_tensors
        (grad,) = grads
        x = x.to(grad.dtype)  # of less precision under autocast
        shape, zero = weight.shape, torch.zeros_like(weight)
        _, mean, rstd = torch.native_layer_norm(x, shape, None, None, ctx.eps)
        of_x = of_weight = of_bias = None
        differentiate = torch.ops.aten.native_layer_norm_backward
        layer = x, shape, mean, rstd, weight, zero
        if ctx.needs_input_grad[1]:
            of_x = differentiate(grad, *layer, (True, False, False))[0]
        of_weight = differentiate(grad * for_weight, *layer, (False, True, False))[1]
        if bias is not None:
            of_bias = differentiate(grad * for_bias, *layer, (False, False, True))[2]
        return None, of_x, of_weight, of_bias, None, None, None


class _Affine(torch.autograd.Function):
    """Output of `x * weight + bias`, after a norm without these; weights of samples for both."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        output: Tensor,
        x: Tensor,
        weight: Tensor,  # of as many axes as x, as is the bias
        bias: Tensor | None,
        for_weight: Tensor,
        for_bias: Tensor,
    ) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, for_weight, for_bias = ctx.saved_tensors
        (grad,) = grads
        of_weight = (grad * for_weight * x).sum_to_size(weight.shape)
        of_bias = None if bias is None else (grad * for_bias).sum_to_size(bias.shape)
        return None, grad * weight, of_weight, of_bias, None, None


# ---- layers of torch by these functions


def weigher(
    name: str, module: nn.Module, owner: dict[str, int | Tensor], varies: Sequence[bool]
) -> Weigh | str | None:
    """How to weight the gradient of a layer's own parameters in one pass.

    Args:
        name: of the layer, for errors.
        module: the layer.
        owner: by parameter of its own, the part of all its entries or of each.
        varies: by part, whether any label's weight for it is not 1.

    Returns:
        What gives the output a derivative that is weighted; None if nothing varies; or the
        reason, in words, why there is none.
    """
    parts = [
        p.flatten().unique().tolist() if isinstance(p, Tensor) else [p] for p in owner.values()
    ]
    if not any(varies[part] for several in parts for part in several):
        return None
    kind = type(module)
    known = kind in (nn.Linear, nn.Embedding, *CONVOLUTIONS, *NORMS) or is_transposed(module)
    if not known or "forward" in vars(module) or not {*owner} <= {"weight", "bias"}:
        return f"{name!r} is a {kind.__name__}, whose samples' shares no single pass knows"
    if kind in CONVOLUTIONS and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return f"{name!r} pads in a way of its own"
    weight, bias = owner["weight"], owner.get("bias", 0)
    if kind is nn.Embedding:
        return partial(_embedding, name, int(weight))
    if kind in NORMS:
        weigh = _layer_norm if kind is nn.LayerNorm else _other_norm
        return partial(weigh, name, int(weight), int(bias))
    if is_transposed(module) and isinstance(weight, Tensor):
        weight = weight.T
    by_output, by_input = _sides(weight)
    if by_output is None and by_input is None:
        return f"{name!r} has rows and columns of different regions"
    of_bias = None if by_output is not None and _same(by_output, bias) else Shares(bias)
    outputs, inputs = (None if by is None else Shares(by) for by in (by_output, by_input))
    if kind in CONVOLUTIONS:
        return partial(_convolution, name, outputs, of_bias)
    return partial(_linear, name, outputs, inputs, of_bias)


def _sides(owner: int | Tensor) -> tuple[int | Tensor | None, int | Tensor | None]:
    """The parts of a weight's outputs, or of its inputs, whichever tells those of all entries."""
    if isinstance(owner, int):
        return owner, None
    flat = owner.flatten(1)
    if torch.equal(flat, flat[:, :1].expand_as(flat)):
        return flat[:, 0], None
    if torch.equal(flat, flat[:1].expand_as(flat)) and owner.ndim == 2:
        return None, flat[0]
    return None, None


def _same(a: int | Tensor, b: int | Tensor) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return isinstance(a, int) and isinstance(b, int) and a == b


class Shares:
    """Weights of a layer's units, or of all of them alike, by those of the parts they are of."""

    def __init__(self, owner: int | Tensor) -> None:
        self.parts = owner.unique().tolist() if isinstance(owner, Tensor) else [owner]
        self.units = [torch.as_tensor(owner == part) for part in self.parts]

    def __call__(self, weights: Tensor) -> Tensor:
        """From `[*ids, parts]` to `[*ids, units]`, or `[*ids, 1]`."""
        if len(self.parts) == 1:
            return weights[..., self.parts[0], None]
        shares = torch.zeros_like(weights[..., :1])
        for part, units in zip(self.parts, self.units, strict=True):
            shares = shares + weights[..., part, None] * units.to(weights)  # exact
        return shares


def _linear(
    name: str,
    by_output: Shares | None,
    by_input: Shares | None,
    of_bias: Shares | None,
    module: Any,
    x: Tensor,
    output: Tensor,
    weights: Tensor,
) -> Tensor:
    weights = weights.to(output.dtype)
    rows = None if by_output is None else spread(by_output(weights), output, name)
    columns = None if by_input is None else spread(by_input(weights), x, name)
    for_bias = None if of_bias is None else spread(of_bias(weights), output, name)
    weight = module.weight.T if is_transposed(module) else module.weight
    given = output.detach(), x, weight, module.bias, rows, columns, for_bias
    return apply(_Linear, *given)  # type: ignore[no-any-return]


def _convolution(
    name: str,
    by_output: Shares | None,
    of_bias: Shares | None,
    module: Any,
    x: Tensor,
    output: Tensor,
    weights: Tensor,
) -> Tensor:
    assert by_output is not None  # regions have no input channels
    weights = weights.to(output.dtype)
    rows, for_bias = (
        spread(shares(weights), output, name, output.ndim - 1, channel_first=True)
        for shares in (by_output, of_bias or by_output)
    )
    none = (0,) * len(module.stride)
    how = (module.stride, module.padding, module.dilation, False, none, module.groups)
    given = output.detach(), x, module.weight, module.bias, rows, for_bias, how
    return apply(_Convolution, *given)  # type: ignore[no-any-return]


def _embedding(
    name: str, part: int, module: Any, x: Tensor, output: Tensor, weights: Tensor
) -> Tensor:
    weight = weights[..., part]
    if weight.ndim and output.shape[0] == 1:  # positions, looked up once for all samples
        output = output.expand(weight.shape[0], *output.shape[1:])
    spread(weight[..., None], output, name)
    return route(output, weight.to(output.dtype))


def _layer_norm(
    name: str, part: int, of_bias: int, module: Any, x: Tensor, output: Tensor, weights: Tensor
) -> Tensor:
    for_weight, for_bias = (
        spread(weights[..., part, None].to(output.dtype), output, name, module.weight.ndim)
        for part in (part, of_bias)
    )
    given = output.detach(), x, module.weight, module.bias, for_weight, for_bias, module.eps
    return apply(_LayerNorm, *given)  # type: ignore[no-any-return]


def _other_norm(
    name: str, part: int, of_bias: int, module: Any, x: Tensor, output: Tensor, weights: Tensor
) -> Tensor:
    weight, bias = module.weight, getattr(module, "bias", None)
    if isinstance(module, nn.GroupNorm):
        normal, features = F.group_norm(x, module.num_groups, eps=module.eps), x.ndim - 1
        shape = (-1, *(1,) * (x.ndim - 2))
        weight, bias = weight.view(shape), None if bias is None else bias.view(shape)
    else:
        normal = F.rms_norm(x, module.normalized_shape, eps=module.eps)
        features = len(module.normalized_shape)
    for_weight, for_bias = (
        spread(weights[..., part, None].to(output.dtype), output, name, features)
        for part in (part, of_bias)
    )
    given = output.detach(), normal, weight, bias, for_weight, for_bias
    return apply(_Affine, *given)  # type: ignore[no-any-return]
