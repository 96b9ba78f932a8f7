"""Entries of parameters that are zero for a while, or that an optimizer leaves where they are."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from oversight_rl.agents.routing.partition import Partition

Owner = Callable[[Tensor], int | Tensor]  # of a parameter: the part of all its entries, or of each


class Ablation:
    """Regions whose parameters are zero from now on, until `restore()` or the end of a `with`.

    One that is off already is left to who switched it off.
    """

    def __init__(self, model: nn.Module, partition: Partition, names: Sequence[str]) -> None:
        parts = torch.tensor([partition.part(name) for name in names if name not in partition.off])
        self._off, self._names = partition.off, set(names) - partition.off
        self._off |= self._names
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []  # parameter, which entries, values
        with torch.no_grad():
            for parameter in model.parameters() if self._names else ():
                owner = torch.as_tensor(partition.of(parameter)).cpu()
                off = torch.isin(owner, parts).to(parameter.device).expand(parameter.shape)
                if off.any():
                    self._before.append((parameter, off, parameter[off].clone()))
                    parameter[off] = 0

    def restore(self) -> None:
        """Put back what was there."""
        self._off -= self._names
        with torch.no_grad():
            while self._before:
                parameter, off, values = self._before.pop()
                parameter[off] = values

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.restore()


@contextmanager
def weighted(model: nn.Module, owner: Owner, weights: Tensor) -> Iterator[None]:
    """Meanwhile, parameters' gradients are multiplied by the weights `[parts]` of their entries."""
    handles = []
    for parameter in model.parameters():
        weight = weights.to(parameter)[owner(parameter)]
        if parameter.requires_grad and bool((weight != 1).any()):
            handles.append(parameter.register_hook(weight.mul))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def spared(model: nn.Module) -> Iterator[None]:
    """Gradients that are made meanwhile leave those of before alone."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def freeze(
    optimizer: Optimizer, owner: Owner, masked: Callable[[], Tensor | None]
) -> list[RemovableHandle]:
    """Let entries of masked parts that have no gradient stay where they are, momentum and all.

    Args:
        optimizer: whose steps are watched.
        owner: of a parameter, the part of its entries.
        masked: says at each step which parts are, bool `[parts]`; None is none.

    Returns:
        The handles of the hooks.
    """
    frozen: list[tuple[Tensor, Tensor | None, Tensor, dict[str, Tensor]]] = []

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if (parts := masked()) is None or not parts.any():
            return
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if (gradient := parameter.grad) is None:
                continue
            still = parts.to(gradient.device)[owner(parameter)]
            if still.all() and not gradient.any():
                parameter.grad = None  # no optimizer touches it
                frozen.append((parameter, gradient, still, {}))
            elif still.any():
                still = still & (gradient == 0)
                state = dict(_like(parameter, optimizer.state.get(parameter, {})))
                kept = {name: value[still] for name, value in state.items()}
                frozen.append((parameter, None, still, {"": parameter.detach()[still], **kept}))

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            while frozen:
                parameter, gradient, still, kept = frozen.pop()
                if gradient is not None:
                    parameter.grad = gradient
                    continue
                parameter[still] = kept[""]
                for name, value in _like(parameter, optimizer.state[parameter]):
                    value[still] = kept.get(name, 0)

    return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]


def _like(parameter: Tensor, state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """What an optimizer holds for each entry of a parameter: momentum, say."""
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            yield name, value
