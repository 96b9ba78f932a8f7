"""What gradient routing costs, as ratios to plain training measured in turns in one run.

`python benchmarks/routing.py [--quick] [--json FILE]`. A step is forward, backward and AdamW.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from oversight_rl.agents.routing import Region, Router, Rule, expand
from oversight_rl.experiments.unlearning.model import LanguageModel


def transformer() -> nn.Module:
    """A small language model, of 72,000 parameters."""
    return LanguageModel(268, 40, width=48, hidden=128, heads=4, layers=2)


def next_word(model: nn.Module, ids: Tensor) -> Tensor:
    """Losses of stories, `[B]`."""
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


@dataclass(frozen=True)
class Arguments:
    """Measure what routing costs."""

    json: Path | None = None
    """File to write the figures to, as one flat object."""
    quick: bool = False
    """A tenth of the measurements."""


@dataclass(frozen=True)
class Case:
    """A model to train, and how."""

    model: nn.Module
    region: Region
    loss_fn: Callable[[nn.Module, Any], Tensor]
    batch: Any


def stories() -> Case:
    model = transformer()
    region = expand(model, "blocks.*.mlp", units=32)
    return Case(model, region, next_word, torch.randint(0, 268, (32, 33)))


def mlp() -> Case:
    layers = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    batch = torch.randn(512, 64), torch.randint(0, 10, (512,))

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y, reduction="none")

    return Case(nn.Sequential(*layers), Region(units={"2": slice(192, 256)}), loss_fn, batch)


RULES = {
    "forget updates its part alone": {0: Rule(["rest"]), 1: Rule(["part"])},
    "and runs without it otherwise": {0: Rule(["rest"], ablate=["part"]), 1: Rule(["part"])},
}


def steps(case: Case) -> dict[str, Callable[[], None]]:
    """A training step of each kind, of models of their own."""

    def step(kind: str, rules: dict[int, Rule] | None, on: Any, mask: bool) -> Callable[[], None]:
        model = copy.deepcopy(case.model)
        count = len(case.batch[0]) if isinstance(case.batch, tuple) else len(case.batch)
        ids = torch.arange(count) % 5 == 0  # a fifth is to be forgotten
        router = Router(model, {"part": case.region}, rules, on=on) if rules else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        if router and mask:
            router.optimizer(optimizer)

        def run() -> None:
            optimizer.zero_grad()
            if router is None:
                case.loss_fn(model, case.batch).mean().backward()
            elif kind == "backward":
                router.backward(case.loss_fn, case.batch, ids)
            else:
                with router.labels(ids):
                    case.loss_fn(model, case.batch).mean().backward()
            optimizer.step()

        return run

    first, second = RULES.values()
    return {
        "plain": step("plain", None, "params", False),
        "labels": step("labels", first, "params", False),
        "labels, masked optimizer": step("labels", first, "params", True),
        "labels, parts off": step("labels", second, "params", False),
        "labels, on edges": step("labels", first, "edges", False),
        "backward": step("backward", first, "params", False),
    }


def measure(case: Case, turns: int) -> dict[str, np.ndarray]:
    """CPU seconds of steps, by kind: in turns of ten, since training finds its caches warm.

    CPU time, since others on the machine count for less in it.
    """
    kinds = steps(case)
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(turns):
        for name, step in kinds.items():
            step()
            start = time.thread_time()
            for _ in range(10):
                step()
            times[name].append((time.thread_time() - start) / 10)
    return {name: np.array(values) for name, values in times.items()}


def main() -> None:
    arguments = tyro.cli(Arguments)
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    table = Table("a step of AdamW", "story transformer", "MLP 256", box=box.SIMPLE)
    measured = [measure(make(), 5 if arguments.quick else 40) for make in (stories, mlp)]
    for kind in measured[0]:
        cells = []
        for name, times in zip(("stories", "mlp"), measured, strict=True):
            ratio = times[kind] / times["plain"]
            figures[f"{name}, {kind}"] = float(np.median(ratio))
            milliseconds = 1000 * float(np.median(times[kind]))
            cells.append(f"{np.median(ratio):.2f} ({milliseconds:.2f} ms)")
        table.add_row(kind, *cells)
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
