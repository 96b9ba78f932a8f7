"""PPO's losses of a minibatch, with every gradient routed."""

from __future__ import annotations

import torch
from torch import Tensor

from oversight_rl.agents.learner import NotFinite
from oversight_rl.agents.memory import Memory
from oversight_rl.agents.networks import DEPLOYED, Output
from oversight_rl.agents.ppo.buffer import RoutedSamples
from oversight_rl.agents.ppo.observations import from_rows, row_width
from oversight_rl.agents.ppo.policy import MoEPolicy
from oversight_rl.agents.reinforce.losses import contrast_loss, cross_entropy, weighted_mean


def losses(
    policy: MoEPolicy,
    batch: RoutedSamples[Tensor],
    memory: Memory | None,
    *,
    contrasts: bool,
    clip: float,
    clip_value: float | None,
) -> dict[str, Tensor]:
    """The parts of the loss, and how far the policy has moved.

    The surrogate and entropy losses reach the experts and the gate through `route`, the value
    losses reach the value nets; all reach the features extractor, and all samples the shared head.

    Args:
        policy: as it is now.
        batch: B samples.
        memory: of labeled observations, for the gate.
        contrasts: whether labeled episodes teach the deployed expert by itself.
        clip: how far the ratio of new to old policy counts.
        clip_value: how far values may move; None: as far as they like.
    """
    weight, share = batch.weights, batch.share
    actions = policy.as_taken(batch.actions)
    output = policy.output(batch.observations)
    values, log_prob, entropy = policy.evaluate_output(
        output, actions, batch.routes if policy.n_experts > 1 else None
    )
    advantages = batch.advantages
    # a ratio to who did not act may be anything, and 0 times that is nan
    log_ratio = torch.where(batch.alone, 0.0, log_prob - batch.old_log_prob)
    ratio = log_ratio.exp()
    gain = _surrogate(advantages, ratio, clip)
    values = values.flatten()
    if clip_value is not None:
        values = batch.old_values + (values - batch.old_values).clamp(-clip_value, clip_value)
    spread = -log_prob if entropy is None else entropy
    parts = {
        "policy_gradient_loss": -_mean(share * gain, weight),
        "value_loss": _mean(share * (batch.returns - values) ** 2, weight),
        "entropy_loss": -_mean(share * spread, weight),
        "gate_loss": gate_loss(policy, memory),
    }
    own = log_prob
    if contrasts:
        own = _own_losses(policy, batch, output, actions, clip, parts)
    if policy.task:  # the reward is seen in every episode, whatever the method drops
        task = policy.task_values(batch.observations, batch.alone)
        parts["task_value_loss"] = (share * (batch.task_returns - task) ** 2).mean()
    with torch.no_grad():  # http://joschu.net/blog/kl-approx.html
        log_ratio = torch.where(batch.alone, own - batch.old_log_prob, log_ratio)
        ratio = log_ratio.exp()
        parts["approx_kl"] = (ratio - 1 - log_ratio).mean()
        parts["clip_fraction"] = ((ratio - 1).abs() > clip).float().mean()
    return parts


def _own_losses(
    policy: MoEPolicy,
    batch: RoutedSamples[Tensor],
    output: Output,
    actions: Tensor,
    clip: float,
    parts: dict[str, Tensor],
) -> Tensor:
    """Add what the deployed expert learns by itself; its log-probabilities of the actions. [B]

    Off-policy from what the mixture did, and by PPO from what it did alone.
    """
    weight, share = batch.own_weights, batch.share
    alone_weight = weight * batch.alone
    distribution = policy.distribution(output.alone(DEPLOYED)[0])
    own, spread = distribution.log_prob(actions), distribution.entropy()
    signed = share * batch.signed
    taken = own, batch.old_log_prob, signed, weight * ~batch.alone
    ratio = torch.where(batch.alone, own - batch.old_log_prob, 0.0).exp()
    gain = _surrogate(signed, ratio, clip)
    off_policy = contrast_loss(*(x[None] for x in taken))[0]
    parts["contrast_loss"] = off_policy - _mean(gain, alone_weight)
    spread = share * (-own if spread is None else spread)
    parts["entropy_loss"] = parts["entropy_loss"] - _mean(spread, alone_weight)
    if policy.own_value_net is not None:
        error = (batch.own_returns - policy.own_values(batch.observations)) ** 2
        parts["value_loss"] = parts["value_loss"] + _mean(share * error, alone_weight)
    return own


def gate_loss(policy: MoEPolicy, memory: Memory | None) -> Tensor:
    """Cross entropy of the gate against remembered labels; 0 where there are none."""
    if memory is None:
        return torch.zeros((), device=policy.device)
    rows, label, known = memory.draw(torch.rand(1, memory.draws))
    observations = from_rows(rows[0].to(policy.device), policy.observation_space)
    log_gate = policy.gate_log_probabilities(observations)
    return cross_entropy(log_gate, label.to(policy.device), known.to(policy.device))[0]


def ending_loss(policy: MoEPolicy, endings: Memory) -> Tensor:
    """Cross entropy of the classifier of endings on remembered ones."""
    rows, label, known = endings.draw(torch.rand(1, endings.draws))
    width = row_width(policy.observation_space)
    seen, actions = rows[0].to(policy.device).tensor_split([width], dim=-1)
    observations = from_rows(seen, policy.observation_space)
    chances = policy.ending_log_probabilities(observations, policy.as_taken(actions))
    label, known = label.to(policy.device), known.to(policy.device)
    return cross_entropy(chances[None], label, known)[0]


def learn_endings(policy: MoEPolicy, endings: Memory) -> Tensor:
    """One step of the classifier of endings, apart from the policy's; returns its loss.

    Raises:
        NotFinite: the loss is not.
    """
    policy.optimizer.zero_grad()
    loss = ending_loss(policy, endings)
    if not loss.isfinite():
        raise NotFinite("loss of the classifier of endings", float(loss.detach()))
    loss.backward()
    policy.optimizer.step()
    return loss.detach()


def _surrogate(advantages: Tensor, ratio: Tensor, clip: float) -> Tensor:
    """The clipped gain of each sample (arXiv 1707.06347, equation 7). [B]"""
    return torch.min(advantages * ratio, advantages * ratio.clamp(1 - clip, 1 + clip))


def _mean(x: Tensor, weight: Tensor) -> Tensor:
    """Mean of `x` `[B]` under weights `[B]`; 0 where all are 0."""
    return weighted_mean(x[None], weight[None])[0]
