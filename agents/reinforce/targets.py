"""What is learned from a window: returns, sample weights and gradient routes."""

from __future__ import annotations

from dataclasses import dataclass

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
from oversight_rl.agents.reinforce.collect import Rollout
from oversight_rl.agents.reinforce.reward_model import RewardModel
from oversight_rl.agents.routing import lookup
from oversight_rl.agents.settings import ReinforceConfig, at


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
    outcome, left = outcomes(rollout.seen, rollout.truth, rollout.uniform, methods)
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
