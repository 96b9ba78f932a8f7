"""The agent and its loss written plainly: net by net, dense, episode by episode."""

import numpy as np
import torch
from torch.nn import functional as F

from oversight_rl.agents.methods import LABELED, TIMEOUT, UNFINISHED, UNLABELED
from oversight_rl.envs.settings import NO_LABEL


def planes(active, shape):
    """Dense observations `[..., planes, rows, cols]` from active inputs."""
    inputs = shape[0] * shape[1] * shape[2]
    dense = torch.zeros(*active.shape[:-1], inputs + 1).scatter(-1, active, 1.0)
    return dense[..., :-1].unflatten(-1, shape)


def forward(agent, observation, run=0):
    """Activations of the experts (a list), the gate's logits but the last, the value."""

    def trunk(j, x):
        for layer in agent.trunks:
            x = (x @ layer.weight[run, j].T + layer.bias[run, j]).relu()
        return x

    x = observation.flatten(1)
    experts = [trunk(k, x) for k in range(agent.n_experts)]
    gate = None
    if agent.has_gate:
        seen = observation
        if agent.gate_conv is not None:
            kernel = agent.gate_conv.weight[run][:, :, None, None]
            seen = F.conv2d(observation, kernel, agent.gate_conv.bias[run])
        gate = trunk(agent.n_experts, seen.flatten(1))
        gate = gate @ agent.gate_out.weight[run].T + agent.gate_out.bias[run]
    value = x if agent.affine_value else trunk(agent.n_experts + agent.has_gate, x)
    for layer in agent.value_layers:
        value = value @ layer.weight[run].T + layer.bias[run]
    return experts, gate, value[:, 0]


def loss(agent, observation, rollout, targets, config):
    """The loss of gradient routing from the paper's formulas, for two experts.

    Each sample's mixture is built from experts and gate values detached where its label says so,
    and the head is applied to mixed activations.
    """
    action, outcome = rollout.action.flatten(), targets.outcome.flatten()
    returns = targets.returns.flatten()
    (diamond, ghost), gate, value = forward(agent, observation)
    as_diamond, as_ghost = (outcome == LABELED)[:, None], (outcome == LABELED + 1)[:, None]
    g = torch.sigmoid(gate)
    g = torch.where(as_diamond | as_ghost, g.detach(), g)
    diamond = torch.where(as_ghost, diamond.detach(), diamond)
    ghost = torch.where(as_diamond, ghost.detach(), ghost)
    mixed = g * diamond + (1 - g) * ghost
    log_policy = (mixed @ agent.head.weight[0].T + agent.head.bias[0]).log_softmax(-1)
    chosen = log_policy[torch.arange(len(action)), action]
    weight = torch.where(outcome >= LABELED, config.labeled_weight[0], 1.0)
    weight = weight / weight.sum()
    labeled = outcome >= LABELED
    gate_loss = F.binary_cross_entropy_with_logits(
        gate[labeled, 0], (outcome[labeled] == LABELED).float()
    )
    return (
        -(chosen * (returns - value).detach() * weight).sum()
        + config.value_coef[0] * ((returns - value) ** 2 * weight).sum()
        + config.entropy_coef[0] * ((log_policy.exp() * log_policy).sum(-1) * weight).sum()
        + config.gate_coef[0] * gate_loss
    )


def outcomes(seen, steps, worlds):
    """Outcome of the episode of each sample, and steps left: `[steps, worlds]` each."""
    outcome = np.full((steps, worlds), UNFINISHED)
    left = np.zeros((steps, worlds), dtype=int)
    for n in range(worlds):
        start = 0
        for t in range(steps):
            if bool(seen.terminated[0, t, n]) or bool(seen.truncated[0, t, n]):
                label = int(seen.label[0, t, n])
                if bool(seen.truncated[0, t, n]):
                    kind = TIMEOUT
                else:
                    kind = UNLABELED if label == NO_LABEL else LABELED + label
                for s in range(start, t + 1):
                    outcome[s, n], left[s, n] = kind, t - s
                start = t + 1
        for s in range(start, steps):
            left[s, n] = steps - s
    return outcome, left


def returns(seen, outcome, after, discount, rewards):
    """Return of each sample, `[steps, worlds]`.

    An episode's end pays `rewards[outcome]`; the window's end `after` `[worlds]`.
    """
    steps, worlds = outcome.shape
    value = np.zeros((steps, worlds))
    for n in range(worlds):
        following = after[n]
        for t in reversed(range(steps)):
            if bool(seen.terminated[0, t, n]) or bool(seen.truncated[0, t, n]):
                following = rewards.get(outcome[t, n], 0) / discount
            following *= discount
            value[t, n] = following
    return value
