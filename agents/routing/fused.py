"""Layers whose parameters' gradient is weighted per sample in the one ordinary pass.

The forward pass is the layer's own. Backward, the gradient of the layer's input is what it always
is, and that of its parameters is summed over samples with their weights: `dW = g^T (w * x)`. Each
function below takes the layer's output, detached, and gives it a new derivative.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oversight_rl.agents.routing.layers import CONVOLUTIONS, NORMS, inputs, is_transposed, outputs
from oversight_rl.agents.routing.primitive import apply, in_transform, route

Units = list[tuple[int, Tensor]]
"""Parts, and which units are of each, bool `[units]`."""


class Weights:
    """Weights of samples for each part, as layers need them.

    Args:
        table: `[*ids, parts]`.
    """

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self._rows: dict[tuple[torch.Size, torch.dtype], tuple[Tensor, ...]] = {}

    def check(self, activations: Tensor, name: str, features: int = 1) -> None:
        """Refuse activations of a module that do not begin with the labels' axes.

        Args:
            activations: of the module.
            name: of the module.
            features: how many of their last axes belong to one label.

        Raises:
            ValueError: they do not.
        """
        ids, shape = self.table.shape[:-1], activations.shape
        if shape[: len(ids)] != ids or len(ids) > len(shape) - features:
            raise ValueError(
                f"labels {tuple(ids)} do not fit {name!r}, whose activations are {tuple(shape)}: "
                "they must begin with the labels' axes; else use router.backward"
            )

    def rows(self, activations: Tensor, name: str, features: int = 1) -> tuple[Tensor, ...]:
        """For the rows of activations, `[rows, 1]` of each part; layers of a shape share them."""
        lead = activations.shape[: activations.ndim - features]
        key = lead, activations.dtype
        if (rows := self._rows.get(key)) is not None:
            return rows
        self.check(activations, name, features)
        table = self.table.to(activations.dtype)
        parts, between = table.shape[-1], len(lead) - table.ndim + 1
        table = table.view(table.shape[:-1] + (1,) * between + (parts,)).expand(*lead, parts)
        rows = table.reshape(-1, parts).T.contiguous()[..., None].unbind()
        if not in_transform():
            self._rows[key] = rows
        return rows

    def units(
        self, units: Units, activations: Tensor, name: str, channel_first: bool = False
    ) -> Tensor:
        """For units, by the part of each, broadcastable with activations.

        Args:
            units: by part, which units are of it.
            activations: `[*ids, ..., units]`; or, with `channel_first`, `[B, units, ...]`.
            name: of the module.
            channel_first: where the units are.
        """
        self.check(activations, name, activations.ndim - 1 if channel_first else 1)
        table = self.table.to(activations.dtype)
        ids, more = table.shape[:-1], (1,) * (activations.ndim - table.ndim)
        (part, which), *others = units
        weights = table[..., part, None]  # [*ids, 1]
        if others:  # sums are exact, and faster than a look-up for each unit
            weights = weights * which.to(table)
            for part, which in others:
                weights = weights + table[..., part, None] * which.to(table)
        count = weights.shape[-1:]
        return weights.view(ids + count + more if channel_first else ids + more + count)


def units_of(owner: int | Tensor) -> Units:
    """Units by the part of each, or all of one part."""
    if isinstance(owner, int):
        return [(owner, torch.ones(1, dtype=torch.bool))]
    return [(part, owner == part) for part in owner.unique().tolist()]


Weigh = Callable[[Any, Tensor, Tensor, Weights], Tensor]
"""From a layer, its input and output, and the samples' weights, to its output."""
Runs = tuple[tuple[int, int, int], ...]
"""Units by the part that they are of: `(start, stop, part)`."""


