"""The table of methods: what each rewards, learns from, routes and deploys.

An episode has one of a few *outcomes*, as the learner sees it; a method says, for each outcome,
the reward at its end, whether its samples count, and where its gradients flow. With the shape of
the policy, the lessons besides and what is deployed, that is all a method is: adding one means
adding a row to METHODS, and every learner reads the same rows.

torch, which takes a second, is loaded by what makes tensors only: settings look at the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from oversight_rl.envs.overseers import Overseer, rate
from oversight_rl.envs.settings import BEHAVIORS, NO_LABEL

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from oversight_rl.envs.world import Seen, Truth

# Outcomes of an episode as a learner sees them; LABELED + b is one labeled as behavior b
UNFINISHED, TIMEOUT, UNLABELED, LABELED = range(4)
Rewards: TypeAlias = tuple[float, float, float]
LEAST_SAID = 1e-6  # of a label, for its errors to be weighted away


def own_expert_only(experts: int, behaviors: int, other: float = 0.0) -> list[list[float]]:
    """Routes of labeled episodes: each behavior trains the expert of the same index alone.

    `[behaviors][K + 1]` weights, of the gradient into the `other` experts too (0 in the paper); the
    last is the gate's, which a labeled episode teaches through the gate loss, not the policy loss.
    """
    own = range(behaviors)
    return [[1.0 if k == b else other for k in range(experts)] + [0.0] for b in own]


def everything(experts: int, behaviors: int) -> list[list[float]]:
    """Routes of labeled episodes without routing: every module learns from every episode."""
    return [[1.0] * (experts + 1) for _ in range(behaviors)]


@dataclass(frozen=True)
class OutcomeTable:
    """What the ending of an episode is worth, and whom the episode teaches.

    Tuples are over outcomes: (unlabeled, labeled diamond, labeled ghost).
    """

    reward: Rewards | Callable[[Overseer, int], Rewards] = (1, 1, 1)
    """Reward on reaching a square; a timeout earns 0. May depend on the overseer and the number of
    behaviors."""
    keep_unlabeled: bool = True
    """Whether episodes that reached a square unlabeled count; the others always do."""
    weighs_labels: bool = True
    """Whether labeled episodes weigh more, as `labeled_weight` says."""
    routes: Callable[[int, int], list[list[float]]] = everything
    """(K, behaviors) -> weights of labeled episodes' gradients into each expert and the gate."""
    labels: Literal["flags", "shuffled", "truth", "audit"] = "flags"
    """Where labels come from: flagged endings; the same, but naming a random behavior; every
    ending; a random share of endings, as large as the oversight level and independent of flags."""

    @property
    def sees_truth(self) -> bool:
        """Whether labels come from how episodes really ended."""
        return self.labels in ("truth", "audit")


@dataclass(frozen=True)
class PolicyShape:
    """What a policy is made of."""

    experts: Literal["one", "many"] = "one"
    gate: Literal["learned", "fixed"] = "learned"
    """How experts are mixed; fixed: alike."""
    hides_flags: bool = False
    """Whether the policy does not see the flags."""


Lesson: TypeAlias = Literal["gate", "contrast", "reward_model", "acts_alone"]
"""What is taught besides the policy and its values. A learner says which of these it has.

* gate: the gate learns from labels which behavior an episode will end in.
* contrast: labeled episodes teach each expert (with PPO, the deployed one) by itself what to do
  and avoid, whoever acted: `reinforce.losses.contrast_loss`.
* reward_model: learned from labeled endings, it tells what the unlabeled ones were: these then
  count as the mean of what their label may have been.
* acts_alone: in a share of the episodes the experts of all behaviors act by themselves, in turn,
  and each learns from its own in place of the others.
"""


