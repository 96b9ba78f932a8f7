"""Which region each entry of a model's parameters is in, and where its activations pass."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from oversight_rl.agents.routing.layers import (
    NORMS,
    attention_layers,
    has_units,
    inputs,
    mlp_layers,
    output_dim,
    outputs,
)
from oversight_rl.agents.routing.regions import REST, Index, Region, matches, nearest, positions


class Partition:
    """Which part of a model each entry of its parameters belongs to.

    Attributes:
        names: of the parts; "rest" is the first.
        owner: by parameter, the part of all its entries or of each, int64 like the parameter;
            those not listed are rest.
        off: regions that are switched off now, by name.
        spots: where activations of units and heads pass: by name of a module and "in" or "out",
            the part of each of its inputs or outputs, int64 [units].

    Raises:
        ValueError: a glob fits nothing, an index goes past the end, or regions overlap.
    """

    def __init__(self, model: nn.Module, regions: Mapping[str, Region]) -> None:
        if REST in regions:
            raise ValueError(f"{REST!r} is what is in no region: choose another name")
        self.names = (REST, *regions)
        self.owner: dict[str, int | Tensor] = {}
        self.spots: dict[tuple[str, str], Tensor] = {}
        self.off: set[str] = set()
        self.wholes: dict[str, int] = {}  # parameters that are in a region by their names
        self._modules = dict(model.named_modules())  # each once, by the first of its names
        self._module_names: dict[int, str] = {
            id(module): name for name, module in self._modules.items()
        }
        parameters: dict[str, Tensor] = {}
        self._names: dict[int, list[str]] = {}  # of a parameter; more than one if it is tied
        for prefix, module in self._modules.items():
            for name, parameter in module.named_parameters(prefix, recurse=False):
                parameters[name] = parameter
                self._names.setdefault(id(parameter), []).append(name)
        self._held = parameters  # so that no other parameter is taken for one of these
        self._reached: set[str] = set()  # names of parameters that regions give
        for part, region in enumerate(regions.values(), start=1):
            for pattern, index in region.units.items():
                for name in matches(pattern, list(self._modules), "module"):
                    self._units(part, name, index)
            for pattern, index in region.heads.items():
                for name in matches(pattern, list(self._modules), "module"):
                    self._heads(part, name, index)
            for pattern in region.params:
                for name in matches(pattern, list(parameters), "parameter"):
                    self._paint(part, name, parameters[name])
                    self.wholes[self._name(parameters[name])] = part
        self._refuse_tied()
        for name, owner in self.owner.items():
            if isinstance(owner, Tensor) and bool((owner == owner.flatten()[0]).all()):
                self.owner[name] = int(owner.flatten()[0])

    def of(self, parameter: Tensor) -> int | Tensor:
        """The part of a parameter's entries.

        Raises:
            ValueError: the model had no such parameter.
        """
        if id(parameter) not in self._names:
            raise ValueError(
                f"a parameter {tuple(parameter.shape)} is none that the model had when its router "
                "was made: make router and optimizer anew after expand, after "
                "load_state_dict(..., assign=True) and whatever else replaces parameters"
            )
        return self.owner.get(self._names[id(parameter)][0], 0)

    def part(self, name: str) -> int:
        """The index of a region."""
        if name not in self.names[1:]:
            raise ValueError(f"no region {name!r}{nearest(name, self.names[1:])}")
        return self.names.index(name)

    def switches(self) -> tuple[dict[tuple[str, str], Tensor], dict[int, str]]:
        """Spots that switch parts off, and a parameter of each part that no spot does it for.

        To the spots of units come layers that are in a region as a whole, whose outputs are zero
        if their parameters are.
        """
        spots = dict(self.spots)
        silent: dict[int, str] = {}
        for name, module in self._modules.items():
            own = [self._name(p) for p in module.parameters(recurse=False)]
            parts = {self.wholes.get(parameter, 0) for parameter in own}
            if not any(parts):
                continue
            zero = type(module) in (*NORMS, nn.Embedding) or has_units(module)
            if zero and len(parts) == 1:
                spots[name, "out"] = torch.tensor([max(parts)])
            else:
                silent |= {self.wholes[p]: p for p in own if p in self.wholes}
        return spots, silent

    def _units(self, part: int, name: str, index: Index) -> None:
        module = self._modules[name]
        what = f"units of {name!r}"
        if has_units(module):
            found = positions(index, outputs(module), what)
            self._rows(part, module, found)
            self._spot(part, name, "out", outputs(module), found)
        elif (layers := mlp_layers(module)) is not None:
            into, out = layers
            found = positions(index, inputs(out), what)
            for layer in into:
                self._rows(part, layer, found)
            self._columns(part, out, found)
        elif any(True for _ in module.parameters()):
            raise ValueError(
                f"{what}: a {type(module).__name__} has none; units are those of Linear, Conv and "
                "Conv1D, and of MLPs with one hidden layer; name its parameters in params="
            )

    def _heads(self, part: int, name: str, index: Index) -> None:
        module = self._modules[name]
        if (layers := attention_layers(module)) is None:
            raise ValueError(
                f"heads of {name!r}: a {type(module).__name__} is no attention with a number of "
                "heads, layers for queries, keys and values, and an output layer, in this order"
            )
        count, projections, out = layers
        width = inputs(out) // count
        heads = positions(index, count, f"heads of {name!r}")
        found = (heads[:, None] * width + torch.arange(width)).flatten()
        for layer in projections:
            thirds = torch.arange(0, outputs(layer), inputs(out))
            self._rows(part, layer, (thirds[:, None] + found).flatten())
        self._columns(part, out, found)

    def _rows(self, part: int, module: nn.Module, found: Tensor) -> None:
        """A part's outputs of a layer."""
        for name, parameter in module.named_parameters(self._module_name(module), recurse=False):
            dim = output_dim(module) if parameter.ndim > 1 else 0
            self._paint(part, name, parameter, dim, found)

    def _columns(self, part: int, module: nn.Module, found: Tensor) -> None:
        """A part's inputs of a layer."""
        name = self._module_name(module)
        weight = module.get_parameter("weight")
        self._paint(part, f"{name}.weight", weight, 1 - output_dim(module), found)
        self._spot(part, name, "in", inputs(module), found)

    def _paint(
        self, part: int, name: str, parameter: Tensor, dim: int = 0, found: Tensor | None = None
    ) -> None:
        self._reached.add(name)
        name = self._name(parameter)
        if name not in self.owner:
            zero = torch.zeros(parameter.shape, dtype=torch.int64, device=parameter.device)
            self.owner[name] = zero
        owner = self.owner[name]
        assert isinstance(owner, Tensor)
        at = (slice(None),) * dim + (slice(None) if found is None else found.to(owner.device),)
        others = owner[at][(owner[at] != 0) & (owner[at] != part)]
        if others.numel():
            raise ValueError(
                f"regions {self.names[int(others[0])]!r} and {self.names[part]!r} overlap in "
                f"{name!r}: no rule says what moves there; make what they share its own region"
            )
        owner[at] = part

    def _spot(self, part: int, name: str, side: str, count: int, found: Tensor) -> None:
        owner = self.spots.setdefault((name, side), torch.zeros(count, dtype=torch.int64))
        owner[found] = part

    def _refuse_tied(self) -> None:
        for name in self._reached:
            names = next(several for several in self._names.values() if name in several)
            for other in names:
                if other not in self._reached:
                    raise ValueError(
                        f"{name!r} is tied to {other!r}, which the region does not name: it would "
                        "learn through its other end; name both in params=, or untie them"
                    )

    def _name(self, parameter: Tensor) -> str:
        return self._names[id(parameter)][0]

    def _module_name(self, module: nn.Module) -> str:
        return self._module_names[id(module)]
