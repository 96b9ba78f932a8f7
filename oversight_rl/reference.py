"""Import policies of the paper's published code."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import torch
from torch import Tensor

from agents.networks import AgentConfig
from envs.settings import UserError
from envs.world import PLANES, WorldConfig
from oversight_rl import checkpoint
from oversight_rl.config import Config
from oversight_rl.tracking import RunFolder

EXPERTS = ("diamond_expert.1", "ghost_expert.1")  # in the order of our experts
SINGLE, FIXED_GATE = "neural_net.1.1", "gating.fake_param"


def import_state_dict(
    source: Path, run_dir: Path, oversight: float, method: str | None = None, seed: int = 0
) -> RunFolder:
    """Write a run folder with the policy in a state dict of the published code.

    The value net is not part of the published policy; it is left at zero.

    Args:
        source: a state dict saved by torch; loading executes nothing and accepts tensors only.
        run_dir: new or empty.
        oversight: level that it was trained at.
        method: None: `naive` for one expert, `no_gate` for a constant gate, else `routing`.
        seed: recorded.

    Raises:
        UserError: the file or a setting is not what it should be.
    """
    state = _read(source)
    single = f"{SINGLE}.layers.0.weight" in state
    renamed = _single(state, source) if single else _mixture(state, source)
    guess = "naive" if single else ("no_gate" if FIXED_GATE in state else "routing")
    hidden, inputs = renamed["experts.0.layers.0.weight"].shape
    side = math.isqrt(inputs // len(PLANES))
    if side * side * len(PLANES) != inputs:
        raise UserError(f"{source}: {inputs} inputs are not {len(PLANES)} planes of a square grid")
    outputs = renamed["experts.0.layers.1.weight"].shape[0]
    config = Config(
        method=method or guess,
        oversight=oversight,
        seeds=(seed,),
        world=WorldConfig(rows=side, cols=side),
        agent=AgentConfig(
            hidden=(hidden, outputs), value_hidden=(1,), gate_conv="gate.conv.weight" in renamed
        ),
    )
    for name, parameter in checkpoint.new_agent(config, 1).named_parameters():
        if name.startswith("value_net."):
            renamed[name] = torch.zeros(parameter.shape[1:])
    tensors = {f"agent.{name}": tensor.float() for name, tensor in renamed.items()}
    checkpoint.agent_from(tensors, config, source)  # refuses what does not fit
    folder = RunFolder.create(run_dir, config)
    facts = {"env_steps": 0, "wall_seconds": 0.0, "imported": True}
    checkpoint.save(folder.checkpoints, 0, tensors, facts)
    folder.close()
    return folder


def _read(source: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{source}: cannot read the file ({error.strerror})") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        raise UserError(f"{source}: not a state dict of tensors saved by torch") from None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{source}: expected a dictionary of tensors")
    return state


def _take(state: dict[str, Tensor], name: str, source: Path) -> Tensor:
    if name not in state:
        raise UserError(f"{source}: not a policy of the published code: no key {name!r}")
    return state[name]


def _layers(
    state: dict[str, Tensor], old: str, new: str, count: int, source: Path
) -> dict[str, Tensor]:
    return {
        f"{new}.layers.{i}.{kind}": _take(state, f"{old}.layers.{i}.{kind}", source)
        for i in range(count)
        for kind in ("weight", "bias")
    }


def _single(state: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    renamed = _layers(state, SINGLE, "experts.0", 2, source)
    return renamed | {
        f"head.{kind}": _take(state, f"neural_net.2.{kind}", source) for kind in ("weight", "bias")
    }


def _mixture(state: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    renamed = {
        f"head.{kind}": _take(state, f"shared_output.{kind}", source) for kind in ("weight", "bias")
    }
    for k, expert in enumerate(EXPERTS):
        renamed |= _layers(state, expert, f"experts.{k}", 2, source)
    if FIXED_GATE not in state:
        renamed |= _layers(state, "gating.2", "gate.mlp", 3, source)
        renamed["gate.conv.weight"] = _take(state, "gating.0.weight", source).flatten(1)
        renamed["gate.conv.bias"] = _take(state, "gating.0.bias", source)
    return renamed
