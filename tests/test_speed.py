"""What speed depends on: no waiting within an update, and a benchmark that runs."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from oversight_rl.agents.methods import METHODS
from oversight_rl.agents.reinforce import collect
from oversight_rl.agents.reinforce.learner import ReinforceLearner
from oversight_rl.agents.settings import AgentConfig, ReinforceConfig
from oversight_rl.envs.overseers import Overseer
from oversight_rl.envs.settings import WorldConfig
from oversight_rl.experiments.oversight.config import Config

TINY = {
    "world": WorldConfig(rows=3, cols=3, max_steps=6),
    "agent": AgentConfig(hidden=(8, 8)),
    "device": "cpu",
}


@pytest.mark.parametrize("method", METHODS)
def test_an_update_neither_reads_a_number_nor_copies_one_to_the_device(monkeypatch, method):
    """As on a GPU, where equal states are not merged; the host would wait there for either.

    Fake tensors have no values: whatever depends on one, be it only a shape, raises.
    """
    monkeypatch.setattr(collect, "MOST_KEYS", 0)
    learner = ReinforceLearner(
        ReinforceConfig(updates=6, worlds=16, steps=8),
        TINY["agent"],
        TINY["world"],
        [method] * 2,
        [Overseer(0.1)] * 2,
        range(2),
    )
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.delattr(torch, name)
    with FakeTensorMode(allow_non_fake_inputs=True):
        learner.update()
        learner.numbers()


def test_the_benchmark_measures_all_figures(monkeypatch, tmp_path):
    path = Path(__file__).parent.parent / "benchmarks" / "speed.py"
    spec = importlib.util.spec_from_file_location("speed", path)
    speed = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "speed", speed)
    spec.loader.exec_module(speed)

    def tiny(preset, method, device, **training):
        learner = ReinforceConfig(updates=10, worlds=16, steps=4)
        return Config(method=method, reinforce=learner, pictures=False, **TINY)

    monkeypatch.setattr(speed, "config", tiny)
    monkeypatch.setattr(speed, "QUALITY", -1.0)
    command = ["speed.py", "--quick", "--stacks", "1", "16", "--json", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", command)
    speed.main()
    figures = json.loads((tmp_path / "x.json").read_text())
    assert {
        "gemm_gflops",
        "update_over_floor_routing",
        "update_over_floor_naive",
        "world_steps_per_second_4096",
        "stack_cost_ratio_16",
        "time_to_quality_seconds",
        "evaluation_seconds",
        "peak_memory_mib",
    } <= set(figures)
    assert all(value > 0 for name, value in figures.items() if not name.startswith("share"))