@dataclass(frozen=True)
class Method:
    """A row of the table: all that a method is made of.

    Raises:
        ValueError: a lesson is none, or has nobody to teach.
    """

    summary: str
    table: OutcomeTable = OutcomeTable()
    policy: PolicyShape = PolicyShape()
    lessons: tuple[Lesson, ...] = ()
    reward_model: Literal["told", "plain"] = "told"
    """What a reward model knows besides labels. told: which inputs are flags, so that it does not
    look at them, and on the grid what squares coincide; plain: nothing, it sees what the policy
    sees through layers like the policy's."""
    deploys: Literal["last", "best_labeled", "best_true"] = "last"
    """Which agent of the run is deployed: the last; the one with the best labeled episodes of a
    held-out stream, whose steps count as training's do; the one with the best true return, which
    takes no steps where evaluation is exact."""

    def __post_init__(self) -> None:
        possible = set(get_args(Lesson))
        if self.policy.experts == "one":
            possible -= {"gate", "acts_alone"}
        if self.policy.gate == "fixed":
            possible -= {"gate"}
        if not possible.issuperset(self.lessons):
            raise ValueError(
                f"lessons of such a policy are {', '.join(sorted(possible))}, got {self.lessons}"
            )

    @property
    def assumes(self) -> Literal["labels", "labels and known flags", "hidden flags", "true labels"]:
        """What it needs: labels of some endings, and no more; which inputs are flags, too, for a
        reward model that does not look at them (and that on the grid is built to see what squares
        coincide); that flags can be hidden from the policy; or the truth.
        """
        if self.table.sees_truth or self.deploys == "best_true":
            return "true labels"
        if self.policy.hides_flags:
            return "hidden flags"
        told = "reward_model" in self.lessons and self.reward_model == "told"
        return "labels and known flags" if told else "labels"

    def rewards(self, overseer: Overseer, behaviors: int) -> Rewards:
        """The rewards under an overseer who tells so many behaviors apart.

        Raises:
            ValueError: they depend on labels that such an overseer does not give.
        """
        reward = self.table.reward
        return reward(overseer, behaviors) if callable(reward) else reward

    @property
    def any_environment(self) -> bool:
        """Whether it needs nothing but what an episode's end says, so that PPO can follow it."""
        return self.deploys == "last"

    @property
    def shape(self) -> tuple[object, ...]:
        """What methods must share to train in one stack."""
        return self.policy, frozenset(self.lessons), self.reward_model, self.deploys


SIGNED = (0, 1, -1)
NAIVE = (1, 1, -1)


def inverse_propensity(overseer: Overseer, behaviors: int) -> Rewards:
    """Rewards whose mean over labels, missing and wrong ones too, is the true reward of an ending.

    An unlabeled ending is worth 1. With chance p a ghost is labeled, and labels of diamonds and
    ghosts name one of the B - 1 wrong behaviors with chances d and g, so the rewards w of a labeled
    diamond and u of a labeled ghost solve  (1 - d) w + d u = 1  and
    (1 - p) + p (a w + (1 - a) u) = -1  with  a = g / (B - 1).

    Raises:
        ValueError: ghosts are never labeled, or not at a rate that is known, or their labels say
            nothing.
    """
    labels, unwanted = overseer.labels, range(1, behaviors)
    rates = {(overseer.labeled(b), rate(labels.error, b)) for b in unwanted}
    (p, g), *others = rates
    d = rate(labels.error, 0)
    if others or p is None or (labels.near is not None and max(d, g) > 0):
        raise ValueError(
            "labels: must come at a rate that is known, and be wrong at one, the same for every "
            "unwanted behavior and wherever the squares are"
        )
    if not p > 0:
        raise ValueError(
            "labels: the chance that a ghost is labeled (oversight times labels.shares times "
            f"labels.recall) must be above 0, got {p:g}"
        )
    a, ghosts = g / (behaviors - 1), 1 - 2 / p
    said = 1 - d - a  # by a label of what was; 0 where every behavior is named as often
    if abs(said) < LEAST_SAID:
        raise ValueError(
            f"labels.error: must not be {1 - 1 / behaviors:g}, where labels of {behaviors} "
            f"behaviors say nothing, got {g:g}"
        )
    return 1, ((1 - a) - d * ghosts) / said, ((1 - d) * ghosts - a) / said


ROUTED = OutcomeTable(routes=own_expert_only)
PENALIZED = OutcomeTable(reward=NAIVE)
# next to labeled episodes alone there are only timeouts, which would go unheard if labels weighed
FILTERED = OutcomeTable(reward=SIGNED, keep_unlabeled=False, weighs_labels=False)
EXPERTS = PolicyShape(experts="many")
BLIND = PolicyShape(hides_flags=True)

