"""What is learned from a window, and its losses, with every gradient routed."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from oversight_rl.agents.memory import Memory
from oversight_rl.agents.methods import LABELED, UNFINISHED, UNLABELED, Lesson
from oversight_rl.agents.networks import Agent, Output, rows_of
from oversight_rl.agents.outcomes import MethodTables, expected, outcomes
from oversight_rl.agents.reinforce.collect import Rollout
from oversight_rl.agents.reinforce.own_values import OwnValues
from oversight_rl.agents.reinforce.reward_model import RewardModel
from oversight_rl.agents.routing.primitive import lookup
from oversight_rl.agents.settings import ReinforceConfig, at
from oversight_rl.envs.record import Record
from oversight_rl.envs.settings import NO_LABEL


@dataclass(frozen=True)
class Targets:
    """What the learner makes of a window, per sample."""

    outcome: Tensor  # [R, T, N], of the episode that the sample belongs to
    returns: Tensor  # [R, T, N]
    weight: Tensor  # [R, T, N], sample weight
    routes: Tensor  # [R, T, N, K + 1], gradient weights of the experts and the gate
    lessons: frozenset[Lesson]  # of the runs' methods
    chances: Tensor  # [R, T, N, B], of what labeled (or imputed) episodes were; else 0
    own_returns: Tensor  # [R, T, N, K], returns of each expert by itself, as far as known; else 0
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
    own_after: Tensor | None = None,
) -> Targets:
    """Turn what was seen into returns, sample weights and gradient routes.

    A method pays only at an episode's end, so the return of a sample is its outcome's reward
    discounted over the steps left (REINFORCE, arXiv 2410.04332, RL appendix). A reward model
    tells the chance that an unlabeled ending was a diamond; such episodes count as the mean of
    both, as far as it is trusted; until it is at all, those whose worth it should tell do not
    count. A memory keeps labeled samples for the gate. `own_after` are experts' own values then.
    """
    outcome, left = outcomes(rollout.seen)
    labeled, known = outcome >= LABELED, torch.where(outcome < LABELED, NO_LABEL, outcome - LABELED)
    if memory is not None:
        memory.add(rollout.observation.flatten(1, 2), known.flatten(1), labeled.flatten(1))
    reward, routes = lookup(methods.reward, outcome), lookup(methods.routes, outcome)
    chances = F.one_hot(outcome, methods.reward.shape[1])[..., LABELED:].to(reward.dtype)
    if config.bootstrap:
        reward = torch.where(outcome == UNFINISHED, rollout.value_after[:, None], reward)
    counts = lookup(methods.sample_weight, outcome)
    chance, trust = None, reward.new_zeros(1, 1, 1)
    if reward_model is not None:
        chance, told, part, trust = word(reward_model, rollout, outcome, known, left)
        unknown = (outcome == UNLABELED) & (part == 0) & methods.needs_word[:, None, None]
        counts = torch.where(unknown, 0.0, counts)
        reward = reward + part * (expected(methods.reward, told) - reward)
        routes = routes + part[..., None] * (expected(methods.routes, told) - routes)
        chances = chances + part[..., None] * told
    own = own_worth(chances, routes.shape[-1] - 1)
    more = at(config.labeled_weight, progress) - 1
    heavy = methods.weighs_labels[:, None, None] * more * (1 - trust)  # a model's word counts alike
    weight = (1 + heavy * labeled) * counts
    for k, worlds in enumerate(rollout.acts[1:]):
        after = None if own_after is None else own_after[:, worlds, k]
        ended, told = outcome[..., worlds], chances[..., worlds, :]
        found = alone_worth(ended, told, own[..., worlds, k], after)
        reward[..., worlds], weight[..., worlds] = found
    discount = config.discount**left
    return Targets(
        outcome=outcome,
        returns=reward * discount,
        weight=weight,
        routes=routes,
        lessons=methods.lessons,
        chances=chances,
        own_returns=discount[..., None] * own,
        chance=chance,
    )


def word(
    reward_model: RewardModel, rollout: Rollout, outcome: Tensor, known: Tensor, left: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a reward model says of episodes, whose endings it remembers.

    Returns:
        chances of the diamond if each step were the last `[R, T, N]`; of both behaviors at each
        episode's end `[R, T, N, 2]`; how much that counts there, nothing but for unlabeled ones
        `[R, T, N]`; and how far it stands in for the labels that are missing `[R, 1, 1]`.
    """
    final = rollout.final(reward_model.world).flatten(1, 2)
    reward_model.remember(final, known.flatten(1), rollout.seen.terminated.flatten(1))
    chance = reward_model(final).sigmoid().view(outcome.shape)
    knows = at_end(reward_model.knows(final).view(outcome.shape), left)
    trust, unlabeled = reward_model.trust[:, None, None], outcome == UNLABELED
    missed, of = ((x & unlabeled).sum((1, 2), keepdim=True) for x in (~knows, unlabeled))
    part = trust * (unlabeled & knows)
    return chance, told_at_end(chance, left), part, trust * (1 - missed / of.clamp(min=1))


def told_at_end(chance: Tensor, left: Tensor) -> Tensor:
    """Chances of both behaviors at each episode's end, by the diamond's after each step.

    `[R, T, N]` each, the latter the steps left of the episode -> `[R, T, N, 2]`.
    """
    diamond = at_end(chance, left)
    return torch.stack([diamond, 1 - diamond], dim=-1)


