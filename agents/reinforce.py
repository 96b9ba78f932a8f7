"""REINFORCE with a value baseline over a stack of R runs: collect, label, loss.

Axes: R runs, T steps of a window, N worlds per run, B = T * N samples. Episodes run on across
windows. Losses and their gradients are per run, so a stack learns what its runs would alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oversight_rl.agents.memory import Memory
from oversight_rl.agents.methods import (
    LABELED,
    TIMEOUT,
    UNFINISHED,
    UNLABELED,
    MethodTables,
    expected,
    outcomes,
)
from oversight_rl.agents.networks import Agent, Output
from oversight_rl.agents.reward_model import RewardModel
from oversight_rl.agents.routing import lookup
from oversight_rl.agents.settings import ReinforceConfig as ReinforceConfig
from oversight_rl.envs.record import Record
from oversight_rl.envs.world import Seen, State, Truth, World


def at(schedule: tuple[float, ...], progress: float) -> float:
    """Value of a schedule at `progress` in [0, 1]."""
    return schedule[0] + (schedule[-1] - schedule[0]) * progress


@dataclass(frozen=True)
class Rollout(Record):
    """A window of experience.

    The agent is evaluated once per distinct state of the window, while the window is collected;
    `output` keeps the graph for the loss. There are U such states; padding included, where the
    runs of a stack met different numbers of them.
    """

    active: Tensor  # [R, U, 5 or 3 + S], observations as active inputs
    output: Output  # [R, U], what the agent computed for them
    slot: Tensor  # [R, T, N], which of them each step started from
    action: Tensor  # [R, T, N]
    seen: Seen  # [R, T, N], what the learner may see
    truth: Truth  # [R, T, N], what only evaluation and oracle methods may see
    value_after: Tensor  # [R, N], value estimates after the window
    audit: Tensor  # [R, T, N] uniform in [0, 1), decides which labels go missing or wrong

    @property
    def observation(self) -> Tensor:
        """What each step started from, as active inputs. [R, T, N, 5 or 3 + S]"""
        run = torch.arange(len(self.active), device=self.active.device)[:, None, None]
        return self.active[run, self.slot]


@dataclass(frozen=True)
class Targets:
    """What the learner makes of a window, per sample."""

    outcome: Tensor  # [R, T, N], of the episode that the sample belongs to
    returns: Tensor  # [R, T, N]
    weight: Tensor  # [R, T, N], sample weight
    routes: Tensor  # [R, T, N, K + 1], gradient weights of the experts and the gate
    signed: Tensor | None  # [R, T, N], true return of labeled (or imputed) episodes, else 0
    imputed: Tensor | None  # [R, T, N], a reward model's chance of the diamond after each step


DEPLOYED = 0  # the expert that is kept, the wanted behavior's
MOST_KEYS = 2**20
"""States up to which equal ones are merged (a table of them is kept for each run)."""


def noise_channels(world: World) -> int:
    """Uniform random numbers per world and step: those of a reset, the action, the audit."""
    return world.noise_channels + 2


def cumulative(probabilities: Tensor) -> Tensor:
    """The inner edges of the actions' shares of [0, 1]: `[..., A]` -> `[..., A - 1]`."""
    return probabilities.cumsum(-1)[..., :-1]


def sample(edges: Tensor, uniform: Tensor) -> Tensor:
    """Draw actions by inverse transform: `cumulative` `[..., A - 1]`, uniform `[...]` -> int64."""
    return (uniform[..., None] >= edges).sum(-1)


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
    runs, steps, worlds, _ = noise.shape
    fresh = world.reset(noise[..., : world.noise_channels])
    forward = agent.prepare()
    states = _Distinct(world, runs, worlds)
    edges = noise.new_empty(runs, steps * worlds, agent.n_actions - 1)  # by slot
    products, slots, actions, taken = [], [], [], []
    run = torch.arange(runs, device=noise.device)[:, None]
    for t in range(steps):
        slot, active = states.look_up(state)
        if active.shape[1]:
            products.append(forward.products(active))
            with torch.no_grad():
                output = forward.output(*products[-1])
                chances = output.mix(output.gate).softmax(-1)
            edges[:, states.count - active.shape[1] : states.count] = cumulative(chances)
        action = sample(edges[run, slot], noise[:, t, :, -2])
        state, step = world.step(state, action, fresh[:, t])
        slots.append(slot)
        actions.append(action)
        taken.append(step)
    with torch.no_grad():
        value_after = forward.value(world.active(state))
    rollout = Rollout(
        active=torch.cat(states.met, dim=1),
        output=forward.output(*(torch.cat(parts, dim=2) for parts in zip(*products, strict=True))),
        slot=torch.stack(slots, dim=1),
        action=torch.stack(actions, dim=1),
        seen=Seen.stack([step.seen for step in taken], dim=1),
        truth=Truth.stack([step.truth for step in taken], dim=1),
        value_after=value_after,
        audit=noise[..., -1],
    )
    return rollout, state


