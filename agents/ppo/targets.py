"""What PPO learns from a rollout: one pure function from experience to targets.

An advantage has two parts, each with a baseline and a scale of its own. *Behavior*: what the
method's table says an ending is worth, paid at the end, and 0 at a timeout. *Task*: the
environment's reward as it came, which no table ever touches. So whatever the sign, the size and
the time of the reward, labels alone decide which behavior is learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from oversight_rl.agents.methods import LABELED, UNFINISHED, UNLABELED, MethodTables, expected
from oversight_rl.agents.networks import DEPLOYED
from oversight_rl.agents.routing import lookup

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

LEAST_SHARE = 1e-3
"""Of a step that an older policy took; what the policy would no longer do teaches it nothing."""
TASK_NOISE = 0.1
"""Spread of task advantages, in units of the task's returns, below which they count as noise."""


@dataclass(frozen=True)
class Experience:
    """A rollout of T steps in N environments, with what the networks say of it; `[T, N]`.

    A value *after* a step is that of what follows in the same episode: 0 where the episode ended,
    and the last observation's where a time limit cut it.
    """

    outcome: NDArray[np.int64]  # of the step's episode, see `methods.outcomes`
    left: NDArray[np.int64]  # steps until the episode's last one
    ended: Bools  # the episode ends with this step in a behavior, seen or not
    done: Bools  # the same, or in none
    alone: Bools  # the deployed expert acted by itself
    value: Floats  # of the mixture: what the ending is to be worth
    value_after: Floats
    gate: Floats | None  # [T, N, K], 0 where not asked for; None without a gate that learns
    chances: Floats | None  # [T, N, behaviors], of what the episode's ending was, by a classifier;
    # None where there is none that was taught
    share: Floats  # how much a step counts: 0 where it waits for its episode's end or was learned
    # from, 1 where the policy took it, and less where an older one did, see `older_share`
    own_value: Floats | None = None  # of the deployed expert by itself
    own_value_after: Floats | None = None
    task_reward: Floats | None = None  # in units of the task's scale; None without a task
    task_value: Floats | None = None  # of whoever acted
    task_value_after: Floats | None = None


@dataclass(frozen=True)
class Targets:
    """What the losses ask of each sample, `[T, N]`."""

    weights: Floats  # of what the mixture did; 0 where it did not act
    own_weights: Floats  # of what the deployed expert learns by itself
    alone_weights: Floats  # the same, where it acted by itself
    routes: Floats  # [T, N, K + 1], gradient weights of the experts and the gate
    advantages: Floats
    returns: Floats  # what the ending was worth, for the mixture's value net
    signed: Floats  # what the episode was to the deployed expert: its discounted true return,
    # labeled or imputed, less a baseline; where it acted by itself, its advantage
    own_returns: Floats  # for its own value net, where it acted by itself
    task_returns: Floats  # for the task's value net


