"""What a playground's page holds, read again without the page: by numpy, from its description."""

import base64
import json
import re
import zlib

import numpy as np
import torch

from oversight_rl.agents.networks import Agent
from oversight_rl.agents.settings import AgentConfig


def data_of(path):
    """What the page tells its scripts."""
    (found,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text()
    )
    return json.loads(found)


def moments_of(run):
    """Tensors of the agent at each moment, first to last; see `playground/pack.py`."""
    content = zlib.decompress(base64.b64decode(run["data"]))
    sizes = [int(np.prod(shape)) for _, shape in run["layout"]]
    rows = [size // shape[-1] for size, (_, shape) in zip(sizes, run["layout"], strict=True)]
    steps = np.frombuffer(content, "<f4", sum(rows))
    planes = np.frombuffer(content, np.int8, offset=4 * sum(rows)).reshape(-1, sum(sizes))
    fine = planes[0].view(np.uint8).astype(int) + 256 * planes[1].astype(int)
    assert len(planes) == run["moments"] + 1
    coarse = run["coarse"]
    rough = np.trunc((fine + np.sign(fine) * coarse / 2) / coarse).astype(int)
    every = [fine]
    for plane in planes[2:]:
        rough = rough + plane
        every.insert(0, rough * coarse)
    return [_tensors(numbers, run["layout"], steps, sizes, rows) for numbers in every]


def _tensors(numbers, layout, steps, sizes, rows):
    found, at, row = {}, 0, 0
    for (name, shape), size, n in zip(layout, sizes, rows, strict=True):
        values = numbers[at : at + size].reshape(n, -1) * steps[row : row + n, None].astype(float)
        found[name] = torch.from_numpy(values.reshape(shape)).float()
        at, row = at + size, row + n
    return found


def agent_of(run, tensors):
    """An agent of these tensors."""
    trunks = [
        tensors[f"trunk{i}.weight"] for i in range(len(tensors)) if f"trunk{i}.weight" in tensors
    ]
    net, actions, world = run["net"], len(tensors["head.bias"]), run["world"]
    config = AgentConfig(
        experts=max(2, net["experts"]),
        hidden=tuple(weight.shape[1] for weight in trunks),
        value_activation="none" if net["affine_value"] else "relu",
    )
    shape = (4, world["rows"], world["cols"])
    many, gate = ("many" if net["experts"] > 1 else "one"), ("learned" if net["gate"] else "fixed")
    agent = Agent(config, shape, actions, 1, many, gate)
    k, out, bias = net["experts"], tensors["out.weight"], tensors["out.bias"]
    state = {"head.weight": out[0, :actions], "head.bias": tensors["head.bias"]}
    for i, weight in enumerate(trunks):
        state |= {f"trunks.{i}.weight": weight, f"trunks.{i}.bias": tensors[f"trunk{i}.bias"]}
    if net["gate"]:
        state |= {"gate_out.weight": out[k, : k - 1], "gate_out.bias": bias[k, : k - 1]}
    if not net["affine_value"]:
        state |= {"value_layers.0.weight": out[-1, :1], "value_layers.0.bias": bias[-1, :1]}
    parameters = dict(agent.named_parameters())
    stacked = {name: x[None].view(parameters[name].shape) for name, x in state.items()}
    agent.load_state_dict(stacked, strict=False)
    if net["affine_value"]:  # composed of layers without activations: one row, and ones after it
        with torch.no_grad():
            for i, layer in enumerate(agent.value_layers):
                layer.weight.zero_()
                layer.bias.zero_()
                layer.weight[0, 0, 0] = 1.0
                if i == 0:
                    layer.weight[0, 0] = tensors["value.weight"][0]
                    layer.bias[0, 0] = tensors["value.bias"][0]
    return agent
