"""Samples of a batch in groups, and what keeps them apart."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Losses = Callable[[nn.Module, Any], Tensor]
"""From a model and a batch of B samples to their losses `[B]`."""

ROUTER = "oversight_rl.agents.routing.router"  # whose hooks are known by it


def take(batch: Any, rows: Tensor, count: int) -> Any:
    """Some of a batch's samples; all its tensors have `count` of them.

    Raises:
        ValueError: it holds something else.
    """
    if isinstance(batch, Tensor) and batch.ndim and len(batch) == count:
        return batch[rows.to(batch.device)]
    if isinstance(batch, Mapping):
        return {name: take(value, rows, count) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)([take(value, rows, count) for value in batch])
    what = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
    raise ValueError(
        f"batch: expected tensors of {count} samples, or a tuple, list or dict of them, got {what}"
    )


def losses_of(loss_fn: Losses, model: nn.Module, batch: Any, count: int) -> Tensor:
    """Losses of a batch's samples, `[count]`.

    Raises:
        ValueError: they are not one for each.
    """
    losses = loss_fn(model, batch)
    if losses.shape != (count,):
        raise ValueError(
            f"loss_fn must return a loss for each of {count} samples, got {tuple(losses.shape)}"
        )
    return losses


def are_chances(ids: Tensor) -> bool:
    """Whether floats are chances of labels, which add up to 1, and not labels of positions."""
    within = ((ids >= 0) & (ids <= 1)).all()
    return bool(within & ((ids.double().sum(-1) - 1).abs() < 1e-2).all())


def owned(hook: Any, module: nn.Module) -> Any:
    """A router's hook that knows the module that it is for: copies of that have it, too."""
    hook.of = module
    return hook


def is_copy(module: nn.Module, hook: Any) -> bool:
    """Whether a module has a router's hook because it is a copy of another."""
    return not torch.compiler.is_compiling() and module is not hook.of


def refuse_unfit(model: nn.Module) -> None:
    """Refuse models whose compiled code knows no hooks that come later, and routed ones.

    Raises:
        ValueError: it is compiled, or has a router already.
    """
    for name, module in model.named_modules():
        what = repr(name) if name else "the model"
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(f"{what} is compiled already: make its router first")
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "__module__", None) != ROUTER:
                    continue
                if not is_copy(module, hook):
                    raise ValueError(f"{what} has a router already: close() it first")
                del hooks[key]  # which does nothing


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Its BatchNorms: in training, the samples of a batch have no gradients of their own."""
    kind = nn.modules.batchnorm._BatchNorm
    return {name: m for name, m in model.named_modules() if isinstance(m, kind)}


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Meanwhile, nothing is dropped."""
    dropouts = (nn.modules.dropout._DropoutNd, nn.MultiheadAttention, nn.RNNBase)
    before: list[tuple[Any, str, float]] = [
        (module, name, getattr(module, name))
        for module in model.modules()
        if isinstance(module, dropouts)
        for name in ("p", "dropout")
        if isinstance(getattr(module, name, None), float)
    ]
    for module, name, _ in before:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def gradients(model: nn.Module) -> list[Tensor]:
    """A copy of each parameter's gradient, zero where there is none."""
    return [
        torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for p in model.parameters()
        if p.requires_grad
    ]
