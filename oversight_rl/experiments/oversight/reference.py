"""Import policies of the paper's published code."""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from oversight_rl.agents.methods import METHODS
from oversight_rl.agents.settings import AgentConfig
from oversight_rl.envs.settings import PLANES, UserError, WorldConfig
from oversight_rl.experiments.oversight.config import Config
from oversight_rl.experiments.oversight.grid import GridRuns
from oversight_rl.experiments.oversight.policies import PREFIX, fill
from oversight_rl.files import writing
from oversight_rl.runs import checkpoint
from oversight_rl.runs.folder import RunFolder

Tensors: TypeAlias = dict[str, Tensor]
EXPERTS = ("diamond_expert.1", "ghost_expert.1")  # in the order of our experts
MOST_PROGRAM = 2**20  # bytes of the pickle in a state dict, of which tensors are no part
SINGLE, HEAD = "neural_net.1.1", "shared_output"
GATE, GATE_CONV, FIXED_GATE = "gating.2", "gating.0", "gating.fake_param"


def import_state_dict(
    source: Path, run_dir: Path, oversight: float, method: str | None = None, seed: int = 0
) -> RunFolder:
    """Write a run folder with the policy in a state dict of the published code.

    The value net is not part of the published policy; it is left at zero. A method that is not
    given is `naive` for one expert, `no_gate` for a constant gate, else `routing`. Loading executes
    nothing and accepts tensors only; `UserError` if the file or a setting is not what it should be.
    """
    state = _read(source)
    single = f"{SINGLE}.layers.0.weight" in state
    learned = not single and FIXED_GATE not in state
    trunks = [SINGLE] if single else [*EXPERTS, *([GATE] if learned else [])]

    def take(name: str) -> Tensor:
        if name not in state:
            raise UserError(f"{source}: not a policy of the published code: no key {name!r}")
        if state[name].ndim == 0 or not state[name].isfinite().all():
            raise UserError(f"{source}: {name} must hold finite numbers")
        return state[name].float()

    first = take(f"{trunks[0]}.layers.0.weight")
    side = math.isqrt(first.shape[-1] // len(PLANES)) if first.ndim == 2 else 0
    if not side or side * side * len(PLANES) != first.shape[1]:
        raise UserError(
            f"{source}: {trunks[0]}.layers.0.weight has shape {tuple(first.shape)}, not the "
            f"{len(PLANES)} planes of a square grid"
        )
    hidden = len(first), len(take(f"{trunks[0]}.layers.1.weight"))
    config = Config(
        method=method or ("naive" if single else "routing" if learned else "no_gate"),
        oversight=oversight,
        seeds=(seed,),
        world=WorldConfig(rows=side, cols=side),
        agent=AgentConfig(hidden=hidden, value_activation="none", gate_conv=learned),
    )
    made_by = METHODS[config.method].policy
    if (made_by.experts == "one") != single or (
        not single and (made_by.gate == "learned") != learned
    ):
        raise UserError(f"method: {config.method} does not train the networks in {source}")
    return _write(source, run_dir, config, _renamed(source, trunks, take))


def _renamed(source: Path, trunks: Sequence[str], take: Callable[[str], Tensor]) -> Tensors:
    """The published tensors by our names; `trunks` are experts, and the gate if it learns."""
    tensors = {}
    for kind in ("weight", "bias"):
        for i in range(2):
            parts = [take(f"{trunk}.layers.{i}.{kind}") for trunk in trunks]
            if len({part.shape for part in parts}) > 1:
                raise UserError(f"{source}: {', '.join(trunks)} differ in their layers' shapes")
            tensors[f"trunks.{i}.{kind}"] = torch.stack(parts)
        single = trunks == [SINGLE]
        tensors[f"head.{kind}"] = take(f"neural_net.2.{kind}" if single else f"{HEAD}.{kind}")
        if GATE in trunks:
            tensors[f"gate_out.{kind}"] = take(f"{GATE}.layers.2.{kind}")
            convolution = take(f"{GATE_CONV}.{kind}")  # [out, in, 1, 1] and [out]
            tensors[f"gate_conv.{kind}"] = convolution.flatten(1 if kind == "weight" else 0)
    return tensors


def _write(source: Path, run_dir: Path, config: Config, tensors: Tensors) -> RunFolder:
    """A run folder with an agent of these parameters; those of the value net are zero."""

    def load(like: Mapping[str, Tensor]) -> tuple[Tensors, None]:
        for name, ours in like.items():
            found = tensors.get(name.removeprefix(PREFIX))
            if found is None and ".value_layers." in name:
                tensors[name.removeprefix(PREFIX)] = torch.zeros(ours.shape)
            else:
                shape = None if found is None else found.shape
                checkpoint.check_shape(name, shape, ours.shape, source)
        return {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}, None

    fill(config, PREFIX, load)  # refuses what does not fit
    prefix = GridRuns.prefix(config)
    origin = f"{source.name}: training settings not named in it are this program's defaults"
    folder = RunFolder.create(run_dir, config, imported=origin)
    facts = {"env_steps": 0, "wall_seconds": 0.0, "imported": True}
    with writing(run_dir):
        named = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
        checkpoint.save(folder.checkpoints, 0, named, facts)
    return folder


def _read(source: Path) -> dict[str, Tensor]:
    """The tensors in a file that torch saved, none larger than the file itself."""
    try:
        size = source.stat().st_size
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
        # stored as they are, so that nothing unpacks to more than the file; the program that puts
        # the tensors together is short; read in place, so that no claim of a size takes memory
        if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or any(
            e.file_size > MOST_PROGRAM for e in entries if e.filename.endswith("data.pkl")
        ):
            raise ValueError
        with warnings.catch_warnings(action="ignore"):  # of odd pickles, which are refused
            state = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise UserError(f"{source}: cannot read the file ({error.strerror})") from None
    except Exception:  # whatever a damaged archive or program makes zipfile and torch raise
        raise UserError(f"{source}: not a state dict of tensors saved by torch") from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise UserError(f"{source}: expected a dictionary of tensors")
    for name, tensor in state.items():
        if (
            tensor.layout != torch.strided
            or not tensor.is_floating_point()
            or tensor.device.type != "cpu"
            or tensor.numel() * tensor.element_size() > size
        ):
            raise UserError(f"{source}: {name} must hold plain numbers, no more than the file has")
    return {name: tensor.detach().clone() for name, tensor in state.items()}
