"""The table of methods: what each rewards, learns from, routes and deploys.

An episode has one of a few *outcomes*, as the learner sees it; a method says, for each outcome,
the reward at its end, whether its samples count, and where its gradients flow. With the shape of
the policy, the lessons besides and what is deployed, that is all a method is: adding one means
adding a row to METHODS, and every learner reads the same rows.

`outcomes` makes tensors of it. Nothing here loads torch, which takes a second: settings look here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

from oversight_rl.envs.overseers import Overseer, rate

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
    look at them, and on the grid what squares coincide; plain: nothing of the world, it sees what
    the policy sees through layers like the policy's. (Both know what the overseer sets itself: how
    often it labels, and whether it looks everywhere.)"""
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
