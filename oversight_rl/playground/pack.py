"""An agent over training as few bytes, for a page.

Numbers are whole multiples of a step that each row of each tensor has, `STEPS` at most. The last
moment is kept as fine as that, as two bytes each; the moments before it are kept to multiples of
`COARSE` steps, as the difference to the moment that follows, which is small: a byte each. In this
order, deflated: the steps (32-bit floats), the low bytes and the high bytes of the last moment, the
differences from the last but one to the first. `unpack` in web/core.js reads them.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from oversight_rl.agents.networks import Agent, FirstLayer, Linear

STEPS = 1023
COARSE = 32


@dataclass(frozen=True)
class Packed:
    """What `unpack` reads."""

    data: str
    """Base64."""
    layout: list[tuple[str, list[int]]]
    """Names and shapes of the tensors, in order."""
    moments: int


def tensors_of(agent: Agent) -> dict[str, Tensor]:
    """The parameters of one run's agent, with what can be composed beforehand composed."""
    net = agent.prepare()
    layers: list[FirstLayer | Linear] = [net.first, *agent.trunks[1:]]
    found = {"head.bias": agent.head.bias, "out.weight": net.out_weight, "out.bias": net.out_bias}
    for depth, layer in enumerate(layers):
        found |= {f"trunk{depth}.weight": layer.weight, f"trunk{depth}.bias": layer.bias}
    if agent.affine_value:
        value = net.affine_value
        found |= {"value.weight": value.weight[:, 0], "value.bias": value.bias[:, 0]}
    return {name: tensor.detach()[0] for name, tensor in found.items()}


def pack(moments: Sequence[Mapping[str, Tensor]]) -> Packed:
    """Pack tensors of the same shapes at each of several moments."""
    layout = [(name, list(tensor.shape)) for name, tensor in moments[-1].items()]
    steps: list[NDArray[np.float32]] = []
    numbers: list[list[NDArray[np.int64]]] = [[] for _ in moments]
    for name, shape in layout:
        rows = [moment[name].reshape(-1, shape[-1]).double().numpy() for moment in moments]
        step = np.abs(rows).max(axis=(0, 2)) / STEPS
        step = np.where(step > 0, step, 1.0).astype(np.float32)
        steps.append(step)
        for own, row in zip(numbers, rows, strict=True):
            own.append(np.rint(row / step[:, None]).astype(np.int64).ravel())
    fine = [np.concatenate(own) for own in numbers]
    rough = [np.sign(x) * ((np.abs(x) + COARSE // 2) // COARSE) for x in fine]
    planes = [fine[-1] & 255, fine[-1] >> 8]
    planes += [rough[i] - rough[i + 1] for i in reversed(range(len(moments) - 1))]
    content = np.concatenate(steps).astype("<f4").tobytes()
    content += b"".join(plane.astype(np.int8).tobytes() for plane in planes)
    # few differences repeat, and many are small: this is smaller than searching, and quick
    deflate = zlib.compressobj(strategy=zlib.Z_RLE)
    packed = deflate.compress(content) + deflate.flush()
    return Packed(base64.b64encode(packed).decode(), layout, len(moments))
