"""A router: which samples update which parts of a network, and which parts are on for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from oversight_rl.agents.routing.entries import Ablation, freeze, spared, weighted
from oversight_rl.agents.routing.fused import Units, Weigh, Weights, units_of, weigher
from oversight_rl.agents.routing.groups import (
    Losses,
    are_chances,
    batch_norms,
    gradients,
    is_copy,
    losses_of,
    owned,
    refuse_unfit,
    take,
    without_dropout,
)
from oversight_rl.agents.routing.layers import CONVOLUTIONS
from oversight_rl.agents.routing.partition import Partition
from oversight_rl.agents.routing.primitive import in_transform, route
from oversight_rl.agents.routing.regions import Region, Rule, check_given
from oversight_rl.agents.routing.surgery import without

Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)


class Router:
    """Weights the gradient, per sample and per part of a network.

    It is made before the model is compiled, and after it has been expanded. Hooks do its work, only
    `with router.labels(ids)`; `close()`, or leaving `with Router(...) as router`, takes them away.

    Args:
        model: any module, or one in `DistributedDataParallel`.
        regions: parts of it by name; what is in none is "rest".
        rules: by label, an int, what its samples update and what is switched off for them.
        on: "params": what the samples may update; gradients pass all parts as ever. "edges": the
            published form, where the weights are those of the gradients of regions' activations,
            hence of all that lies before them, and "rest" are the other units beside a region's.

    Raises:
        ValueError: a glob fits nothing, units go past the end, regions overlap, a rule names no
            region, or the model is compiled already.

    Source: arXiv 2410.04332; on parameters, with parts switched off, arXiv 2512.05648.
    """

    def __init__(
        self,
        model: nn.Module,
        regions: Mapping[str, Region],
        rules: Mapping[int, Rule],
        *,
        on: Literal["params", "edges"] = "params",
    ) -> None:
        if on not in ("params", "edges"):
            raise ValueError(f"on must be 'params' or 'edges', got {on!r}")
        check_given(regions, rules)
        self.model, self.regions, self.rules, self.on = model, dict(regions), dict(rules), on
        self._inner: nn.Module = model
        if isinstance(model, nn.parallel.DistributedDataParallel):
            self._inner = model.module
        refuse_unfit(model)
        self.partition = Partition(self._inner, regions)
        names = self.partition.names
        self._table = torch.tensor(  # [labels, parts]
            [rule.weights(names) for rule in rules.values()], dtype=torch.float64
        )
        self._kept = torch.tensor(  # [labels, parts], 0 where a part is switched off
            [[float(name not in rule.ablate) for name in names] for rule in rules.values()],
            dtype=torch.float64,
        )
        self._batch_norms = batch_norms(self._inner)
        self._labels = torch.tensor(list(rules))
        self._like = next(p for p in self._inner.parameters() if p.is_floating_point())
        self._refusals: list[str] = []  # why there is no single pass
        self._layers: dict[str, Weigh] = {}
        self._weights: Weights | None = None  # of the labels that are given
        self._on: Weights | None = None  # 0 where parts are off
        self._called = False
        self._updated: Tensor | None = None  # [parts], by samples since the last step
        self._stepped = False
        self._handles: list[RemovableHandle] = []
        self._optimizers: list[RemovableHandle] = []
        self._closed = False
        self._plan()
        self._install()

    # ---- one pass

    @contextmanager
    def labels(self, ids: Tensor) -> Iterator[None]:
        """While forward and backward passes run: the samples' labels.

        Args:
            ids: int or bool `[B]`, or `[B, T]` for the positions of sequences, whose activations
                begin with these axes; or chances `[B, labels]` or `[B, T, labels]`, floats in the
                order of the rules, which weight what the rules say.

        Raises:
            ValueError: a label is unknown, the shape does not fit activations, a layer's
                parameters cannot be weighted in one pass (use `backward`), BatchNorm couples
                samples, or no layer of the model was called.
        """
        self._refuse_closed()
        if self._refusals:
            raise ValueError(f"{self._refusals[0]}: use router.backward")
        self._refuse_batch_norm()
        chances = self._chances(ids)
        soft = ids.is_floating_point()
        if soft and bool((self._kept == 0).any()):
            raise ValueError("chances cannot switch parts off in one pass: use router.backward")
        before = self._weights, self._on
        self._weights = self._of(self._table, chances)
        self._on = self._of(self._kept, chances) if self._switches else None
        self._count(self._weights.table)
        self._called = not self._handles
        try:
            yield
        finally:
            self._weights, self._on = before
        if not self._called:
            raise ValueError(
                "labels: no routed layer of the model was called; a model that was compiled and "
                "called before its router was made keeps its old code: make the router first"
            )

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ValueError("the router is closed, and routes nothing: make another one")

    def _refuse_batch_norm(self) -> None:
        for name, module in self._batch_norms.items():
            if module.training:
                raise ValueError(
                    f"{name!r} is a {type(module).__name__}, which mixes the samples of a batch: "
                    "use GroupNorm or LayerNorm, or let it keep its statistics (eval())"
                )

    def _chances(self, ids: Tensor) -> Tensor:
        """Index of each label's rule `[*ids]`, or chances as they are."""
        if not isinstance(ids, Tensor):
            raise ValueError(f"labels must be a tensor, got {type(ids).__name__}")
        if not ids.numel():
            raise ValueError("labels are of no samples: leave empty batches out")
        like = self._like
        if self._labels.device != like.device or self._table.dtype != like.dtype:
            self._labels = self._labels.to(like.device)
            self._table, self._kept = self._table.to(like), self._kept.to(like)
        ids = ids.detach().to(like.device)
        if ids.is_floating_point():
            if not ids.ndim or ids.shape[-1] != len(self.rules):
                raise ValueError(
                    f"chances {tuple(ids.shape)} must have one for each of {len(self.rules)} labels"
                )
            if not in_transform() and not are_chances(ids):
                raise ValueError(
                    "chances must lie in [0, 1] and add up to 1 for each sample; labels are ints"
                )
            return ids.to(like.dtype)
        found, index = (ids[..., None] == self._labels).max(-1)
        if not in_transform() and not found.all():
            known = ", ".join(map(str, self.rules))
            raise ValueError(f"no rule for label {int(ids[~found][0])}; there are {known}")
        return index

    def _count(self, weights: Tensor) -> None:
        """Note which parts samples of weights `[..., parts]` update until the next step."""
        if not self._optimizers or in_transform():
            return
        updated = (weights != 0).flatten(0, -2).any(0)
        if self._updated is not None and not self._stepped:
            updated |= self._updated
        self._updated, self._stepped = updated, False

    def _masked(self) -> Tensor | None:
        """Parts that no sample has updated since the last step, `[parts]`; None if unlabeled."""
        self._stepped = True
        if self._updated is None:
            return None
        if self._inner is not self.model:
            updated = self._updated.int()
            torch.distributed.all_reduce(updated, torch.distributed.ReduceOp.MAX)
            return updated == 0
        return ~self._updated

    def _of(self, table: Tensor, chances: Tensor) -> Weights:
        """Rows of a table `[labels, parts]` for the labels."""
        soft = chances.is_floating_point()
        return Weights(chances @ table if soft else nn.functional.embedding(chances, table))

    # ---- a pass per group

    def backward(self, loss_fn: Losses, batch: Any, ids: Tensor) -> Tensor:
        """Accumulate the gradient of the mean loss; exact for any module.

        A forward and a backward pass for each group of samples of one label, whose gradient is
        weighted at the parameters. The samples of a batch must not depend on each other.

        Args:
            loss_fn: losses `[b]` of a model and the part of a batch that a group is.
            batch: tensors whose first axis is the samples, or a tuple, list or dict of them.
            ids: labels `[B]`, or chances `[B, labels]`; with these, samples are in each group
                that they may belong to, and also what is switched off is exact.

        Returns:
            The mean loss, detached.

        Raises:
            ValueError: a label is unknown, or a shape does not fit.
        """
        self._refuse_closed()
        self._refuse_batch_norm()
        chances = self._chances(ids)
        if chances.ndim != 1 + ids.is_floating_point():
            raise ValueError(f"backward: labels {tuple(ids.shape)} must be of samples, [B]")
        if self.on == "edges":
            with self.labels(ids):
                loss = losses_of(loss_fn, self.model, batch, len(ids)).mean()
                loss.backward()
            return loss.detach()
        if not ids.is_floating_point():
            chances = nn.functional.one_hot(chances, len(self.rules))
        groups = [
            (rule, weights, chance.nonzero()[:, 0], chance)
            for rule, weights, chance in zip(
                self.rules.values(), self._table, chances.T, strict=True
            )
            if chance.any()
        ]
        self._count(torch.stack([weights for _, weights, _, _ in groups]))
        total = torch.zeros(())
        for left, (rule, weights, rows, chance) in enumerate(groups, start=1 - len(groups)):
            with ExitStack() as stack:
                if left and self._inner is not self.model:  # one exchange between processes
                    stack.enter_context(self.model.no_sync())  # type: ignore[operator]
                stack.enter_context(self.ablate(*rule.ablate))
                stack.enter_context(weighted(self._inner, self.partition.of, weights))
                losses = losses_of(loss_fn, self.model, take(batch, rows, len(ids)), len(rows))
                loss = (losses * chance[rows].to(losses)).sum() / len(ids)
                loss.backward()
                total = total.to(loss.device) + loss.detach()
        return total

    # ---- what goes with it

    def optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Let entries that are masked for every sample stay where they are.

        Momentum and weight decay move what has no gradient, too. With this, parts that no sample
        has updated since the last step do not move, and their momentum stays.

        Returns:
            The optimizer itself.

        Raises:
            ValueError: it holds parameters that are not the model's, or no longer.
        """
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self.partition.of(parameter)
        self._optimizers += freeze(optimizer, self.partition.of, self._masked)
        return optimizer

    def ablate(self, *names: str) -> Ablation:
        """Switch regions off: their parameters are zero from now on.

        Returns:
            What puts them back, by `restore()` or at the end of a `with`.
        """
        return Ablation(self._inner, self.partition, names)

    def contract(self, *names: str) -> nn.Module:
        """A copy of the model without regions, whose output is that of the ablated model.

        Raises:
            ValueError: a region is not made of hidden units of MLPs and of adapters alone.
        """
        self._remove_hooks()
        try:
            return without(self._inner, self.partition, names)
        finally:
            self._install()

    def check(self, loss_fn: Losses, batch: Any, ids: Tensor) -> float:
        """Compare the gradient that routing gives with one that is summed sample by sample.

        It checks `labels` where that serves the model, else `backward`; dropout is off meanwhile.

        Args:
            loss_fn: losses `[b]` of a model and a batch, as for `backward`.
            batch: as for `backward`.
            ids: labels `[B]`.

        Returns:
            The largest difference, as a share of the largest entry of the gradient: some 1e-15 in
            float64 and 1e-6 in float32 if the routes are what the rules say.
        """
        index = self._chances(ids)
        if index.ndim != 1 or ids.is_floating_point():
            raise ValueError(f"check: labels {tuple(ids.shape)} must be of samples, ints [B]")
        with without_dropout(self._inner), spared(self._inner):
            if self._refusals:
                self.backward(loss_fn, batch, ids)
            else:
                with self.labels(ids):
                    losses_of(loss_fn, self.model, batch, len(ids)).mean().backward()
            routed = gradients(self._inner)
            expected = [torch.zeros_like(gradient) for gradient in routed]
            for row, label in enumerate(index.tolist()):
                self._inner.zero_grad()
                sample = take(batch, torch.tensor([row]), len(ids))
                with ExitStack() as stack:
                    if self.on == "edges":
                        stack.enter_context(self.labels(ids[row : row + 1]))
                    else:
                        rule = [*self.rules.values()][label]
                        stack.enter_context(self.ablate(*rule.ablate))
                        of = self.partition.of
                        stack.enter_context(weighted(self._inner, of, self._table[label]))
                    losses_of(loss_fn, self.model, sample, 1).sum().backward()
                for total, gradient in zip(expected, gradients(self._inner), strict=True):
                    total += gradient / len(ids)
        pairs = zip(routed, expected, strict=True)
        difference = max(float((a - b).abs().max()) for a, b in pairs)
        largest = max(float(gradient.abs().max()) for gradient in expected)
        return difference / largest if largest else difference

    def close(self) -> None:
        """Take all hooks away, those of optimizers too."""
        self._closed = True
        self._remove_hooks()
        while self._optimizers:
            self._optimizers.pop().remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- hooks

    def _plan(self) -> None:
        """Which layers' gradients are weighted, and where activations are, by hooks."""
        varies = (self._table != 1).any(0).tolist()
        off = (self._kept == 0).any(0).tolist()
        switches, silent = self.partition.switches()
        for part, parameter in silent.items():
            if off[part]:
                self._refusals.append(f"{parameter!r} is switched off")
        self._switches = _spots(switches, off)
        self._edges: dict[tuple[str, str], Units] = {}
        if self.on == "edges":
            self._plan_edges(varies)
            return
        for name, module in self._inner.named_modules():
            own = dict(module.named_parameters(recurse=False))
            owner = {key: self.partition.of(parameter) for key, parameter in own.items()}
            weigh = weigher(name, module, owner, varies)
            if isinstance(weigh, str):
                self._refusals.append(weigh)
            elif weigh is not None:
                self._layers[name] = weigh

    def _plan_edges(self, varies: list[bool]) -> None:
        for name, region in self.regions.items():
            if region.params:
                raise ValueError(
                    f"on='edges' weights activations, which the parameters of region {name!r} "
                    "are not: give it units or heads"
                )
        self._edges = _spots(self.partition.spots, varies)

    def _install(self) -> None:
        for name, module in self._inner.named_modules():
            before, after = ((name, side) for side in ("in", "out"))
            if before in self._switches or before in self._edges:
                hook = owned(self._input_hook(before), module)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            if name in self._layers or after in self._switches or after in self._edges:
                hook = owned(self._output_hook(after, self._layers.get(name)), module)
                self._handles.append(  # first: what the user's hooks do comes after the layer
                    module.register_forward_hook(hook, prepend=True, with_kwargs=True)
                )

    def _remove_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _input_hook(self, spot: tuple[str, str]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if self._weights is None or is_copy(module, hook):
                return None
            self._called = True
            if not args:
                name, x = next(iter(kwargs.items()))
                return args, {**kwargs, name: self._pass(x, spot, module)}
            return (self._pass(args[0], spot, module), *args[1:]), kwargs

        return hook

    def _output_hook(self, spot: tuple[str, str], weigh: Weigh | None) -> Callable[..., Any]:
        passes = spot in self._switches or spot in self._edges

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            if self._weights is None or is_copy(module, hook):
                return None
            self._called = True
            if weigh is not None and torch.is_grad_enabled():
                x = args[0] if args else next(iter(kwargs.values()))
                output = weigh(module, x, output, self._weights)
            return self._pass(output, spot, module) if passes else output

        return hook

    def _pass(self, activation: Tensor, spot: tuple[str, str], module: nn.Module) -> Tensor:
        """Activations with what is switched off, or with their gradient weighted."""
        first = isinstance(module, CONVOLUTIONS)
        if spot in self._edges and self._weights is not None:
            weights = self._weights.units(self._edges[spot], activation, spot[0], first)
            activation = route(activation, weights.expand_as(activation))
        if spot in self._switches and self._on is not None:
            activation = activation * self._on.units(
                self._switches[spot], activation, spot[0], first
            )
        return activation


def _spots(
    spots: Mapping[tuple[str, str], Tensor], concerned: Sequence[bool]
) -> dict[tuple[str, str], Units]:
    """The spots where activations of parts that are concerned pass, `concerned` by part."""
    units = {spot: units_of(owner) for spot, owner in spots.items()}
    return {spot: at for spot, at in units.items() if any(concerned[part] for part, _ in at)}
