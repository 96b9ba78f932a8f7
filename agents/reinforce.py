"""REINFORCE with a value baseline over a stack of R runs: collect, label, loss.

Axes: R runs, T steps of a window, N worlds per run, B = T * N samples. Episodes run on across
windows. Losses and their gradients are per run, so a stack learns what its runs would alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from agents.methods import LABELED, TIMEOUT, UNFINISHED, UNLABELED, MethodTables
from agents.networks import Agent, PolicyOutput, flatten
from agents.routing import lookup, route
from envs.settings import Settings
from envs.world import NO_LABEL, Record, Seen, State, Truth, World

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Schedule = Annotated[
    tuple[NonNegative, ...],
    BeforeValidator(lambda x: (x,) if isinstance(x, int | float) else x),
    Field(min_length=1, max_length=2),
]
"""One number: constant; two: linear from the first update to the last."""


class ReinforceConfig(Settings):
    """The learner. A schedule is one number (constant) or two (linear, first to last update)."""

    section: ClassVar[str] = "training"

    updates: int = Field(400, ge=1)
    """Number of updates."""
    worlds: int = Field(256, ge=1)
    """Worlds N stepped in parallel by each run."""
    steps: int = Field(16, ge=1)
    """Steps T of each world per update."""
    learning_rate: Schedule = (3e-3, 1e-4)
    """Adam step size."""
    discount: float = Field(0.97, gt=0, le=1)
    """Discount per step, of training and of every reported return."""
    value_coef: Schedule = (0.5,)
    """Weight of the value loss."""
    entropy_coef: Schedule = (0.02, 0.002)
    """Weight of the entropy bonus."""
    gate_coef: Schedule = (1.0,)
    """Weight of the gate loss."""
    labeled_weight: float = Field(20.0, ge=0, allow_inf_nan=False)
    """Weight of a labeled episode's samples next to any other's in the policy and value losses;
    1 as published."""
    bootstrap: bool = True
    """Whether the return of an episode cut by the window's end goes on with its value estimate;
    false, as published, treats it as 0."""


def at(schedule: tuple[float, ...], progress: float) -> float:
    """Value of a schedule at `progress` in [0, 1]."""
    return schedule[0] + (schedule[-1] - schedule[0]) * progress


@dataclass(frozen=True)
class Rollout(Record):
    """A window of experience."""

    observation: Tensor  # [R, T, N, F]
    action: Tensor  # [R, T, N]
    seen: Seen  # [R, T, N], what the learner may see
    truth: Truth  # [R, T, N], what only evaluation and oracle methods may see
    following: Tensor  # [R, N, F], observation after the window
    audit: Tensor  # [R, T, N] uniform in [0, 1), decides which endings an oracle labels


@dataclass(frozen=True)
class Targets(Record):
    """What the learner makes of a window, per sample."""

    outcome: Tensor  # [R, T, N], of the episode that the sample belongs to
    returns: Tensor  # [R, T, N]
    weight: Tensor  # [R, T, N], sample weight
    routes: Tensor  # [R, T, N, K + 1], gradient weights of the experts and the gate


def noise_channels(world: World) -> int:
    """Uniform random numbers per world and step: those of a reset, the action, the audit."""
    return world.noise_channels + 2


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw actions by inverse transform: logits `[..., A]`, uniform `[...]` -> `[...]` int64."""
    cumulative = logits.softmax(-1).cumsum(-1)[..., :-1]
    return (uniform[..., None] >= cumulative).sum(-1)


@torch.no_grad()
def collect(agent: Agent, world: World, state: State, noise: Tensor) -> tuple[Rollout, State]:
    """Step the worlds through one window under the agent's mixture.

    Args:
        agent: a stack of R agents.
        world: the worlds' dynamics.
        state: worlds `[R, N]`.
        noise: `[R, T, N, noise_channels(world)]`, uniform in [0, 1).

    Returns:
        The window, and the worlds after it.
    """
    fresh = world.reset(noise[..., : world.noise_channels])
    runs, steps, worlds, _ = noise.shape
    observation = flatten(world.observe(state))
    observations = observation.new_empty(runs, steps, worlds, observation.shape[-1])
    actions, taken = [], []
    for t in range(steps):
        observations[:, t] = observation
        output = agent(observation)
        action = sample(output.mix(output.gate), noise[:, t, :, -2])
        state, step = world.step(state, action, fresh[:, t])
        observation = flatten(world.observe(state))
        actions.append(action)
        taken.append(step)
    rollout = Rollout(
        observation=observations,
        action=torch.stack(actions, dim=1),
        seen=Seen.stack([step.seen for step in taken], dim=1),
        truth=Truth.stack([step.truth for step in taken], dim=1),
        following=observation,
        audit=noise[..., -1],
    )
    return rollout, state


