"""What is learned from a window, and its losses, with every gradient routed."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from oversight_rl.agents.memory import Memory
from oversight_rl.agents.methods import (
    LABELED,
    UNFINISHED,
    UNLABELED,
    Lesson,
    MethodTables,
    expected,
    outcomes,
)
from oversight_rl.agents.networks import DEPLOYED, Agent, Output
from oversight_rl.agents.reinforce.collect import Rollout
from oversight_rl.agents.reinforce.reward_model import RewardModel
from oversight_rl.agents.routing.primitive import lookup
from oversight_rl.agents.settings import ReinforceConfig, at
from oversight_rl.envs.record import Record


@dataclass(frozen=True)
class Targets:
    """What the learner makes of a window, per sample."""

    outcome: Tensor  # [R, T, N], of the episode that the sample belongs to
    returns: Tensor  # [R, T, N]
    weight: Tensor  # [R, T, N], sample weight
    routes: Tensor  # [R, T, N, K + 1], gradient weights of the experts and the gate
    lessons: frozenset[Lesson]  # of the runs' methods
    deployed_returns: Tensor  # [R, T, N], true return of labeled (or imputed) episodes, else 0
    chance: Tensor | None  # [R, T, N], a reward model's, of the diamond after each step

    def only_labeled(self, worlds: int) -> "Targets":
        """The same, where of all worlds but the first ones only labeled episodes count."""
        counts = self.outcome >= LABELED
        counts[..., :worlds] = True
        return replace(self, weight=self.weight * counts)

    def first(self, worlds: int) -> "Targets":
        """Those of the first worlds alone."""
        parts: dict[str, Any] = {
            k: x[:, :, :worlds] for k, x in vars(self).items() if isinstance(x, Tensor)
        }
        return replace(self, **parts)


@torch.no_grad()
def label(
    rollout: Rollout,
    methods: MethodTables,
    config: ReinforceConfig,
    progress: float = 0.0,
    reward_model: RewardModel | None = None,
    memory: Memory | None = None,
) -> Targets:
    """Turn what was seen into returns, sample weights and gradient routes.

    A method pays only at an episode's end, so the return of a sample is its outcome's reward
    discounted over the steps left (REINFORCE, arXiv 2410.04332, RL appendix). A reward model
    remembers the labeled endings and tells the chance that each other one was a diamond; such
    episodes count as the mean of both. As long as nobody taught it, it says nothing: an episode
    whose worth it should tell does not count. A memory keeps all labeled samples for the gate.
    """
    outcome, left = outcomes(rollout.seen)
    labeled = outcome >= LABELED
    if memory is not None:
        behavior = (outcome - LABELED).flatten(1)
        memory.add(rollout.observation.flatten(1, 2), behavior, labeled.flatten(1))
    reward, routes = lookup(methods.reward, outcome), lookup(methods.routes, outcome)
    true_worth = 2.0 * (outcome == LABELED) - labeled.to(reward.dtype)
    if config.bootstrap:
        reward = torch.where(outcome == UNFINISHED, rollout.value_after[:, None], reward)
    counts = lookup(methods.sample_weight, outcome)
    chance = None
    if reward_model is not None:
        final = reward_model.world.after(rollout.observation, rollout.action).flatten(1, 2)
        endings = labeled & rollout.seen.terminated
        reward_model.memory.add(final, (outcome - LABELED).flatten(1), endings.flatten(1))
        chance = reward_model(final).sigmoid().view_as(reward)
        time = torch.arange(chance.shape[1], device=chance.device)[:, None]  # [T, 1]
        at_end = chance.gather(1, (time + left).clamp(max=chance.shape[1] - 1))
        chances, unlabeled = torch.stack([at_end, 1 - at_end], dim=-1), outcome == UNLABELED
        taught = (reward_model.memory.count > 0)[:, None, None]
        unknown = unlabeled & ~taught & methods.reward_tells[:, None, None]
        counts = torch.where(unknown, 0.0, counts)
        imputed = unlabeled & taught
        reward = torch.where(imputed, expected(methods.reward, chances), reward)
        routes = torch.where(imputed[..., None], expected(methods.routes, chances), routes)
        true_worth = torch.where(imputed, 2 * at_end - 1, true_worth)
    discount = config.discount**left
    heavy = methods.weighs_labels[:, None, None] * (at(config.labeled_weight, progress) - 1)
    return Targets(
        outcome=outcome,
        returns=reward * discount,
        weight=(1 + heavy * labeled) * counts,
        routes=routes,
        lessons=methods.lessons,
        deployed_returns=discount * true_worth,
        chance=chance,
    )


@dataclass(frozen=True)
class Loss(Record):
    """The parts of the loss per run, `[R]` each."""

    policy: Tensor
    value: Tensor
    entropy: Tensor
    gate: Tensor
    contrast: Tensor
    reward_model: Tensor

    def total(self, config: ReinforceConfig, progress: float) -> Tensor:
        """The weighted sum at `progress` in [0, 1] of training. [R]"""
        return (
            self.policy
            + at(config.value_coef, progress) * self.value
            - at(config.entropy_coef, progress) * self.entropy
            + at(config.gate_coef, progress) * self.gate
            + at(config.contrast_coef, progress) * self.contrast
            + self.reward_model
        )


def weighted_mean(x: Tensor, weight: Tensor) -> Tensor:
    """Mean of `x` `[R, B]` under weights >= 0 `[R, B]`, per run; exactly 0 where all are 0."""
    total = weight.sum(-1)
    return (x * weight).sum(-1) / torch.where(total > 0, total, 1.0)


def loss(
    agent: Agent,
    rollout: Rollout,
    targets: Targets,
    reward_model: RewardModel | None = None,
    memory: Memory | None = None,
) -> Loss:
    """Policy, value, entropy and gate losses, with every gradient routed.

    One forward serves all routes: the policy and entropy losses reach expert k and the gate
    through `route`, weighted per sample; the shared head always learns; the gate loss (cross
    entropy of the gate against the label of labeled episodes) reaches the gate unweighted.
    """
    outcome = targets.outcome.flatten(1)  # [R, B]
    weight = targets.weight.flatten(1)
    output = rollout.output.rows(rollout.slot.flatten(1))
    routed = output.routed(targets.routes.flatten(1, 2))
    log_policy = routed.mix(routed.gate).log_softmax(-1)  # [R, B, A]
    action = rollout.action.flatten(1)[..., None]
    log_prob = log_policy.gather(-1, action).squeeze(-1)
    value = output.value
    error = targets.returns.flatten(1) - value

    uniform = rollout.uniform.flatten(1)
    gate = contrast = nothing = value.new_zeros(len(value))
    if "gate" in targets.lessons:
        gate = gate_loss(agent, output, outcome, uniform, memory)
    if "contrast" in targets.lessons:
        own = output.alone(DEPLOYED).log_softmax(-1).gather(-1, action).squeeze(-1)
        contrast = contrast_loss(own, log_prob, targets.deployed_returns.flatten(1), weight)
    return Loss(
        policy=-weighted_mean(log_prob * error.detach(), weight),
        value=weighted_mean(error**2, weight),
        entropy=weighted_mean(-(log_policy.exp() * log_policy).sum(-1), weight),
        gate=gate,
        contrast=contrast,
        reward_model=nothing if reward_model is None else reward_model.loss(uniform),
    )


def gate_loss(
    agent: Agent, output: Output, outcome: Tensor, uniform: Tensor, memory: Memory | None
) -> Tensor:
    """Cross entropy of the gate against labels: this window's, or remembered ones. [R]"""
    if memory is None:
        weight = (outcome >= LABELED).to(uniform.dtype)
        logits, label = output.gate_logits, (outcome - LABELED).clamp(min=0)
    else:
        active, label, weight = memory.draw(uniform)
        logits = agent.prepare().gate(active)
    return cross_entropy(logits.log_softmax(-1), label, weight)