class _Distinct:
    """The distinct states that worlds `[R, N]` have met, numbered in *slots* as they are met.

    On a GPU, where counting them would make the host wait, and in worlds with too many states,
    every state counts as new.
    """

    def __init__(self, world: World, runs: int, worlds: int) -> None:
        self.world, self.runs, self.worlds = world, runs, worlds
        self.met: list[Tensor] = []  # active inputs of new states, step by step
        self.count = 0  # slots in use in each run
        self.merging = world.device.type == "cpu" and 0 < world.n_keys <= MOST_KEYS
        if self.merging:
            self.slots = torch.full((runs, world.n_keys), -1)

    def look_up(self, state: State) -> tuple[Tensor, Tensor]:
        """Slots `[R, N]` of states, and active inputs `[R, new, ...]` of those not met before."""
        if not self.merging:
            slot = torch.arange(self.worlds, device=self.world.device) + self.count
            active = self.world.active(state)
            self.count += self.worlds
            self.met.append(active)
            return slot.expand(self.runs, -1), active
        key = self.world.key(state)
        known = self.slots.gather(1, key)
        if self.runs > 1:
            key = key + torch.arange(self.runs)[:, None] * self.world.n_keys
        new = key[known < 0].unique()  # sorted, so by run
        run = new // self.world.n_keys
        per_run = run.bincount(minlength=self.runs)
        rank = torch.arange(len(new)) - (per_run.cumsum(0) - per_run)[run]
        self.slots.view(-1)[new] = rank + self.count
        width = int(per_run.max())
        active = self.world.active(self.world.unkey(new % self.world.n_keys))
        if self.runs > 1:
            padded = torch.full((self.runs, width, active.shape[-1]), self.world.inputs)
            padded[run, rank] = active
            active = padded
        else:
            active = active[None]
        self.count += width
        self.met.append(active)
        return self.slots.view(-1).take(key), active


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
    outcome, left = outcomes(rollout.seen, rollout.truth, rollout.audit, methods)
    labeled = outcome >= LABELED
    if memory is not None:
        behavior = (outcome - LABELED).flatten(1)
        memory.add(rollout.observation.flatten(1, 2), behavior, labeled.flatten(1))
    reward, routes = lookup(methods.reward, outcome), lookup(methods.routes, outcome)
    sign = 2.0 * (outcome == LABELED) - labeled.to(reward.dtype)
    if config.bootstrap:
        reward = torch.where(outcome == UNFINISHED, rollout.value_after[:, None], reward)
    counts = lookup(methods.sample_weight, outcome)
    imputed = None
    if reward_model is not None:
        final = reward_model.world.after(rollout.observation, rollout.action).flatten(1, 2)
        endings = labeled & rollout.seen.terminated
        reward_model.memory.add(final, (outcome - LABELED).flatten(1), endings.flatten(1))
        imputed = reward_model(final).sigmoid().view_as(reward)
        time = torch.arange(imputed.shape[1], device=imputed.device)[:, None]  # [T, 1]
        at_end = imputed.gather(1, (time + left).clamp(max=imputed.shape[1] - 1))
        chances, unlabeled = torch.stack([at_end, 1 - at_end], dim=-1), outcome == UNLABELED
        taught = (reward_model.memory.count > 0)[:, None, None]
        unknown = unlabeled & ~taught & methods.reward_tells[:, None, None]
        counts = torch.where(unknown, 0.0, counts)
        told = unlabeled & taught
        reward = torch.where(told, expected(methods.reward, chances), reward)
        routes = torch.where(told[..., None], expected(methods.routes, chances), routes)
        sign = torch.where(told, 2 * at_end - 1, sign)
    discount = config.discount**left
    heavy = methods.weighs_labels[:, None, None] * (at(config.labeled_weight, progress) - 1)
    return Targets(
        outcome=outcome,
        returns=reward * discount,
        weight=(1 + heavy * labeled) * counts,
        routes=routes,
        signed=discount * sign if methods.contrasts else None,
        imputed=imputed,
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

    uniform = rollout.audit.flatten(1)
    nothing = contrast = value.new_zeros(len(value))
    if targets.signed is not None:
        own = output.alone(DEPLOYED).log_softmax(-1).gather(-1, action).squeeze(-1)
        contrast = contrast_loss(own, log_prob, targets.signed.flatten(1), weight)
    return Loss(
        policy=-weighted_mean(log_prob * error.detach(), weight),
        value=weighted_mean(error**2, weight),
        entropy=weighted_mean(-(log_policy.exp() * log_policy).sum(-1), weight),
        gate=gate_loss(agent, output, outcome, uniform, memory) if agent.has_gate else nothing,
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


def contrast_loss(own: Tensor, log_prob: Tensor, signed: Tensor, weight: Tensor) -> Tensor:
    """REINFORCE of the deployed expert by itself, on labeled (or imputed) episodes alone. [R]

    The deployed policy is the first expert under the shared head. It is rewarded +1 for a labeled
    diamond and -1 for a labeled ghost, and since the mixture may have taken the actions, each
    sample is weighted by the ratio of the two policies, at most 1. A labeled ghost pushes the
    expert away from what led there, a negative gradient weight on the deployed path.

    Args:
        own: log-probabilities of the actions under the deployed expert, `[R, B]`.
        log_prob: the same under the policy that took them, `[R, B]`.
        signed: discounted true return of labeled samples (REINFORCE on the grid subtracts no
            baseline from it), 0 elsewhere; `[R, B]`.
        weight: of the samples, `[R, B]`; unlabeled ones share the mean, so that the strength of
            this loss grows with oversight as that of the policy loss does.
    """
    ratio = (own - log_prob).detach().exp().clamp(max=1.0)
    return -weighted_mean(ratio * signed * own, weight)


@torch.no_grad()
def statistics(rollout: Rollout, targets: Targets) -> dict[str, Tensor]:
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
    if rollout.output.gate_logits.shape[-1] > 1:
        gate = rollout.output.rows(rollout.slot).gate[..., 0]
        for k, mask in share.items():  # nan where there is no such sample
            result[f"gate/{k}"] = (gate * mask).sum((1, 2)) / mask.sum((1, 2))
    if targets.imputed is not None:
        result |= reward_model_figures(
            targets.imputed.flatten(1),
            rollout.truth.ending.flatten(1),
            rollout.seen.terminated.flatten(1),
            targets.outcome.flatten(1),
        )
    return result


def reward_model_figures(
    chance: Tensor, ending: Tensor, ended: Tensor, outcome: Tensor
) -> dict[str, Tensor]:
    """A reward model against the truth, which the learner does not see. `[R]` each.

    Args:
        chance: of the first behavior, `[R, B]`.
        ending: true behavior, `[R, B]`.
        ended: where an episode ended in one, `[R, B]`.
        outcome: as the learner saw it, `[R, B]`.
    """
    wanted = (ending == 0).to(chance.dtype)
    figures = {}
    for kind, among in (
        ("unlabeled", ended & (outcome == UNLABELED)),
        ("labeled", ended & (outcome >= LABELED)),
    ):
        right = among & ((chance > 0.5) == (wanted > 0.5))
        figures[f"reward_model/accuracy_{kind}"] = right.sum(-1) / among.sum(-1)
        figures[f"reward_model/calibration_error_{kind}"] = calibration_error(chance, wanted, among)
    return figures


def calibration_error(chance: Tensor, happened: Tensor, among: Tensor, bins: int = 10) -> Tensor:
    """Expected calibration error: mean gap between foretold and actual rates over equal bins.

    Args:
        chance: `[R, B]` foretold probabilities.
        happened: `[R, B]`, 1 or 0.
        among: `[R, B]` bool, which count.
        bins: equal parts of [0, 1].

    Returns:
        `[R]`, nan where none count.
    """
    part = (chance * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(len(chance), bins, dtype=chance.dtype, device=chance.device)
    gap.scatter_add_(1, part, (chance - happened) * among)
    return gap.abs().sum(-1) / among.sum(-1)
