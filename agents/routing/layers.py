"""What is known of the layers of other people's networks: which entries belong to a unit."""

from typing import Any

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
MIXING = (
    *NORMS,
    nn.modules.batchnorm._NormBase,
    nn.Softmax,
    nn.LogSoftmax,
    nn.Softmin,
    nn.GLU,
)
HEADS = ("num_heads", "n_heads", "n_head", "num_attention_heads", "heads")  # attributes' names


class Adapted(nn.Module):
    """A linear layer and a low-rank adapter beside it: `base(x) + up(down(x))`."""

    def __init__(self, base: nn.Module, rank: int, generator: torch.Generator | None) -> None:
        super().__init__()
        weight = base.get_parameter("weight")
        kind: Any = {"device": weight.device, "dtype": weight.dtype, "bias": False}
        self.base = base
        self.down = nn.Linear(inputs(base), rank, **kind)
        self.up = nn.Linear(rank, outputs(base), **kind)
        with torch.no_grad():
            self.down.weight.normal_(0, inputs(base) ** -0.5, generator=generator)
            self.up.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]


def is_transposed(module: nn.Module) -> bool:
    """Whether it is the `Conv1D` of `transformers`: a linear layer with weight `[in, out]`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, and no subclass that may not be one."""
    return type(module) is nn.Linear or is_transposed(module)


def has_units(module: nn.Module) -> bool:
    """Whether it is a layer whose outputs are units, each with entries of its own."""
    return is_linear(module) or type(module) in CONVOLUTIONS


def output_dim(module: nn.Module) -> int:
    """The dimension of its weight that counts output units."""
    return 1 if is_transposed(module) else 0


def outputs(module: nn.Module) -> int:
    """Its number of output units."""
    return module.get_parameter("weight").shape[output_dim(module)]


def inputs(module: nn.Module) -> int:
    """Its number of inputs."""
    return module.get_parameter("weight").shape[1 - output_dim(module)]


def linears(module: nn.Module) -> list[nn.Module]:
    """The linear layers in a module, those of adapters excepted."""
    adapters = {
        id(part) for m in module.modules() if isinstance(m, Adapted) for part in (m.down, m.up)
    }
    return [m for m in module.modules() if is_linear(m) and id(m) not in adapters]


def mlp_layers(module: nn.Module) -> tuple[list[nn.Module], nn.Module] | None:
    """The layers into and out of an MLP's one hidden layer; None if it is no such MLP.

    Two linear layers; or three, where the first two, value and gate, are multiplied. Between them
    is no layer that mixes hidden units, such as a norm or a softmax.
    """
    layers = linears(module)
    if has_units(module) or len(layers) not in (2, 3):
        return None
    *into, out = layers
    parts = list(module.modules())
    between = parts[parts.index(into[0]) : parts.index(out)]
    fits = all(outputs(layer) == inputs(out) for layer in into)
    fits &= not any(isinstance(part, MIXING) for part in between)
    deep = len(into) == 2 and any(inputs(layer) == outputs(layer) for layer in into)
    return (into, out) if fits and not deep else None


def attention_layers(module: nn.Module) -> tuple[int, list[nn.Module], nn.Module] | None:
    """An attention's number of heads, its projections and output layer; None if it is none.

    Queries, keys and values come from a layer each, or from one layer that is three times as wide.
    """
    count = next((getattr(module, name) for name in HEADS if hasattr(module, name)), None)
    layers = linears(module)
    if isinstance(module, nn.MultiheadAttention) or len(layers) not in (2, 4):
        return None
    *projections, out = layers
    width = inputs(out) * (3 if len(projections) == 1 else 1)
    if (
        not isinstance(count, int)
        or inputs(out) % count
        or any(outputs(layer) != width for layer in projections)
    ):
        return None
    return count, projections, out
