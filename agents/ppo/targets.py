"""What PPO learns from a rollout: one pure function from experience to targets.

An advantage has two parts, each with a baseline and a scale of its own. *Behavior*: what the
method's table says an ending is worth, paid at the end, and 0 at a timeout. *Task*: the
environment's reward as it came, which no table ever touches. So whatever the sign, the size and the
time of the reward, labels alone decide which behavior is learned.

Where an expert acted by itself it learns from that alone, by advantages of that (its reward is +1
at the end of an episode in its own behavior, -1 in another, or what a reward model expects of
that), and nothing off-policy from what the mixture did.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oversight_rl.agents.methods import LABELED, UNFINISHED, UNLABELED
from oversight_rl.agents.networks import DEPLOYED
from oversight_rl.agents.outcomes import MethodTables, expected
from oversight_rl.agents.ppo.held import Steps, Window
from oversight_rl.agents.routing.primitive import lookup

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
A = TypeVar("A", NDArray[Any], Tensor)

LEAST_SHARE = 1e-3
"""Of a step that an older policy took; what the policy would no longer do teaches it nothing."""
TASK_NOISE = 0.1
"""Spread of task advantages, in units of the task's returns, below which they count as noise."""


@dataclass(frozen=True)
class Experience:
    """The window of a rollout: what became of its episodes, what the networks say; `[W, C]` each.

    A value *after* a step is that of what follows in the same episode: 0 where the episode ended,
    and the last observation's where a time limit cut it. What the policy has no network for is
    None.
    """

    window: Window
    view: NDArray[np.int64]  # which observation it was, in the rollout and where due, see `Views`
    outcome: NDArray[np.int64]  # of the step's episode, see `outcomes.outcomes`
    left: NDArray[np.int64]  # steps until the episode's last one
    due: Bools  # to be learned from now, see `Window.due`
    share: Floats  # how much a step counts: 1 where the policy took it, less where an older one
    # did, see `older_share`; 0 where it is not due
    log_prob: Floats  # of its action under the policy before the update
    old_value: Floats  # of the mixture, likewise, where it is asked for
    value_after: Floats  # of the mixture, see `Steps.value`
    chances: Floats | None = None  # [W, C, behaviors], of what the episode's ending was
    taught: bool = False  # whether the reward model, which says so, has seen a label
    own_value_after: Floats | None = None  # of the deployed expert by itself
    task_value_after: Floats | None = None  # of whoever acted
    gate: Floats | None = None  # [W, C, K], 0 but where `judged`

    @property
    def steps(self) -> Steps:
        """The steps as they were taken."""
        return self.window.steps

    @cached_property
    def learns_alone(self) -> bool:
        """Whether the deployed expert learns from what it did by itself, and nothing else."""
        return bool((self.steps.alone & (self.share > 0)).any())

    @cached_property
    def judged(self) -> Bools:
        """Which samples the gate is asked about: what they are worth depends on their behavior.

        It is known by labels alone, or by a reward model, too; but the deployed expert has no use
        for the latter where it learns from what it did by itself.
        """
        by_label = self.chances is None or not self.taught or self.learns_alone
        asked = self.outcome >= LABELED if by_label else self.outcome != UNFINISHED
        return asked & (self.share > 0)


class Targets(NamedTuple, Generic[A]):
    """What the losses ask of each step: of a window's `[W, C]`, or of samples `[B]`."""

    view: A  # int, which observation it was, see `Views`
    actions: A
    actor: A  # int, 0 the mixture, k + 1 expert k by itself
    share: A  # as all below, see `Experience`
    old_log_prob: A
    old_values: A
    weights: A  # of what the mixture did; 0 where it did not act
    own_weights: A  # of what an expert learns by itself: who acted, or else the deployed one
    routes: A  # [..., K + 1], gradient weights of the experts and the gate
    advantages: A
    returns: A  # what the ending was worth, for the mixture's value net
    own_advantages: A  # what the episode was to that expert: its discounted return by its own
    # behavior, labeled or imputed, less a baseline; where it acted by itself, its advantage
    own_returns: A  # for its own value net, where it acted by itself
    task_returns: A  # for the task's value net

    @property
    def alone(self) -> A:
        """Where an expert acted by itself, bool."""
        return self.actor > 0


Samples: TypeAlias = Targets[NDArray[Any]]


