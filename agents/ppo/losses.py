"""PPO's losses of a minibatch, with every gradient routed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oversight_rl.agents.learner import NotFinite
from oversight_rl.agents.memory import Memory
from oversight_rl.agents.networks import DEPLOYED, Output, Prepared
from oversight_rl.agents.positive_unlabeled import (
    Judged,
    as_often,
    loss_of_endings,
    loss_of_labels,
)
from oversight_rl.agents.ppo.extractors import prepared, renumbered
from oversight_rl.agents.ppo.observations import each, from_rows, row_width
from oversight_rl.agents.ppo.policy import MoEPolicy
from oversight_rl.agents.ppo.targets import Targets
from oversight_rl.agents.ppo.views import AT_ONCE, Views
from oversight_rl.agents.reinforce.losses import contrast_loss, cross_entropy

LESSONS = 12
"""Steps of the reward model in an update; it must be right before the experts are set."""


class Replay(NamedTuple):
    """Remembered observations, as a features extractor takes them soonest, and what they were."""

    observations: Any  # [B, ...]
    actions: Tensor | None  # [B, ...], of endings
    label: Tensor  # [B]
    weight: Tensor  # [B], 0 where nothing is remembered

    def part(self, number: int, parts: int) -> Replay:
        """One of so many equal parts."""
        size = len(self.label) // parts
        at = torch.arange(number * size, (number + 1) * size, device=self.label.device)
        rows = each(lambda x: x[at], self.observations)
        actions = None if self.actions is None else self.actions[at]
        return Replay(rows, actions, self.label[at], self.weight[at])


def losses(
    policy: MoEPolicy,
    batch: Targets[Tensor],
    views: Views,
    replay: Replay | None,
    *,
    clip: float,
    clip_value: float | None,
) -> dict[str, Tensor]:
    """The parts of the loss, and how far the policy has moved.

    The surrogate and entropy losses reach the experts and the gate through `route`, the value
    losses reach the value nets; all reach the features extractor, and all samples the shared head.

    Args:
        policy: as it is now.
        batch: B samples.
        views: what they saw.
        replay: of labeled observations, for the gate.
        clip: how far the ratio of new to old policy counts.
        clip_value: how far values may move; None: as far as they like.
    """
    counts, share = batch.share * _shares(batch.weights), batch.share
    actions = policy.as_taken(batch.actions)
    view, count = renumbered(batch.view, len(views))  # [B]
    seen = view.new_empty(count).index_copy_(0, view, batch.view)
    features, agent = policy.features(views[seen]), policy.agent.prepare()
    output = agent(features[None], view)
    routed = output.routed(batch.routes[None]) if policy.n_experts > 1 else output
    log_prob, entropy = policy.judged(routed.mixture[0], actions)
    # a ratio to who did not act may be anything, and 0 times that is nan
    log_ratio = torch.where(batch.alone, 0.0, log_prob - batch.old_log_prob)
    ratio = log_ratio.exp()
    gain = _surrogate(batch.advantages, ratio, clip)
    values = output.value[0]
    if clip_value is not None:
        values = batch.old_values + (values - batch.old_values).clamp(-clip_value, clip_value)
    spread = -log_prob if entropy is None else entropy
    parts = {
        "policy_gradient_loss": -(gain @ counts),
        "value_loss": (batch.returns - values) ** 2 @ counts,
        "entropy_loss": -(spread @ counts),
        "gate_loss": gate_loss(policy, replay, agent),
    }
    own = log_prob
    if policy.lessons & {"contrast", "acts_alone"}:
        expert = (batch.actor - 1).clamp(min=DEPLOYED)
        own_values = policy.own_values(features)[view, expert] if policy.soloists else None
        own, more = _own_losses(policy, batch, output, own_values, actions, clip)
        for name, part in more:
            parts[name] = parts[name] + part if name in parts else part
    if policy.task:  # the reward is seen in every episode, whatever the method drops
        task = policy.task_values(features)[view, batch.actor]
        parts["task_value_loss"] = (share * (batch.task_returns - task) ** 2).mean()
    with torch.no_grad():  # http://joschu.net/blog/kl-approx.html
        log_ratio = torch.where(batch.alone, own - batch.old_log_prob, log_ratio)
        ratio = log_ratio.exp()
        parts["approx_kl"] = (ratio - 1 - log_ratio).mean()
        parts["clip_fraction"] = ((ratio - 1).abs() > clip).float().mean()
    return parts


def figure_names(policy: MoEPolicy, has_reward_model: bool) -> list[str]:
    """What `RoutedPPO.train` logs of an update in which it learns, in order."""
    names = ["learning_rate", *["reward_model_loss"] * has_reward_model]
    names += ["policy_gradient_loss", "value_loss", "entropy_loss", "gate_loss"]
    names += ["contrast_loss"] * bool(policy.lessons & {"contrast", "acts_alone"})
    names += ["task_value_loss"] * policy.task + ["approx_kl", "clip_fraction", "loss"]
    return [*names, "explained_variance", *["std"] * hasattr(policy, "log_std")]


def _own_losses(
    policy: MoEPolicy,
    batch: Targets[Tensor],
    output: Output,
    own_values: Tensor | None,
    actions: Tensor,
    clip: float,
) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """Log-probabilities `[B]` of experts by themselves, and the parts of the loss they have so.

    Each sample is of the expert that acted by itself, or else of the deployed one.
    """
    weight, alone = batch.own_weights, batch.alone
    each = torch.stack([output.alone(k)[0] for k in range(max(1, policy.soloists))])  # [S, B, A]
    sample = torch.arange(len(alone), device=alone.device)
    own, entropy = policy.judged(each[(batch.actor - 1).clamp(min=DEPLOYED), sample], actions)
    parts = []
    if "contrast" in policy.lessons:  # off-policy from what the mixture did
        advantages = batch.share * batch.own_advantages
        taken = own, batch.old_log_prob, advantages, weight * ~alone
        parts.append(("contrast_loss", contrast_loss(*(x[None] for x in taken))[0]))
    if own_values is not None:  # PPO from what it did
        ratio = torch.where(alone, own - batch.old_log_prob, 0.0).exp()
        spread = -own if entropy is None else entropy
        error = batch.own_returns - own_values
        counts = batch.share * _shares(weight * alone)
        parts += [
            ("contrast_loss", -(_surrogate(batch.own_advantages, ratio, clip) @ counts)),
            ("entropy_loss", -(spread @ counts)),
            ("value_loss", error**2 @ counts),
        ]
    return own, parts


def gate_loss(policy: MoEPolicy, replay: Replay | None, agent: Prepared) -> Tensor:
    """Cross entropy of the gate against remembered labels; 0 where there are none."""
    if replay is None:
        return torch.zeros((), device=policy.device)
    gate = agent.gate(policy.features(replay.observations)[None]).log_softmax(-1)
    return cross_entropy(gate, replay.label[None], replay.weight[None])[0]


def replays(
    make: Callable[[MoEPolicy, Memory, int], Replay], policy: MoEPolicy, memory: Memory, times: int
) -> Iterator[Replay]:
    """So many replays, some of them made at once, which takes less time.

    Args:
        make: `remembered` or `remembered_endings`.
        policy: that learns from them.
        memory: to draw from.
        times: how many.
    """
    most = max(1, AT_ONCE // memory.draws)
    for start in range(0, times, most):
        parts = min(times - start, most)
        whole = make(policy, memory, parts)
        yield from (whole.part(number, parts) for number in range(parts))


def remembered(policy: MoEPolicy, memory: Memory, times: int) -> Replay:
    """What the gate learns from in so many minibatches."""
    rows, label, weight = _drawn(policy, memory, times)
    seen = prepared(policy.features_extractor, from_rows(rows, policy.observation_space))
    return Replay(seen, None, label, weight)


def remembered_endings(policy: MoEPolicy, memory: Memory, times: int) -> Replay:
    """What the reward model learns from in so many steps."""
    rows, label, weight = _drawn(policy, memory, times)
    seen, actions = rows.tensor_split([row_width(policy.observation_space)], dim=-1)
    seen = policy.without_flags(from_rows(seen, policy.observation_space))
    assert policy.endings is not None
    seen = prepared(policy.endings.extractor, seen)
    return Replay(seen, policy.as_taken(actions), label, weight)


def _drawn(policy: MoEPolicy, memory: Memory, times: int) -> list[Tensor]:
    """So many draws of rows, labels and weights of a memory, one after another."""
    return [x[0].to(policy.device) for x in memory.at(torch.rand(1, times * memory.draws))]


def judged_endings(policy: MoEPolicy, replay: Replay) -> Judged:
    """What the reward model says of remembered endings."""
    assert policy.endings is not None
    assert replay.actions is not None
    features = policy.features(replay.observations, policy.endings.extractor)
    log_chances = policy.endings(features, replay.actions).log_softmax(-1)
    return Judged(log_chances[None], replay.label[None], replay.weight[None])


def learn_reward_model(
    policy: MoEPolicy, memory: Memory, every: Memory | None, chances: Tensor, errs: bool
) -> list[Tensor]:
    """Steps of the reward model, apart from the policy's, once there are labels; their losses.

    Args:
        policy: that it is a part of.
        memory: of labeled endings.
        every: of all endings, where labels may never name some behavior.
        chances: that an ending of each behavior is labeled, nan where unknown, `[1, behaviors]`.
        errs: whether labels can be wrong, and one that does not fit in is to cost less.

    Raises:
        NotFinite: a loss is not.
    """
    losses: list[Tensor] = []
    if not int(memory.count):
        return losses
    unlabeled: Iterator[Replay | None] = repeat(None)
    if every is not None:
        unlabeled = replays(remembered_endings, policy, every, LESSONS)
    for replay, other in zip(
        replays(remembered_endings, policy, memory, LESSONS), unlabeled, strict=False
    ):
        policy.optimizer.zero_grad()
        said = judged_endings(policy, replay)
        said = replace(said, weight=as_often(said.weight, said.label, chances))
        if every is None or other is None:
            (loss,) = loss_of_labels(said, errs)
        else:
            (loss,) = loss_of_endings(
                said, judged_endings(policy, other), chances, memory, every, errs
            )
        if not loss.isfinite():
            raise NotFinite("reward model's loss", float(loss.detach()))
        loss.backward()
        policy.optimizer.step()
        losses.append(loss.detach())
    return losses


def _surrogate(advantages: Tensor, ratio: Tensor, clip: float) -> Tensor:
    """The clipped gain of each sample (arXiv 1707.06347, equation 7). [B]"""
    return torch.min(advantages * ratio, advantages + clip * advantages.abs())


def _shares(weight: Tensor) -> Tensor:
    """Weights `[B]` as shares of their sum; 0 where all are 0."""
    total = weight.sum()
    return weight / torch.where(total > 0, total, 1.0)