def cross_entropy(log_gate: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean cross entropy of the gate's log-probabilities `[R, B, K]`. [R]"""
    return -weighted_mean(log_gate.gather(-1, label[..., None]).squeeze(-1), weight)


def contrast_loss(own: Tensor, log_prob: Tensor, returns: Tensor, weight: Tensor) -> Tensor:
    """REINFORCE of the deployed expert by itself, on labeled (or imputed) episodes alone. [R]

    The deployed policy is the first expert under the shared head. It is rewarded +1 for a labeled
    diamond and -1 for a labeled ghost, and since the mixture may have taken the actions, each
    sample is weighted by the ratio of the two policies, at most 1. A labeled ghost pushes the
    expert away from what led there, a negative gradient weight on the deployed path.

    Args:
        own: log-probabilities of the actions under the deployed expert, `[R, B]`.
        log_prob: the same under the policy that took them, `[R, B]`.
        returns: discounted true return of labeled samples (REINFORCE on the grid subtracts no
            baseline from it), 0 elsewhere; `[R, B]`.
        weight: of the samples, `[R, B]`; unlabeled ones share the mean, so that the strength of
            this loss grows with oversight as that of the policy loss does.
    """
    ratio = (own - log_prob).detach().exp().clamp(max=1.0)
    return -weighted_mean(ratio * returns * own, weight)