class _Linear(torch.autograd.Function):
    """Output of `x @ weight.T + bias`, by runs of inputs or of outputs that share their weights."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        output: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        how: tuple[bool, Runs, Runs],  # runs of outputs or inputs, those of the bias
        *rows: Tensor,  # [rows, 1] of each part
    ) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, given: tuple[Any, ...], output: Tensor) -> None:
        _, *layer, ctx.how = given[:5]
        ctx.save_for_backward(*layer, *given[5:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, *rows = ctx.saved_tensors
        of_outputs, runs, bias_runs = ctx.how
        _, needs_x, needs_weight, needs_bias, *others = ctx.needs_input_grad
        (grad,) = grads
        if grad.ndim != 2:
            grad = grad.reshape(-1, grad.shape[-1])
        of_x = of_weight = of_bias = None
        if needs_x:
            of_x = grad.mm(weight.to(grad.dtype)).view(x.shape).to(x.dtype)
        if needs_weight:
            x = x.reshape(grad.shape[0], -1).to(grad.dtype)
            if of_outputs:
                weighted = _weighted(grad, rows, runs)
                of_weight = weighted.t().mm(x)
            else:
                of_weight = grad.t().mm(_weighted(x, rows, runs))
            of_weight = of_weight.to(weight.dtype)
        if bias is not None and needs_bias:
            if needs_weight and of_outputs and bias_runs == runs:
                of_bias = weighted.sum(0)
            elif len(bias_runs) == 1:
                of_bias = rows[bias_runs[0][-1]].t().mm(grad).view(-1)
            else:
                of_bias = _weighted(grad, rows, bias_runs).sum(0)
            of_bias = of_bias.to(bias.dtype)
        return None, of_x, of_weight, of_bias, *[None] * len(others)


def _weighted(matrix: Tensor, rows: Sequence[Tensor], runs: Runs) -> Tensor:
    """A matrix `[rows, units]` times the weights of rows for the parts that the units are of."""
    (_, _, part), *others = runs
    weighted = matrix * rows[part]
    for start, stop, part in others:
        weighted[:, start:stop] = matrix[:, start:stop] * rows[part]
    return weighted


class _LayerNorm(torch.autograd.Function):
    """Output of a layer norm."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        output: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        for_weight: Tensor,  # [rows, 1]
        for_bias: Tensor | None,  # None is the weight's
    ) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, given: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*given[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd, for_weight, for_bias = ctx.saved_tensors
        grad = grads[0].contiguous()
        x = x.to(grad.dtype)  # of less precision under autocast
        shape, layer = weight.shape, (mean, rstd, weight, bias)
        differentiate = torch.ops.aten.native_layer_norm_backward.default
        of_x = None
        if ctx.needs_input_grad[1]:
            of_x, _, _ = differentiate(grad, x, shape, *layer, (True, False, False))
        weighted = (grad.view(len(for_weight), -1) * for_weight).view(grad.shape)
        needed = False, True, bias is not None
        _, of_weight, of_bias = differentiate(weighted, x, shape, *layer, needed)
        if for_bias is not None:
            weighted = (grad.view(len(for_bias), -1) * for_bias).view(grad.shape)
            _, _, of_bias = differentiate(weighted, x, shape, *layer, (False, False, True))
        return None, of_x, of_weight, of_bias, None, None, None, None


class _Convolution(torch.autograd.Function):
    """Output of a convolution."""

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
    def setup_context(ctx: Any, given: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.how = given
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
    def setup_context(ctx: Any, given: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*given[1:])

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
        what = f"{name!r} is a {kind.__name__}"
        if not kind.__module__.startswith("torch."):
            own = f"{name}.{min(owner)}".removeprefix(".")
            what = f"{own!r} is a parameter of a {kind.__name__}"
        return f"{what}, whose samples' shares no single pass knows"
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
    if kind in CONVOLUTIONS:
        assert by_output is not None  # no region has input channels
        return partial(_convolution, name, units_of(by_output), units_of(bias))
    count = outputs(module)
    if isinstance(weight, int) and inputs(module) < count:  # multiplies the smaller matrix
        by_output, by_input = None, weight
    linear = partial(_linear, name, is_transposed(module))
    if by_output is not None:
        return partial(linear, True, runs(by_output, count), runs(bias, count))
    assert by_input is not None
    return partial(linear, False, runs(by_input, inputs(module)), runs(bias, count))


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


def runs(owner: int | Tensor, count: int) -> Runs:
    """Runs of units of one part."""
    if isinstance(owner, int):
        return ((0, count, owner),)
    values, lengths = owner.unique_consecutive(return_counts=True)
    stops = lengths.cumsum(0).tolist()
    return tuple(zip([0, *stops], stops, values.tolist(), strict=False))


def _linear(
    name: str,
    transposed: bool,
    of_outputs: bool,
    units: Runs,
    of_bias: Runs,
    module: Any,
    x: Tensor,
    output: Tensor,
    weights: Weights,
) -> Tensor:
    weight = module.weight.T if transposed else module.weight
    rows = weights.rows(output, name)
    given = output.detach(), x, weight, module.bias, (of_outputs, units, of_bias), *rows
    return apply(_Linear, *given)  # type: ignore[no-any-return]


def _convolution(
    name: str,
    by_output: Units,
    of_bias: Units,
    module: Any,
    x: Tensor,
    output: Tensor,
    weights: Weights,
) -> Tensor:
    rows, for_bias = (weights.units(own, output, name, True) for own in (by_output, of_bias))
    none = (0,) * len(module.stride)
    how = (module.stride, module.padding, module.dilation, False, none, module.groups)
    given = output.detach(), x, module.weight, module.bias, rows, for_bias, how
    return apply(_Convolution, *given)  # type: ignore[no-any-return]


def _embedding(
    name: str, part: int, module: Any, x: Tensor, output: Tensor, weights: Weights
) -> Tensor:
    table = weights.table
    if table.ndim > 1 and output.shape[0] == 1:  # positions, looked up once for all samples
        output = output.expand(table.shape[0], *output.shape[1:])
    weights.check(output, name)
    return route(output, table[..., part].to(output.dtype))


def _layer_norm(
    name: str, part: int, of_bias: int, module: Any, x: Tensor, output: Tensor, weights: Weights
) -> Tensor:
    rows = weights.rows(output, name, module.weight.ndim)
    made_by = None if torch.compiler.is_compiling() else output.grad_fn
    if type(made_by).__name__ == "NativeLayerNormBackward0":  # has kept what would cost a pass
        mean, rstd = made_by._saved_result1, made_by._saved_result2  # type: ignore[union-attr]
    else:
        wide = x.detach().to(output.dtype)
        _, mean, rstd = torch.native_layer_norm(wide, module.weight.shape, None, None, module.eps)
    for_bias = None if of_bias == part else rows[of_bias]
    given = output.detach(), x, module.weight, module.bias, mean, rstd, rows[part], for_bias
    return apply(_LayerNorm, *given)  # type: ignore[no-any-return]


def _other_norm(
    name: str, part: int, of_bias: int, module: Any, x: Tensor, output: Tensor, weights: Weights
) -> Tensor:
    weight, bias = module.weight, getattr(module, "bias", None)
    if isinstance(module, nn.GroupNorm):
        normal, features = F.group_norm(x, module.num_groups, eps=module.eps), x.ndim - 1
        shape = (-1, *(1,) * (x.ndim - 2))
        weight, bias = weight.view(shape), None if bias is None else bias.view(shape)
    else:
        normal = F.rms_norm(x, module.normalized_shape, eps=module.eps)
        features = len(module.normalized_shape)
    rows = weights.rows(output, name, features)
    lead = output.shape[: output.ndim - features] + (1,) * features
    for_weight, for_bias = rows[part].view(lead), rows[of_bias].view(lead)
    given = output.detach(), normal, weight, bias, for_weight, for_bias
    return apply(_Affine, *given)  # type: ignore[no-any-return]