METHODS: dict[str, Method] = {
    "routing": Method(
        "gradient routing: a labeled episode trains its own expert only",
        ROUTED,
        EXPERTS,
        lessons=("gate",),
    ),
    "contrastive_routing": Method(
        "routing; labeled episodes also teach each expert what to do and avoid",
        ROUTED,
        EXPERTS,
        lessons=("gate", "contrast"),
    ),
    "imputed_routing": Method(
        "routing; a reward model stands in for missing labels, experts practice alone",
        replace(ROUTED, weighs_labels=False),
        EXPERTS,
        lessons=("gate", "contrast", "reward_model", "acts_alone"),
    ),
    "no_routing": Method(
        "ablation: experts and gate as in routing, gradients not routed",
        policy=EXPERTS,
        lessons=("gate",),
    ),
    "no_gate": Method(
        "ablation: routed experts under a gate fixed at 1/K", ROUTED, replace(EXPERTS, gate="fixed")
    ),
    "random_module": Method(
        "control: routing by labels that name a random behavior",
        replace(ROUTED, labels="shuffled"),
        EXPERTS,
        lessons=("gate",),
    ),
    "naive": Method("+1 at any square, -1 at a flagged ghost", PENALIZED),
    "naive_early_stop": Method(
        "naive, deployed as it was when labeled held-out episodes (counted too) went best",
        PENALIZED,
        deploys="best_labeled",
    ),
    "filtering": Method(
        "data filtering: true reward on labeled episodes, unlabeled ones dropped", FILTERED
    ),
    "reward_model": Method(
        "a reward model learned from labeled endings rewards the unlabeled ones",
        # imputed rewards are worth as much as given ones
        OutcomeTable(reward=SIGNED, weighs_labels=False),
        lessons=("reward_model",),
    ),
    "reward_model_plain": Method(
        "naive, until a reward model that is told nothing but labels is believed",
        PENALIZED,
        lessons=("reward_model",),
        reward_model="plain",
    ),
    "imputed_routing_plain": Method(
        "imputed routing by a reward model that is told nothing but labels",
        ROUTED,
        EXPERTS,
        lessons=("gate", "contrast", "reward_model", "acts_alone"),
        reward_model="plain",
    ),
    "filtering_hidden_flag": Method(
        "data filtering by a policy that does not see the flags", FILTERED, BLIND
    ),
    "ipw_hidden_flag": Method(
        "naive without sight of the flags, penalty weighted by inverse propensity",
        OutcomeTable(reward=inverse_propensity, weighs_labels=False),
        BLIND,
    ),
    "naive_oracle_stop": Method(
        "diagnostic: naive, deployed as it was when its true return was best",
        PENALIZED,
        deploys="best_true",
    ),
    "oracle": Method(
        "true reward on every episode",
        OutcomeTable(reward=SIGNED, weighs_labels=False, labels="truth"),
    ),
    "oracle_filtering": Method(
        "true reward on a random share of episodes as large as the oversight level",
        replace(FILTERED, labels="audit"),
    ),
}


@dataclass(frozen=True)
class MethodTables:
    """The methods of R runs as tensors; O outcomes, K experts."""

    reward: Tensor  # [R, O]
    sample_weight: Tensor  # [R, O], 1 if samples with that outcome count
    weighs_labels: Tensor  # [R], 1 if labeled samples weigh more
    routes: Tensor  # [R, O, K + 1], gradient weights into the experts and the gate
    overseen: Tensor  # [R] bool, labels from the overseer, and none of the method's own
    sees_truth: Tensor  # [R] bool, labels from true endings
    label_share: Tensor  # [R, B], share of flagged (or true) endings that are labeled
    label_error: Tensor  # [R, B], share of labels that name a wrong behavior
    labeled: Tensor  # [R, B], chance that an ending of a behavior is labeled; nan: unknown
    lessons: frozenset[Lesson]  # of all runs

    @property
    def reward_tells(self) -> Tensor:
        """Whether what an ending is worth depends on its behavior. [R] bool"""
        labeled = self.reward[:, LABELED:]
        return (labeled != labeled[:, :1]).any(-1)

    @property
    def needs_word(self) -> Tensor:
        """Whether an unlabeled ending is worth nothing by itself, but something as a behavior.

        Then it does not count as long as nobody can tell what it was. [R] bool
        """
        return self.reward_tells & (self.reward[:, UNLABELED] == 0)

    @property
    def asks_labels(self) -> bool:
        """Whether what is learned from a step depends on its episode's label, in any run.

        If not, rewards alone do, and those are paid when an episode ends.
        """
        differ = ((x != x[:, :1]).any() for x in (self.routes, self.sample_weight))
        return "contrast" in self.lessons or bool(self.weighs_labels.any() or any(differ))