def at_end(x: Tensor, left: Tensor) -> Tensor:
    """What is said of each step `[R, T, N]`, of its episode's end, so many steps later."""
    time = torch.arange(x.shape[1], device=x.device)[:, None]  # [T, 1]
    return x.gather(1, (time + left).clamp(max=x.shape[1] - 1))


def alone_worth(
    outcome: Tensor, chances: Tensor, own: Tensor, after: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What endings are worth to an expert that acted by itself, and which count: `[R, T, N]` each.

    Args:
        outcome: of the episodes, `[R, T, N]`.
        chances: of what they were, all 0 where nobody knows, `[R, T, N, B]`.
        own: what they are worth to it, `[R, T, N]`.
        after: its values after the window `[R, N]`, which unfinished ones go on with, if at all.
    """
    counts = (outcome != UNLABELED) | (chances.sum(-1) > 0)
    if after is not None:
        own = torch.where(outcome == UNFINISHED, after[:, None], own)
    return own, counts.to(own.dtype)


def own_worth(chances: Tensor, experts: int) -> Tensor:
    """What an ending is worth to each expert by itself: 1 as its own behavior, -1 as another.

    Chances `[..., B]` of what it was, all 0 where nobody knows -> `[..., K]`; 0 for experts that no
    behavior is meant for.
    """
    known = chances.sum(-1, keepdim=True)
    own = 2 * chances - known
    return F.pad(own, (0, experts - chances.shape[-1]))[..., :experts]


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
    own_values: OwnValues | None = None,
) -> Loss:
    """Policy, value, entropy and gate losses, with every gradient routed.

    One forward serves all routes: the policy and entropy losses reach expert k and the gate
    through `route`, weighted per sample; the shared head always learns; the gate loss (cross
    entropy of the gate against the label of labeled episodes) reaches the gate unweighted. Where
    experts act by themselves, each learns from what it did, and nothing from what others did.
    """
    mixed, *alone = rollout.acts
    weight, returns, action = (
        x[..., mixed].flatten(1) for x in (targets.weight, targets.returns, rollout.action)
    )
    output = rollout.output.rows(rollout.slot[..., mixed].flatten(1))
    routed = output.routed(targets.routes[..., mixed, :].flatten(1, 2))
    log_policy = routed.mixture.log_softmax(-1)  # [R, B, A]
    acting = [acting_loss(log_policy, output.value, action, returns, weight)]
    uniform = rollout.uniform.flatten(1)
    gate = contrast = nothing = uniform.new_zeros(len(uniform))
    if "gate" in targets.lessons:
        chances = targets.chances[..., mixed, :].flatten(1, 2)
        gate = gate_loss(agent, output, chances, uniform, memory)
    if own_values is not None:
        values = own_values(rollout.active)  # [R, U, K]
        acting += [alone_loss(rollout, targets, values, k) for k in range(len(alone))]
    elif "contrast" in targets.lessons:
        log_prob = log_policy.gather(-1, action[..., None]).squeeze(-1)
        for k, own_return in enumerate(targets.own_returns.unbind(-1)):
            own = output.alone(k).log_softmax(-1).gather(-1, action[..., None]).squeeze(-1)
            contrast = contrast + contrast_loss(own, log_prob, own_return.flatten(1), weight)
    worlds = rollout.slot.shape[-1]
    shares = [rollout.slot[0, 0, part].shape[0] / worlds for part in rollout.acts]
    policy, value, entropy = (  # whoever took them, all samples count alike
        torch.stack([share * part for share, part in zip(shares, parts, strict=True)]).sum(0)
        for parts in zip(*acting, strict=True)
    )
    return Loss(
        policy=policy,
        value=value,
        entropy=entropy,
        gate=gate,
        contrast=contrast,
        reward_model=nothing if reward_model is None else reward_model.loss(uniform),
    )


def acting_loss(
    log_policy: Tensor, value: Tensor, action: Tensor, returns: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Policy loss, value loss and entropy of who acted: `[R]` each.

    Of log-probabilities `[R, B, A]`, value estimates, actions, returns and weights, `[R, B]` each.
    """
    log_prob = log_policy.gather(-1, action[..., None]).squeeze(-1)
    error = returns - value
    entropy = -(log_policy.exp() * log_policy).sum(-1)
    parts = -log_prob * error.detach(), error**2, entropy
    policy, squared, spread = (weighted_mean(part, weight) for part in parts)
    return policy, squared, spread


def alone_loss(
    rollout: Rollout, targets: Targets, values: Tensor, expert: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of an expert where it acted by itself; values are `[R, U, K]`."""
    worlds = rollout.acts[1 + expert]
    slot, *parts = (
        x[..., worlds].flatten(1)
        for x in (rollout.slot, rollout.action, targets.returns, targets.weight)
    )
    log_policy = rollout.output.rows(slot).alone(expert).log_softmax(-1)
    row = slot + (torch.arange(len(slot), device=slot.device) * values.shape[1])[:, None]
    value = rows_of(values[..., expert].reshape(-1, 1), row)[..., 0]
    return acting_loss(log_policy, value, *parts)


def gate_loss(
    agent: Agent, output: Output, chances: Tensor, uniform: Tensor, memory: Memory | None
) -> Tensor:
    """Cross entropy of the gate against labels: this window's, or remembered ones. [R]

    A window's are given or imputed, as chances of each behavior `[R, B, behaviors]`.
    """
    if memory is None:
        log_gate = output.gate_logits.log_softmax(-1)[..., : chances.shape[-1]]
        return -weighted_mean((chances * log_gate).sum(-1), chances.sum(-1))
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
