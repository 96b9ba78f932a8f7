"""Checkpoints: atomic, resumable, pickle-free.

A checkpoint is a pair of files, `update_N.safetensors` and `update_N.json`. Each is written under
another name, flushed to disk and renamed; the JSON comes last, so a pair with both is complete. It
is never written again. The JSON holds checksums of the tensors and of itself.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import safetensors
import safetensors.torch
import torch
from pydantic import TypeAdapter
from torch import Tensor

from oversight_rl.agents.methods import METHODS
from oversight_rl.agents.networks import Agent, new_agent
from oversight_rl.agents.steering import Steering
from oversight_rl.config import Config
from oversight_rl.envs.settings import UserError
from oversight_rl.envs.world import BEHAVIORS
from oversight_rl.files import as_text, check_plain, read_json, write_atomically, writing

if TYPE_CHECKING:
    from oversight_rl.agents.ppo.policy import MoEPolicy

AnyAgent: TypeAlias = "Agent | MoEPolicy"
POLICY = "oversight_rl_policy"  # metadata key of an exported policy
KEEP = 2  # newest checkpoints left in a folder: runs of one stack may be one apart
MOST_TEXT = 2**20  # bytes of a checkpoint's JSON, and of a safetensors file's header
_STEERING = TypeAdapter(Steering)  # checks the types of what is read
_FILE = re.compile(r"update_([0-9]{8,12})\.(?:json|safetensors)(?:\.tmp)?")


def save(
    folder: Path, update: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Save a checkpoint, unless it is there, and drop all but the newest few.

    Args:
        folder: to write it to, made if need be; the run folder around it must be there.
        update: that it was taken after.
        tensors: by name.
        facts: what else there is to remember, for `load`.
    """
    folder.mkdir(exist_ok=True)
    if update not in updates(folder):
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        content = {"update": update} | dict(facts) | {"checksums": checksums(ready)}
        content["checksum"] = _checksum(json.dumps(content).encode())
        path = folder / f"update_{update:08d}.safetensors"
        write_atomically(path, safetensors.torch.save(ready))
        write_atomically(path.with_suffix(".json"), json.dumps(content, indent=1).encode())
    _keep(folder, updates(folder)[-KEEP:])


def drop_after(folder: Path, update: int) -> None:
    """Drop the checkpoints that are newer than `update`, and what a kill left of others."""
    _keep(folder, [old for old in updates(folder) if old <= update][-KEEP:])


def _keep(folder: Path, kept: Sequence[int]) -> None:
    """Remove other checkpoints, and what a kill left of them; JSON files first."""
    for path in sorted(folder.glob("update_*"), key=lambda path: path.suffix != ".json"):
        match = _FILE.fullmatch(path.name)
        if match and (int(match[1]) not in kept or path.suffix == ".tmp"):
            path.unlink()


def updates(folder: Path) -> list[int]:
    """Updates with a complete checkpoint, oldest first."""
    names = {path.name for path in folder.glob("update_*")}
    found = [
        int(match[1])
        for name in names
        if name.endswith(".json")
        and (match := _FILE.fullmatch(name))
        and name.removesuffix("json") + "safetensors" in names
    ]
    return sorted(found)