def outcomes(rollout: Rollout, methods: MethodTables) -> tuple[Tensor, Tensor]:
    """The outcome of the episode that each sample belongs to, and the steps left until its end.

    Only runs of oracle methods look at the truth.

    Returns:
        outcome `[R, T, N]`, and steps `[R, T, N]` from the sample to its episode's last step, or
        to the end of the window where the episode is unfinished.
    """
    seen, steps = rollout.seen, rollout.action.shape[1]
    share = methods.label_share[:, None, None]
    revealed = torch.where(rollout.audit < share, rollout.truth.ending, NO_LABEL)
    label = torch.where(methods.sees_truth[:, None, None], revealed, seen.label)
    reached = torch.where(label == NO_LABEL, UNLABELED, LABELED + label)
    ended_as = torch.where(seen.terminated, reached, TIMEOUT)
    time = torch.arange(steps, device=label.device)[:, None]  # [T, 1]
    done = seen.terminated | seen.truncated
    end = torch.where(done, time, steps).flip(1).cummin(1).values.flip(1)  # [R, T, N]
    outcome = ended_as.gather(1, end.clamp(max=steps - 1))
    return torch.where(end < steps, outcome, UNFINISHED), end - time


@torch.no_grad()
def label(
    agent: Agent, rollout: Rollout, methods: MethodTables, config: ReinforceConfig
) -> Targets:
    """Turn what was seen into returns, sample weights and gradient routes.

    A method pays only at an episode's end, so the return of a sample is its outcome's reward
    discounted over the steps left (REINFORCE, arXiv 2410.04332, RL appendix).
    """
    outcome, left = outcomes(rollout, methods)
    reward = lookup(methods.reward, outcome)
    if config.bootstrap:
        after = agent.value(rollout.following)[:, None]  # [R, 1, N]
        reward = torch.where(outcome == UNFINISHED, after, reward)
    return Targets(
        outcome=outcome,
        returns=reward * config.discount**left,
        weight=torch.where(outcome >= LABELED, config.labeled_weight, 1.0)
        * lookup(methods.sample_weight, outcome),
        routes=lookup(methods.routes, outcome),
    )


@dataclass(frozen=True)
class Loss(Record):
    """The parts of the loss per run, `[R]` each."""

    policy: Tensor
    value: Tensor
    entropy: Tensor
    gate: Tensor

    def total(self, config: ReinforceConfig, progress: float) -> Tensor:
        """The weighted sum at `progress` in [0, 1] of training. [R]"""
        return (
            self.policy
            + at(config.value_coef, progress) * self.value
            - at(config.entropy_coef, progress) * self.entropy
            + at(config.gate_coef, progress) * self.gate
        )


def weighted_mean(x: Tensor, weight: Tensor) -> Tensor:
    """Mean of `x` `[R, B]` under weights >= 0 `[R, B]`, per run; exactly 0 where all are 0."""
    total = weight.sum(-1)
    return (x * weight).sum(-1) / torch.where(total > 0, total, 1.0)


def loss(agent: Agent, rollout: Rollout, targets: Targets) -> Loss:
    """Policy, value, entropy and gate losses, with every gradient routed.

    One forward serves all routes: the policy and entropy losses reach expert k and the gate
    through `route`, weighted per sample; the shared head always learns; the gate loss (cross
    entropy of the gate against the label of labeled episodes) reaches the gate unweighted.
    """
    observation = rollout.observation.flatten(1, 2)  # [R, B, F]
    outcome = targets.outcome.flatten(1)
    weight = targets.weight.flatten(1)
    routes = targets.routes.flatten(1, 2)  # [R, B, K + 1]

    output: PolicyOutput = agent(observation, routes[..., :-1])
    mixing = route(output.gate_logits, routes[..., -1]).softmax(-1)
    log_policy = output.mix(mixing).log_softmax(-1)  # [R, B, A]
    log_prob = log_policy.gather(-1, rollout.action.flatten(1)[..., None]).squeeze(-1)
    value = agent.value(observation)
    error = targets.returns.flatten(1) - value

    labeled = outcome >= LABELED
    target = (outcome - LABELED).clamp(min=0)[..., None]
    gate_log_prob = output.gate_logits.log_softmax(-1)
    gate_error = (
        torch.zeros_like(value)
        if agent.gate is None
        else -gate_log_prob.gather(-1, target).squeeze(-1)
    )
    return Loss(
        policy=-weighted_mean(log_prob * error.detach(), weight),
        value=weighted_mean(error**2, weight),
        entropy=weighted_mean(-(log_policy.exp() * log_policy).sum(-1), weight),
        gate=weighted_mean(gate_error, labeled.to(value.dtype)),
    )


@torch.no_grad()
def statistics(agent: Agent, rollout: Rollout, targets: Targets) -> dict[str, Tensor]:
    """Diagnostics of a window per run: endings as seen, and the gate by outcome. `[R]` each."""
    done = rollout.seen.terminated | rollout.seen.truncated
    share = {
        "timeout": targets.outcome == TIMEOUT,
        "unlabeled": targets.outcome == UNLABELED,
        "labeled_diamond": targets.outcome == LABELED,
        "labeled_ghost": targets.outcome == LABELED + 1,
    }
    ended = done.sum((1, 2)).clamp(min=1)
    result = {f"endings/{k}": (mask & done).sum((1, 2)) / ended for k, mask in share.items()}
    gate = agent(rollout.observation.flatten(1, 2)).gate[..., 0].view_as(rollout.audit)
    for k, mask in share.items():
        result[f"gate/{k}"] = weighted_mean(gate.flatten(1), mask.flatten(1).float())
    return result