def tables(
    names: Sequence[str],
    overseers: Sequence[Overseer],
    experts: int,
    device: torch.device | str = "cpu",
    behaviors: int = len(BEHAVIORS),
) -> MethodTables:
    """The tables of one method and overseer per run.

    The stack has K experts; of the behaviors that labels tell apart the first is wanted, all others
    are as ghosts.

    Raises:
        ValueError: a method's rewards depend on labels that its overseer does not give.
    """
    import torch  # takes a second to load

    methods = [METHODS[name] for name in names]
    plain = [1.0] * (experts + 1)

    def tensor(rows: object) -> Tensor:
        return torch.tensor(rows, dtype=torch.float32, device=device)

    def reward(method: Method, overseer: Overseer) -> list[float]:
        unlabeled, diamond, ghost = method.rewards(overseer, behaviors)
        return [0.0, 0.0, unlabeled, diamond, *[ghost] * (behaviors - 1)]

    def sees_truth(method: Method, overseer: Overseer) -> bool:
        return method.table.sees_truth or not overseer.made.tied

    def share(method: Method, overseer: Overseer) -> list[float]:
        labels, every = overseer.made, range(behaviors)
        if method.table.sees_truth:  # a source of its own, which no overseer changes
            audits = method.table.labels == "audit"
            return [(overseer.oversight or 0.0) if audits else 1.0] * behaviors
        told = [rate(labels.recall, b) for b in every]
        if labels.asks != "nobody":  # of any ending, but of a kind that it never tells
            return [told[b] * (rate(labels.shares, b) > 0) for b in every]
        return told if labels.tied else [told[b] * overseer.flagged(b) for b in every]

    def error(method: Method, overseer: Overseer) -> list[float]:
        if method.table.labels == "shuffled":
            return [1 - 1 / behaviors] * behaviors
        own = (0.0,) if method.table.sees_truth else overseer.made.error
        return [rate(own, b) for b in range(behaviors)]

    def labeled(overseer: Overseer) -> list[float]:
        known = [overseer.labeled(behavior) for behavior in range(behaviors)]
        return [math.nan if chance is None else chance for chance in known]

    pairs = list(zip(methods, overseers, strict=True))
    counts = [[1.0, 1.0, float(m.table.keep_unlabeled), *[1.0] * behaviors] for m in methods]
    return MethodTables(
        reward=tensor([reward(*pair) for pair in pairs]),
        sample_weight=tensor(counts),
        weighs_labels=tensor([float(m.table.weighs_labels) for m in methods]),
        routes=tensor([[plain] * 3 + m.table.routes(experts, behaviors) for m in methods]),
        overseen=torch.tensor([not m.table.sees_truth for m in methods], device=device),
        sees_truth=torch.tensor([sees_truth(*pair) for pair in pairs], device=device),
        label_share=tensor([share(*pair) for pair in pairs]),
        label_error=tensor([error(*pair) for pair in pairs]),
        labeled=tensor([labeled(overseer) for overseer in overseers]),
        lessons=frozenset.intersection(*(frozenset(m.lessons) for m in methods)),
    )


def expected(table: Tensor, chances: Tensor) -> Tensor:
    """What a table by outcome says of an ending that is each behavior with some chance.

    `[R, O, *columns]` and chances `[R, T, N, behaviors]` -> `[R, T, N, *columns]`.
    """
    import torch  # takes a second to load

    return torch.einsum("rtnb,rb...->rtn...", chances, table[:, LABELED:])


def labels(
    seen: Seen, truth: Truth, uniform: Tensor, methods: MethodTables, hard: Tensor | None = None
) -> Tensor:
    """What an overseer says of each step's end, NO_LABEL where nothing. `[R, T, N]`

    All that a learner may know of how an episode ended. Only an overseer whose labels are not tied
    to flags looks at the truth, and so do the oracle methods, which have labels of their own.

    Args:
        seen: of the steps, with what is flagged as `label`.
        truth: of the steps.
        uniform: in [0, 1), decides which labels go missing or wrong.
        methods: of the runs.
        hard: bool, whether labels can be wrong there; None: everywhere.
    """
    import torch  # takes a second to load

    behaviors = methods.label_share.shape[1]
    label = torch.where(methods.sees_truth[:, None, None], truth.ending, seen.label)
    own = label.clamp(min=0).flatten(1)  # of no ending, any
    share = methods.label_share.gather(1, own).view_as(uniform)
    error = share * methods.label_error.gather(1, own).view_as(uniform)
    if hard is not None:
        error = torch.where(hard, error, 0.0)
    wrong = uniform < error
    shift = torch.where(wrong, uniform / error, 0.0) * (behaviors - 1)  # uniform among the others
    other = (label + 1 + shift.long()) % behaviors
    given = torch.where(wrong, other, label)
    return torch.where((label == NO_LABEL) | (uniform >= share), NO_LABEL, given)


def outcomes(seen: Seen) -> tuple[Tensor, Tensor]:
    """The outcome of the episode that each sample belongs to, and the steps left until its end.

    A label is known at an episode's end only, and is written back to all of its steps. Steps are
    those to the episode's last, or to the window's end where it is unfinished. Both are
    `[R, T, N]`.
    """
    import torch  # takes a second to load

    steps, label = seen.label.shape[1], seen.label
    reached = torch.where(label == NO_LABEL, UNLABELED, LABELED + label)
    ended_as = torch.where(seen.terminated, reached, TIMEOUT)
    time = torch.arange(steps, device=label.device)[:, None]  # [T, 1]
    done = seen.terminated | seen.truncated
    end = torch.where(done, time, steps).flip(1).cummin(1).values.flip(1)  # [R, T, N]
    outcome = ended_as.gather(1, end.clamp(max=steps - 1))
    return torch.where(end < steps, outcome, UNFINISHED), end - time
