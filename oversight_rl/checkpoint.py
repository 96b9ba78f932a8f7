"""Checkpoints: atomic, resumable, pickle-free.

A checkpoint is a pair of files, `update_N.safetensors` and `update_N.json`. Each is written under
another name, flushed to disk and renamed; the JSON comes last, so a pair with both is complete.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from agents.methods import METHODS
from agents.networks import Agent
from agents.steering import Steering
from envs.settings import UserError
from envs.world import ACTIONS, BEHAVIORS
from oversight_rl.config import Config

if TYPE_CHECKING:
    from agents.ppo import MoEPolicy

AnyAgent: TypeAlias = "Agent | MoEPolicy"
POLICY = "oversight_rl_policy"  # metadata key of an exported policy
KEEP = 2  # newest checkpoints left in a folder: runs of one stack may be one apart


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is either there as a whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(
    folder: Path, update: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> Path:
    """Save a checkpoint and drop all but the newest few; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"update_{update:08d}.safetensors"
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, safetensors.torch.save(ready))
    content = json.dumps({"update": update} | dict(facts), indent=1)
    write_atomically(path.with_suffix(".json"), content.encode())
    for old in updates(folder)[:-KEEP]:
        stale = folder / f"update_{old:08d}.safetensors"
        stale.with_suffix(".json").unlink()
        stale.unlink()
    return path


def updates(folder: Path) -> list[int]:
    """Updates with a complete checkpoint, oldest first."""
    found = [
        int(path.stem.removeprefix("update_"))
        for path in folder.glob("update_*.json")
        if path.stem.removeprefix("update_").isdigit() and path.with_suffix(".safetensors").exists()
    ]
    return sorted(found)


def load(folder: Path, update: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint.

    Raises:
        UserError: a file is missing, damaged or not a checkpoint.
    """
    path = folder / f"update_{update:08d}.safetensors"
    tensors, _ = read_tensors(path)
    try:
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path.with_suffix('.json')}: not a readable checkpoint ({error})"
        ) from None
    wanted = {"update": int, "env_steps": int, "wall_seconds": float}
    if not isinstance(facts, dict) or any(
        not isinstance(facts.get(name), kind) for name, kind in wanted.items()
    ):
        raise UserError(f"{path.with_suffix('.json')}: not of a checkpoint of this program")
    return tensors, facts


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        UserError: the file is missing, damaged or of another kind.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def new_agent(
    config: Config, runs: int, generators: Sequence[torch.Generator] | None = None
) -> Agent:
    """A stack of agents as a configuration wants them, drawn from `generators` if given."""
    method = METHODS[config.method]
    return Agent(
        config.agent,
        config.world.shape,
        len(ACTIONS),
        runs,
        method.experts,
        method.gate,
        generators,
    )


def take_run(agent: Agent, config: Config, run: int) -> Agent:
    """A copy of one run of a stack, on the CPU."""
    single = new_agent(config, 1)
    parameters = {name: p[run : run + 1].cpu() for name, p in agent.state_dict().items()}
    single.load_state_dict(parameters)
    return single


def agent_from(tensors: Mapping[str, Tensor], config: Config, source: Path) -> AnyAgent:
    """The agent in a checkpoint's or a policy file's tensors: the deployed one.

    Raises:
        UserError: tensors are missing or do not fit the configuration.
    """
    if config.algo == "ppo":
        policy = new_policy(config)
        fill({f"policy.{n}": p for n, p in policy.named_parameters()}, tensors, source)
        return policy
    agent = new_agent(config, 1)
    selected = "selected." if any(name.startswith("selected.agent.") for name in tensors) else ""
    fill({f"{selected}agent.{n}": p[0] for n, p in agent.named_parameters()}, tensors, source)
    return agent


def fill(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], source: Path) -> None:
    """Copy saved tensors into those of the same names.

    Raises:
        UserError: one is missing or has another shape.
    """
    for name, tensor in ours.items():
        found = theirs.get(name)
        if found is None or found.shape != tensor.shape:
            was = "is missing" if found is None else f"has shape {tuple(found.shape)}"
            raise UserError(
                f"{source}: does not fit its configuration: {name} {was}, expected "
                f"{tuple(tensor.shape)}"
            )
        with torch.no_grad():
            tensor.copy_(found)


def new_policy(config: Config) -> MoEPolicy:
    """The policy of a PPO run, its parameters at random."""
    from oversight_rl.ppo_training import make_model

    return make_model(config, envs=1).policy  # type: ignore[return-value]


@dataclass(frozen=True)
class Saved:
    """An agent read from disk."""

    agent: AnyAgent
    config: Config
    env_steps: int
    wall_seconds: float
    steering: Steering | None = None  # of an exported policy

    @property
    def behaviors(self) -> Sequence[str]:
        """What its first experts are meant for."""
        return BEHAVIORS if isinstance(self.agent, Agent) else self.agent.behaviors


def write_policy(path: Path, steering: Steering, source: Saved) -> None:
    """Export a steered agent to one safetensors file, for `read_policy` and `evaluate`.

    Raises:
        UserError: the file cannot be written.
    """
    about = {
        "config": source.config.model_dump(mode="json"),
        "steering": dataclasses.asdict(steering),
        "env_steps": source.env_steps,
        "wall_seconds": source.wall_seconds,
    }
    named = source.agent.named_parameters()
    if isinstance(source.agent, Agent):
        tensors = {f"agent.{name}": p.detach()[0].contiguous() for name, p in named}
    else:
        tensors = {f"policy.{name}": p.detach().contiguous() for name, p in named}
    content = safetensors.torch.save(tensors, metadata={POLICY: json.dumps(about)})
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot write there ({error.strerror})") from None


def read_policy(path: Path) -> Saved:
    """Read an exported policy.

    Raises:
        UserError: the file is missing, damaged or of another kind.
    """
    tensors, metadata = read_tensors(path)
    if POLICY not in metadata:
        raise UserError(f"{path}: neither a run folder nor an exported policy")
    try:
        about = json.loads(metadata[POLICY])
        config = Config.model_validate(about["config"])
        fields = about["steering"]
        for name in ("weights", "ablated"):
            fields[name] = None if fields[name] is None else tuple(fields[name])
        steering = Steering(**fields)
        facts = int(about["env_steps"]), float(about["wall_seconds"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a readable policy ({error})") from None
    return Saved(agent_from(tensors, config, path), config, *facts, steering)