def load(
    folder: Path, update: int, like: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint.

    Args:
        folder: of checkpoints.
        update: which one.
        like: tensors to read, with the shapes and types that they must have; on any device.

    Raises:
        UserError: a file is missing, damaged or not such a checkpoint.
    """
    path = folder / f"update_{update:08d}.json"
    check_plain(path)
    facts = read_json(path, MOST_TEXT)
    wanted = {"update": int, "env_steps": int, "wall_seconds": float, "checksums": dict}
    if not isinstance(facts, dict) or any(
        not isinstance(facts.get(name), kind) for name, kind in wanted.items()
    ):
        raise UserError(f"{path}: not of a checkpoint of this program")
    checksum = facts.pop("checksum", None)
    seconds = facts["wall_seconds"]
    if checksum != _checksum(json.dumps(facts).encode()) or facts["update"] != update:
        raise UserError(f"{path}: is damaged")
    if facts["env_steps"] < 0 or not (seconds >= 0 and math.isfinite(seconds)):
        raise UserError(f"{path}: not of a checkpoint of this program")
    tensors, _ = read_tensors(path.with_suffix(".safetensors"), like)
    _check(tensors, facts.pop("checksums"), path.with_suffix(".safetensors"))
    return tensors, facts


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """CRC-32 of each tensor's bytes, to notice damage."""
    return {
        name: _checksum(tensor.flatten().view(torch.uint8).numpy().data)
        for name, tensor in tensors.items()
    }


def _checksum(content: bytes | memoryview) -> int:
    return zlib.crc32(content)


def _check(tensors: Mapping[str, Tensor], wanted: Mapping[str, Any], source: Path) -> None:
    for name, found in checksums(tensors).items():
        if wanted.get(name) != found:
            raise UserError(f"{source}: is damaged: {name} is not as it was saved")


def read_tensors(
    path: Path, like: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, within the memory that `like` would take.

    Args:
        path: the file.
        like: tensors to read, with the shapes and types that they must have.

    Raises:
        UserError: the file is missing, damaged, of another kind or of other tensors.
    """
    check_plain(path)
    tensors = {}
    try:
        with path.open("rb") as raw:
            header = int.from_bytes(raw.read(8), "little")
            if header > MOST_TEXT:
                raise UserError(f"{path}: its header claims {header:,} bytes")
            # safetensors takes no name that is not UTF-8
            source = str(path) if as_text(path) == str(path) else f"/dev/fd/{raw.fileno()}"
            with safetensors.safe_open(source, framework="pt") as file:
                names = set(file.keys())
                for name, ours in like.items():
                    shape = tuple(file.get_slice(name).get_shape()) if name in names else None
                    _check_shape(name, shape, ours.shape, path)
                    tensors[name] = file.get_tensor(name)
                    kind = tensors[name].dtype
                    if kind != ours.dtype:
                        raise UserError(f"{path}: {name} is {kind}, not {ours.dtype}")
                return tensors, file.metadata() or {}
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def _check_shape(
    name: str, found: Sequence[int] | None, wanted: Sequence[int], source: Path
) -> None:
    if found is None or tuple(found) != tuple(wanted):
        was = "is missing" if found is None else f"has shape {tuple(found)}"
        raise UserError(
            f"{source}: does not fit its configuration: {name} {was}, expected {tuple(wanted)}"
        )


def _untrained(config: Config) -> Agent:
    return new_agent(config.agent, config.world.shape, config.method, 1)


def agent_like(config: Config, prefix: str = "agent.") -> dict[str, Tensor]:
    """The agent that a configuration describes, as tensors that take no memory."""
    if config.algo == "ppo":
        return {f"{prefix}{n}": p.detach() for n, p in new_policy(config).named_parameters()}
    with torch.device("meta"):
        agent = _untrained(config)
    return {f"{prefix}{name}": parameter[0] for name, parameter in agent.named_parameters()}


def deployed_prefix(config: Config) -> str:
    """What the names of the deployed agent's tensors begin with in a checkpoint."""
    if config.algo == "ppo":
        return "policy."
    return "agent." if METHODS[config.method].deploys == "last" else "selected.agent."


def new_policy(config: Config) -> MoEPolicy:
    """The policy of a PPO run, its parameters at random; the global random streams stay."""
    from oversight_rl.ppo_training import make_model

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        policy = make_model(config, envs=1).policy  # SB3 seeds them all
    random.setstate(states[0])
    np.random.set_state(states[1])
    return policy  # type: ignore[return-value]


def agent_from(
    tensors: Mapping[str, Tensor], config: Config, source: Path, prefix: str = "agent."
) -> AnyAgent:
    """The agent in a checkpoint's or a policy file's tensors.

    Raises:
        UserError: tensors are missing or do not fit the configuration.
    """
    for name, ours in agent_like(config, prefix).items():
        found = tensors.get(name)
        _check_shape(name, None if found is None else found.shape, ours.shape, source)
    agent = (
        new_policy(config)
        if config.algo == "ppo"
        else new_agent(config.agent, config.world.shape, config.method, 1)
    )
    with torch.no_grad():
        for name, parameter in agent.named_parameters():
            saved = tensors[f"{prefix}{name}"]
            parameter.copy_(saved.view_as(parameter))  # a stack of one run has one axis more
    return agent


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
    like = agent_like(source.config)
    parameters = source.agent.parameters()
    tensors = {  # a stack of one run has one axis more
        name: parameter.detach().view(tensor.shape).contiguous()
        for (name, tensor), parameter in zip(like.items(), parameters, strict=True)
    }
    about["checksums"] = checksums(tensors)
    content = safetensors.torch.save(tensors, metadata={POLICY: json.dumps(about)})
    with writing(path):
        write_atomically(path, content)


def read_policy(path: Path) -> Saved:
    """Read an exported policy.

    Raises:
        UserError: the file is missing, damaged or of another kind.
    """
    _, metadata = read_tensors(path, {})
    if POLICY not in metadata:
        raise UserError(f"{path}: neither a run folder nor an exported policy")
    try:
        about = json.loads(metadata[POLICY])
        config = Config.model_validate(about["config"])
        fields = about["steering"]
        for name in ("weights", "ablated"):
            fields[name] = None if fields[name] is None else tuple(fields[name])
        steering = _STEERING.validate_python(fields)
        facts = int(about["env_steps"]), float(about["wall_seconds"])
        wanted = dict(about["checksums"])
    except (
        *(ValueError, TypeError, KeyError, RecursionError, OverflowError),
        UserError,  # of its settings or its steering
    ) as error:
        raise UserError(f"{path}: not a readable policy ({error})") from None
    tensors, _ = read_tensors(path, agent_like(config))
    _check(tensors, wanted, path)
    agent = agent_from(tensors, config, path)
    weights = (0.0,) * agent.n_experts if steering.weights is None else steering.weights
    if len(weights) != agent.n_experts or not set(steering.ablated) <= set(range(agent.n_experts)):
        raise UserError(f"{path}: its steering does not fit its {agent.n_experts} experts")
    return Saved(agent, config, *facts, steering)