def targets(
    x: Experience,
    methods: MethodTables,
    *,
    discount: float,
    trace: float,
    labeled_weight: float,
    normalize: bool,
    task_weight: float,
) -> Samples:
    """Weights, routes, advantages and returns of a window.

    Args:
        x: the window.
        methods: tables of the one run.
        discount: per step.
        trace: lambda of generalized advantage estimation.
        labeled_weight: of a labeled sample next to others, for methods that have it.
        normalize: whether the parts of advantages are brought to mean 0 and spread 1.
        task_weight: of a spread of the task's advantage next to one of the behavior's.
    """
    steps, due, labeled = x.steps, x.share > 0, x.outcome >= LABELED
    endings = _endings(x, methods)
    heavy = np.where(labeled, 1 + float(methods.weighs_labels) * (labeled_weight - 1), 1.0)
    weights = heavy * endings.counts * (due & ~steps.alone)
    learns = due & (steps.alone if x.learns_alone else True)
    own_weights = heavy * endings.own_counts * learns

    def estimate(reward: NDArray[Any], value: Floats, value_after: Floats | None) -> NDArray[Any]:
        assert value_after is not None
        return gae(reward, value, value_after, steps.done, discount, trace)

    behavior = estimate(endings.worth * steps.ended, steps.value, x.value_after)
    advantages, deployed = _by_behavior(x, endings, behavior, weights, discount, normalize)
    own_returns = task_returns = np.zeros_like(behavior)
    if x.learns_alone:
        value, reward = steps.own_value, endings.own_worth * steps.ended
        alone = estimate(reward, value, x.own_value_after)
        own_returns = alone + value
        mean, spread = moments(alone[own_weights > 0]) if normalize else (0.0, 1.0)
        deployed = np.where(steps.alone, (alone - mean) / spread, deployed)
    if x.task_value_after is not None:
        task = estimate(steps.task_reward, steps.task_value, x.task_value_after)
        task_returns = task + steps.task_value
        advantages = advantages + task_weight * _of_task(task, weights > 0, normalize)
        among = steps.alone & (own_weights > 0)
        deployed = deployed + task_weight * _of_task(task, among, normalize)
    parts: tuple[NDArray[Any], ...]
    parts = (weights, own_weights, endings.routes, advantages, behavior + steps.value)
    parts = (*parts, deployed, own_returns, task_returns)
    known = x.view, steps.actions, steps.actor, x.share, x.log_prob, x.old_value
    return Targets(*known, *(np.asarray(part, np.float32) for part in parts))


class _Endings(NamedTuple):
    """What a method's table says of each step, by how its episode ended or may have ended."""

    worth: NDArray[Any]
    own_worth: NDArray[Any]  # to the expert that learns by itself, as far as known; else 0
    routes: NDArray[Any]
    counts: NDArray[Any]  # 1 if the mixture is to learn from it
    own_counts: NDArray[Any]  # 1 if that expert is to


def _endings(x: Experience, methods: MethodTables) -> _Endings:
    outcome = torch.as_tensor(x.outcome)[None]
    labeled, unlabeled = x.outcome >= LABELED, x.outcome == UNLABELED
    worth, counts, routes = (
        lookup(table, outcome)[0].numpy()
        for table in (methods.reward, methods.sample_weight, methods.routes)
    )
    expert = np.maximum(x.steps.actor - 1, DEPLOYED)  # whose own behavior it should be
    own_worth, own_counts = 2.0 * (x.outcome == LABELED + expert) - labeled, counts
    if x.chances is not None and x.taught:
        chances = torch.as_tensor(x.chances)[None]
        mean_worth, mean_routes = (
            expected(table, chances)[0].numpy() for table in (methods.reward, methods.routes)
        )
        worth = np.where(unlabeled, mean_worth, worth)
        routes = np.where(unlabeled[..., None], mean_routes, routes)
        chance = np.take_along_axis(x.chances, expert[..., None], 2)[..., 0]
        own_worth = np.where(unlabeled, 2 * chance - 1, own_worth)
    elif x.chances is not None:  # what nobody knows counts for nothing
        own_counts = counts * ~unlabeled
        counts = own_counts if bool(methods.reward_tells) else counts
    return _Endings(worth, own_worth, routes, counts, own_counts)


def _by_behavior(
    x: Experience,
    endings: _Endings,
    advantages: NDArray[Any],
    weights: NDArray[Any],
    discount: float,
    normalize: bool,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """What the mixture did, as worth for the mixture and for the deployed expert.

    A labeled episode trains its own expert alone, whose task is to bring that behavior about. The
    value net foretells any behavior, so it is no baseline for that: once it is right, labeled
    episodes would be no better than expected, and the experts would stay alike. Where labels are
    routed, a labeled sample is therefore worth its discounted ending, less what the mixture was to
    get *by its own behavior*: the value V times the gate's g of that behavior. To the deployed
    expert, likewise, a state was worth V (2 g_0 - 1). The task's value enters neither.
    """
    value, fades = x.steps.value, discount**x.left
    routed = (x.outcome >= LABELED) & (endings.routes != 1).any(-1)
    deployed, own_share = endings.own_worth * fades, np.zeros_like(value)
    if x.gate is not None:
        behavior = np.maximum(x.outcome - LABELED, 0)[..., None]
        own_share = np.take_along_axis(x.gate, behavior, 2)[..., 0]
        deployed = deployed - x.judged * (2 * x.gate[..., DEPLOYED] - 1) * value
    advantages = np.where(routed, endings.worth * fades - own_share * value, advantages)
    if not normalize:
        return advantages, deployed
    mean, spread = moments(advantages[(weights > 0) & ~routed])
    return (advantages - mean * ~routed) / spread, deployed / spread


def _of_task(task: NDArray[Any], among: Bools, normalize: bool) -> NDArray[Any]:
    """The task's advantages in their spread among some steps, and 0 elsewhere."""
    if normalize:
        mean, spread = moments(task[among])
        task = (task - mean) / np.hypot(spread, TASK_NOISE)
    return task * among


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

    A value after a step is that of what follows in its episode, which may be `done` with it; 0
    where nothing does. `trace` is lambda.
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