def targets(
    x: Experience,
    methods: MethodTables,
    *,
    discount: float,
    trace: float,
    labeled_weight: float,
    imputes: bool,
    normalize: bool,
    task_weight: float,
) -> Targets:
    """Weights, routes, advantages and returns of a rollout.

    A labeled episode trains its own expert alone, whose task is to bring that behavior about. The
    value net foretells any behavior, so it is no baseline for that: once it is right, labeled
    episodes would be no better than expected, and the experts would stay alike. Where labels are
    routed, a labeled sample is therefore worth its discounted ending, less what the mixture was to
    get *by its own behavior*: the value V times the gate's g of that behavior. To the deployed
    expert, likewise, a state was worth V (2 g_0 - 1). The task's value enters neither.

    Where the deployed expert acted by itself it learns from that alone, by advantages of its own
    (its reward is +1 or -1 at an episode's end, or what a classifier expects of that), and nothing
    off-policy from what the mixture did.

    Args:
        x: the rollout.
        methods: tables of the one run.
        discount: per step.
        trace: lambda of generalized advantage estimation.
        labeled_weight: weight of a labeled sample next to others, for methods that have it.
        imputes: whether a classifier is to say what unlabeled endings were.
        normalize: whether the parts of advantages are brought to mean 0 and spread 1.
        task_weight: how much a spread of the task's advantage counts next to one of the
            behavior's.
    """
    outcome = torch.as_tensor(x.outcome)[None]
    labeled, unlabeled = x.outcome >= LABELED, x.outcome == UNLABELED
    worth, counts, routes = (
        lookup(table, outcome)[0].numpy()
        for table in (methods.reward, methods.sample_weight, methods.routes)
    )
    sign = 2.0 * (x.outcome == LABELED) - labeled
    own_counts = counts
    if x.chances is not None:
        chances = torch.as_tensor(x.chances)[None]
        mean_worth, mean_routes = (
            expected(table, chances)[0].numpy() for table in (methods.reward, methods.routes)
        )
        worth = np.where(unlabeled, mean_worth, worth)
        routes = np.where(unlabeled[..., None], mean_routes, routes)
        sign = np.where(unlabeled, 2 * x.chances[..., DEPLOYED] - 1, sign)
    elif imputes:  # nobody taught the classifier yet: what nobody knows counts for nothing
        own_counts = counts * ~unlabeled
        counts = own_counts if bool(methods.reward_tells) else counts
    heavy = np.where(labeled, 1 + float(methods.weighs_labels) * (labeled_weight - 1), 1.0)
    acts_alone = learns_alone(x.alone, x.share)
    due = x.share > 0
    weights = heavy * counts * (due & ~x.alone)
    own_weights = heavy * own_counts * (due & (x.alone if acts_alone else True))

    # behavior
    fades = discount**x.left
    advantages = gae(worth * x.ended, x.value, x.value_after, x.done, discount, trace)
    returns = advantages + x.value
    routed = labeled & (routes != 1).any(-1)
    signed = sign * fades
    own_share = np.zeros_like(x.value)
    if x.gate is not None:
        behavior = np.maximum(x.outcome - LABELED, 0)[..., None]
        own_share = np.take_along_axis(x.gate, behavior, 2)[..., 0]
        by_label = x.chances is None or acts_alone
        signed = signed - judged(x.outcome, by_label) * (2 * x.gate[..., DEPLOYED] - 1) * x.value
    advantages = np.where(routed, worth * fades - own_share * x.value, advantages)
    if normalize:
        mean, spread = moments(advantages[(weights > 0) & ~routed])
        advantages = (advantages - mean * ~routed) / spread
        signed = signed / spread
    own_returns = np.zeros_like(x.value)
    if acts_alone:
        assert x.own_value is not None
        assert x.own_value_after is not None
        own = gae(sign * x.ended, x.own_value, x.own_value_after, x.done, discount, trace)
        own_returns = own + x.own_value
        if normalize:
            mean, spread = moments(own[own_weights > 0])
            own = (own - mean) / spread
        signed = np.where(x.alone, own, signed)

    # task
    task_returns = np.zeros_like(x.value)
    if x.task_reward is not None:
        assert x.task_value is not None
        assert x.task_value_after is not None
        task = gae(x.task_reward, x.task_value, x.task_value_after, x.done, discount, trace)
        task_returns = task + x.task_value
        for among, part in ((weights > 0, advantages), (x.alone & (own_weights > 0), signed)):
            scaled = task
            if normalize:
                mean, spread = moments(task[among])
                scaled = (task - mean) / np.hypot(spread, TASK_NOISE)
            part += task_weight * scaled * among
    return Targets(
        *(
            np.asarray(part, np.float32)
            for part in (
                weights, own_weights, own_weights * x.alone, routes, advantages, returns, signed,
                own_returns, task_returns,
            )
        )
    )  # fmt: skip


def learns_alone(alone: Bools, share: Floats) -> bool:
    """Whether the deployed expert learns from what it did by itself, and from nothing else."""
    return bool((alone & (share > 0)).any())


def judged(outcome: NDArray[np.int64], by_label: bool) -> Bools:
    """Which samples the gate is asked about: what they are worth depends on their behavior.

    Args:
        outcome: of each step's episode.
        by_label: whether labels alone say which behavior it was; else a classifier does, too.
    """
    return outcome >= LABELED if by_label else outcome != UNFINISHED


def older_share(now: Floats, then: Floats) -> Floats:
    """How much an older policy's steps count, by log-probabilities of their actions now and then.

    They are judged anew before an update, so that PPO's ratio is to the policy as it is now, and
    their losses count by how much likelier it is now than then to do the same, at most 1, or not at
    all where that is next to nothing. Rewards that followed are those that the older policy found.

    Source: the decoupled objective of arXiv 2110.00641; the bound is that of arXiv 1802.01561.
    """
    share: Floats = np.exp(np.minimum(now - then, 0))
    return np.where(share < LEAST_SHARE, np.float32(0), share)


def gae(
    reward: NDArray[Any],
    value: NDArray[Any],
    value_after: NDArray[Any],
    done: Bools,
    discount: float,
    trace: float,
) -> NDArray[Any]:
    """Generalized advantage estimation (arXiv 1506.02438, equation 16). `[T, N]` each.

    Args:
        reward: of each step.
        value: before it.
        value_after: after it, in the same episode; 0 where nothing follows.
        done: whether the episode ends with it.
        discount: per step.
        trace: lambda.
    """
    advantage: NDArray[Any] = reward + discount * value_after - value
    for t in reversed(range(len(advantage) - 1)):
        advantage[t] += discount * trace * ~done[t] * advantage[t + 1]
    return advantage


def moments(x: NDArray[Any]) -> tuple[float, float]:
    """Mean of numbers `[B]` and their spread, as if there were one more at distance 1 from it.

    So rounding is never blown up where all are nearly equal, and one number alone has a spread.
    (An ending is worth about 1, and the task is in units of its returns.)
    """
    mean = float(x.mean()) if x.size else 0.0
    return mean, float((((x - mean) ** 2).sum() + 1) / (x.size + 1)) ** 0.5
