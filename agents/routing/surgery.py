"""Parts that are added to a network, merged into it, or really removed."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from oversight_rl.agents.routing.layers import (
    Adapted,
    inputs,
    is_transposed,
    linears,
    mlp_layers,
    output_dim,
)
from oversight_rl.agents.routing.partition import Partition
from oversight_rl.agents.routing.regions import Region, matches


def expand(
    model: nn.Module,
    pattern: str,
    *,
    units: int = 0,
    rank: int = 0,
    generator: torch.Generator | None = None,
) -> Region:
    """Add hidden units to MLPs, or low-rank adapters to linear layers; the output stays.

    Optimizers, routers and compiled code are made afterwards: parameters are new.

    Args:
        model: changed in place.
        pattern: a glob of names of modules (`fnmatch`: `*` crosses dots): MLPs with one hidden
            layer, or, for adapters, modules all of whose linear layers get one.
        units: hidden units for each MLP. What leads into them is drawn, as wide as the weights
            beside it; what leads out of them is zero.
        rank: of adapters `base(x) + up(down(x))`, in whose place the layer was; up is zero.
        generator: draws the numbers.

    Returns:
        The region of all that was added.

    Raises:
        ValueError: the glob fits nothing, or no MLP or linear layer; or a weight is tied.
    """
    if (units > 0) == (rank > 0) or units < 0 or rank < 0:
        raise ValueError(f"expand: units or rank must be positive, got {units} and {rank}")
    modules = dict(model.named_modules())
    names = matches(pattern, list(modules), "module")
    if rank:
        return _adapt(model, pattern, names, rank, generator)
    added = {}
    for name in names:
        layers = mlp_layers(modules[name])
        if layers is None:
            kind = type(modules[name]).__name__
            raise ValueError(
                f"expand: {name!r}, a {kind}, is no MLP with one hidden layer, or has a norm or "
                "softmax that mixes its units"
            )
        _refuse_adapted(modules[name])
        into, out = layers
        count = inputs(out)
        added[name] = slice(count, count + units)
        for layer in (*into, out):
            _refuse_tied(model, layer)
            weight, dim = layer.get_parameter("weight"), output_dim(layer)
            dim = 1 - dim if layer is out else dim
            shape = list(weight.shape)
            shape[dim] = units
            new = torch.zeros(shape)
            if layer is not out:
                new.normal_(0, float(weight.detach().std()), generator=generator)
            _change(layer, dim, more=new)
    return Region(units=added)


def merge(model: nn.Module) -> nn.Module:
    """Fold the adapters that a model has into its linear layers, in place.

    Returns:
        The model.
    """
    for name, module in reversed(list(model.named_modules())):  # inner ones first
        if isinstance(module, Adapted):
            weight = module.base.get_parameter("weight")
            change = module.up.weight @ module.down.weight
            with torch.no_grad():
                weight.add_(change.T if is_transposed(module.base) else change)
            model.set_submodule(name, module.base)
    return model


def without(model: nn.Module, partition: Partition, names: Sequence[str]) -> nn.Module:
    """A copy of a model without regions.

    Raises:
        ValueError: a region is not made of hidden units of MLPs and of adapters alone.
    """
    parts = torch.tensor([partition.part(name) for name in names])
    left = {  # parameters with entries of the regions
        name
        for name, owner in partition.owner.items()
        if torch.isin(torch.as_tensor(owner).cpu(), parts).any()
    }
    small = copy.deepcopy(model)
    parameters = {parameter: name for name, parameter in small.named_parameters()}
    modules = {module: name for name, module in small.named_modules()}
    for module, name in reversed(modules.items()):  # inner ones first
        if isinstance(module, Adapted):
            own = {f"{name}.down.weight", f"{name}.up.weight"}
            if own <= left and all(isinstance(partition.owner[p], int) for p in own):
                small.set_submodule(name, module.base)
                left -= own
    spots = dict(partition.spots)
    for module in modules:
        if (layers := mlp_layers(module)) is None:
            continue
        into, out = layers
        owner = spots.pop((modules[out], "in"), None)
        if owner is None or not torch.isin(owner, parts).any():
            continue
        _refuse_adapted(module)
        keep = (~torch.isin(owner, parts)).nonzero()[:, 0]
        for layer in (*into, out):
            left -= {parameters[parameter] for parameter in layer.parameters()}
            dim = output_dim(layer)
            _change(layer, 1 - dim if layer is out else dim, keep=keep)
    if left:
        raise ValueError(
            f"contract: {min(left)!r} has entries that are no hidden units of an MLP and no "
            "adapter: they can be switched off (ablate), not removed"
        )
    return small


def _adapt(
    model: nn.Module, pattern: str, names: Sequence[str], rank: int, generator: Any
) -> Region:
    found = {id(layer) for name in names for layer in linears(model.get_submodule(name))}
    found &= {id(layer) for layer in linears(model)}  # no adapter's
    added = []
    for name, module in list(model.named_modules()):
        if id(module) in found and name:
            _refuse_tied(model, module)
            model.set_submodule(name, Adapted(module, rank, generator))
            added += [f"{name}.down.weight", f"{name}.up.weight"]
    if not added:
        raise ValueError(f"expand: there is no linear layer in {pattern!r}")
    return Region(params=added)


def _refuse_adapted(module: nn.Module) -> None:
    if any(isinstance(part, Adapted) for part in module.modules()):
        raise ValueError("hidden units of an MLP with adapters: merge or remove these first")


def _refuse_tied(model: nn.Module, layer: nn.Module) -> None:
    for own, parameter in layer.named_parameters():
        names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter]
        if len(names) > 1:
            raise ValueError(f"expand: {own} of a layer is tied: {' is '.join(names)}; untie it")


def _change(
    layer: nn.Module, dim: int, *, keep: Tensor | None = None, more: Tensor | None = None
) -> None:
    """Keep some units of a layer, or add some; `dim` of its weight counts them.

    Args:
        layer: a linear layer, changed in place.
        dim: that of its outputs, whose bias is changed too, or of its inputs.
        keep: their indices.
        more: the weights of more, like the weight apart from `dim`.
    """
    is_output = dim == output_dim(layer)
    for name, parameter in list(layer.named_parameters()):
        at = dim if name == "weight" else 0
        if name != "weight" and not is_output:
            continue
        value = parameter.detach()
        if keep is not None:
            value = value.index_select(at, keep.to(value.device))
        if more is not None:
            new = more if name == "weight" else torch.zeros(more.shape[dim])
            value = torch.cat([value, new.to(value)], at)
        setattr(layer, name, nn.Parameter(value, parameter.requires_grad))
    for name, is_outputs in (("out_features", 1), ("in_features", 0), ("nf", 1), ("nx", 0)):
        if is_outputs == is_output and hasattr(layer, name):
            setattr(layer, name, layer.get_parameter("weight").shape[dim])
